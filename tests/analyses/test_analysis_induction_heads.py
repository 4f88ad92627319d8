"""The induction pair of the embedded models: where it is, how far from chance, and nothing of it in random weights."""

from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.analyses import induction_pair, passage_score
from mambascope.analyses.induction_heads import PASSAGES
from mambascope.errors import InputError


@pytest.fixture(scope="module")
def induction_2l() -> Any:
    return ms.load("induction-2l", device="cpu")


@pytest.mark.parametrize("reduce", ["mean_abs", "rms", "max"])
def test_induction_2l_reads_three_steps_after_the_special_token(induction_2l: Any, reduce: Any) -> None:
    """Its scan reads p + 3; through the convolution (K = 4) those are the tokens p … p + 3, the target p + 1 first."""
    scan = induction_pair(induction_2l, reduce=reduce)
    layer, offset, share = scan.best()
    assert (layer, offset) == (1, 3)
    assert share > 0.8
    assert scan.control[1, scan.offsets.index(3)] < 0.05
    assert scan.share[0].max() < 0.05  # the other layer has none
    conv = induction_pair(induction_2l, reduce=reduce, through="conv")
    assert conv.best()[:2] == (1, 1)
    window = conv.share[1, conv.offsets.index(0) : conv.offsets.index(4)]
    assert window.sum() > 0.8
    assert torch.all(window > conv.control[1].max())


def test_it_does_not_depend_on_length_or_seed(induction_2l: Any) -> None:
    for options in ({"length": 300}, {"seed": 7}, {"rows": 4, "length": 40}):
        assert induction_pair(induction_2l, **options).best()[:2] == (1, 3)


def test_random_weights_have_no_pair(induction_2l: Any) -> None:
    torch.manual_seed(0)
    fresh = ms.HookedMamba(induction_2l.cfg)
    for through in ("scan", "conv"):
        assert induction_pair(fresh, through=through).excess.abs().max() < 0.05


def test_lm_mini_looks_back_one_period_and_two_layers_differ() -> None:
    """Layer 7's scan reads t - N + 2 and layer 11's t - N + 1; through the convolution both are t - N + 1."""
    model = ms.load("lm-mini", device="cpu")
    score = passage_score(model, PASSAGES)
    assert score.second_loss < score.first_loss
    table = score.table().set_index("layer")
    for layer, offset in ((7, 2), (11, 1)):
        assert table.loc[layer, "best offset"] == offset
        assert table.loc[layer, "best"] > 5 * table.loc[layer, "noise"]
    assert sorted(table["best"].nlargest(2).index) == [7, 11]
    conv = passage_score(model, PASSAGES, through="conv").table().set_index("layer")
    assert list(conv.loc[[7, 11], "best offset"]) == [1, 1]
    torch.manual_seed(0)
    fresh = ms.HookedMamba(model.cfg, model.tokenizer)
    random = passage_score(fresh, PASSAGES).table()
    assert float(random["best"].max()) < float(table["best"].nlargest(2).min()) / 2


def test_tables_figures_and_bad_input(induction_2l: Any, speaking: Any) -> None:
    found = induction_pair(induction_2l, rows=2, window=3)
    assert list(found.table().columns) == ["offset", "layer 0", "control 0", "layer 1", "control 1"]
    assert len(found.figure().data) == 2
    with pytest.raises(InputError, match="rows must be an integer ≥ 2"):
        induction_pair(induction_2l, rows=1)
    with pytest.raises(InputError, match="at least two texts"):
        passage_score(speaking, "one text")
    with pytest.raises(InputError, match="fewer than two tokens"):
        passage_score(speaking, ["a", "some words"])
    assert passage_score(speaking, ["some words", "other words"]).profile.shape[0] == speaking.cfg.n_layers

"""What siblings are compared by: measured on an embedded model's folder, kept in its card, laid side by side."""

import lzma
import math
import shutil

import pytest
import torch

from mambascope import zoo
from mambascope.errors import InputError, LoadError
from mambascope.loading import load
from mambascope.training.command import main
from mambascope.training.measure import compare, evaluate_context, evaluate_copying, evaluate_generation
from mambascope.training.metrics import in_context_score
from mambascope.zoo.card import read_card


def quiet(_: str) -> None:
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    shutil.copytree(zoo.model_folder("lm-mini"), home / "lm-mini")
    return home / "lm-mini"


def test_copying_is_measured_against_the_first_copy(folder):
    values = evaluate_copying(folder, (8, 16), rows=2, device="cpu", report=quiet)
    rows = read_card(folder)["evaluations"]["Copying of random tokens"]["rows"]
    assert rows == values["rows"]
    assert [row["N"] for row in rows] == [8, 16]
    for row in rows:
        assert row["first_copy_nats"] > math.log(8192)  # a language model is worse than a guess there
        assert row["second_over_first"] == pytest.approx(row["second_copy_nats"] / row["first_copy_nats"])


def test_context_score_is_the_one_that_training_watches(folder, tmp_path):
    (tmp_path / "wikitext-2").mkdir()
    text = " ".join(f"In {year} the river rose and the town of Ely was flooded." for year in range(1700, 1800))
    (tmp_path / "wikitext-2" / "valid.txt.xz").write_bytes(lzma.compress(text.encode()))
    values = evaluate_context(folder, [tmp_path], windows=2, device="cpu", report=quiet)
    model = load(folder, device="cpu")
    ids = model.tokenizer.backend.encode(text).ids
    rows = torch.tensor([ids[:513], ids[512:1025]])
    assert values["windows"] == 2
    assert values["in_context_score_nats"] == pytest.approx(in_context_score(model, rows), abs=1e-4)
    with pytest.raises(LoadError):
        evaluate_context(folder, [tmp_path / "wikitext-2"], device="cpu", report=quiet)
    (tmp_path / "wikitext-2" / "valid.txt.xz").write_bytes(lzma.compress(b"short"))
    with pytest.raises(InputError, match="fewer than one window of 512"):
        evaluate_context(folder, [tmp_path], device="cpu", report=quiet)


def test_the_state_of_a_mamba_does_not_grow(folder):
    values = evaluate_generation(folder, (4, 40), repeats=1, device="cpu", report=quiet)
    first, second = values["rows"]
    assert first["state_bytes"] == second["state_bytes"] == load(folder).initial_state(1).nbytes
    assert first["ms_a_token"] > 0


def test_cards_side_by_side(folder, tmp_path, capsys):
    table = compare([folder, zoo.model_folder("induction-2l")])
    assert list(table.columns) == ["lm-mini", "induction-2l"]
    assert table.loc["parameters", "lm-mini"] == 7_791_616
    assert table.loc["WikiText-2 validation, bits per byte", "lm-mini"] == pytest.approx(1.329, abs=1e-3)
    assert table.loc["Induction heads, errors at 4,096 of 1,000", "induction-2l"] == 0
    assert main(["compare", str(folder), "induction-2l", "--csv", str(tmp_path / "t.csv")]) == 0
    assert "WikiText-2 validation, bits per byte" in capsys.readouterr().out
    assert (tmp_path / "t.csv").read_text().startswith("what,lm-mini,induction-2l")
    assert main(["compare", str(tmp_path)]) == 1
    assert "cannot read the model card" in capsys.readouterr().err

"""Rivals of one size, recipes that differ in nothing else, and a floor that counts attention."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from mambascope import zoo
from mambascope.config import MIXERS, MambaConfig
from mambascope.errors import ConfigError, LoadError
from mambascope.loading.names import count_parameters, parameter_shapes
from mambascope.model import HookedMamba
from mambascope.training import train_recipe
from mambascope.training.floor import measure_floor
from mambascope.training.match import match
from mambascope.training.recipe import Recipe, load_recipe

SMALL = MambaConfig(d_model=32, n_layers=4, d_vocab=50)


@pytest.mark.parametrize("letter", MIXERS)
def test_counted_parameters_are_those_of_the_model(letter: str) -> None:
    cfg = SMALL.with_pattern(f"m{letter}", **({"window": 5} if letter == "w" else {}))
    model = HookedMamba(cfg)
    assert parameter_shapes(cfg) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert count_parameters(cfg) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("pattern", "options"), [("af", {}), ("ma", {}), ("mmam", {}), ("l", {}), ("aaf", {"n_layers": 6}), ("s", {})]
)
def test_the_width_that_matches_is_the_nearest_there_is(pattern: str, options: dict[str, int]) -> None:
    found = match(SMALL, pattern, **options)
    size, want = getattr(found.config, found.free), count_parameters(SMALL)
    near = [count_parameters(dataclasses.replace(found.config, **{found.free: size + d})) for d in (-1, 0, 1)]
    assert abs(found.difference) == abs(near[1] / want - 1) < 0.011
    assert near[0] < near[1] < near[2]
    shown = str(found)
    assert f"{want:,}" in shown and f"{near[1]:,}" in shown and f"{found.free} = {size:,}" in shown


def test_layers_can_be_chosen_in_whole_repetitions_and_what_cannot_match_says_so() -> None:
    found = match(MambaConfig(d_model=32, n_layers=12, d_vocab=50), "af", "n_layers", d_ff=64)
    assert found.config.n_layers % 2 == 0 and abs(found.difference) < 0.05
    with pytest.raises(ConfigError, match="more than the .* to match; give fewer layers"):
        match(SMALL, "af", n_layers=40)
    with pytest.raises(ConfigError, match="d_inner changes no parameter of pattern 'af'"):
        match(SMALL, "af", "d_inner")
    with pytest.raises(ConfigError, match="d_ff is to be chosen"):
        match(SMALL, "af", d_ff=3)
    with pytest.raises(ConfigError, match="free='width'"):
        match(SMALL, "af", "width")


@pytest.mark.parametrize(
    ("rival", "like"),
    [
        ("lm-mini-transformer", "lm-mini-v2"),
        ("lm-mini-hybrid", "lm-mini-v2"),
        ("induction-2l-attention", "induction-2l"),
    ],
)
def test_siblings_differ_in_their_layers_alone_and_are_of_one_size(rival: str, like: str) -> None:
    mine, theirs = (load_recipe(zoo.recipe_path(name)) for name in (rival, like))
    same = ("licence", "seed", "train", "text", "task", "store")
    assert all(getattr(mine, field) == getattr(theirs, field) for field in same)
    assert mine.model.pattern and not theirs.model.pattern
    assert abs(count_parameters(mine.model) / count_parameters(theirs.model) - 1) < 0.005
    assert Recipe.from_dict(mine.to_dict()) == mine
    assert "pattern" not in theirs.to_dict()["model"]


def test_a_recipe_like_another_takes_over_the_rest_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(zoo.recipe_path("induction-2l").read_text())
    (tmp_path / "mine.toml").write_text('like = "base"\nname = "mine"\n[train]\nsteps = 512\n')
    base, mine = (load_recipe(tmp_path / f"{name}.toml") for name in ("base", "mine"))
    assert (mine.name, mine.train.steps, mine.train.lr, mine.task) == ("mine", 512, base.train.lr, base.task)
    (tmp_path / "lost.toml").write_text('like = "nobody"\nname = "lost"\n')
    with pytest.raises(LoadError, match="nobody.toml"):
        load_recipe(tmp_path / "lost.toml")


def test_the_floor_counts_attention() -> None:
    plain, hybrid = (measure_floor(HookedMamba(SMALL.with_pattern(p)), 2, 64) for p in ("m", "ma"))
    assert plain.cores == 0 and hybrid.cores > 0 and hybrid.scans < plain.scans
    assert hybrid.seconds == hybrid.products + hybrid.scans + hybrid.cores
    assert "other mixers" in str(hybrid) and "other mixers" not in str(plain)


def test_a_hybrid_trains_resumes_and_loads_as_what_it_is(tmp_path: Path) -> None:
    import mambascope as ms
    from mambascope.training.export import export_model

    values = load_recipe(zoo.recipe_path("induction-2l")).to_dict()
    values["model"] |= {"d_model": 16, "n_layers": 3, "pattern": "maf", "n_heads": 2}
    for field in ("d_inner", "dt_rank"):
        del values["model"][field]
    values["train"] |= {
        "steps": 8,
        "batch": 4,
        "length": 16,
        "log_every": 4,
        "checkpoint_every": 4,
        "evaluate_every": 8,
    }
    values["task"] |= {"evaluate_lengths": [16], "evaluate_sequences": 4}
    recipe = Recipe.from_dict(values)
    model, result = train_recipe(recipe, tmp_path / "run", report=lambda _: None)
    assert result.finished and math.isfinite(result.evaluations[-1]["loss_16"])
    folder = export_model(tmp_path / "run", tmp_path / "model")
    loaded = ms.load(str(folder))
    ids = torch.randint(0, 16, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    assert loaded.cfg.pattern == "maf" and loaded.cfg.layers == "maf"

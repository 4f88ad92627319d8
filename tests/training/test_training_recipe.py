"""Recipes: what ships parses; wrong keys and values are named."""

import copy
import tomllib

import pytest

from mambascope import zoo
from mambascope.errors import ConfigError, InputError, LoadError, UnknownNameError
from mambascope.loading.names import count_parameters
from mambascope.training.recipe import Recipe, load_recipe, same_recipe


@pytest.fixture
def values():
    return tomllib.loads(zoo.recipe_path("lm-mini").read_text())


def test_shipped_recipes():
    mini, induction = (load_recipe(zoo.recipe_path(name)) for name in ("lm-mini", "induction-2l"))
    size = 2 * count_parameters(mini.model) + 2 * mini.model.n_layers * mini.model.d_inner * (mini.model.d_state + 1)
    assert size < 15.5 * 2**20, "A_log and D stay float32; the tokenizer needs room too"
    assert mini.text is not None
    assert mini.text.sources[0].share == (0.05, 0.20)
    for end in (0, 1):
        assert sum(source.share[end] for source in mini.text.sources) == pytest.approx(1)
    assert (induction.train.optimizer, induction.train.batch, induction.train.length) == ("adam", 64, 256)
    assert induction.train.weight_decay == 0
    assert induction.train.lr == 1e-3
    assert induction.model.d_vocab == 16
    assert Recipe.from_dict(mini.to_dict()) == mini


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("train", "learning_rate", 1.0, r"\[train\]: unknown key 'learning_rate'.*; known: .*lr"),
        ("train", "batches", 3, r"unknown key 'batches', did you mean 'batch'"),
        ("train", "steps", "many", r"\[train\]: steps must be int, got 'many'"),
        ("train", "optimizer", "sgd", r"optimizer must be one of 'adam', 'adamw', got 'sgd'"),
        ("train", "betas", [0.9], r"betas must have 2 entries"),
        ("train", "schedule", "constant", r"lr_floor belongs to schedule = 'cosine'"),
        ("train", "warmup", 10_000, r"warmup = 10000 leaves nothing of train.steps"),
        ("train", "checkpoint_every", 30, r"checkpoint_every = 30 must be a multiple of log_every = 20"),
        ("model", "layers", 3, r"\[model\]: config has an unknown field 'layers'"),
        ("text", "vocabulary", 300, r"text.vocabulary = 300 but model.d_vocab = 8192"),
        ("text", "held_out", 0.9, r"held_out must be in 0"),
    ],
)
def test_wrong_keys_and_values_are_named(values, section, key, value, message):
    values[section][key] = value
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(values)


def test_contradictions_and_missing_parts(values):
    both = copy.deepcopy(values) | {"task": {"name": "induction"}}
    with pytest.raises(ConfigError, match=r"exactly one of \[text\] and \[task\]"):
        Recipe.from_dict(both)
    del values["train"]["steps"]
    with pytest.raises(ConfigError, match=r"\[train\] lacks steps"):
        Recipe.from_dict(values)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(LoadError, match="cannot read recipe"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(LoadError, match="not a TOML file"):
        load_recipe(tmp_path / "bad.toml")
    with pytest.raises(UnknownNameError, match="no recipe 'lm-mimi', did you mean 'lm-mini'"):
        zoo.recipe_path("lm-mimi")


def test_a_resume_with_another_recipe_shows_the_difference(values):
    old, new = (Recipe.from_dict(copy.deepcopy(values)).to_dict() for _ in range(2))
    new["train"]["log_every"] = 100
    same_recipe(old, new)  # no weight depends on it
    new["train"]["lr"] = 1.0
    new["text"]["sources"][1]["share"] = [0.5, 0.5]
    with pytest.raises(InputError, match=r"text.sources.1.share: .*; train.lr: 0.003 before, 1.0 now"):
        same_recipe(old, new)

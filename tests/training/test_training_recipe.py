"""Recipes: what ships parses; wrong keys and values are named."""

import copy
import tomllib

import pytest
import torch

from mambascope import zoo
from mambascope.analyses.tasks import make_task
from mambascope.errors import ConfigError, InputError, LoadError, UnknownNameError
from mambascope.loading.names import count_parameters
from mambascope.training.recipe import Recipe, TrainSettings, load_recipe, same_recipe
from mambascope.training.sampler import Batch
from mambascope.training.task_batches import TaskBatches, last_only


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
        ("text", "repeats", 1.0, r"share of the rows, 0 ≤ repeats < 1, got 1.0"),
        ("text", "repeats_longest", [16, 64], r"repeats_longest is given, but text.repeats is 0"),
        ("text", "repeats_longest", 64, r"repeats_longest must be a list"),
    ],
)
def test_wrong_keys_and_values_are_named(values, section, key, value, message):
    values[section][key] = value
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(values)


def test_blocks_read_twice_have_a_shortest_length(values):
    values["text"] |= {"repeats": 0.1, "repeats_longest": [4, 64]}
    with pytest.raises(ConfigError, match=r"repeats_longest must be at least 8, got \(4, 64\)"):
        Recipe.from_dict(values)


def test_contradictions_and_missing_parts(values):
    both = copy.deepcopy(values) | {"task": {"name": "induction"}}
    with pytest.raises(ConfigError, match=r"exactly one of \[text\] and \[task\]"):
        Recipe.from_dict(both)
    del values["train"]["steps"]
    with pytest.raises(ConfigError, match=r"\[train\] lacks steps"):
        Recipe.from_dict(values)


@pytest.fixture
def task_values():
    values = tomllib.loads(zoo.recipe_path("induction-2l").read_text())
    values["task"] = {"name": "recall", "evaluate_lengths": [64, 128], "options": {"pairs": 4, "vocabulary": 16}}
    return values


def test_a_recipe_names_any_task_and_its_options(task_values):
    recipe = Recipe.from_dict(task_values)
    assert recipe.task is not None
    assert recipe.task.make() == make_task("recall", pairs=4, vocabulary=16)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("task", "name", "recal", r"there is no task 'recal', did you mean 'recall'"),
        ("task", "options", {"pair": 4}, r"\[task.options\]: unknown key 'pair', did you mean 'pairs'"),
        ("task", "options", {"pairs": "4"}, r"\[task.options\]: pairs must be int, got '4'"),
        ("task", "options", {"pairs": 9, "vocabulary": 16}, r"9 pairs need as many keys"),
        ("task", "options", 3, r"options must be a table, got 3"),
        ("task", "options", {"vocabulary": 64}, r"task 'recall' uses 64 token ids; the model knows only 16"),
        ("task", "evaluate_lengths", [8], r"task 'recall' at length 8: 4 pairs and their queries need a length ≥ 16"),
        ("task", "evaluate_sequences", 0, r"evaluate_sequences must be at least 1"),
        ("train", "length", 8, r"'recall' at length 8"),
        ("train", "loss", "last", r"train.loss = 'last', but not every row asks for its last position"),
        ("train", "loss", "first", r"loss must be one of 'asked', 'all', 'last'"),
    ],
)
def test_tasks_that_do_not_fit_are_named(task_values, section, key, value, message):
    task_values[section][key] = value
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(task_values)


def test_which_tokens_the_loss_is_taken_over(task_values):
    task = make_task("recall", pairs=4, vocabulary=16)
    batches = {}
    for loss in ("asked", "all"):
        task_values["train"]["loss"] = loss
        recipe = Recipe.from_dict(task_values)
        batches[loss] = TaskBatches(task, recipe.train, recipe.seed)(70)
    asked, every = batches["asked"], batches["all"]
    assert torch.equal(asked.tokens, every.tokens)
    assert asked.targets.shape == (64, 256 - 8)
    assert ((asked.targets != -100).sum(1) == 4).all()
    assert (every.targets[:, :-1] != -100).all()
    scored = asked.targets != -100
    assert torch.equal(every.targets[:, 8:][scored], asked.targets[scored])
    assert torch.equal(every.targets[:, :7], asked.tokens[:, 1:8])
    one = last_only(lambda step: Batch(asked.tokens, every.targets))(0)
    assert torch.equal(one.targets, every.targets[:, -1:])


def test_task_batches_are_a_function_of_the_step():
    task, settings = make_task("parity"), TrainSettings(steps=200, batch=3, length=9, lr=1.0)
    straight = TaskBatches(task, settings, 5)
    rows = [straight(step).tokens for step in range(70)]
    other = TaskBatches(task, settings, 5)
    for step in (69, 3, 64, 0):
        assert torch.equal(other(step).tokens, rows[step])
    assert len({tuple(row.flatten().tolist()) for row in rows}) > 65
    assert not torch.equal(TaskBatches(task, settings, 6)(0).tokens, rows[0])


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

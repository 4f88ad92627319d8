"""Quick forms of the task tables: seconds each, the direction asserted with a margin that seeds keep.

The full forms are the package's sweeps (``python -m mambascope.zoo sweep NAME``).
"""

import pytest
import torch

from mambascope.analyses.tasks import Score, evaluate
from mambascope.training.build import train_recipe
from mambascope.training.recipe import Recipe
from mambascope.training.sweep import load_sweep


@pytest.fixture
def trained(tmp_path):
    """A function (sweep, model, train, task options) -> score of a short training of that sweep's recipe."""

    def train(sweep: str, model: dict, train: dict, options: dict | None = None, name: str | None = None) -> Score:
        values = load_sweep(sweep).runs[0].recipe.to_dict()
        values["model"] = {"d_vocab": values["model"]["d_vocab"], "n_layers": 1, **model}
        quick = {"cuda_graph": False, "warmup": 20, "log_every": 50, "checkpoint_every": 10**6, "evaluate_every": 10**6}
        values["train"] |= quick | train
        values["task"] |= {"evaluate_lengths": [], "evaluate_sequences": 1}
        values["task"]["options"] |= options or {}
        values["task"]["name"] = name or values["task"]["name"]
        recipe = Recipe.from_dict(values)
        assert recipe.task is not None
        where = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        made, _ = train_recipe(recipe, where, report=lambda _: None)
        return evaluate(recipe.task.make(), made, recipe.train.length, 300, trained_length=recipe.train.length)

    return train


@pytest.mark.parametrize("order", [1, 2])
def test_a_layer_learns_order_k_only_if_its_conv_spans_k_plus_one(trained, order: int) -> None:
    gaps = []
    for width in (order, order + 1):
        score = trained(
            "markov-width",
            {"d_model": 16, "d_state": 8, "d_conv": width},
            {"steps": 400, "batch": 16, "length": 96, "lr": 1e-2},
            {"order": order},
        )
        gaps.append(score.loss - score.best_loss)
    assert gaps[0] > 0.03
    assert 0 < gaps[1] < 0.025


def test_recall_is_a_step_from_conv_width_one_to_two(trained) -> None:
    accuracy = [
        trained(
            "recall-width",
            {"d_vocab": 17, "d_model": 32, "d_conv": width, "initializer_range": 0.5},
            {"steps": 500, "batch": 64, "length": 16, "lr": 1e-2},
            {"vocabulary": 17, "pairs": 4, "power": 1.0},
        ).accuracy
        for width in (1, 2)
    ]
    assert accuracy[0] < 0.6
    assert accuracy[1] > 0.9


def test_parity_holds_for_a_few_bits_and_is_lost_after_many(trained) -> None:
    score = trained(
        "state-tracking",
        {"d_vocab": 2, "d_model": 32, "d_state": 8},
        {"steps": 400, "batch": 32, "length": 64, "lr": 3e-3},
        name="parity",
    )
    by_position = score.accuracy_at()
    assert float(by_position[:2].min()) > 0.95
    assert 0.4 < float(by_position[-16:].mean()) < 0.6
    assert torch.isfinite(by_position).all()

"""Quick forms of the task tables: seconds each, the direction asserted with a margin that seeds keep.

The full forms are the package's sweeps (``python -m mambascope.zoo sweep NAME``).
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mambascope.analyses.tasks import evaluate
from mambascope.training.build import train_recipe
from mambascope.training.recipe import Recipe
from mambascope.training.sweep import load_sweep


@pytest.fixture
def trained(tmp_path):
    """A function (sweep, model, train, task options) -> scores at ``lengths`` (the trained one) of a short training of
    that sweep's recipe; one score where no lengths are given."""

    def train(
        sweep: str,
        model: dict,
        train: dict,
        options: dict | None = None,
        name: str | None = None,
        lengths: Sequence[int] = (),
    ) -> Any:
        values = load_sweep(sweep).runs[0].recipe.to_dict()
        values["model"] = {"d_vocab": values["model"]["d_vocab"], "n_layers": 1, **model}
        quick = {"cuda_graph": False, "warmup": 20, "log_every": 50, "checkpoint_every": 10**6, "evaluate_every": 10**6}
        values["train"] |= quick | train
        values["task"] |= {"evaluate_lengths": [], "evaluate_sequences": 1}
        if name is not None:  # another task than the sweep's first, with options of its own
            values["task"] |= {"name": name, "options": {}}
        values["task"]["options"] |= options or {}
        recipe = Recipe.from_dict(values)
        assert recipe.task is not None
        where = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        made, _ = train_recipe(recipe, where, report=lambda _: None)
        task, trained = recipe.task.make(), recipe.train.length
        scores = [evaluate(task, made, n, 300, trained_length=trained) for n in lengths or (trained,)]
        return scores if lengths else scores[0]

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


def test_selection_learns_to_copy_out_of_noise_before_a_time_invariant_model_does(trained) -> None:
    """S4D in Mamba's block differs by selection alone. Seeds 1 to 3: Mamba 0.975 to 0.998, S4D 0.585 to 0.627. So short
    a context S4D learns later (0.967 after 1,500 steps, seed 1): this shows who learns it first, not who could."""
    mamba, s4d = (
        trained(
            "selective-copying",
            {"d_vocab": 8, "d_model": 32, "n_layers": 2, "pattern": pattern, "initializer_range": 0.5},
            {"steps": 300, "batch": 24, "length": 68, "lr": 1.5e-2},
            {"vocabulary": 8, "memorize": 2},
        ).accuracy
        for pattern in "ms"
    )
    assert mamba > 0.9
    assert s4d < 0.78


def test_one_lstm_layer_holds_parity_where_mamba_and_attention_of_fixed_depth_fall(trained) -> None:
    """Trained at 32 bits, read at 8, 32, 128. Seeds 1 and 2: LSTM 1.000 at all, Mamba 0.58, attention 0.53 at 32."""
    for pattern, lr, options in (("l", 5e-3, {}), ("m", 3e-3, {}), ("a", 3e-3, {"n_heads": 2})):
        scores = trained(
            "state-tracking",
            {"d_vocab": 2, "d_model": 32, "d_state": 8, "pattern": pattern, **options},
            {"steps": 400, "batch": 32, "length": 32, "lr": lr},
            name="parity",
            lengths=(8, 32, 128),
        )
        accuracy = [score.accuracy for score in scores]
        if pattern == "l":
            assert min(accuracy) > 0.98
        else:
            assert accuracy[1] < 0.75 and accuracy[2] < 0.6, pattern
        assert [score.beyond_training for score in scores] == [False, False, True]


def test_one_lstm_layer_follows_words_of_s5_where_mamba_and_attention_of_fixed_depth_cannot(trained) -> None:
    """Trained at 32, read at 32 and 64. Seeds 1 to 3: LSTM 0.974 to 0.983 and 0.85 to 0.89; Mamba 0.16 and 0.08;
    attention with feed-forward 0.10 to 0.12 and 0.06."""
    attention = {"n_layers": 2, "n_heads": 2}
    for pattern, lr, options in (("l", 1e-2, {"d_model": 48}), ("m", 5e-3, {}), ("af", 3e-3, attention)):
        scores = trained(
            "state-tracking",
            {"d_vocab": 120, "d_model": 32, "d_state": 8, "pattern": pattern, **options},
            {"steps": 400, "batch": 32, "length": 32, "lr": lr},
            lengths=(32, 64),
        )
        accuracy = [score.accuracy for score in scores]
        if pattern == "l":
            assert accuracy[0] > 0.9 and accuracy[1] > 0.7
        else:
            assert accuracy[0] < 0.25 and accuracy[1] < 0.15, pattern


def test_mamba_finds_what_followed_the_token_at_lengths_where_attention_trained_the_same_does_not(trained) -> None:
    """Trained at 32 until both have no errors there, read at 256. Seeds 1 and 2: Mamba 1.000, attention 0.11 and 0.15,
    where 1 in 7 is chance."""
    attention = {"n_layers": 4, "n_heads": 4, "d_ff": 64}
    for pattern, steps, lr, options in (("m", 400, 1e-2, {"n_layers": 2}), ("af", 800, 3e-3, attention)):
        near, far = trained(
            "induction-rivals",
            {"d_vocab": 8, "d_model": 32, "d_state": 8, "initializer_range": 0.5, "pattern": pattern, **options},
            {"steps": steps, "batch": 32, "length": 32, "lr": lr},
            {"vocabulary": 8},
            lengths=(32, 256),
        )
        assert near.accuracy > 0.9, pattern
        assert far.accuracy > 0.9 if pattern == "m" else far.accuracy < 0.4, pattern

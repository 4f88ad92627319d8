"""The induction task: its distribution, and an evaluation that tells a solver from a guesser."""

import numpy as np
import pytest
import torch

from mambascope.analyses.tasks import induction
from mambascope.errors import InputError


def solver(tokens, return_type, logits_to_keep):
    """Look up what followed the special token: the task's answer by construction."""
    position = (tokens == 15).int().argmax(1)
    answer = tokens[torch.arange(len(tokens)), position + 1]
    return torch.nn.functional.one_hot(answer, 16).float()[:, None] * 50


def guesser(tokens, return_type, logits_to_keep):
    return torch.zeros(len(tokens), 1, 16).index_fill_(2, torch.tensor(3), 1.0)


def test_sequences_have_one_special_token_before_the_last():
    tokens, answers = induction.sequences(4000, 12, seed=5)
    assert tokens.shape == (4000, 12)
    assert answers.shape == (4000,)
    assert tokens.dtype == torch.int64
    special = tokens == induction.special_token(16)
    assert special[:, -1].all()
    assert (special[:, :-1].sum(1) == 1).all()
    position = special[:, :-1].int().argmax(1)
    assert torch.equal(tokens[torch.arange(4000), position + 1], answers)
    assert set(position.tolist()) == set(range(10)), "every place, but never right before the end"
    counts = np.bincount(answers.numpy(), minlength=16)
    assert counts[15] == 0
    assert abs(counts[:15] - 4000 / 15).max() < 6 * (4000 / 15) ** 0.5
    assert abs(np.bincount(position.numpy()) - 400).max() < 6 * 20


def test_seeds():
    again = [induction.sequences(5, 9, seed=7)[0] for _ in range(2)]
    assert torch.equal(*again)
    assert not torch.equal(again[0], induction.sequences(5, 9, seed=8)[0])


def test_the_shortest_sequence():
    tokens, answers = induction.sequences(50, 3)
    assert (tokens[:, 0] == 15).all()
    assert torch.equal(tokens[:, 1], answers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"length": 2}, "at least 3"), ({"vocabulary": 2}, "vocabulary of at least 3"), ({"count": 0}, "count")],
)
def test_impossible_tasks(changes, message):
    with pytest.raises(InputError, match=message):
        induction.sequences(**({"count": 1, "length": 8} | changes))


def test_evaluation_tells_a_solver_from_a_guesser():
    solved = induction.evaluate(solver, 64, 1000, tokens_at_once=1000)
    assert (solved.errors, solved.sequences, solved.accuracy) == (0, 1000, 1.0)
    assert solved.loss < 1e-6
    guessed = induction.evaluate(guesser, 64, 1000)
    low, high = guessed.interval
    assert low < induction.chance_accuracy(16) < high
    assert high - low < 0.05
    assert guessed.loss == pytest.approx(np.log(15), rel=0.1)


def test_the_interval_by_hand():
    low, high = induction.InductionResult(64, 1000, 0, 0.0).interval
    assert high == 1.0
    assert low == pytest.approx(1000 / (1000 + 1.959964**2), rel=1e-9)

"""Induction and capacity: exact on a model built to recall, at chance on random ones."""

import math

import pytest
import torch
from hand_built import random_model, recall_model

from mambascope.analyses import copy_capacity, induction_score, repeated_tokens
from mambascope.analyses.induction import lag_profile
from mambascope.analyses.repeats import scores
from mambascope.errors import InputError


def test_repeats_are_repeats(recall, speaking) -> None:
    tokens = repeated_tokens(recall, 9, 4, seed=2)
    assert tokens.shape == (4, 18)
    assert torch.equal(tokens[:, :9], tokens[:, 9:])
    assert all(len(set(row.tolist())) == 9 for row in tokens)  # distinct, so that the answer is determined
    assert torch.equal(tokens, repeated_tokens(recall, 9, 4, seed=2))
    control = repeated_tokens(recall, 9, 4, seed=2, repeat=False)
    assert torch.equal(control[:, :9], tokens[:, :9])
    assert not torch.equal(control[:, 9:], tokens[:, 9:])
    assert not (repeated_tokens(speaking, 200, 2) == 0).any()  # no end-of-text among them
    bos = random_model(bos_token_id=7, prepend_bos=True)
    assert repeated_tokens(bos, 3, 2)[:, 0].tolist() == [7, 7]
    assert repeated_tokens(bos, 3, 2).shape == (2, 7)
    assert set(repeated_tokens(recall, 5, 3, pool=torch.tensor([1, 2])).flatten().tolist()) == {1, 2}


def test_scores_are_the_model_s(random) -> None:
    tokens = repeated_tokens(random, 12, 5)
    found = scores(random, tokens, tokens_at_once=50)
    with torch.no_grad():
        loss = random(tokens, return_type="loss", loss_per_token=True)
        right = random(tokens)[:, :-1].argmax(-1) == tokens[:, 1:]
    assert torch.allclose(found.loss, loss, atol=1e-5)
    assert torch.equal(found.correct, right)


@pytest.mark.parametrize("back", [1, 2])
def test_the_offset_is_measured_not_assumed(back: int) -> None:
    model = recall_model(back=back)
    found = induction_score(model, 10, rows=6)
    assert [offset for offset, _ in found.best()] == [back]
    assert float(found.at_offset(back)[0]) > 0.6
    assert float(found.at_offset(3 - back)[0]) < 0.05
    assert found.profile.shape == (1, 20)
    assert float(found.prefix_matching[0]) == float(found.at_offset(1)[0])


def test_the_recall_model_recalls() -> None:
    found = induction_score(recall_model(), 10, rows=6)
    assert found.second_loss < 0.01
    assert found.first_loss > 0.9 * math.log(20)
    assert found.table()["best offset"].tolist() == [1]


def test_random_weights_show_no_induction() -> None:
    for seed in range(3):
        model = random_model(seed=seed, d_vocab=200)
        found = induction_score(model, 24, rows=6, seed=seed)
        assert abs(found.second_loss - found.first_loss) < 0.05
        for offset in (-1, 0, 1, 2):
            assert float(found.at_offset(offset).abs().max()) < 0.02
    assert float(induction_score(recall_model(), 10, rows=2).at_offset(1).max()) > 0.6  # the bar above can be passed


def test_a_profile_by_hand() -> None:
    weights = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [2, 1, 1, 0], [4, 0, 0, -4]])
    found = lag_profile(weights, 2)  # queries 2 and 3
    assert found.tolist() == pytest.approx([(0.25 - 0.5) / 2, 0.125, 0.25, 0.5])


def test_a_model_with_room_has_no_knee_and_one_without_has() -> None:
    lengths = (2, 4, 6, 8, 12, 16)
    roomy = copy_capacity(recall_model(), lengths, rows=6)
    assert roomy.accuracy.min() == 1
    assert roomy.knee == math.inf
    knees = [copy_capacity(recall_model(32, slots=slots), lengths, rows=12).knee for slots in (6, 12)]
    assert knees[0] is not None
    assert knees[1] is not None
    assert 2 < knees[0] < knees[1]


def test_random_weights_copy_nothing(random) -> None:
    found = copy_capacity(random, (4, 8, 16), rows=8)
    assert found.knee is None
    assert not found.recalls
    assert float(found.accuracy.max()) < 0.15
    assert float(found.gain.abs().max()) < 0.2
    assert found.chance == 1 / 40
    assert found.table()["N"].tolist() == [4, 8, 16]


def test_bad_input(random) -> None:
    with pytest.raises(InputError, match="n must be an integer ≥ 2, got 1"):
        induction_score(random, 1)
    with pytest.raises(InputError, match="rows must be an integer ≥ 1, got 0"):
        induction_score(random, 4, rows=0)
    with pytest.raises(InputError, match="rising sequence of integers"):
        copy_capacity(random, (8, 4))
    with pytest.raises(InputError, match="at least two ids of the vocabulary of 40"):
        copy_capacity(random, (2, 3), pool=torch.tensor([5]))
    with pytest.raises(InputError, match="offset -40 is lag 44"):
        induction_score(random, 4, rows=1).at_offset(-40)

"""Losses, guesses and the logit lens against the model's own logits."""

import math

import pytest
import torch
from hand_built import byte_tokenizer, random_model
from torch import Tensor

from mambascope.analyses import logit_lens, predictions
from mambascope.errors import InputError


def test_predictions_are_the_model_s(random, ids: Tensor) -> None:
    found = predictions(random, ids, top=3)
    with torch.no_grad():
        logits = random(ids)[0]
        loss = random(ids, return_type="loss", loss_per_token=True)[0]
    assert math.isnan(found.loss[0])
    assert torch.allclose(found.loss[1:], loss, atol=1e-5)
    p = logits.softmax(-1)
    assert torch.equal(found.next.top, p.topk(3).indices)
    assert torch.allclose(found.next.p, p.topk(3).values, atol=1e-6)
    assert torch.allclose(found.next.entropy, -(p * p.log()).sum(-1), atol=1e-5)
    ranks = (logits[:-1] > logits[:-1].gather(1, ids[0, 1:, None])).sum(1)
    assert torch.equal(found.next.rank[:-1], ranks)
    assert int(found.next.rank[-1]) == -1
    assert found.mean_loss == pytest.approx(float(loss.mean()), abs=1e-5)


def test_chunks_change_nothing(random, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = logit_lens(random, ids)
    monkeypatch.setattr("mambascope.analyses.logits._CHUNK", 7 * 40)
    pieces = logit_lens(random, ids)
    assert torch.equal(whole.top, pieces.top)
    assert torch.allclose(whole.logp, pieces.logp, atol=1e-6, equal_nan=True)


def test_the_last_row_of_the_lens_is_the_model(random, ids: Tensor) -> None:
    lens, own = logit_lens(random, ids), predictions(random, ids, top=1)
    assert lens.rows == ["embed", "0", "1", "2"]
    assert torch.equal(lens.top[-1], own.next.top[:, 0])
    assert torch.allclose(lens.logp[-1, :-1], -own.loss[1:], atol=1e-5)
    _, cache = random.run_with_cache(ids)
    with torch.no_grad():
        middle = (random.ln_final(cache["resid_post", 0]) @ random.W_U)[0]
    assert torch.equal(lens.top[1], middle.argmax(-1))


def test_an_edit_of_the_final_norm_is_seen(random, ids: Tensor) -> None:
    with random.hooks(fwd_hooks=[("ln_final.hook_normalized", lambda value, hook: value * 0)]):
        _, cache = random.run_with_cache(ids)
    assert torch.allclose(predictions(random, cache).loss[1:], torch.tensor(math.log(40)), atol=1e-5)


def test_an_untrained_lens_is_at_chance() -> None:
    model = random_model(d_model=64, seed=4)
    ids = torch.randint(0, 40, (1, 400), generator=torch.Generator().manual_seed(0))
    lens = logit_lens(model, ids)
    hits = (lens.rank[:, :-1] == 0).float().mean(1)
    assert float(hits.max()) < 1 / 40 + 4 * math.sqrt(1 / 40 / 400)
    assert float(lens.logp[:, :-1].mean()) < -math.log(40) + 0.05


def test_the_recall_model_s_lens_shows_the_layer_that_knows(recall) -> None:
    ids = torch.tensor([[3, 8, 5, 11, 2, 3, 8, 5]])
    lens = logit_lens(recall, ids)
    assert lens.top[1, 5:].tolist() == [8, 5, 11]
    assert float(lens.logp[1, 5:7].exp().min()) > 0.99
    assert float(lens.logp[0, 5:7].exp().max()) < 0.06  # the embedding alone knows nothing


def test_padding_rows_of_the_vocabulary_are_no_guess() -> None:
    model = random_model(tokenizer=byte_tokenizer())  # 257 tokens in 264 rows
    with torch.no_grad():
        model.embed.weight[257:] *= 100
    assert int(predictions(model, "some text", top=257).next.top.max()) < 257
    assert int(logit_lens(model, "some text").top.max()) < 257


def test_tables_and_bad_top(speaking) -> None:
    table = predictions(speaking, "abc", top=2).table()
    assert list(table.columns) == ["position", "token", "loss", "next 1", "p 1", "next 2", "p 2"]
    assert logit_lens(speaking, "abc").table().shape == (3, 6)
    with pytest.raises(InputError, match="top must be an integer from 1 to the 257 tokens, got 0"):
        predictions(speaking, "abc", top=0)

"""Restoration: exact on a model whose answer is known to live in one place, equal to hooks on random ones."""

import warnings

import pytest
import torch
from hand_built import byte_tokenizer, random_model
from torch import Tensor

from mambascope.analyses import patch
from mambascope.errors import CacheError, HookError, InputError, UnknownNameError

CLEAN = torch.tensor([[3, 8, 5, 11, 2, 3]])  # 3 is followed by 8
VALUE = torch.tensor([[3, 7, 5, 11, 2, 3]])  # now by 7


def test_the_value_s_place_restores(recall) -> None:
    found = patch(recall, CLEAN, VALUE, (8, 7))
    assert found.clean > 5
    assert found.corrupted < -5
    assert found.restored[0].tolist() == pytest.approx([0, 1, 0, 0, 0, 0], abs=1e-3)
    assert found.columns == ["[3]", "[8]|[7]", "[5]", "[11]", "[2]", "[3]"]
    wrote = patch(recall, CLEAN, VALUE, (8, 7), site="u_write")
    assert wrote.restored[0].tolist() == pytest.approx([0, 1, 0, 0, 0, 0], abs=1e-3)
    assert wrote.site == "u_write"


def test_the_state_carries_it_from_there_on(recall) -> None:
    found = patch(recall, CLEAN, VALUE, (8, 7), site="h")
    assert found.restored[0].tolist() == pytest.approx([0, 1, 1, 1, 1, 1], abs=1e-3)


def test_a_key_sits_in_the_query_too(recall) -> None:
    """Corrupting the query: only the last place restores."""
    found = patch(recall, CLEAN, torch.tensor([[3, 8, 5, 11, 2, 5]]), (8, 11))
    assert found.restored[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-3)


@pytest.mark.parametrize("site", ["resid_pre", "mixer_in", "mixer_out", "x", "delta", "B", "gated", "h"])
def test_the_sweep_is_what_hooks_give(random, ids: Tensor, site: str) -> None:
    clean = ids[:, :9]
    corrupted = clean.clone()
    corrupted[0, 4] = (corrupted[0, 4] + 1) % 40
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # random answers hardly differ
        found = patch(random, clean, corrupted, (1, 2), site=site)
    _, cache = random.run_with_cache(clean)
    for layer, t in ((0, 4), (1, 4), (2, 6), (1, 8)):
        value = cache[site, layer][:, t] if site != "h" else cache["h", layer][:, t]
        name = next(n for n in random.hook_dict if n.startswith(f"blocks.{layer}.") and n.endswith(f"hook_{site}"))
        hooks = [(f"{name}[{t}]", lambda v, hook, new=value: new)]
        logits = random.run_with_hooks(corrupted, fwd_hooks=hooks)[0, -1].detach()
        by_hand = (float(logits[1] - logits[2]) - found.corrupted) / (found.clean - found.corrupted)
        scale = abs(found.clean - found.corrupted)
        assert abs(float(found.restored[layer, t]) - by_hand) * scale < 1e-5


def test_places_before_the_change_restore_nothing(random, ids: Tensor) -> None:
    corrupted = ids.clone()
    corrupted[0, 40] = (corrupted[0, 40] + 1) % 40
    corrupted[0, 74] = (corrupted[0, 74] + 1) % 40
    found = patch(random, ids, corrupted, (1, 2))
    scale = abs(found.clean - found.corrupted)
    assert float(found.restored[:, :40].abs().max()) * scale < 1e-5
    assert float(found.restored[0, 41:74].abs().max()) * scale < 1e-5


def test_a_random_model_s_answer_is_noise(ids: Tensor) -> None:
    """A change far back hardly reaches an untrained model's answer, and patching says so."""
    fresh = random_model(dt_max=0.01)
    corrupted = ids.clone()
    corrupted[0, 2] = (corrupted[0, 2] + 1) % 40
    with pytest.warns(UserWarning, match="mostly noise"):
        patch(fresh, ids, corrupted, (1, 2))


def test_text_answers_and_labels() -> None:
    model = random_model(tokenizer=byte_tokenizer())
    found = patch(model, "abcab", "axcax", ("c", "d"))
    assert found.answers == ("c", "d")
    assert found.columns == ["a", "b|x", "c", "a", "b|x"]
    assert found.table().shape == (5, 5)


def test_bad_input(recall) -> None:
    with pytest.raises(InputError, match="the clean text has 6 tokens, the corrupted one 5"):
        patch(recall, CLEAN, VALUE[:, 1:], (8, 7))
    with pytest.raises(InputError, match="nothing to restore"):
        patch(recall, CLEAN, CLEAN, (8, 7))
    with pytest.raises(InputError, match="answer 99 is neither a text nor an id"):
        patch(recall, CLEAN, VALUE, (99, 7))
    with pytest.raises(UnknownNameError, match="no hook point is called"):
        patch(recall, CLEAN, VALUE, (8, 7), site="attention")
    with pytest.raises(HookError, match="hook_A_bar has no single value"):
        patch(recall, CLEAN, VALUE, (8, 7), site="A_bar")
    text = random_model(tokenizer=byte_tokenizer())
    with pytest.raises(InputError, match="2 tokens"):
        patch(text, "abc", "abd", ("no", "y"))


def test_a_corrupted_cache_that_no_longer_holds_is_refused(recall) -> None:
    with recall.hooks(fwd_hooks=[("blocks.0.hook_mixer_out", lambda v, hook: v * 0.5 + 1.0)]):
        _, edited = recall.run_with_cache(VALUE)
    with pytest.raises(CacheError, match="not in force here"):
        patch(recall, CLEAN, edited, (8, 7))


def test_the_model_s_own_hooks_stay(recall) -> None:
    calls: list[int] = []
    recall.add_hook("blocks.0.hook_resid_post", lambda v, hook: calls.append(1))
    try:
        patch(recall, CLEAN, VALUE, (8, 7))
        before = len(calls)
        recall(CLEAN)
        assert len(calls) == before + 1
    finally:
        recall.reset_hooks()

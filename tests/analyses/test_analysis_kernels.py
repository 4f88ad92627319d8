"""Effective kernels against the formula written out, and against what happens when something is added."""

import pytest
import torch
from hand_built import random_model
from torch import Tensor

from mambascope.analyses import effective_kernel, hidden_attention, read, sources
from mambascope.analyses.kernels import REDUCTIONS
from mambascope.errors import CacheError, InputError


def close(a: Tensor, b: Tensor, bar: float = 1e-5) -> bool:
    return bool((a.double() - b.double()).abs().max() <= bar * b.double().abs().max())


def test_parts_add_up_to_y_with_a_state_before(random, ids: Tensor) -> None:
    with torch.no_grad():
        _, state = random(ids[:, :20], return_state=True)
        _, cache = random.run_with_cache(ids[:, 20:], state=state)
    for layer in (0, 1, -1):
        for query in (0, 7, -1):
            found = effective_kernel(random, cache, layer, query)
            total = (found.alpha * found.u).sum(0) + found.carry
            assert found.error < 1e-5
            assert close(total, found.y)
    assert effective_kernel(random, cache, 0, 0).carry.abs().max() > 1e-3  # the state before matters
    whole = effective_kernel(random, ids, 1)
    late = effective_kernel(random, cache, 1)
    assert close(late.alpha, whole.alpha[20:])
    before = (whole.alpha * whole.u)[:20].sum(0)
    assert (late.carry - before).abs().max() < 1e-5 * whole.y.abs().max()


@pytest.mark.parametrize("layer", [0, 2])
def test_adding_to_what_is_written_changes_y_by_alpha(ids: Tensor, layer: int) -> None:
    exact = random_model().double()  # the change is small beside y
    found = effective_kernel(exact, ids, layer)
    name = f"blocks.{layer}.mixer"
    g = torch.Generator().manual_seed(0)
    for s in (0, 40, 74):
        e = torch.randn(found.u.shape[1], generator=g).double()
        cache: dict[str, Tensor] = {}

        def see(value: Tensor, hook: object, cache: dict[str, Tensor] = cache) -> None:
            cache["y"] = value.detach().clone()

        def add(value: Tensor, hook: object, e: Tensor = e) -> Tensor:
            return value + e

        hooks = [(f"{name}.hook_u_write[{s}]", add), (f"{name}.hook_y[-1]", see)]
        exact.run_with_hooks(ids, fwd_hooks=hooks)
        change, predicted = cache["y"][0] - found.y, found.alpha[s] * e
        assert (change - predicted).abs().max() < 1e-4 * predicted.abs().max()


def test_map_rows_are_rows(random, ids: Tensor) -> None:
    reading = read(random, ids)
    for reduce in REDUCTIONS:
        found = hidden_attention(random, reading, 1, reduce=reduce)
        for query in (0, 31, 32, -1):
            row = effective_kernel(random, reading, 1, query).weights(reduce)
            at = query % 75
            assert close(found.weights[at, : at + 1], row)


def test_sources_are_the_rows_of_all_layers(random, ids: Tensor) -> None:
    found = sources(random, ids, reduce="rms")
    assert found.amount.shape == (3, 75)
    for layer in range(3):
        assert torch.equal(found.amount[layer], effective_kernel(random, ids, layer).contributions("rms"))
    assert torch.allclose(found.share.sum(1), torch.ones(3))
    assert float(found.error.max()) < 1e-5


def test_recall_model_reads_what_followed(recall) -> None:
    tokens = torch.tensor([[3, 8, 5, 11, 2, 3]])
    found = effective_kernel(recall, tokens, 0)
    assert found.weights("max").tolist() == pytest.approx([0, 1, 0, 0, 0, 0], abs=1e-3)


def test_falcon_norms_and_bf16(ids: Tensor) -> None:
    falcon = random_model(mixer_norm_eps=1e-6)
    assert effective_kernel(falcon, ids, 1).error < 1e-5
    half = random_model().to(torch.bfloat16)
    assert effective_kernel(half, ids, 1).error < 1e-5


def test_edits_are_honoured_or_refused(random, ids: Tensor) -> None:
    name = "blocks.1.mixer.hook_"
    with random.hooks(fwd_hooks=[(name + "delta", lambda value, hook: value * 0.5)]):
        _, honoured = random.run_with_cache(ids)
    plain = effective_kernel(random, ids, 1)
    found = effective_kernel(random, honoured, 1)
    assert found.error < 1e-5
    assert not torch.allclose(found.alpha, plain.alpha)
    for site, words in (
        ("h[30]", "hook_h or hook_y at position 30"),
        ("write", "edited the recurrence"),
        ("y", "hook_y"),
    ):
        with random.hooks(fwd_hooks=[(name + site, lambda value, hook: value + 1.0)]):
            _, edited = random.run_with_cache(ids)
        with pytest.raises(CacheError, match=words):
            effective_kernel(random, edited, 1)
        with pytest.raises(CacheError, match=words):
            hidden_attention(random, edited, 1)
        if site == "h[30]":  # what came before the edit is still what happened
            assert effective_kernel(random, edited, 1, query=29).error < 1e-5
    with random.hooks(fwd_hooks=[(name + "h[30]", lambda value, hook: None)]):
        _, looked = random.run_with_cache(ids)
    assert effective_kernel(random, looked, 1).error < 1e-5


def test_bad_input_is_named(random, ids: Tensor) -> None:
    with pytest.raises(InputError, match="query 75 is outside the text of 75 tokens"):
        effective_kernel(random, ids, 0, query=75)
    with pytest.raises(InputError, match="layer 3 is outside the model's 3 layers"):
        effective_kernel(random, ids, 3)
    with pytest.raises(InputError, match="reduction 'means_abs' is unknown, did you mean 'mean_abs'"):
        sources(random, ids, reduce="means_abs")
    _, partial = random.run_with_cache(ids, names_filter=lambda n: "hook_resid" in n)
    with pytest.raises(CacheError, match="was not cached"):
        effective_kernel(random, partial, 0)


def test_nan_is_located(random, ids: Tensor) -> None:
    def spoil(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[:, 12, 3] = float("nan")
        return value

    with random.hooks(fwd_hooks=[("blocks.2.mixer.hook_delta", spoil)]):
        _, cache = random.run_with_cache(ids)
    with pytest.raises(InputError, match="delta of layer 2 is NaN or infinite at position 12"):
        hidden_attention(random, cache, 2)

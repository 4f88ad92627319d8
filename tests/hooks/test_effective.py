"""Effective kernels of a cache: shares that add up, effects that are what was predicted, edits that are not hidden."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mambascope import ops
from mambascope.errors import CacheError, InputError
from mambascope.hooks.effective_path import PATHS
from mambascope.model import HookedMamba
from tests.conftest import error, make_model

MIXER = "blocks.1.mixer"


def cached(model: HookedMamba, tokens: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(tokens, **options)[1]


def add(amount: Tensor) -> Any:
    return lambda value, hook: value + amount


@pytest.mark.parametrize("through", PATHS)
def test_shares_add_up(model: HookedMamba, tokens: Tensor, through: Any) -> None:
    direction = torch.randn(24, generator=torch.Generator().manual_seed(2)) if "gate" in through else None
    with torch.no_grad():
        _, state = model(tokens[:, :20], return_state=True)
    cache = cached(model, tokens[:, 20:], state=state)
    for layer in (0, -1):
        for query in (0, 1, 17, -1):
            row = cache.effective_kernel(layer, query, through=through, direction=direction)
            assert row.error < 1e-5
            assert not row.weights[:, row.query[0] + 1 :].any()
    assert row.weights.shape == (2, 50, 48)
    early = cache.effective_kernel(1, 0, through=through)
    assert early.before.abs().max() > 1e-4  # the state before matters
    if through != "scan":
        return
    whole = cached(model, tokens)
    row, late = whole.effective_kernel(1), cache.effective_kernel(1)
    assert error(late.weights, row.weights[:, 20:]) < 1e-5
    assert error(late.before, row.amounts[:, :20].sum(1)) < 2e-5


def test_the_gate_leads_to_the_residual_stream(tokens: Tensor) -> None:
    """Through the gate along a direction, tokens and skip together are what the layer adds along it."""
    model = make_model()
    cache = cached(model, tokens)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(2))
    row = cache.effective_kernel(2, through="gate", direction=direction)
    scale = direction @ model.blocks[2].mixer.out_proj.weight
    skip = cache["skip", 2][:, -1] * ops.silu(cache["gate_in", 2][:, -1]) * scale
    total = row.amounts.sum((1, 2)) + row.before.sum(1) + skip.sum(1)
    assert error(total, cache["mixer_out", 2][:, -1] @ direction) < 1e-5
    norm = cache.effective_kernel(2, through="gate").weights
    assert error(norm.abs(), (cache.effective_kernel(2).weights * cache_gate(cache, model)).abs()) < 1e-6


def cache_gate(cache: Any, model: HookedMamba) -> Tensor:
    columns = torch.linalg.vector_norm(model.blocks[2].mixer.out_proj.weight, dim=0)
    return (ops.silu(cache["gate_in", 2][:, -1]) * columns)[:, None]


@pytest.mark.parametrize("s", [0, 31, 69])
def test_adding_to_what_is_written_changes_y_by_alpha(tokens: Tensor, s: int) -> None:
    model = make_model().double()  # the change is small beside y
    cache = cached(model, tokens)
    e = torch.randn(48, generator=torch.Generator().manual_seed(s)).double()
    predicted = cache.influence(1, s) * e
    with model.hooks(fwd_hooks=[(f"{MIXER}.hook_u_write[{s}]", add(e))]):
        change = cached(model, tokens)["y", 1] - cache["y", 1]
    assert (change - predicted).abs().max() < 1e-4 * predicted.abs().max()
    assert torch.equal(predicted[:, :s], torch.zeros_like(predicted[:, :s]))
    wrong = cache.influence(1, max(s - 1, 1)) * e
    assert (change - wrong).abs().max() > 1e-2 * predicted.abs().max()  # the check can fail


@pytest.mark.parametrize("s", [0, 31, 69])
def test_adding_to_x_changes_y_through_the_convolution(tokens: Tensor, s: int) -> None:
    """delta, B and C held at the clean run, and u at SiLU's clean factor of the new convolution."""
    model = make_model().double()
    cache = cached(model, tokens)
    e = torch.randn(48, generator=torch.Generator().manual_seed(s)).double()
    predicted = cache.influence(1, s, through="conv") * e
    factor = torch.sigmoid(cache["conv", 1])
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda value, hook: cache[f"{MIXER}.hook_{name}"]

    def conv(value: Tensor, hook: Any) -> None:
        seen["conv"] = value.clone()

    hooks = [(f"{MIXER}.hook_x[{s}]", add(e)), (f"{MIXER}.hook_conv", conv)]
    hooks += [(f"{MIXER}.hook_u_write", lambda value, hook: seen["conv"] * factor)]
    hooks += [(f"{MIXER}.hook_{name}", keep(name)) for name in ("delta", "B", "C")]
    with model.hooks(fwd_hooks=hooks):
        change = cached(model, tokens)["y", 1] - cache["y", 1]
    assert (change - predicted).abs().max() < 1e-4 * predicted.abs().max()
    assert (change[:, s]).abs().max() > 0


@pytest.mark.parametrize("through", PATHS)
def test_rows_columns_and_maps_are_one_thing(model: HookedMamba, tokens: Tensor, through: Any) -> None:
    cache = cached(model, tokens)
    channels = [3, -1, 17]
    for reduce in ops.maps.REDUCTIONS:
        whole = cache.hidden_attention(1, reduce, through=through)
        some = cache.hidden_attention(1, reduce, channels, through)
        assert whole.shape == (2, 70, 70)
        for t in (0, 2, 40, -1):
            row = cache.effective_kernel(1, t, through=through)
            assert error(whole[:, t], row.reduced(reduce)) < 1e-5
            part = cache.effective_kernel(1, t, channels, through)
            assert torch.equal(part.weights, row.weights[..., channels])
            assert part.error < 1e-5
            assert error(some[:, t], part.reduced(reduce)) < 1e-5
        window = cache.hidden_attention(1, reduce, through=through, rows=slice(-20, None), cols=slice(3, 30))
        assert error(window, whole[:, -20:, 3:30]) < 1e-5
    column = cache.influence(1, 30, channels, through)
    for t in (29, 30, 33, 69):
        assert error(column[:, t], cache.effective_kernel(1, t, channels, through).weights[:, 30]) < 1e-5 or t < 30
    assert not column[:, :30].any()


@pytest.mark.parametrize("through", PATHS)
def test_padded_batches_read_as_their_rows(model: HookedMamba, tokens: Tensor, through: Any) -> None:
    batch, mask = torch.zeros(3, 75, dtype=torch.long), torch.zeros(3, 75)
    places = ((5, 75), (0, 68), (2, 60))
    rows = (tokens[0], tokens[1, :68], tokens[0, :58])
    for i, ((start, stop), row) in enumerate(zip(places, rows, strict=True)):
        batch[i, start:stop], mask[i, start:stop] = row, 1
    padded = cached(model, batch, attention_mask=mask)
    right = cached(model, batch[1:2], attention_mask=mask[1:2])
    for i, ((start, stop), tokens_of_row) in enumerate(zip(places, rows, strict=True)):
        plain = cached(model, tokens_of_row[None])
        for query in (0, -1):
            found, alone = (
                padded.effective_kernel(1, query, through=through),
                plain.effective_kernel(1, query, through=through),
            )
            assert error(found.weights[i, start:stop], alone.weights[0]) < 1e-5
            assert not found.weights[i, :start].any() and not found.weights[i, stop:].any()
            assert found.query[i] == alone.query[0]
            assert found.error < 1e-5
        maps = [padded.hidden_attention(1, through=through)[i]]
        maps += [right.hidden_attention(1, through=through)[0]] if i == 1 else []
        alone = plain.hidden_attention(1, through=through)[0]
        for found in maps:
            assert error(found[start:stop, start:stop], alone) < 1e-5
            found[start:stop, start:stop] = 0
            assert not found.any()
        column = padded.influence(1, -1, through=through)[i]
        assert error(column[stop - 1], plain.influence(1, -1, through=through)[0, -1]) < 1e-5
    whole = padded.hidden_attention(1, through=through)
    for rows, cols in ((slice(10, 20), slice(4, 15)), (slice(0, 3), slice(0, 2)), (slice(-9, None), slice(60, 75))):
        window = padded.hidden_attention(1, through=through, rows=rows, cols=cols)
        assert (window - whole[:, rows, cols]).abs().max() < 1e-5 * whole.abs().max()
    with pytest.raises(InputError, match="query 69 is outside row 1 of 68 tokens"):
        padded.effective_kernel(1, 69)


def test_views_and_strips_are_the_map(tokens: Tensor) -> None:
    cache = cached(make_model(), tokens)
    whole, view = cache.hidden_attention(1, "signed"), cache.attention_view(1, "signed")
    assert view.shape == whole.shape
    for key in [(slice(None), 5), (1, slice(3, 9), slice(0, 7)), (slice(0, 1), slice(-9, None), -70), 0]:
        assert error(view[key], whole[key]) < 1e-5 or not whole[key].any()
    for height in (None, 1, 33):
        strips = list(view.strips(height))
        assert error(torch.cat([value for _, value in strips], 1), whole) < 1e-5
        assert [t for rows, _ in strips for t in rows] == list(range(70))
    pooled = view.pooled(8)
    assert pooled.shape == (2, 8, 8)
    block = whole[0, 9:18, 0:9]
    assert pooled[0, 1, 0] == pytest.approx(float(block.flatten()[block.abs().argmax()]), rel=1e-5)
    assert pooled[0].abs().max() == pytest.approx(float(whole[0].abs().max()), rel=1e-5)
    alone = cache.apply_slice_to_batch_dim(1)
    assert error(alone.attention_view(1, "signed")[4:9], whole[1, 4:9]) < 1e-5
    assert error(alone.attention_view(1, "signed").pooled(8), pooled[1]) < 1e-5
    assert alone.effective_kernel(1).weights.shape == (70, 48)
    assert alone.effective_kernel(1).error < 1e-5
    assert alone.influence(1, 4).shape == (70, 48)
    for key in ("a", (0, 0, 0, 0), (0, [1, 2])):
        with pytest.raises(InputError, match="with integers and slices"):
            view[key]
    with pytest.raises(InputError, match="query 70 is outside the 70 columns"):
        view[0, 70]


def test_another_activation_has_its_own_factor(tokens: Tensor) -> None:
    for activation in ("gelu", "relu", "identity"):
        cache = cached(make_model(activation=activation), tokens)
        for through in PATHS:
            assert cache.effective_kernel(1, through=through).error < 1e-5, activation


def test_falcon_norms_and_half_weights(tokens: Tensor) -> None:
    assert cached(make_model(mixer_norm_eps=1e-6), tokens).effective_kernel(1).error < 1e-5
    half = cached(make_model(dtype=torch.bfloat16), tokens)
    assert half.effective_kernel(1).error < 1e-5
    assert half.effective_kernel(1).weights.dtype == torch.float32
    assert half.effective_kernel(1, through="conv").error < 4e-3  # the model rounds conv and u to bfloat16
    double = cached(make_model(dtype=torch.float64), tokens)
    assert double.effective_kernel(1, through="conv").error < 1e-12


def test_a_saved_cache_gives_the_same(tokens: Tensor, tmp_path: Any) -> None:
    from mambascope.hooks.cache_file import load_cache

    model = make_model()
    cache = cached(model, tokens)
    cache.save(tmp_path / "c.safetensors")
    assert torch.equal(load_cache(tmp_path / "c.safetensors", model).hidden_attention(1), cache.hidden_attention(1))


def test_the_page_says_what_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "effective-kernels.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["row"].error < 1e-6
    assert found["seen"].shape[0] == 1 and found["moved"].shape[2] == 512


# ---- edits


def edited(model: HookedMamba, tokens: Tensor, site: str, amount: float = 1.0, **options: Any) -> Any:
    with model.hooks(fwd_hooks=[(f"{MIXER}.hook_{site}", lambda value, hook: value + amount)]):
        return cached(model, tokens, **options)


def test_edits_of_what_the_kernel_is_made_of_are_honoured(model: HookedMamba, tokens: Tensor) -> None:
    plain = cached(model, tokens)
    with torch.no_grad():
        _, state = model(tokens[:, :20], return_state=True)
    for site, paths in (
        ("delta", PATHS),
        ("B", PATHS),
        ("C", PATHS),
        ("x", PATHS),
        ("gate_in", PATHS),
        ("conv", ("scan", "gate")),
        ("u", ("scan", "gate")),
        ("u_write", ("scan", "gate")),
    ):
        cache = edited(model, tokens, site, 0.3)
        late = edited(model, tokens[:, 20:], site, 0.3, state=state)
        for through in paths:
            row = cache.effective_kernel(1, through=through)
            assert row.error < 1e-5, (site, through)
            assert late.effective_kernel(1, 0, through=through).error < 1e-5, (site, through)
            if site not in ("u_write", "gate_in") or (through == "gate" and site == "gate_in"):
                assert error(row.weights, plain.effective_kernel(1, through=through).weights) > 1e-3, (site, through)
    assert cached(model, tokens).effective_kernel(1).error < 1e-5


@pytest.mark.parametrize(
    ("site", "through", "words"),
    [
        ("h[30]", "scan", "hook_h or hook_y at position 30"),
        ("y", "scan", "hook_h or hook_y at position 0"),
        ("write", "scan", "edited the recurrence .*write"),
        ("A_bar[3]", "gate", "edited the recurrence .*A_bar"),
        ("B_bar", "scan", "edited the recurrence .*B_bar"),
        ("conv", "conv", "edited hook_conv"),
        ("u", "conv", "edited hook_u or hook_u_write"),
        ("u_write[40]", "conv+gate", "edited hook_u or hook_u_write at position 40"),
        ("gated", "gate", "edited hook_gated"),
    ],
)
def test_edits_that_the_kernel_would_hide_are_refused(
    model: HookedMamba, tokens: Tensor, site: str, through: Any, words: str
) -> None:
    cache = edited(model, tokens, site)
    for ask in (cache.effective_kernel, cache.hidden_attention):
        with pytest.raises(CacheError, match=f"layer 1: a hook .*{words}"):
            ask(1, through=through)
    with pytest.raises(CacheError, match=words):
        cache.influence(1, 0, through=through)
    if "[30]" in site or "[40]" in site:  # what came before the edit is still what happened
        first = int(site.split("[")[1][:2])
        assert cache.effective_kernel(1, first - 1, through=through).error < 1e-5
        above = cache.hidden_attention(1, through=through, rows=slice(0, first))
        assert error(above, cached(model, tokens).hidden_attention(1, through=through, rows=slice(0, first))) < 1e-5
        view = cache.attention_view(1, through=through)
        assert error(view[:, :first], above) < 1e-5
        with pytest.raises(CacheError, match=words):
            view[:, : first + 1]


def test_looking_is_no_edit(model: HookedMamba, tokens: Tensor) -> None:
    for site in ("h[30]", "write", "u_write"):
        with model.hooks(fwd_hooks=[(f"{MIXER}.hook_{site}", lambda value, hook: None)]):
            looked = cached(model, tokens)
        for through in PATHS:
            assert looked.effective_kernel(1, through=through).error < 1e-5


# ---- bad input


def test_bad_input_is_named(tokens: Tensor) -> None:
    cache = cached(make_model(), tokens)
    cases: list[tuple[Any, str]] = [
        (lambda: cache.effective_kernel(3), "layer 3 is outside the model's 3 layers"),
        (lambda: cache.effective_kernel(0, 70), "query 70 is outside the text of 70 tokens"),
        (lambda: cache.effective_kernel(0, -71), "query -71 is outside"),
        (lambda: cache.effective_kernel(0, 1.5), "query must be an integer position"),
        (lambda: cache.influence(0, 70), "source 70 is outside"),
        (lambda: cache.effective_kernel(0, channels=[]), "channels is empty"),
        (lambda: cache.hidden_attention(0, channels=slice(9, 9)), "channels is empty"),
        (lambda: cache.influence(0, 1, channels=[48]), "channel 48 is outside the layer's 48 channels"),
        (lambda: cache.influence(0, 1, channels=[0.5]), "channels must be a list of channel numbers"),
        (lambda: cache.hidden_attention(0, "abs_mean"), "reduction 'abs_mean' is unknown, did you mean 'mean_abs'"),
        (lambda: cache.hidden_attention(0, through="convolution"), "through='convolution' is unknown"),
        (lambda: cache.hidden_attention(0, direction=torch.ones(24)), "use through='gate'"),
        (lambda: cache.hidden_attention(0, through="gate", direction=torch.ones(5)), r"M = \(24,\), got \(5,\)"),
        (lambda: cache.hidden_attention(0, rows=slice(70, 80)), "holds none of the 70 tokens"),
        (lambda: cache.attention_view(0).pooled(0), "cells must be"),
        (lambda: list(cache.attention_view(0).strips(0)), "height must be"),
    ]
    for ask, words in cases:
        with pytest.raises(InputError, match=words):
            ask()
    assert error(cache.effective_kernel(-1, -70).weights, cache.effective_kernel(2, 0).weights) == 0


def test_a_map_that_cannot_fit_says_so_first(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cached(make_model(), tokens)
    monkeypatch.setattr("mambascope.memory.available_bytes", lambda device: 10_000_000)
    cache.recording.shape = (2, 5000)  # a text whose map takes 400 MB
    with pytest.raises(InputError, match=r"5,000 x 5,000 tokens would take 407.7 MB .* 10.0 MB .* rows=slice\(a, b\)"):
        cache.hidden_attention(0)


def test_a_layer_without_a_scan_is_named(tokens: Tensor) -> None:
    model = make_model()
    cache = cached(model, tokens)
    model.blocks[1].mixer = torch.nn.Identity()
    with pytest.raises(InputError, match="layer 1 has no selective scan .its mixer is Identity"):
        cache.effective_kernel(1)


def test_nan_is_located(tokens: Tensor) -> None:
    model = make_model()
    for site in ("delta", "u_write"):

        def spoil(value: Tensor, hook: Any) -> Tensor:
            value = value.clone()
            value[1, 12, 3] = float("nan")
            return value

        with model.hooks(fwd_hooks=[(f"{MIXER}.hook_{site}", spoil)]):
            cache = cached(model, tokens)
        for ask in (cache.effective_kernel, cache.hidden_attention):
            with pytest.raises(InputError, match=f"{site} of layer 1 is NaN or infinite at row 1, position 12"):
                ask(1)
    with torch.no_grad():
        _, state = model(tokens[:, :20], return_state=True)
    state.layers[1].ssm[0, 3, 0] = float("nan")
    with model.hooks(fwd_hooks=[(f"{MIXER}.hook_u_write", lambda value, hook: None)]):
        cache = cached(model, tokens[:, 20:], state=state)
    with pytest.raises(InputError, match="the state that layer 1 started from holds NaN"):
        cache.effective_kernel(1)


def test_a_stale_cache_is_refused(tokens: Tensor) -> None:
    model = make_model()
    cache = cached(model, tokens)
    cache.effective_kernel(1)
    with torch.no_grad():
        model.blocks[1].mixer.A_log.mul_(1.5)
    for ask in (cache.effective_kernel, cache.hidden_attention):
        with pytest.raises(CacheError, match="A_log has changed since"):
            ask(1)
    partial = cached(model, tokens, names_filter=lambda name: "hook_resid" in name)
    with pytest.raises(CacheError, match="was not cached"):
        partial.effective_kernel(1)

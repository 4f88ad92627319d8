"""Hooks, caches, interventions, sweeps and readouts where some layers are no Mamba."""

from typing import Any

import pytest
import torch
from torch import Tensor

import mambascope as ms
from mambascope import analyses
from mambascope import interventions as iv
from mambascope.config import MambaConfig
from mambascope.errors import CacheError, HookError, InputError, UnknownNameError
from mambascope.hooks.points import ON_DEMAND, tail_of
from mambascope.model import HookedMamba

V, LENGTH = 23, 11
INPUT = torch.randint(0, V, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> HookedMamba:
    torch.manual_seed(5)
    cfg = MambaConfig(d_model=32, n_layers=4, d_vocab=V, d_state=4, pattern="mafw", n_heads=4, window=4)
    return HookedMamba(cfg, dtype=torch.float64)


ATTENTION = [
    f"blocks.1.mixer.hook_{n}" for n in ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")
]
FEED_FORWARD = [f"blocks.2.mixer.hook_{n}" for n in ("pre", "pre_linear", "post")]


def plain(model: HookedMamba, name: str) -> Tensor:
    kept: list[Tensor] = []
    model.run_with_hooks(INPUT, fwd_hooks=[(name, lambda v, hook: kept.append(v.clone()))])
    return kept[0]


@pytest.mark.parametrize("name", [*ATTENTION, *FEED_FORWARD])
def test_a_cache_reads_what_a_hook_sees_filtered_or_not(model: HookedMamba, name: str) -> None:
    seen = plain(model, name)
    _, cache = model.run_with_cache(INPUT)
    _, only = model.run_with_cache(INPUT, names_filter=name)
    _, some = model.run_with_cache(INPUT, pos_slice=slice(2, 5))
    assert tail_of(name)[1] not in ON_DEMAND or name not in cache._replays.get(1, {})
    axis = 2 if seen.shape[-2:] == (LENGTH, LENGTH) else 1
    torch.testing.assert_close(cache[name], seen, rtol=0, atol=1e-12)
    torch.testing.assert_close(only[name], seen, rtol=0, atol=1e-12)
    torch.testing.assert_close(some[name], seen.narrow(axis, 2, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*ATTENTION, *FEED_FORWARD])
@pytest.mark.parametrize("index", [3, slice(2, 5), -1])
def test_an_edit_at_positions_is_the_edit_of_the_whole(model: HookedMamba, name: str, index: Any) -> None:
    whole = plain(model, name)
    axis = 2 if whole.shape[-2:] == (LENGTH, LENGTH) else 1
    cut = (slice(None),) * axis + (index,)
    seen: list[tuple[int, ...]] = []

    def at_once(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[cut] = 0.25
        return value

    def there(value: Tensor, hook: Any) -> Tensor:
        seen.append(tuple(value.shape))
        return torch.full_like(value, 0.25)

    def in_place(value: Tensor, hook: Any) -> None:
        value.fill_(0.25)

    text = f"[{index.start}:{index.stop}]" if isinstance(index, slice) else f"[{index}]"
    want = model.run_with_hooks(INPUT, fwd_hooks=[(name, at_once)])
    got = model.run_with_hooks(INPUT, fwd_hooks=[(name + text, there)])
    assert seen == [tuple(whole[cut].shape)]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        model.run_with_hooks(INPUT, fwd_hooks=[(name + text, in_place)]), want, rtol=0, atol=1e-12
    )
    assert (want - model(INPUT)).abs().max() > 1e-6
    sites = ms.at(name, [1, 4])
    rows = model.run_with_hooks(INPUT, fwd_hooks=[(sites, lambda v, hook: torch.zeros_like(v))])
    for b, t in enumerate((1, 4)):
        alone = model.run_with_hooks(
            INPUT[b : b + 1], fwd_hooks=[(f"{name}[{t}]", lambda v, hook: torch.zeros_like(v))]
        )
        torch.testing.assert_close(rows[b : b + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [*ATTENTION, *FEED_FORWARD])
def test_gradients_arrive_at_every_point_and_add_up(model: HookedMamba, name: str) -> None:
    grads: list[Tensor] = []
    loss = model.run_with_hooks(INPUT, return_type="loss", bwd_hooks=[(name, lambda g, hook: grads.append(g.clone()))])
    loss.backward()
    value, step = plain(model, name), torch.randn(grads[0].shape, dtype=torch.float64) * 1e-6
    assert grads[0].shape == value.shape
    moved = [
        model.run_with_hooks(INPUT, return_type="loss", fwd_hooks=[(name, lambda v, hook, s=s: v + s * step)])
        for s in (1, -1)
    ]
    slope = (moved[0] - moved[1]) / 2
    grad = grads[0].masked_fill(~torch.isfinite(value), 0)
    torch.testing.assert_close(slope, (grad * step).sum(), rtol=1e-4, atol=1e-14)


def test_pattern_rows_are_distributions_inside_the_window(model: HookedMamba) -> None:
    _, cache = model.run_with_cache(INPUT)
    for layer, window in ((1, LENGTH), (3, 4)):
        pattern = cache["pattern", layer]
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
        t, s = torch.meshgrid(torch.arange(LENGTH), torch.arange(LENGTH), indexing="ij")
        assert bool(((pattern > 0) == ((s <= t) & (s > t - window))).all())
    _, grads = model.run_with_cache(INPUT, return_type="loss", incl_bwd=True)
    assert grads["blocks.1.mixer.hook_pattern_grad"].shape == grads["pattern", 1].shape


def test_patterns_that_would_not_fit_are_refused_before_they_are_made(
    model: HookedMamba, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = torch.randint(0, V, (1, 3000))
    _, cache = model.run_with_cache(long)
    monkeypatch.setattr("mambascope.memory.available_bytes", lambda device: 10_000_000)
    with pytest.raises(InputError, match=r"blocks.1.mixer.hook_pattern: scores and pattern of 3,000 x 3,000 positions"):
        _ = cache["pattern", 1]
    with pytest.raises(CacheError, match="would take"):
        model.run_with_cache(long, names_filter="blocks.1.mixer.hook_pattern")
    assert cache["z", 1].shape == (1, 3000, 4, 8)


def test_interventions_work_where_the_point_is_and_are_refused_by_name_where_not(model: HookedMamba) -> None:
    other = INPUT.flip(0)
    _, cache = model.run_with_cache(other)
    for name in (*ATTENTION, *FEED_FORWARD):
        for site in (name, f"{name}[3]", f"{name}[2:5]"):
            patched = model.run_with(INPUT, [iv.patch(site, cache)])
            assert torch.isfinite(patched).all() and model.edits_done()[0].calls == 1
        torch.testing.assert_close(model.run_with(other, [iv.patch(name, cache)]), model(other), rtol=0, atol=1e-12)
    with pytest.raises(UnknownNameError, match="layer 1 is attention and has no mixer.hook_h"):
        model.run_with(INPUT, [iv.swap(iv.state(1, 3), rows=[1, 0])])
    with pytest.raises(UnknownNameError, match="layer 2 is feed-forward and has no mixer.hook_h"):
        model.run_with(INPUT, [iv.erase(2, 3)])
    with pytest.raises(UnknownNameError, match="layer 1 is attention"):
        model.run_with(INPUT, [iv.knockout(1, sources=2, targets=5)])
    everywhere = model.run_with(INPUT, [iv.knockout(None, sources=2, targets=5)])
    torch.testing.assert_close(everywhere, model.run_with(INPUT, [iv.knockout(0, sources=2, targets=5)]))
    frozen = model.run_with(INPUT, [iv.freeze(cache, "delta")])
    torch.testing.assert_close(frozen, model.run_with(INPUT, [iv.freeze(cache, "delta", layers=0)]))
    transformer = HookedMamba(MambaConfig(d_model=32, n_layers=2, d_vocab=V, pattern="af"))
    with pytest.raises(HookError, match="no layer has a selective scan .pattern 'af'"):
        transformer.run_with(INPUT, [iv.knockout(None, sources=2, targets=5)])


def test_path_patching_goes_through_attention(model: HookedMamba) -> None:
    edits = iv.path_patch(model, INPUT[:1], INPUT[1:], "blocks.0", "blocks.3", through=[1, 2])
    assert (model.run_with(INPUT[:1], edits) - model(INPUT[:1])).abs().max() > 1e-8


@pytest.mark.parametrize("site", ["resid_pre", "mixer_out", "resid_post", "q", "z", "pre", "h", "delta"])
def test_sweeps_are_single_runs_and_attribution_is_their_first_order(model: HookedMamba, site: str) -> None:
    clean, corrupted = INPUT[:1], INPUT[1:]
    metric = ms.LogitDifference(3, 7)
    over = {"sites": [site], "positions": [0, 4, LENGTH - 1]}
    found = ms.sweep(model, clean, corrupted, metric, over)
    _, cache = model.run_with_cache(clean)
    tail = found.grid.sites[0]
    for k, layer in enumerate(found.grid.layers):
        for j, t in enumerate(found.grid.positions):
            patched = model.run_with(corrupted, [iv.patch(f"blocks.{layer}.{tail}[{t}]", cache)])[0, -1].detach()
            want = float(patched[3] - patched[7])
            assert abs(float(found.values[0, k, j, 0]) - want) < 1e-9
    guess = ms.attribute(model, clean, corrupted, metric, over)
    assert guess.grid.layers == found.grid.layers
    if site == "h":
        return
    for k, layer in enumerate(guess.grid.layers):
        name, grads = f"blocks.{layer}.{tail}", []
        logits = model.run_with_hooks(corrupted, bwd_hooks=[(name, lambda g, hook, to=grads: to.append(g.clone()))])
        (logits[0, -1, 3] - logits[0, -1, 7]).backward()
        apart = grads[0] * (cache[name] - model.run_with_cache(corrupted)[1][name])
        for j, t in enumerate(guess.grid.positions):
            want = float((logits[0, -1, 3] - logits[0, -1, 7] + apart[0, t].sum()).detach())
            assert abs(float(guess.values[0, k, j, 0]) - want) < 1e-9


def test_sweeps_refuse_what_a_layer_does_not_have(model: HookedMamba) -> None:
    metric = ms.LogitDifference(3, 7)
    with pytest.raises(UnknownNameError, match="layer 1 is attention and has no mixer.hook_delta"):
        ms.sweep(model, INPUT[:1], INPUT[1:], metric, {"sites": ["delta"], "layers": [0, 1]})
    with pytest.raises(HookError, match="no layer has all of"):
        ms.sweep(model, INPUT[:1], INPUT[1:], metric, ["delta", "q"])
    with pytest.raises(HookError, match="hook_pattern: its values depend on the keys"):
        ms.sweep(model, INPUT[:1], INPUT[1:], metric, "pattern")


def test_residual_decompositions_add_up_over_every_kind_of_layer(model: HookedMamba) -> None:
    _, cache = model.run_with_cache(INPUT)
    last = cache["resid_post", 3]
    torch.testing.assert_close(cache.decompose_resid().sum(0), last)
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=True, return_labels=True)
    torch.testing.assert_close(stack.sum(0), last.float(), rtol=1e-4, atol=1e-5)
    assert len(labels) == 64 + 32 + 88 + 32 + 2
    neurons, names = cache.stack_neuron_results(-1, return_labels=True, incl_remainder=True)
    torch.testing.assert_close(neurons.sum(0), last)
    assert len(names) == len(neurons)


def test_readouts_that_need_no_scan_work_and_the_others_name_the_layer(model: HookedMamba) -> None:
    row = INPUT[0]
    lens = analyses.logit_lens(model, row)
    assert lens.top.shape == (5, LENGTH)
    for ask in (
        lambda: analyses.gates(model, row),
        lambda: model.run_with_cache(INPUT)[1].hidden_attention(1),
        lambda: model.run_with_cache(INPUT)[1].effective_kernel(2, -1),
        lambda: analyses.state_norms(model, row),
    ):
        with pytest.raises((InputError, UnknownNameError), match="layer [12]"):
            ask()


def test_induction_is_measured_over_every_kind_of_layer(model: HookedMamba) -> None:
    n = 8
    found = analyses.induction_score(model, n, rows=3)
    assert found.profile.shape[0] == 4
    _, cache = model.run_with_cache(found.tokens[:1])
    pattern = cache["pattern", 1][0].mean(0)  # L L
    queries = range(pattern.shape[0] - n, pattern.shape[0])
    want = sum(float(pattern[t, t - n + 1]) for t in queries) / n
    one = analyses.induction.lag_profile(pattern, n)
    assert abs(float(one[n - 1]) - want) < 1e-12
    assert float(found.profile[2, 0]) == 1.0  # feed-forward reads its own token
    assert found.prefix_matching.abs().max() < 0.05  # random weights match nothing
    assert float(found.profile[3, 4:].abs().max()) == 0.0  # beyond the window


def test_training_metrics_of_a_hybrid_are_numbers(model: HookedMamba) -> None:
    from mambascope.training.metrics import induction_metrics, state_metrics

    rival = HookedMamba(MambaConfig(d_model=32, n_layers=2, d_vocab=V, pattern="lf"))
    norms = state_metrics(model, INPUT)
    assert norms.keys() == {"state_norm_0", "state_norm_1", "state_norm_3"}
    assert "prefix_matching" in induction_metrics(model) and "prefix_matching" not in induction_metrics(rival)
    assert all(value == value for value in norms.values())


@pytest.mark.parametrize("tail", ["1.mixer.hook_z", "1.mixer.hook_pattern", "3.mixer.hook_k", "2.mixer.hook_post"])
def test_a_hook_at_absolute_positions_of_a_growing_text_is_that_of_one_run(model: HookedMamba, tail: str) -> None:
    site, seen = f"blocks.{tail}[6]", []

    def zero(value: Tensor, hook: Any) -> Tensor:
        seen.append(hook.pos)
        return value * 0

    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    with torch.no_grad(), model.hooks([(site, zero)]):
        text = model.generate(INPUT[:, :5], max_new_tokens=5)
        assert seen == [6]
        want = model(text)[:, 4:-1].argmax(-1)
        assert torch.equal(text[:, 5:], want)
        rows = model.generate(INPUT[:, :5], max_new_tokens=6, attention_mask=mask)
        for row, n in zip(rows, (5, 3), strict=True):
            assert torch.equal(row[n:], model(row[None])[0, n - 1 : -1].argmax(-1))


def test_a_cache_that_continued_a_text_is_read_back_from_its_file(model: HookedMamba, tmp_path: Any) -> None:
    _, state = model(INPUT[:, :5], return_state=True)
    _, cache = model.run_with_cache(INPUT[:, 5:], state=state)
    cache.save(tmp_path / "c.safetensors")
    again = ms.load_cache(tmp_path / "c.safetensors", model)
    whole = plain(model, "blocks.1.mixer.hook_pattern")[:, :, 5:]
    for found in (cache, again):
        torch.testing.assert_close(found["pattern", 1], whole, rtol=0, atol=1e-12)
    assert again["pattern", 3].shape == (2, 4, LENGTH - 5, LENGTH - 5 + 3)  # a window of 4 keeps 3 positions


def test_nnsight_reads_and_edits_the_points_of_every_kind_of_layer(model: HookedMamba) -> None:
    lm, want = ms.wrap(model), model(INPUT)
    with lm.trace(INPUT):
        q = lm.hooks["blocks.1.mixer.hook_q"].output.save()
        row = lm.site("blocks.1.mixer.hook_pattern[3]").output.save()
        lm.site("blocks.2.mixer.hook_post[3]").output[:] = 0
        out = lm.output.save()
    torch.testing.assert_close(q, plain(model, "blocks.1.mixer.hook_q"), rtol=0, atol=1e-12)
    torch.testing.assert_close(row, plain(model, "blocks.1.mixer.hook_pattern")[:, :, 3], rtol=0, atol=1e-12)
    edited = model.run_with_hooks(INPUT, fwd_hooks=[("blocks.2.mixer.hook_post[3]", lambda v, hook: v * 0)])
    torch.testing.assert_close(out, edited, rtol=0, atol=1e-12)
    assert (out - want).abs().max() > 1e-8


def test_transformer_lens_patches_heads_where_layers_are_attention() -> None:
    from transformer_lens import patching

    torch.manual_seed(0)
    model = HookedMamba(MambaConfig(d_model=32, n_layers=2, d_vocab=V, pattern="a", n_heads=4))
    clean, corrupted = INPUT[:1], INPUT[1:]

    def metric(logits: Tensor) -> Tensor:
        return (logits[0, -1, 3] - logits[0, -1, 7]).detach()

    _, cache = model.run_with_cache(clean)
    found = patching.get_act_patch_attn_head_by_pos_every(model, corrupted, cache, metric)  # type: ignore[arg-type]
    assert found.shape == (5, 2, LENGTH, 4)

    def head(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, 4, 2] = cache["z", 1][:, 4, 2]
        return value

    want = metric(model.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.mixer.hook_z", head)]))
    assert abs(float(found[0, 1, 4, 2] - want)) < 1e-6

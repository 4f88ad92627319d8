"""Attribution predicts what small patches do, at every site and on every path; it is gradient × difference."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mambascope as ms
from mambascope.errors import HookError, InputError
from mambascope.hooks import attribution
from mambascope.hooks.points import LAZY, points_of
from mambascope.hooks.sweeps.watch import Watch
from mambascope.model import HookedMamba
from tests.conftest import error, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*mostly noise")
SITES = ("resid_pre", "u", "delta", "B", "C", "h")
METRIC = ms.LogitDifference(1, 2)
CORRUPTED = torch.tensor([[5, 9, 14, 3, 8, 20, 14, 7, 30, 11, 6, 9, 2], [9, 5, 3, 14, 8, 7, 14, 20, 3, 1, 6, 30, 8]])


def neighbours(model: HookedMamba, step: float) -> Tensor:
    """A clean text whose tokens 14 and 3 are others, ``step`` away in the embedding."""
    with torch.no_grad():
        away = torch.randn(2, model.cfg.d_model, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        scale = model.W_E.std() * step
        for new, old, direction in ((40, 14, away[0]), (41, 3, away[1])):
            model.W_E[new] = model.W_E[old] + scale * direction.to(model.dtype)
    return torch.where(CORRUPTED == 14, 40, torch.where(CORRUPTED == 3, 41, CORRUPTED))


def both(model: HookedMamba, step: float) -> tuple[ms.Sweep, ms.Sweep]:
    clean = neighbours(model, step)
    measured = ms.sweep(model, clean, CORRUPTED, METRIC, SITES)
    return measured, ms.attribute(model, clean, CORRUPTED, METRIC, SITES)


def miss(measured: Tensor, predicted: Tensor) -> float:
    return float((predicted - measured).norm() / measured.norm())


@pytest.mark.parametrize("exact", ["reference", "torch"])
def test_small_patches_do_what_it_predicts_and_the_miss_falls_with_their_size(exact: str) -> None:
    model = make_model(dtype=torch.float64, backend=exact)
    misses = []
    for step in (4e-3, 2e-3, 1e-3):
        measured, predicted = both(model, step)
        for s, site in enumerate(measured.sites):
            x, y = measured.change[s].flatten(), predicted.change[s].flatten()
            assert float(torch.corrcoef(torch.stack([x, y]))[0, 1]) > 0.99, site
            misses.append((site, miss(x, y)))
    for s, site in enumerate(measured.sites):
        first, second, third = (misses[s + k * len(SITES)][1] for k in range(3))
        assert 0.4 < second / first < 0.6, site  # linear: half the step, half the relative error
        assert 0.4 < third / second < 0.6, site
        assert third < 0.02, site


def test_a_wrong_sign_would_be_seen() -> None:
    measured, predicted = both(make_model(dtype=torch.float64, backend="torch"), 1e-3)
    assert miss(measured.change, -predicted.change) > 1.9


ANY = [s.name for s in points_of("m") if s.scope == "block" and s.name not in LAZY - {"mixer.hook_h"}]


def test_every_path_predicts_the_same_at_every_point(backend: str) -> None:
    wide, model = make_model(dtype=torch.float64, backend="torch"), make_model(backend=backend)
    clean = neighbours(wide, 1.0)
    neighbours(model, 1.0)
    want = ms.attribute(wide, clean, CORRUPTED, METRIC, ANY).change
    got = ms.attribute(model, clean, CORRUPTED, METRIC, ANY).change
    for s, site in enumerate(ANY):
        assert error(got[s], want[s]) < 1e-4, site


def by_hand(model: HookedMamba, clean: Tensor, corrupted: Tensor, site: str, layer: int, p: int) -> float:
    """⟨gradient, difference⟩ from a backward hook and two caches."""
    name, grads = f"blocks.{layer}.{site}", []
    with torch.no_grad():
        (_, good), (_, bad) = (model.run_with_cache(x) for x in (clean, corrupted))
        apart = good[name][:, p] - bad[name][:, p]
    logits = model.run_with_hooks(corrupted, bwd_hooks=[(f"{name}[{p}]", lambda g, hook: grads.append(g.clone()))])
    (logits[:, -1, 1] - logits[:, -1, 2]).mean().backward()
    return float((grads[0] * apart).sum())


def test_it_is_gradient_times_difference_at_every_point() -> None:
    model = make_model(dtype=torch.float64)
    clean = CORRUPTED.clone()
    clean[:, [3, 8]] += 1
    found = ms.attribute(model, clean, CORRUPTED, METRIC, ANY)
    for s, site in enumerate(found.grid.sites):
        for layer, p in ((0, 3), (1, 9), (2, 12)):
            want = by_hand(model, clean, CORRUPTED, site, layer, p)
            assert abs(float(found.change[s, layer, p, 0]) - want) < 1e-9, site
    assert not any(parameter.grad is not None and parameter.grad.isnan().any() for parameter in model.parameters())


def test_what_is_read_in_passing_is_what_every_point_shows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites before the scan come from passes that stop at no point; both texts from one, where that is faster."""
    model, sites = make_model(backend=backend), ["u", "delta", "B", "C", "h", "u_write", "resid_pre"]
    clean = neighbours(model, 1.0)
    found = ms.attribute(model, clean, CORRUPTED, METRIC, sites).change
    monkeypatch.setitem(attribution._TOGETHER, "cpu", 1 << 13)
    rows: list[int] = []
    embed = model.embed.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    ms.attribute(model, clean, CORRUPTED, METRIC, sites)
    assert rows == [4]
    embed.remove()
    together = ms.attribute(model, clean, CORRUPTED, METRIC, sites).change
    monkeypatch.setattr(Watch, "only_inputs", lambda self: False)
    walked = ms.attribute(model, clean, CORRUPTED, METRIC, sites).change
    for other in (together, walked):
        assert error(other, found) < 1e-5
    with model.hooks([("blocks.1.hook_resid_pre", lambda v, hook: None)]):  # hooks see each text by itself
        rows.clear()
        with model.hooks([("hook_embed", lambda v, hook: rows.append(len(v)))]):
            ms.attribute(model, clean, CORRUPTED, METRIC, sites)
    assert rows == [2, 2]


@pytest.mark.parametrize("align", ["start", "end"])
@pytest.mark.parametrize("longer", ["clean", "corrupted"])
def test_texts_of_other_lengths(align: Any, longer: str) -> None:
    model = make_model(dtype=torch.float64)
    long = torch.randint(0, 40, (1, 75), generator=torch.Generator().manual_seed(3))
    short = long[:, 4:72].clone()
    short[:, [5, 60]] += 1
    clean, corrupted = (long, short) if longer == "clean" else (short, long)
    found = ms.attribute(model, clean, corrupted, METRIC, ["resid_pre", "h"], align=align)
    for s, site in enumerate(found.grid.sites):
        name = f"blocks.1.{site}"
        with torch.no_grad():
            (_, good), (_, bad) = (model.run_with_cache(x) for x in (clean, corrupted))
        for k in (0, 30, 66, 67):
            p = found.grid.positions[k]
            grads: list[Tensor] = []
            hooks = [(f"{name}[{p}]", lambda g, hook, grads=grads: grads.append(g.clone()))]
            logits = model.run_with_hooks(corrupted, bwd_hooks=hooks)
            (logits[:, -1, 1] - logits[:, -1, 2]).mean().backward()
            apart = good[name][:, p % clean.shape[1]] - bad[name][:, p % corrupted.shape[1]]
            assert abs(float(found.change[s, 1, k, 0]) - float((grads[0] * apart).sum())) < 1e-9


def test_pairs_of_different_lengths_and_answers() -> None:
    model = make_model(dtype=torch.float64)
    clean, corrupted = [[1, 2, 3, 4], [5, 6, 7, 8, 9], [4, 4, 3, 1]], [[1, 5, 3, 4], [5, 2, 7, 8, 9], [4, 4, 6, 1]]
    metric = ms.LogitDifference([1, 2, 3], [4, 5, 6])
    found = ms.attribute(model, clean, corrupted, metric, SITES, align="end")
    alone = [
        ms.attribute(model, [a], [b], ms.LogitDifference(r, w), SITES, align="end").change[:, :, -4:]
        for a, b, r, w in zip(clean, corrupted, (1, 2, 3), (4, 5, 6), strict=True)
    ]
    assert error(found.change, torch.stack(alone).mean(0)) < 1e-10


def test_groups_of_channels_add_up() -> None:
    model = make_model()
    clean = neighbours(model, 1.0)
    for site, width in (("h", 48), ("u", 48), ("resid_pre", 24)):
        whole = ms.attribute(model, clean, CORRUPTED, METRIC, site)
        parts = ms.attribute(model, clean, CORRUPTED, METRIC, {"sites": site, "channels": [range(5), range(5, width)]})
        assert error(parts.change.sum(-1, keepdim=True), whole.change) < 1e-5
        assert parts.values.shape[-1] == 2


def test_integrated_gradients_add_up_to_the_difference() -> None:
    model = make_model(dtype=torch.float64)
    clean = CORRUPTED.clone()
    clean[:, [3, 8]] += 1
    misses = []
    for steps in (4, 16, 64):
        found = ms.attribute(model, clean, CORRUPTED, METRIC, ["resid_pre", "h"], steps=steps)
        misses.append(abs(float(found.change[0, 0].sum()) - (found.clean - found.corrupted)))
    assert misses[2] < 1e-3 * abs(found.clean - found.corrupted)
    assert misses[2] < misses[1] < misses[0]
    plain = ms.attribute(model, clean, CORRUPTED, METRIC, ["resid_pre", "h"])
    assert float((plain.change[1] - found.change[1]).abs().max()) > 1e-3  # at h, too, it is another mean
    with pytest.raises(InputError, match="steps must be a positive number"):
        ms.attribute(model, clean, CORRUPTED, METRIC, steps=0)
    with pytest.raises(InputError, match="as many tokens each"):
        ms.attribute(model, clean, CORRUPTED[:, 1:], METRIC, steps=2, align="end")


def test_hooks_in_force_take_part() -> None:
    model = make_model(dtype=torch.float64)
    clean = CORRUPTED.clone()
    clean[:, [3, 8]] += 1
    hooks = [
        ("blocks.1.hook_resid_pre[5]", lambda old, hook: old * 2),
        ("blocks.1.mixer.hook_h[4]", lambda old, hook: old * 0.5),
    ]
    with model.hooks(fwd_hooks=hooks):
        found = ms.attribute(model, clean, CORRUPTED, METRIC, ["mixer_in", "delta"])
        for s, site in enumerate(found.grid.sites):
            for layer, p in ((0, 3), (1, 5), (1, 9)):
                want = by_hand(model, clean, CORRUPTED, site, layer, p)
                assert abs(float(found.change[s, layer, p, 0]) - want) < 1e-9
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_mixer_out", lambda value, hook: value.detach())]),
        pytest.raises(HookError, match=r"no gradient arrives at blocks\.1\.mixer\.hook_delta"),
    ):
        ms.attribute(model, clean, CORRUPTED, METRIC, "delta")


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.most = max(self.most, x.numel())
        return out


def test_states_are_never_held() -> None:
    model = make_model(backend="cpu", d_vocab=50, d_state=16)
    clean = torch.randint(0, 50, (1, 640), generator=torch.Generator().manual_seed(3))
    with Largest() as seen:
        ms.attribute(model, clean, clean.roll(1, 1), METRIC, "h")
    channels, states = model.cfg.d_inner, model.cfg.d_state
    assert 640 * channels <= seen.most <= 2 * 640 * channels
    assert seen.most < 640 * channels * states / 4


def test_it_leaves_no_trace() -> None:
    model = make_model()
    with torch.no_grad():  # the caller's mode does not matter
        ms.attribute(model, neighbours(model, 1.0), CORRUPTED, METRIC, SITES)
    assert all(p.grad is None for p in model.parameters())
    assert not any(point.live for point in model.hook_dict.values())
    for p in model.parameters():
        p.requires_grad_(False)
    assert float(ms.attribute(model, neighbours(model, 1.0), CORRUPTED, METRIC, "h").change.abs().max()) > 0


def test_metrics_without_a_gradient() -> None:
    model = make_model()
    clean = neighbours(model, 1.0)
    with pytest.raises(InputError, match="Rank has no gradient"):
        ms.attribute(model, clean, CORRUPTED, ms.Rank(3))
    with pytest.raises(InputError, match="has no gradient: what it returned does not depend on the logits"):
        ms.attribute(model, clean, CORRUPTED, lambda logits: logits[:, -1].argmax(-1).float().mean())
    with pytest.raises(InputError, match="has no gradient"):
        ms.attribute(model, clean, CORRUPTED, lambda logits: logits.mean().item())
    with pytest.raises(InputError, match="it must return one number"):
        ms.attribute(model, clean, CORRUPTED, lambda logits: logits[:, -1, 0])
    with pytest.raises(InputError, match="is nan on the clean text"):
        ms.attribute(model, clean, CORRUPTED, lambda logits: logits.mean() * float("nan"))
    with pytest.raises(InputError, match="is NaN or infinite"):
        ms.attribute(model, clean, CORRUPTED, lambda logits: (logits.mean() * 0).sqrt())
    for metric in (ms.Loss(), ms.KL(), ms.Probability(3), ms.LogProbability(3)):
        assert bool(ms.attribute(model, clean, CORRUPTED, metric, "h").change.isfinite().all())

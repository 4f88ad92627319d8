"""A layer as a convolution: FFT, recurrence and explicit kernel agree; freezing costs nothing where nothing varies."""

import math

import pytest
import torch
from hand_built import random_model
from torch import Tensor

from mambascope import ops
from mambascope.analyses import Selection, freezing_cost, lti_view, mean_selection, read, repeated_tokens
from mambascope.analyses.lti import lti_kernel
from mambascope.errors import CacheError, InputError
from mambascope.model import HookedMamba
from mambascope.ops.lti import fft_convolve


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def time_invariant_model(seed: int = 0) -> HookedMamba:
    """delta, B and C read one channel only, whose u is silu(bias) at every token."""
    model = random_model(seed)
    with torch.no_grad():
        for block in model.blocks:
            mixer = block.mixer
            mixer.conv1d.weight[0] = 0
            mixer.conv1d.bias[0] = 1.5
            mixer.x_proj.weight[:, 1:] = 0
            mixer.x_proj.weight[:, 0] *= 4
            mixer.out_proj.weight *= 20
    return model


def parts(L: int, D: int, N: int, dtype: torch.dtype, low: float = 1e-3, high: float = 0.5) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(L * 100 + N)
    delta = torch.exp(torch.rand(D, generator=g, dtype=torch.float64) * math.log(high / low) + math.log(low))
    A = -torch.arange(1, N + 1, dtype=torch.float64).repeat(D, 1) * (0.5 + torch.rand(D, 1, generator=g))
    B, C = (torch.randn(N, generator=g, dtype=torch.float64) for _ in range(2))
    u = torch.randn(L, D, generator=g, dtype=torch.float64)
    return tuple(v.to(dtype) for v in (delta, A, B, C, u))


@pytest.mark.parametrize("N", [1, 7, 16])
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize(("low", "high"), [(1e-3, 0.5), (20, 60), (1e-9, 1e-8)])
def test_fft_recurrence_and_explicit_kernel_agree(L: int, N: int, low: float, high: float) -> None:
    delta, A, B, C, u = parts(L, 6, N, torch.float64, low, high)
    kernel = torch.stack([(torch.exp(A * delta[:, None]) ** j * B * C).sum(1) * delta for j in range(L)])
    explicit = torch.stack([(kernel[: t + 1].flip(0) * u[: t + 1]).sum(0) for t in range(L)])
    steps = [v.expand(L, -1)[None] for v in (u, delta, B, C)]
    recurrence = ops.selective_scan(steps[0], steps[1], A, steps[2], steps[3]).y[0]
    single = [v.float() for v in (delta, A, B, C)]
    assert error(lti_kernel(*single, L), kernel) < 1e-5
    fft = fft_convolve(lti_kernel(*single, L), u.float())
    assert fft.dtype == torch.float32
    assert error(fft, explicit) < 1e-5
    assert error(fft, recurrence) < 1e-5
    if low > 1e-6:  # below, a float32 recurrence rounds its decay to 1 and drifts from the truth by 3e-5
        steps = [v.float() for v in steps]
        assert error(fft, ops.selective_scan(steps[0], steps[1], A.float(), steps[2], steps[3]).y[0]) < 1e-5
    assert error(fft_convolve(lti_kernel(delta, A, B, C, L), u), explicit) < 1e-12


def test_the_comparison_can_fail_and_nothing_wraps_around() -> None:
    delta, A, B, C, u = parts(65, 6, 7, torch.float32)
    right = fft_convolve(lti_kernel(delta, A, B, C, 65), u)
    assert error(fft_convolve(lti_kernel(delta * 1.01, A, B, C, 65), u), right) > 1e-3
    late = torch.zeros_like(u)
    late[-1] = 1  # only the last step may hear it
    heard = fft_convolve(lti_kernel(delta, A, B, C, 65), late)
    assert float(heard[:-1].abs().max()) < 1e-6 * float(heard[-1].abs().max())
    batch = torch.stack([u, 2 * u])
    assert torch.allclose(fft_convolve(lti_kernel(delta, A, B, C, 65), batch)[1], 2 * right)
    short = fft_convolve(lti_kernel(delta, A, B, C, 3), u)  # a kernel of three taps
    k = lti_kernel(delta, A, B, C, 3)
    assert torch.allclose(short[10], k[0] * u[10] + k[1] * u[9] + k[2] * u[8], atol=1e-6)


def test_channels_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    delta, A, B, C, u = parts(65, 6, 7, torch.float64)
    whole = fft_convolve(lti_kernel(delta, A, B, C, 65), u)
    monkeypatch.setattr("mambascope.ops.lti._BLOCK", 300)
    assert torch.allclose(fft_convolve(lti_kernel(delta, A, B, C, 65), u), whole, atol=1e-12)


def test_by_hand() -> None:
    # N = 1, A = -1, delta = ln 2: halves each step; B = 2, C = 3: k = 6 ln 2 · (1, 1/2, 1/4, …)
    ln2 = torch.tensor([math.log(2)], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    k = lti_kernel(ln2, -one[None], 2 * one, 3 * one, 4)
    assert k[:, 0].tolist() == pytest.approx([6 * math.log(2) * 0.5**j for j in range(4)])
    y = fft_convolve(k, torch.tensor([[1.0], [0], [4], [0]], dtype=torch.float64))
    assert y[:, 0].tolist() == pytest.approx([6 * math.log(2) * x for x in (1, 0.5, 4.25, 2.125)])


def test_the_spectrum_is_the_kernels(random, ids: Tensor) -> None:
    found = lti_view(random, ids, 1)
    long = found.kernel(1 << 15)  # until everything has died away
    f = torch.tensor([0.0, 0.03125, 0.25, 0.5])
    j = torch.arange(len(long), dtype=torch.float64)
    direct = torch.stack([(long * torch.polar(torch.ones_like(j), -2 * math.pi * x * j)[:, None]).sum(0) for x in f])
    slow = found.time_constants.amax(1) < 1 << 10
    assert bool(slow.any())
    assert error(torch.view_as_real(found.response(f)[:, slow]), torch.view_as_real(direct[:, slow])) < 1e-5
    assert torch.allclose(found.time_constants, 1 / (found.A.abs() * found.delta[:, None]))
    table = found.table()
    assert table["gain"].tolist() == pytest.approx(found.response(torch.zeros(1))[0].real.tolist())
    assert float(table["explained"][3]) == pytest.approx(float(found.by_channel[3]))


def test_a_slow_channel_has_a_finite_gain() -> None:
    tiny = torch.tensor([1e-9], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    from mambascope.analyses.lti import LTILayer

    layer = LTILayer(0, tiny, -one[None], one, one, one, one, 4)
    assert layer.response(torch.zeros(1))[0, 0].real.item() == pytest.approx(1.0)  # delta / (1 - exp(-delta))


def test_means(random, ids: Tensor) -> None:
    other = (ids[:, :30] + 3) % 40
    _, cache = random.run_with_cache(ids)
    _, second = random.run_with_cache(other)
    found = mean_selection(random, ids)
    assert torch.allclose(found.delta[1], cache["delta", 1][0].double().mean(0))
    assert torch.allclose(mean_selection(random, cache).C, found.C)
    sample = mean_selection(random, [ids[0], other[0]], layers=[2])
    both = torch.cat([cache["B", 2][0], second["B", 2][0]]).double().mean(0)
    assert torch.allclose(sample.B[0], both)
    assert (sample.tokens, sample.layers) == (105, (2,))
    rows = mean_selection(random, torch.cat([ids, ids.flip(1)]))
    assert rows.tokens == 150


def test_a_time_invariant_layer_is_a_convolution(ids: Tensor) -> None:
    model = time_invariant_model()
    for layer in range(3):
        found = lti_view(model, ids, layer)
        assert found.explained > 1 - 1e-9
        _, cache = model.run_with_cache(ids)
        u, y = cache["u_write", layer], cache["y", layer]
        assert error(found.convolve(u), y) < 1e-5
    _, state = model(ids, return_state=True)
    _, later = model.run_with_cache(ids.flip(1), state=state)  # a text that goes on
    assert lti_view(model, later, 0).explained > 1 - 1e-9


def test_an_untrained_layer_is_not_one(ids: Tensor) -> None:
    for seed in range(3):
        model = random_model(seed, n_layers=1)
        assert abs(lti_view(model, ids, 0).explained) < 0.4  # B and C average out
    given = mean_selection(model, ids)
    spoilt = Selection(given.layers, given.delta, given.B, -given.C)
    assert lti_view(time_invariant_model(), ids, 0, selection=spoilt).explained < 0.9


def test_freezing_what_is_constant_costs_nothing(ids: Tensor) -> None:
    model = time_invariant_model()
    found = freezing_cost(model, ids)
    constant = found.rise[:, :4]
    assert float(constant.abs().max()) <= 1e-6
    assert float(found.together[:4].abs().max()) <= 1e-6
    assert float(found.rise[:, 4].abs().max()) > 1e-3  # the scans do matter
    lively = freezing_cost(random_model(0), ids)
    assert float(lively.rise[:, :4].abs().max()) > 1e-6  # and the check can fail


def test_freezing_is_the_hooked_run(random, ids: Tensor) -> None:
    held = mean_selection(random, ids, layers=[1])
    found = freezing_cost(random, ids, layers=[1])
    hook = ("blocks.1.mixer.hook_C", lambda v, hook: held.C[0].to(v).expand_as(v).clone())
    frozen = random.run_with_hooks(ids, return_type="loss", fwd_hooks=[hook])
    clean = random(ids, return_type="loss").detach()
    frozen = frozen.detach()
    assert found.loss == pytest.approx(float(clean), rel=1e-6)
    assert float(found.rise[0, 2]) == pytest.approx(float(frozen - clean), abs=1e-6)
    assert found.table()["C"][0] == float(found.rise[0, 2])
    assert found.table()["layer"].tolist() == ["1", "all at once"]
    assert torch.allclose(found.together, found.rise[0])
    assert torch.equal(random(ids, return_type="loss"), clean)  # no hook is left behind


def test_recall_is_no_convolution(recall) -> None:
    """What looks a token up by content is lost when B or C is held; on unrelated tokens there is nothing to lose."""
    repeated = repeated_tokens(recall, 10, 4, seed=1)
    found = freezing_cost(recall, repeated)
    delta, B, C, every, removed = found.rise[0].tolist()
    assert abs(delta) < 1e-6  # delta is 1 throughout
    assert min(B, C, every) > 0.5
    assert abs(found.kept_together - (1 - every / removed)) < 1e-12
    assert found.kept_together < 0.5
    shuffled = repeated_tokens(recall, 10, 4, seed=1, repeat=False)
    at_chance = freezing_cost(recall, shuffled)
    assert float(at_chance.rise[0, 4]) < 0  # its recall only misleads, and is better removed
    assert math.isnan(float(at_chance.kept[0]))


def test_an_untrained_model_loses_nothing_by_it(ids: Tensor) -> None:
    rises = []
    for seed in range(4):
        found = freezing_cost(random_model(seed), ids)
        rises.append((found.rise[:, 3] / found.error[:, 3]).flatten())
    z = torch.cat(rises)
    assert float(z.mean().abs()) < 1.5
    assert float(z.abs().max()) < 4


def test_bad_input(random, ids: Tensor) -> None:
    given = mean_selection(random, ids)
    with pytest.raises(InputError, match="give texts or ids, not a cache"):
        freezing_cost(random, read(random, ids))
    with pytest.raises(InputError, match="the loss needs at least two tokens"):
        freezing_cost(random, [3])
    with pytest.raises(InputError, match="layer 7 is outside"):
        lti_view(random, ids, 7)
    with pytest.raises(InputError, match="length must be a positive"):
        lti_view(random, ids, 0).kernel(0)
    with pytest.raises(InputError, match=r"the kernel must be K 32"):
        fft_convolve(torch.ones(3, 4), torch.ones(5, 32))
    with pytest.raises(InputError, match=r"Selection's delta has shape \(3, 31\), expected \(3, 32\)"):
        freezing_cost(random, ids, selection=Selection(given.layers, given.delta[:, 1:], given.B, given.C))
    with pytest.raises(InputError, match="Selection's B holds NaN"):
        freezing_cost(random, ids, selection=Selection(given.layers, given.delta, given.B * math.nan, given.C))
    with pytest.raises(InputError, match="delta is negative"):
        lti_view(random, ids, 0, selection=Selection(given.layers, -given.delta, given.B, given.C))
    with pytest.raises(InputError, match="has no layer 1; it has 0"):
        freezing_cost(random, ids, selection=mean_selection(random, ids, layers=[0]))
    with pytest.raises(InputError, match="channels is empty: name at least one"):
        lti_view(random, ids, 0).figure([])
    model = random_model(4)
    reading = read(model, ids)
    model.blocks[1].mixer = torch.nn.Identity()
    with pytest.raises(InputError, match="layer 1 has no selective scan"):
        lti_view(model, reading, 1)


def test_edited_blocks(random, ids: Tensor) -> None:
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_delta", lambda v, hook: torch.full_like(v, 0.25))]):
        _, cache = random.run_with_cache(ids)
    assert torch.equal(lti_view(random, cache, 1).delta, torch.full((32,), 0.25, dtype=torch.float64))  # honoured
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_y[5]", lambda v, hook: 2 * v)]):
        _, cache = random.run_with_cache(ids)
    with pytest.raises(CacheError, match="layer 1: a hook edited hook_h or hook_y at position 5"):
        lti_view(random, cache, 1)


def test_one_token(random) -> None:
    found = lti_view(random, [3], 0)
    assert found.explained == pytest.approx(1.0)  # one token is its own mean
    assert found.kernel().shape == (1, 32)


def test_figures(random, ids: Tensor) -> None:
    found = lti_view(random, ids, 0)
    curves = found.figure([4, -1], length=20)
    assert [trace.name for trace in curves.data] == ["channel 4", "channel 31"]
    assert list(curves.data[0].y) == found.kernel(20)[:, 4].tolist()
    spectrum = found.spectrum_figure(points=9)
    assert len(spectrum.data) == 6
    assert spectrum.layout.yaxis.type == "log"
    bars = freezing_cost(random, ids).figure()
    assert [trace.name for trace in bars.data] == ["delta", "B", "C", "all"]

"""The numba convolution, norm and elementwise kernels: float64 truth, and fused equal to apart."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("numba")

from mambascope.ops import cpu
from mambascope.ops.cpu import threads
from mambascope.ops.cpu.elementwise import fold

CONV_SHAPES = [(1, 1, 1, 1), (2, 5, 20, 4), (3, 65, 33, 3), (2, 2, 16, 8), (1, 130, 48, 2), (2, 129, 40, 4)]  # B L D K


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    assert torch.isfinite(found).all()
    return float((found.double() - truth).detach().abs().max() / truth.abs().max()) if truth.numel() else 0.0


def conv_problem(batch: int, length: int, channels: int, width: int) -> list[Tensor]:
    "x (one half of a wider tensor), weight, bias, state, lengths"
    x = torch.randn(batch, length, 2 * channels)[:, :, channels:]
    state = torch.randn(batch, channels, width - 1)
    lengths = torch.randint(0, length + 1, (batch,))
    return [x, torch.randn(channels, width), torch.randn(channels), state, lengths]


def conv_truth(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    past = weight.shape[1] - 1
    before = x.new_zeros(batch, channels, past) if state is None else state
    full = torch.cat((before, x.transpose(1, 2)), 2)
    y = F.conv1d(full, weight[:, None], bias, groups=channels).transpose(1, 2)
    ends = [length] * batch if lengths is None else lengths.tolist()
    new = torch.stack([full[b, :, end : end + past] for b, end in enumerate(ends)])
    return (F.silu(y) if silu else y), new


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", CONV_SHAPES)
def test_convolution(shape: tuple[int, ...], silu: bool) -> None:
    args = conv_problem(*shape)
    y, state = cpu.conv_forward(*args, silu=silu)
    truth = conv_truth(*(a.double() if a.is_floating_point() else a for a in args), silu)
    assert error(y, truth[0]) < 6e-7
    assert torch.equal(state.double(), truth[1])


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", CONV_SHAPES)
def test_convolution_gradients(shape: tuple[int, ...], silu: bool) -> None:
    args = conv_problem(*shape)
    wide = [a.double().requires_grad_() for a in args[:4]]
    y, state = conv_truth(*wide, args[4], silu)
    seeds = torch.randn(y.shape), torch.randn(state.shape)
    truth = torch.autograd.grad((y, state), wide, [s.double() for s in seeds])
    found = cpu.conv_backward(*args, *seeds, silu=silu)
    for name, t in zip(("dx", "dweight", "dbias", "dstate"), truth, strict=True):
        assert error(found[name], t) < 1e-6, name


def test_convolution_without_bias_state_and_lengths() -> None:
    x, weight, *_ = conv_problem(2, 9, 20, 4)
    y, state = cpu.conv_forward(x, weight, None, None, None, silu=True)
    zeros = torch.zeros(2, 20, 3)
    assert torch.equal(y, cpu.conv_forward(x, weight, torch.zeros(20), zeros, torch.tensor([9, 9]), silu=True)[0])
    assert torch.equal(state, x[:, 6:].transpose(1, 2))
    found = cpu.conv_backward(x, weight, None, None, None, torch.ones_like(y), None, silu=True)
    assert found["dbias"] is None
    assert found["dstate"] is None
    wide = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(conv_truth(wide, weight.double(), None, None, None, True)[0].sum(), wide)
    assert error(found["dx"], truth) < 1e-6


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_convolution_cut_at_any_position(width: int) -> None:
    x, weight, bias, state, _ = conv_problem(2, 12, 20, width)
    y, end = cpu.conv_forward(x, weight, bias, state, None, silu=True)
    for cut in range(1, 12):
        first, between = cpu.conv_forward(x[:, :cut], weight, bias, state, None, silu=True)
        second, last = cpu.conv_forward(x[:, cut:], weight, bias, between, None, silu=True)
        assert torch.equal(torch.cat((first, second), 1), y)
        assert torch.equal(last, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_activation_is_the_lone_one(dtype: torch.dtype) -> None:
    x, weight, bias, state, lengths = conv_problem(2, 33, 37, 4)
    args = (x.to(dtype), weight.to(dtype), bias.to(dtype), state.to(dtype), lengths)
    fused, apart = cpu.conv_forward(*args, silu=True), cpu.conv_forward(*args, silu=False)
    assert fused[0].dtype == fused[1].dtype == dtype
    assert torch.equal(fused[0], cpu.silu_forward(apart[0]))


def test_convolution_does_not_depend_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    args = conv_problem(3, 200, 100, 4)
    y, _ = cpu.conv_forward(*args, silu=True)
    gradients = cpu.conv_backward(*args, torch.ones_like(y), None, silu=True)
    monkeypatch.setattr(threads, "GRAIN", 0)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(y, cpu.conv_forward(*args, silu=True)[0])
            again = cpu.conv_backward(*args, torch.ones_like(y), None, silu=True)
            assert all(torch.equal(gradients[k], again[k]) for k in gradients)
    finally:
        torch.set_num_threads(before)


def test_long_sums_keep_their_digits() -> None:
    x, weight, bias, state, _ = conv_problem(1, 20000, 16, 4)
    dy = torch.rand(1, 20000, 16)
    found = cpu.conv_backward(x, weight, bias, state, None, dy, None, silu=False)["dbias"]
    assert error(found, dy.double().sum((0, 1))) < 1e-6


def test_softplus_keeps_its_relative_precision() -> None:
    x = torch.cat((torch.linspace(-86.9, 100, 100_003), torch.linspace(-1, 1, 1001), torch.tensor([0.0, 20.0, 20.01])))
    found, truth = cpu.softplus_forward(x), F.softplus(x.double(), threshold=1e9)
    assert float(((found - truth) / truth).abs().max()) < 4e-7
    edges = cpu.softplus_forward(torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38]))
    assert torch.equal(edges.nan_to_num(-1.0, posinf=1.0), torch.tensor([1.0, 0.0, -1.0, 3e38, 0.0]))


def test_silu_and_gate() -> None:
    z = torch.cat((torch.linspace(-80, 80, 10_001), torch.linspace(-1, 1, 101)))
    y = torch.randn_like(z)
    truth = F.silu(z.double())
    assert float(((cpu.silu_forward(z) - truth) / truth.abs().clamp_min(1e-30)).abs().max()) < 5e-7
    assert torch.equal(cpu.gate_forward(y, z), y * cpu.silu_forward(z))
    assert torch.isnan(cpu.silu_forward(torch.tensor([torch.nan]))).all()


@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (2, 3, 37), (2, 0, 4), (1, 2, 5000), (2, 3, 4, 5)])
def test_elementwise_takes_any_shape_and_any_strides(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    views = (
        [x]
        if len(shape) < 3
        else [x, torch.cat((x, x), -1)[..., : shape[-1]], x.transpose(0, 1).contiguous().transpose(0, 1)]
    )
    for view in views:
        assert torch.equal(cpu.softplus_forward(view), cpu.softplus_forward(x.flatten()).view(shape))
        assert torch.equal(cpu.gate_forward(view, x), cpu.gate_forward(x.flatten(), x.flatten()).view(shape))
        assert torch.equal(cpu.gate_forward(x, view), cpu.gate_forward(view, view))
    low = cpu.gate_forward(x, x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert cpu.softplus_forward(x.bfloat16()).dtype == torch.float32


def test_fold_adds_in_order() -> None:
    parts = torch.randn(7, 5, 1001)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert torch.equal(fold(parts), total)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33, 64, 768, 1000])
def test_norm(columns: int) -> None:
    x, weight = torch.randn(2, 5, columns + 3)[:, :, 3:] * 3, torch.randn(columns)
    out, normalized, scale = cpu.norm_forward(x, weight, 1e-5, expose=True)
    truth = torch.sqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    assert normalized is not None
    assert scale is not None
    assert error(scale, truth) < 3e-7
    assert error(out, x / truth * weight) < 3e-7
    assert torch.equal(normalized, x / scale)  # so that a hook on the scale can go on from here
    assert torch.equal(out, normalized * weight)
    assert torch.equal(out, cpu.norm_forward(x, weight, 1e-5, expose=False)[0])
    assert torch.equal(normalized, cpu.norm_forward(x, None, 1e-5, expose=False)[0])
    assert torch.equal(out[1, 2], cpu.norm_forward(x[1, 2], weight, 1e-5, expose=False)[0])


def test_norm_dtypes() -> None:
    x, weight = torch.randn(2, 3, 40), torch.randn(40).bfloat16()
    out, normalized, scale = cpu.norm_forward(x, weight, 1e-5, expose=True)
    assert (out.dtype, normalized.dtype, scale.dtype) == (torch.bfloat16, torch.float32, torch.float32)  # type: ignore[union-attr]
    assert torch.equal(out, (normalized * weight.float()).bfloat16())  # type: ignore[operator]
    assert cpu.norm_forward(x.bfloat16(), None, 1e-5, expose=False)[0].dtype == torch.bfloat16
    assert torch.isnan(cpu.norm_forward(torch.full((1, 1, 4), torch.nan), None, 1e-5, expose=False)[0]).all()


def test_supports_says_why_not() -> None:
    device = torch.device("cpu")
    assert cpu.supports(device, torch.float32, 16, 4) == ""
    assert "float64" in cpu.supports(device, torch.float64, 16, 4)
    assert "meta" in cpu.supports(torch.device("meta"), torch.float32, 16, 4)
    assert "d_state" in cpu.supports(device, torch.float32, 0, 4)

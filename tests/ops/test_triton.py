"""The plain Triton kernels against the float64 recurrence: under the interpreter on a CPU, as they are on a GPU.

The interpreter shows what the kernels compute, not what a GPU makes of them; ``tests/bench/bench_scan_gpu.py`` repeats
the comparison there at full shapes before it times anything.
"""

import os
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from mambascope.errors import BackendError
from mambascope.ops import conv, norm
from mambascope.ops.scan import reference, triton_replay
from mambascope.ops.scan import triton as kernels
from mambascope.ops.scan.triton_table import BackwardPlan, ForwardPlan, backward_plan, forward_plan

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)

DEVICE = "cuda" if CUDA else "cpu"
ORDER = ("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "h0")
GRADS = dict(zip(ORDER, ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dh0"), strict=True))
ALL = {"D", "z", "dt_bias", "h0", "lengths"}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    "torch.empty gives NaN: what a kernel does not write is seen"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


def problem(
    batch: int,
    length: int,
    channels: int,
    states: int,
    *,
    options: set[str] = ALL,
    wild: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    "strided as in the model: x and z halves of one tensor, B and C slices of another"
    xz, low = torch.randn(batch, length, 2 * channels), torch.randn(batch, length, 3 + 2 * states)
    raw = torch.randn(batch, length, channels) - 2
    A = -torch.exp(torch.rand(channels, states) * 2.7)
    if wild:  # steps from 1e-4 to 50, decay from 1 to exactly 0, outliers in u
        raw = torch.exp(torch.rand(batch, length, channels) * 13.1 - 9.2)
        raw = raw + torch.log(-torch.expm1(-raw))
        A = -torch.arange(1.0, states + 1).expand(channels, states).contiguous()
        xz[:, ::7, ::5] *= 100
    if "dt_bias" not in options:
        raw = torch.nn.functional.softplus(raw)
    xz, low, raw = (v.to(DEVICE, dtype) for v in (xz, low, raw))
    x: dict[str, Any] = {
        "u": xz[:, :, :channels],
        "delta": raw,
        "A": A.to(DEVICE),
        "B": low[:, :, 3 : 3 + states],
        "C": low[:, :, 3 + states :],
        "D": torch.randn(channels, device=DEVICE),
        "z": xz[:, :, channels:],
        "dt_bias": torch.randn(channels, device=DEVICE) * 0.1,
        "h0": torch.randn(batch, channels, states, device=DEVICE),
        "lengths": torch.randint(length // 2, length + 1, (batch,), device=DEVICE),
    }
    return {name: v if name not in ALL or name in options else None for name, v in x.items()}


def plain(x: dict[str, Any], boundaries: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    "the sequential recurrence in one dtype: outputs and the leaves that will carry gradients"
    v = {k: t if t is None or k == "lengths" else t.detach().to(dtype).requires_grad_() for k, t in x.items()}
    delta = v["delta"]
    if v["dt_bias"] is not None:
        delta = torch.nn.functional.softplus(delta + v["dt_bias"], threshold=60)
    y, h, bound = reference.scan(v["u"], delta, v["A"], v["B"], v["C"], v["h0"], v["lengths"], boundaries)
    y = y if v["D"] is None else y + v["D"] * v["u"]
    y = y if v["z"] is None else y * torch.nn.functional.silu(v["z"])
    assert bound is not None
    return [y, h, bound], {k: t for k, t in v.items() if t is not None and k != "lengths"}


def derivatives(
    x: dict[str, Any], boundaries: int, dtype: torch.dtype, seeds: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs, leaves = plain(x, boundaries, dtype)
    loss = torch.stack([(o * s.to(dtype)).sum() for o, s in zip(outputs, seeds, strict=True)]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return [o.detach() for o in outputs], dict(zip(leaves, found, strict=True))


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert b.numel() > 0
    return float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))


def close(name: str, found: Tensor, exact: Tensor, plain_error: float) -> None:
    "style.md's bar: twice the plain float32 recurrence's error, at least 1e-6; one rounding more for a half type"
    bar = max(1e-6, 2 * plain_error)
    if found.dtype != torch.float32:  # the interpreter cuts float32 to bfloat16 instead of rounding
        bar += torch.finfo(found.dtype).eps * 1.1 / (2 if CUDA else 1)
    assert error(found, exact) <= bar, f"{name}: error {error(found, exact):.2e}, bar {bar:.2e}"


def run(x: dict[str, Any], boundaries: int | None, plan: ForwardPlan | None = None) -> Any:
    softplus = x["dt_bias"] is not None
    return kernels.scan_forward(*x.values(), dt_softplus=softplus, boundaries=boundaries, plan=plan)


def compare(
    x: dict[str, Any], boundaries: int, forward: ForwardPlan | None = None, backward: BackwardPlan | None = None
) -> None:
    "outputs, states and every gradient, from gradients given at all three outputs"
    found = run(x, boundaries, forward)
    seeds = [torch.randn_like(t.float()) for t in found]
    seeds[0] = seeds[0].to(found[0].dtype)
    exact, exact_grads = derivatives(x, boundaries, torch.float64, seeds)
    rough, rough_grads = derivatives(x, boundaries, torch.float32, seeds)
    for name, a, b, c in zip(("y", "h_last", "h_boundary"), found, exact, rough, strict=True):
        close(name, a, b, error(c, b))
    grads = kernels.scan_backward(
        *x.values(),
        found[2],
        *seeds,
        dt_softplus=x["dt_bias"] is not None,
        boundaries=boundaries,
        plan=backward,
    )
    for name, exact_grad in exact_grads.items():
        a = grads[GRADS[name]]
        assert a is not None
        assert a.dtype == (x[name].dtype if name in ("u", "delta", "B", "C", "z") else torch.float32)
        close(GRADS[name], a, exact_grad, error(rough_grads[name], exact_grad))


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "boundaries"),
    [
        (1, 1, 1, 1, 1),
        (2, 5, 33, 7, 4),
        (1, 63, 3, 16, 16),
        (1, 65, 5, 2, 64),
        (2, 17, 4, 33, 5),
        (1, 9, 9, 64, 3),
        (1, 6, 5, 128, 3),
        (1, 5, 3, 256, 2),
    ],
)
def test_shapes(batch: int, length: int, channels: int, states: int, boundaries: int) -> None:
    compare(problem(batch, length, channels, states), boundaries)


@pytest.mark.parametrize("options", [set(), {"D"}, {"z"}, {"dt_bias"}, {"h0"}, {"lengths"}, {"D", "z"}, ALL])
def test_options(options: set[str]) -> None:
    compare(problem(2, 11, 5, 4, options=options), 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype: torch.dtype) -> None:
    x = problem(2, 13, 6, 4, dtype=dtype)
    assert run(x, None)[0].dtype == dtype
    compare(x, 4)


def test_adversarial_ranges() -> None:
    compare(problem(1, 40, 7, 16, wild=True), 16)


# Every way in which the table cuts time: one pass; chunks of one and of several intervals, the last one short.
FORWARD = [ForwardPlan(32, 44, 1), ForwardPlan(32, 8, 6), ForwardPlan(32, 24, 2), ForwardPlan(16, 20, 3)]
BACKWARD = [
    BackwardPlan(32, 4, 11, 1, 11),
    BackwardPlan(32, 4, 1, 11, 11),
    BackwardPlan(32, 4, 3, 4, 11),
    BackwardPlan(16, 4, 4, 3, 11),
]


@pytest.mark.parametrize(("forward", "backward"), list(zip(FORWARD, BACKWARD, strict=True)))
def test_plans(forward: ForwardPlan, backward: BackwardPlan) -> None:
    compare(problem(1, 41, 5, 4), 4, forward, backward)


def test_boundaries_wider_than_a_segment_are_filled_in() -> None:
    "intervals of 10 cut in segments of 4, 4 and 2; the last interval is short, so that some segments are empty"
    for length in (21, 27, 30):
        compare(problem(2, length, 4, 3), 10, None, BackwardPlan(32, 4, 4, 3, 9))


def test_slices_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = problem(3, 9, 4, 3)
    y, h, bound = run(x, 4)
    arguments = (*x.values(), bound, y, h, bound)
    whole = kernels.scan_backward(*arguments, dt_softplus=True, boundaries=4)
    monkeypatch.setattr(kernels, "_MAX_SCRATCH", 1)
    sliced = kernels.scan_backward(*arguments, dt_softplus=True, boundaries=4)
    for name, grad in whole.items():
        if name in ("dA", "dD", "ddt_bias"):
            torch.testing.assert_close(sliced[name], grad)
        else:
            assert torch.equal(sliced[name], grad), name  # type: ignore[arg-type]


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.scan_backward

    def wrong(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        found["dB"][0, 2, 1] *= 1.01  # type: ignore[index]
        return found

    monkeypatch.setattr(kernels, "scan_backward", wrong)
    with pytest.raises(AssertionError, match="dB"):
        compare(problem(1, 6, 4, 3), 4)


@pytest.mark.parametrize("cut", [1, 7, 16])
def test_split_and_resume(cut: int) -> None:
    x = problem(1, 17, 5, 4, options={"D", "z", "dt_bias", "h0"})
    y, h, _ = run(x, None)
    timed = ("u", "delta", "B", "C", "z")
    first = {k: v[:, :cut] if k in timed else v for k, v in x.items()}
    y1, h1, _ = run(first, None)
    rest = {k: v[:, cut:] if k in timed else v for k, v in x.items()} | {"h0": h1}
    y2, h2, _ = run(rest, None)
    torch.testing.assert_close(torch.cat((y1, y2), 1), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h2, h, rtol=1e-6, atol=1e-6)


def test_padding_leaves_the_state_and_the_neighbours_alone() -> None:
    x = problem(2, 12, 5, 4) | {"lengths": torch.tensor([12, 5], device=DEVICE)}
    y, h, _ = run(x, None)
    alone = {k: v if v is None or k in ("A", "D", "dt_bias") else v[1:2] for k, v in x.items()}
    for name in ("u", "delta", "B", "C", "z"):
        alone[name] = alone[name][:, :5]
    y1, h1, _ = run(alone | {"lengths": None}, None)
    assert torch.equal(h[1:], h1)
    assert torch.equal(y[1:, :5], y1)


def test_same_bits_twice_and_whatever_the_strides() -> None:
    x = problem(2, 10, 5, 4)
    dense = {k: None if v is None else v.contiguous() for k, v in x.items()}
    runs = []
    for inputs in (x, x, dense):
        y, h, bound = run(inputs, 4)
        grads = kernels.scan_backward(*inputs.values(), bound, y, h, bound, dt_softplus=True, boundaries=4)
        runs.append([y, h, bound, *grads.values()])
    for first, second in pairwise(runs):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_and_apart_give_the_same_bits(dtype: torch.dtype) -> None:
    x = problem(2, 9, 5, 4, dtype=dtype)
    fused, h, _ = run(x, None)
    delta = kernels.softplus_forward(x["delta"].float() + x["dt_bias"])
    bare = x | {"delta": delta, "D": None, "z": None, "dt_bias": None}
    y, h_bare, _ = run(bare, None)
    assert y.dtype == torch.float32
    apart = kernels.gate_forward(y + x["D"] * x["u"].float(), x["z"])
    assert torch.equal(fused, apart)
    assert torch.equal(h, h_bare)


@pytest.mark.parametrize("width", [4, 5])
def test_gradients_of_x_and_z_come_side_by_side(width: int) -> None:
    x = problem(2, 9, 5, 4)
    y, h, bound = run(x, 4)
    arriving = (bound, y, h, None)
    apart = kernels.scan_backward(*x.values(), *arriving, dt_softplus=True, boundaries=4)
    found = kernels.scan_backward(*x.values(), *arriving, dt_softplus=True, boundaries=4, paired=True)
    assert "dxz" not in apart
    assert all(torch.equal(v, found[name]) for name, v in apart.items() if v is not None)
    dxz = found["dxz"].zero_()
    assert found["dz"].data_ptr() == dxz[..., 5:].data_ptr()
    conv_of = (x["u"], torch.randn(5, width, device=DEVICE), None, None, None, y, None)
    dx = kernels.conv_backward(*conv_of, silu=True)
    into = kernels.conv_backward_into(*conv_of, dxz, silu=True)
    assert torch.equal(dxz[..., :5], dx.pop("dx"))
    assert not dxz[..., 5:].any()
    assert into.keys() == dx.keys()
    assert torch.equal(into["dweight"], dx["dweight"])


def test_nothing_to_do() -> None:
    x = problem(2, 0, 5, 4, options={"D", "z", "dt_bias", "h0"})
    y, h, bound = run(x, 4)
    assert y.shape == (2, 0, 5)
    assert bound.shape == (2, 0, 5, 4)
    assert torch.equal(h, x["h0"])
    grads = kernels.scan_backward(*x.values(), bound, y, h, None, dt_softplus=True, boundaries=4)
    assert torch.equal(grads["dh0"], h)
    assert not grads["dA"].any()


def test_nan_goes_only_where_it_touches() -> None:
    x = problem(2, 8, 5, 4, options={"D", "dt_bias"})
    x["delta"][1, 3, 2] = float("nan")
    y, h, _ = run(x, None)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, 3:, 2] = True
    assert torch.equal(y.isnan(), touched)
    assert h[1, 2].isnan().all()
    assert int(h.isnan().sum()) == 4


def test_state_window() -> None:
    x = problem(2, 7, 5, 4, options={"h0"})
    h = kernels.state_window(x["u"], x["delta"], x["A"], x["B"], x["h0"])
    double = [x[k].double() for k in ("u", "delta", "A", "B", "h0")]
    assert error(h, reference.window(*double)) < 1e-6
    assert torch.equal(h[:, -1], run(x, None)[1])


@pytest.mark.parametrize(("length", "channels", "states"), [(1, 3, 1), (9, 20, 5), (6, 18, 33)])
def test_contraction_of_a_window(length: int, channels: int, states: int) -> None:
    x = problem(2, length, channels, states)
    window = (x["u"], x["delta"].abs(), x["A"], x["B"], x["h0"])
    weight = torch.randn(2, length, states, channels, device=DEVICE).transpose(2, 3)
    h = kernels.state_window(*window)
    same_for_all = torch.randn(1, 1, channels, 1, device=DEVICE).expand(2, length, channels, states)
    for w in (weight, same_for_all, weight.bfloat16()):
        truth = (h.double() * w.double()).sum(-1)
        assert error(kernels.window_dot(*window, w), truth) < 1e-6
    assert error(kernels.window_dot(*window, weight), (h * weight.flip(2)).double().sum(-1)) > 1e-2


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_convolution(width: int, given: bool, silu: bool) -> None:
    "against the float64 formula, all gradients; short rows and rows shorter than the filter"
    batch, length, channels = 3, 18, 7
    x = torch.randn(batch, length, 2 * channels, device=DEVICE)[:, :, channels:]
    weight, bias = torch.randn(channels, width, device=DEVICE), torch.randn(channels, device=DEVICE) if given else None
    state = torch.randn(batch, channels, width - 1, device=DEVICE) if given else None
    lengths = torch.tensor([18, 2, 9], device=DEVICE) if given else None
    y, new = kernels.conv_forward(x, weight, bias, state, lengths, silu=silu)
    leaves = [None if v is None else v.double().detach().requires_grad_() for v in (x, weight, bias, state)]
    exact = conv.conv_formula(*leaves, lengths, silu)  # type: ignore[arg-type]
    assert error(y, exact[0].detach()) < 1e-6
    assert torch.equal(new.double(), exact[1])
    dy, dnew = torch.randn_like(y), torch.randn_like(new)
    found = kernels.conv_backward(x, weight, bias, state, lengths, dy, dnew, silu=silu)
    loss = (exact[0] * dy).sum() + (exact[1] * dnew).sum()
    there = {n: v for n, v in zip(("dx", "dweight", "dbias", "dstate"), leaves, strict=True) if v is not None}
    grads = torch.autograd.grad(loss, list(there.values()))
    for name, grad in zip(there, grads, strict=True):
        a = found[name]
        assert a is not None
        assert a.shape == grad.shape
        assert a.numel() == 0 or error(a, grad) < 2e-6, name


def test_a_norm_that_widens_gives_the_bits_of_both_apart() -> None:
    x, weight = torch.randn(2, 9, 40, device=DEVICE).half(), torch.randn(40, device=DEVICE).half()
    wide, out = kernels.wide_norm_forward(x, weight, 1e-5, wide=torch.float32)
    assert torch.equal(wide, x.float())
    assert torch.equal(out, kernels.norm_forward(x.float(), weight, 1e-5, expose=False)[0])
    assert not torch.equal(out, kernels.norm_forward(x.float(), weight, 0.5, expose=False)[0])


def test_convolution_fused_and_apart_give_the_same_bits() -> None:
    x, weight = torch.randn(2, 9, 5, device=DEVICE).bfloat16(), torch.randn(5, 4, device=DEVICE)
    y, _ = kernels.conv_forward(x, weight, None, None, None, silu=False)
    assert torch.equal(kernels.silu_forward(y), kernels.conv_forward(x, weight, None, None, None, silu=True)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_norm(dtype: torch.dtype, weighted: bool) -> None:
    x = torch.randn(2, 3, 40, device=DEVICE).to(dtype)[:, :, 5:]
    weight = torch.randn(35, device=DEVICE).to(dtype) if weighted else None
    out, normalized, scale = kernels.norm_forward(x, weight, 1e-5, expose=True)
    bare = kernels.norm_forward(x, weight, 1e-5, expose=False)
    assert torch.equal(out, bare[0])
    assert bare[1] is None
    assert out.dtype == dtype
    exact = norm.norm_formula(x.double(), None if weight is None else weight.double(), 1e-5)
    assert normalized is not None
    assert scale is not None
    assert scale.shape == (2, 3, 1)
    assert error(normalized, exact[1]) < 1e-6
    assert error(scale, exact[2]) < 1e-6
    close("out", out, exact[0], 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_with_the_residual_gives_the_bits_of_both_apart(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 40, device=DEVICE).bfloat16()[:, :, 5:]
    residual, weight = torch.randn(2, 3, 35, device=DEVICE).to(dtype), torch.randn(35, device=DEVICE)
    added, out, normalized, scale = kernels.add_norm_forward(x, residual, weight, 1e-5, expose=True)
    if CUDA or dtype == torch.float32:
        assert torch.equal(added, residual + x)
    else:  # the interpreter cuts off what a GPU rounds
        assert error(added, residual.double() + x.double()) < torch.finfo(dtype).eps
    for a, b in zip((out, normalized, scale), kernels.norm_forward(added, weight, 1e-5, expose=True), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(out, kernels.norm_forward(residual, weight, 1e-5, expose=False)[0])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_elementwise() -> None:
    x = torch.cat((torch.linspace(-90, 90, 301), torch.tensor([0.0, 1e-6, -16.0]))).to(DEVICE)
    exact = torch.nn.functional.softplus(x.double(), threshold=200)
    assert float(((kernels.softplus_forward(x) - exact).abs() / exact)[x > -12].max()) < 1e-6  # relative
    assert error(kernels.silu_forward(x), torch.nn.functional.silu(x.double())) < 1e-6
    yz = torch.randn(2, 3, 14, device=DEVICE)
    y, z = yz[:, :, :7], yz[:, :, 7:]
    assert error(kernels.gate_forward(y, z), y.double() * torch.nn.functional.silu(z.double())) < 1e-6
    assert kernels.softplus_forward(x.bfloat16()).dtype == torch.float32
    assert kernels.silu_forward(x[:0]).shape == (0,)
    assert kernels.silu_forward(x[0]).shape == ()


def test_the_table_covers_every_shape() -> None:
    for L in (1, 4, 31, 63, 64, 65, 512, 1000, 2048, 16384):
        for B, D, N in ((1, 1, 1), (1, 40, 16), (1, 1536, 16), (8, 1536, 16), (64, 1536, 128), (2, 5120, 256)):
            for T in (None, 1, 16, 64, 100, 4096):
                plan = forward_plan(B, L, D, N, 132, T)
                assert (plan.n_chunks - 1) * plan.chunk < L <= plan.n_chunks * plan.chunk
                assert T is None or plan.chunk % T == 0
                back = backward_plan(B, L, D, N, 132, T or 64)
                assert back.segment <= 64
                assert back.n_chunks >= 1
                assert (back.n_chunks - 1) * back.chunk < back.n_segments <= back.n_chunks * back.chunk
                assert str(plan).startswith("forward: ")
                assert str(back).startswith("backward: ")
    assert forward_plan(64, 2048, 1536, 16, 132, 64).n_chunks == 1
    assert forward_plan(1, 2048, 1536, 16, 132, 64).n_chunks > 8


def test_supports_says_why_not() -> None:
    device = torch.device(DEVICE)
    assert kernels.supports(device, torch.bfloat16, 256, 4) == ""
    assert "float64" in kernels.supports(device, torch.float64, 16, 4)
    assert "257" in kernels.supports(device, torch.float32, 257, 4)
    assert "40" in kernels.supports(device, torch.float32, 16, 40)
    assert "xpu" in kernels.supports(torch.device("xpu"), torch.float32, 16, 4)
    with pytest.raises(BackendError, match="float64"):
        kernels.softplus_forward(torch.zeros(3, dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("length", [1, 63, 64, 200, 512, 2048, 16384])
def test_asking_for_states_does_not_change_how_time_is_cut(length: int) -> None:
    cuts = {
        (plan.n_chunks, plan.chunk if plan.n_chunks > 1 else None)
        for plan in (forward_plan(1, length, 1536, 16, 132, boundaries) for boundaries in (None, 16, 32, 64))
    }
    assert len(cuts) == 1


@pytest.mark.skipif(CUDA, reason="on a GPU nothing is interpreted")
def test_the_interpreter_warns_once_of_large_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_replay, "_MUCH", 100)
    monkeypatch.setattr(triton_replay, "_warned", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.silu_forward(torch.zeros(2, 50))
    with pytest.warns(UserWarning, match=r"silu_forward of a tensor \(2, 51\) runs step by step"):
        kernels.silu_forward(torch.zeros(2, 51))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.silu_forward(torch.zeros(2, 51))

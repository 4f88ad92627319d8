"""Every backend against the float64 reference: outputs, states, and all gradients, by the one tolerance table."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from cases import backend_params, double, poisoned, run, scan_inputs  # noqa: F401  (poisoned is a fixture)
from tolerance import assert_within, error
from torch import Tensor

from mambascope import ops

BACKENDS = backend_params("torch", "cpu")
pytestmark = pytest.mark.usefixtures("poisoned")

SHAPES = [  # B L D N
    (2, 1, 40, 16),
    (1, 63, 40, 16),
    (2, 64, 40, 16),
    (2, 65, 40, 1),
    (1, 65, 40, 7),
    (2, 65, 40, 33),
    (1, 65, 3, 1),  # D = 1 would make dA and dD one number each, which may cancel to nothing
    (2, 1000, 40, 16),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {},
    "boundaries": {"boundaries": 16},
    "ragged": {"boundaries": 7},
}


def problem(
    shape: tuple[int, ...], kind: str, how: str, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Any]:
    x, options = scan_inputs(*shape, kind=kind, dtype=dtype), dict(OPTIONS.get(how, {}))
    if how == "bare":  # delta after softplus, nothing fused, no state given
        x["delta"] = ops.softplus(x["delta"].float() + x["dt_bias"], backend="reference")
        x = {name: t for name, t in x.items() if name not in ("D", "z", "dt_bias", "h0")}
    if how == "ragged":
        g = torch.Generator().manual_seed(5)
        options["lengths"] = torch.randint(0, shape[1] + 1, (shape[0],), generator=g)
    return x, options


@lru_cache(maxsize=64)
def truth(
    shape: tuple[int, ...], kind: str, how: str, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The float64 reference, and the plain float32 recurrence whose error sets the bar."""
    x, options = problem(shape, kind, how, dtype)
    return run(double(x), "reference", **options), run(x, "reference", **options)


def compare(shape: tuple[int, ...], kind: str, how: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    x, options = problem(shape, kind, how, dtype)
    exact, sequential = truth(shape, kind, how, dtype)
    found = run(x, backend, **options)
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        assert tensor.dtype == sequential[name].dtype, name
        assert_within(tensor, exact[name], sequential[name], name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["fused", "boundaries", "ragged", "bare"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_states_and_gradients(shape: tuple[int, ...], how: str, backend: str) -> None:
    compare(shape, "tame", how, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["fused", "ragged", "bare"])
@pytest.mark.parametrize("shape", [(2, 65, 40, 16), (1, 300, 24, 33)])
def test_adversarial_ranges(shape: tuple[int, ...], how: str, backend: str) -> None:
    compare(shape, "wild", how, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.bfloat16, "tame"), (torch.bfloat16, "wild"), (torch.float16, "tame")],  # wild leaves float16's range
)
def test_low_precision_inputs(dtype: torch.dtype, kind: str, backend: str) -> None:
    compare((2, 65, 40, 16), kind, "boundaries", backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [("u", "z"), ("delta",), ("B", "C"), ("A", "D", "dt_bias", "h0")])
def test_any_mixture_of_precisions(low: tuple[str, ...], backend: str) -> None:
    x = {name: t.bfloat16() if name in low else t for name, t in scan_inputs(2, 33, 20, 5).items()}
    exact, sequential = run(double(x), "reference", boundaries=8), run(x, "reference", boundaries=8)
    for name, tensor in run(x, backend, boundaries=8).items():
        assert tensor.dtype == sequential[name].dtype, name
        assert_within(tensor, exact[name], sequential[name], name)


def test_float64_on_the_torch_path() -> None:
    x = scan_inputs(2, 130, 40, 7, dtype=torch.float64)
    exact = run(x, "reference", boundaries=50)
    for name, tensor in run(x, "torch", boundaries=50).items():
        assert_within(tensor, exact[name], name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_bits_of_contiguous_ones(backend: str) -> None:
    batch, length, channels, states = 2, 65, 40, 7
    x = scan_inputs(batch, length, channels, states)
    xz = torch.cat((x["u"], x["z"]), -1)
    low = torch.cat((torch.randn(batch, length, 3), x["B"], x["C"]), -1)
    strided = dict(x, u=xz[..., :channels], z=xz[..., channels:], B=low[..., 3 : 3 + states], C=low[..., 3 + states :])
    strided["delta"] = x["delta"].transpose(1, 2).contiguous().transpose(1, 2)  # last axis not contiguous
    strided["A"] = x["A"].t().contiguous().t()
    strided["h0"] = x["h0"].transpose(1, 2).contiguous().transpose(1, 2)
    plain = run(x, backend, boundaries=16)
    for name, tensor in run(strided, backend, boundaries=16).items():
        if backend == "torch" and name in ("dD", "ddt_bias"):  # torch sums over B L in the order of the memory
            assert error(tensor, plain[name]) < 1e-6, name
        else:
            assert torch.equal(tensor, plain[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_arrive_at_states_alone(backend: str) -> None:
    x = scan_inputs(2, 40, 12, 5)
    for output in ("h_last", "h_boundary"):
        grads = []
        for name, dtype in (("reference", torch.float64), ("reference", torch.float32), (backend, torch.float32)):
            y = {k: t.to(dtype).requires_grad_() for k, t in x.items()}
            h = getattr(ops.selective_scan(**y, dt_softplus=True, boundaries=9, backend=name), output)
            wanted = [y[k] for k in ("u", "delta", "A", "B", "dt_bias", "h0")]
            grads.append(torch.autograd.grad(h.square().sum(), wanted))
        for exact, sequential, found in zip(*grads, strict=True):
            assert_within(found, exact, sequential, output)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_some_inputs_need_gradients(backend: str) -> None:
    x = scan_inputs(1, 30, 8, 4)
    every = run(x, backend)
    for name in ("A", "z", "h0"):
        y = dict(x, **{name: x[name].clone().requires_grad_()})
        out = ops.selective_scan(**y, dt_softplus=True, backend=backend)
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=g).bfloat16().float() for t in out[:2]]
        if not out.h_last.requires_grad:  # z does not reach the state
            out, weights = out[:1], weights[:1]
        pairs = [(t, w) for t, w in zip(out, weights, strict=False) if t is not None]
        (grad,) = torch.autograd.grad([t for t, _ in pairs], [y[name]], [w for _, w in pairs])
        assert torch.equal(grad, every[f"d{name}"]), name


@pytest.mark.parametrize("backend", backend_params("reference", "torch", "cpu"))
def test_windows_of_states(backend: str) -> None:
    x = scan_inputs(2, 37, 12, 5, kind="wild")
    delta = ops.softplus(x["delta"] + x["dt_bias"], backend="reference")
    u, A, B, h0 = x["u"], x["A"], x["B"], x["h0"]
    exact = ops.state_window(*(t.double() for t in (u, delta, A, B, h0)), backend="reference")
    sequential = ops.state_window(u, delta, A, B, h0, backend="reference")
    found = ops.state_window(u, delta, A, B, h0, backend=backend)
    assert found.shape == (2, 37, 12, 5)
    assert_within(found, exact, sequential)
    scanned = ops.selective_scan(u, delta, A, B, x["C"], h0=h0, boundaries=10, backend=backend)
    assert scanned.h_boundary is not None
    again = ops.state_window(u[:, 20:30], delta[:, 20:30], A, B[:, 20:30], scanned.h_boundary[:, 2], backend=backend)
    assert_within(again, exact[:, 20:30], sequential[:, 20:30])
    if backend != "torch":  # the sequential kernels give the very bits of the scan that passed there
        assert torch.equal(again[:, -1], scanned.h_boundary[:, 3])
        assert torch.equal(again, found[:, 20:30])


def test_the_exposed_recurrence_and_its_gradients() -> None:
    g = torch.Generator().manual_seed(3)
    for length in (1, 2, 17, 300):
        A_bar = 1.2 * torch.rand(2, length, 6, 3, generator=g, dtype=torch.float64) - 0.2  # zero and negative ones too
        A_bar[:, length // 2] = 0.0
        write = torch.randn(2, length, 6, 3, generator=g, dtype=torch.float64)
        C, h0 = torch.randn(2, length, 3, generator=g).double(), torch.randn(2, 6, 3, generator=g).double()
        inputs = [t.requires_grad_() for t in (A_bar, write, C, h0)]
        h, states = h0, []
        for t in range(length):
            h = A_bar[:, t] * h + write[:, t]
            states.append(h)
        plain = (torch.einsum("bln,bldn->bld", C, torch.stack(states, 1)), h, torch.stack(states, 1))
        found = ops.linear_scan(*inputs)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in plain]
        for a, b in zip(found, plain, strict=True):
            assert_within(a, b)
        expected = torch.autograd.grad(plain, inputs, weights)
        for a, b in zip(torch.autograd.grad(found, inputs, weights), expected, strict=True):
            assert_within(a, b)
    y, h_last, h = ops.linear_scan(A_bar, write, C)
    assert_within(h_last, ops.linear_scan(A_bar, write, C, torch.zeros_like(h0))[1])
    assert torch.equal(h[:, -1], h_last)
    assert y.shape == (2, 300, 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_comparison_can_fail(backend: str) -> None:
    """A result that is slightly wrong, wrong in one place, NaN, or of another shape does not pass."""
    shape = (1, 63, 40, 16)
    exact, sequential = truth(shape, "tame", "fused", torch.float32)
    x, _ = problem(shape, "tame", "fused")
    y = run(x, backend, gradients=False)["y"]
    assert_within(y, exact["y"], sequential["y"])
    one = y.clone()
    one[0, 31, 7] += 3e-5 * y.abs().max()
    nan = y.clone()
    nan[0, 0, 0] = float("nan")
    late = run(x, backend, gradients=False, lengths=torch.tensor([62]))["y"]
    for wrong in (1.00001 * y, one, nan, late, y[:, :, :39], torch.zeros_like(y)):
        with pytest.raises(AssertionError):
            assert_within(wrong, exact["y"], sequential["y"])
    assert error(y, y) == 0.0
    with pytest.raises(AssertionError, match="float64"):
        assert_within(y, sequential["y"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_delta_touches_its_channel_from_there_on_and_nothing_else(backend: str) -> None:
    x = scan_inputs(2, 65, 40, 7)
    clean = run(x, backend, gradients=False, boundaries=8)
    x["delta"][1, 30, 17] = float("nan")
    found = run(x, backend, gradients=False, boundaries=8)
    for name, position in (("y", 1), ("h_last", None), ("h_boundary", 1)):
        touched = torch.zeros_like(clean[name], dtype=torch.bool)
        if name == "y":
            touched[1, 30:, 17] = True
        elif name == "h_last":
            touched[1, 17] = True
        else:
            touched[1, 4:, 17] = True  # boundaries at 32, 40, …
        assert position is None or touched.any()
        assert torch.isnan(found[name][touched]).all(), name
        assert torch.equal(found[name][~touched], clean[name][~touched]), name


@pytest.mark.parametrize("backend", backend_params("reference", "torch", "cpu"))
def test_what_follows_neighbours_and_channel_order_do_not_matter(backend: str) -> None:
    x = scan_inputs(3, 70, 40, 5)
    whole = run(x, backend, gradients=False)
    cut = {k: t[:, :41] if k in ("u", "delta", "B", "C", "z") else t for k, t in x.items()}
    assert_within(run(cut, backend, gradients=False)["y"], run(double(x), "reference", gradients=False)["y"][:, :41])
    row = {k: t if k in ("A", "D", "dt_bias") else t[1:2] for k, t in x.items()}
    assert torch.equal(run(row, backend, gradients=False)["y"], whole["y"][1:2])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    permuted = {k: t[..., order] if k in ("u", "delta", "z", "D", "dt_bias") else t for k, t in x.items()}
    permuted.update(A=x["A"][order], h0=x["h0"][:, order])
    found = run(permuted, backend, gradients=False)["y"]
    if backend == "torch":  # its sum over N adds in another order in the last few channels of a vector loop
        assert error(found, whole["y"][..., order]) < 1e-6
    else:
        assert torch.equal(found, whole["y"][..., order])

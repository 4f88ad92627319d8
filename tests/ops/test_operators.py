"""The kernel backends as torch.library operators: opcheck, compile, export, fake tensors, autocast, derivatives."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import run, scan_inputs
from tolerance import error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from mambascope import ops
from mambascope.errors import BackendError
from mambascope.ops import operators

pytest.importorskip("numba", reason="the operators are checked on the numba kernels")
OPS: Any = torch.ops.mambascope


def scan_args(dtype: torch.dtype = torch.float32, grad: bool = True, bare: bool = False) -> list[Any]:
    x = scan_inputs(2, 21, 20, 5, dtype=dtype)
    if bare:
        x["delta"] = ops.softplus(x["delta"])
    absent = ("D", "z", "dt_bias") if bare else ()
    return [None if name in absent else t.requires_grad_(grad) for name, t in x.items()]


def normal(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


def conv_args(grad: bool = True) -> list[Any]:
    return [normal(2, 9, 20, grad=grad), normal(20, 4, grad=grad), normal(20, grad=grad), normal(2, 20, 3, grad=grad)]


LENGTHS = torch.tensor([21, 4])
CALLS: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "scan": ("selective_scan_cpu", lambda: (*scan_args(), LENGTHS, True, 8)),
    "scan in bf16": ("selective_scan_cpu", lambda: (*scan_args(torch.bfloat16), None, True, 8)),
    "bare scan": ("selective_scan_cpu", lambda: (*scan_args(bare=True), None, False, 8)),
    "scan without gradient": ("selective_scan_cpu", lambda: (*scan_args(grad=False), LENGTHS, True, 0)),
    "scan on torch": ("selective_scan_torch", lambda: (*scan_args(bare=True), LENGTHS, False, 8)),
    "scan backward": (
        "selective_scan_backward_cpu",
        lambda: (
            *scan_args(grad=False),
            LENGTHS,
            normal(2, 3, 20, 5),
            normal(2, 21, 20),
            None,
            None,
            True,
            8,
        ),
    ),
    "window": ("state_window_cpu", lambda: tuple(t for t in (*scan_args(grad=False)[:4], torch.zeros(2, 20, 5)))),
    "conv": ("causal_conv_cpu", lambda: (*conv_args(), torch.tensor([9, 1]), True)),
    "bare conv": ("causal_conv_cpu", lambda: (*conv_args()[:2], None, None, None, False)),
    "conv backward": (
        "causal_conv_backward_cpu",
        lambda: (*conv_args(False), None, normal(2, 9, 20), None, True),
    ),
    "softplus": ("softplus_cpu", lambda: (normal(3, 20, grad=True),)),
    "silu": ("silu_cpu", lambda: (normal(3, 20).bfloat16().detach().requires_grad_(),)),
    "gate": ("gate_cpu", lambda: (normal(3, 20, grad=True), normal(3, 20, grad=True))),
    "norm": ("rms_norm_cpu", lambda: (normal(3, 20, grad=True), normal(20, grad=True), 1e-5, False)),
    "open norm": ("rms_norm_cpu", lambda: (normal(3, 20, grad=True), None, 1e-5, True)),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    """Schema, fake implementation (shapes, dtypes, strides), autograd registration, and tracing with dynamic shapes."""
    operator, arguments = CALLS[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "backward" not in name and name != "window":  # those have no derivative to trace
        checks.append("test_aot_dispatch_dynamic")
    found = opcheck(getattr(OPS, operator).default, arguments(), test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}


def test_opcheck_can_fail() -> None:
    torch.library.define("mambascope_test::liar", "(Tensor x) -> Tensor")
    torch.library.impl("mambascope_test::liar", "cpu")(lambda x: x + 1)
    torch.library.register_fake("mambascope_test::liar")(lambda x: x.new_empty(x.shape[:-1]))
    with pytest.raises(Exception, match="liar"):
        opcheck(torch.ops.mambascope_test.liar.default, (torch.zeros(2, 3),), test_utils="test_faketensor")


def test_every_operator_is_registered_for_every_kernel_backend() -> None:
    for backend in ("cpu", "triton"):
        for operator in operators.SCHEMAS:
            assert hasattr(OPS, f"{operator}_{backend}")


class Piece(nn.Module):
    """Norm, convolution, scan: what a block asks of the operators."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend = backend
        x = scan_inputs(1, 1, 20, 5)
        self.A, self.D, self.norm = nn.Parameter(x["A"]), nn.Parameter(x["D"]), nn.Parameter(torch.ones(20))
        self.weight = nn.Parameter(normal(20, 1, 4))

    def forward(self, x: Tensor, raw: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x = ops.rms_norm(x, self.norm, 1e-5, backend=self.backend).out
        u = ops.causal_conv(x, self.weight, activation="silu", backend=self.backend).y
        return ops.selective_scan(u, raw, self.A, B, C, self.D, x, dt_softplus=True, boundaries=8, backend=self.backend)


def piece_inputs(length: int) -> tuple[Tensor, ...]:
    x = scan_inputs(2, length, 20, 5)
    return x["u"], x["delta"], x["B"], x["C"]


def results(module: Any, owner: nn.Module, length: int) -> list[Tensor]:
    out = [t for t in module(*piece_inputs(length)) if t is not None]
    return [*out, *torch.autograd.grad(sum(t.square().sum() for t in out), list(owner.parameters()))]


@pytest.mark.parametrize("backend", ["cpu", "torch", "auto", "reference"])
def test_compiled_graphs_see_whole_operators(backend: str) -> None:
    """No graph break, forward and backward, with gradients and without, at two lengths."""
    torch._dynamo.reset()
    piece = Piece(backend)
    compiled = torch.compile(piece, backend="aot_eager", fullgraph=True)
    for a, b in zip(results(compiled, piece, 21), results(piece, piece, 21), strict=True):
        assert error(a, b) < 1e-6
    if backend == "reference":  # its loop is unrolled, so another length is another graph
        return
    with torch.no_grad():
        for length in (21, 40):
            for a, b in zip(compiled(*piece_inputs(length)), piece(*piece_inputs(length)), strict=True):
                assert torch.equal(a, b)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler here")
def test_compiled_to_machine_code() -> None:
    torch._dynamo.reset()
    x = scan_inputs(1, 30, 20, 5)

    def twice(u: Tensor, z: Tensor) -> Tensor:
        out = ops.selective_scan(2 * u, x["delta"], x["A"], x["B"], x["C"], x["D"], z, dt_softplus=True, backend="cpu")
        return out.y + 1

    with torch.no_grad():
        assert error(torch.compile(twice, fullgraph=True)(x["u"], x["z"]), twice(x["u"], x["z"])) < 1e-6


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_export_keeps_the_operators(backend: str) -> None:
    piece = Piece(backend)
    exported = torch.export.export(piece, piece_inputs(21))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert f"mambascope.selective_scan_{backend}.default" in targets
    if backend == "cpu":
        assert {"mambascope.rms_norm_cpu.default", "mambascope.causal_conv_cpu.default"} <= targets
    for a, b in zip(exported.module()(*piece_inputs(21)), piece(*piece_inputs(21)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_fake_tensors_give_shapes_and_dtypes_without_running(backend: Any) -> None:
    x = scan_inputs(2, 21, 20, 5, dtype=torch.bfloat16)
    real = run(x, backend, gradients=False, boundaries=8)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(t) for name, t in x.items()}
        out = ops.selective_scan(**fake, dt_softplus=True, boundaries=8, backend=backend)
    for name, t in real.items():
        pretended = getattr(out, name)
        assert (pretended.shape, pretended.dtype, pretended.stride()) == (t.shape, t.dtype, t.stride())


def test_operator_and_direct_call_give_the_same_bits() -> None:
    x = scan_inputs(2, 70, 20, 5)
    direct = run(x, "cpu", gradients=False, boundaries=8)
    assert operators.direct(*x.values())
    y, h_last, h_boundary = OPS.selective_scan_cpu(*x.values(), None, True, 8)
    assert torch.equal(y, direct["y"])
    assert torch.equal(h_last, direct["h_last"])
    assert torch.equal(h_boundary, direct["h_boundary"])
    x["A"].requires_grad_()
    assert not operators.direct(*x.values())
    with torch.no_grad():
        assert operators.direct(*x.values())
    with FakeTensorMode():
        assert not operators.direct(*scan_inputs(1, 2, 2, 2).values())


def test_the_replay_interval_changes_no_gradient_beyond_rounding_and_fits_the_boundaries() -> None:
    for boundaries in (None, 1, 7, 64, 100, 1000, 1009, 4096):
        interval = operators.replay_interval(boundaries, 64)
        assert boundaries is None or boundaries % interval == 0
        assert interval <= 128 or boundaries == 1009  # a prime: nothing divides it
    x = scan_inputs(1, 1100, 8, 3)
    plain = run(x, "cpu")
    for boundaries in (5, 512, 1009):
        out = run(x, "cpu", boundaries=boundaries)
        assert out["h_boundary"].shape[1] == -(-1100 // boundaries)
        exact = run(x, "reference", gradients=False, boundaries=boundaries)
        assert error(out["h_boundary"], exact["h_boundary"]) < 1e-5
        assert torch.equal(out["y"], plain["y"])


def test_autocast_changes_nothing() -> None:
    x = scan_inputs(2, 30, 20, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(x, "cpu"), run(x, "torch")
    for found, backend in zip(inside, ("cpu", "torch"), strict=True):
        for name, t in run(x, backend).items():
            assert torch.equal(found[name], t), name


def test_second_derivatives_through_kernels_are_refused_by_name() -> None:
    x = {name: t.requires_grad_() for name, t in scan_inputs(1, 9, 4, 3).items()}
    y = ops.selective_scan(**x, dt_softplus=True, backend="cpu").y
    (first,) = torch.autograd.grad(y.square().sum(), x["u"], create_graph=True)
    with pytest.raises(BackendError, match=r"selective_scan on backend 'cpu' has no second derivative.*'torch'"):
        torch.autograd.grad(first.sum(), x["delta"])
    weight = torch.ones(4, 4, requires_grad=True)
    y = ops.causal_conv(x["u"], weight, activation="silu", backend="cpu").y
    (first,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(BackendError, match="causal_conv on backend 'cpu' has no second derivative"):
        torch.autograd.grad(first.sum(), x["u"])


def test_gradients_of_windows_need_the_torch_path() -> None:
    x = scan_inputs(1, 9, 4, 3)
    u, A, B, h0 = x["u"].requires_grad_(), x["A"].requires_grad_(), x["B"].requires_grad_(), x["h0"]
    delta = ops.softplus(x["delta"]).requires_grad_()
    with pytest.raises(BackendError, match="state_window has no gradient on backend 'cpu'"):
        ops.state_window(u, delta, A, B, h0, backend="cpu")
    inputs = (u, delta, A, B)
    results = [
        torch.autograd.grad(ops.state_window(u, delta, A, B, h0, backend=b).square().sum(), inputs)
        for b in ("auto", "reference")
    ]
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 1e-5
    h = OPS.state_window_cpu(u, delta, A, B, h0)
    with pytest.raises(BackendError, match="state_window on backend 'cpu' has no gradient"):
        h.sum().backward()


def test_an_operator_called_without_boundaries_says_what_it_lacks() -> None:
    y, _, _ = OPS.selective_scan_cpu(*scan_args(), None, True, 0)
    with pytest.raises(BackendError, match="without boundary states"):
        y.sum().backward()
    with pytest.raises(BackendError, match="recurrence alone"):
        OPS.selective_scan_torch(*scan_args(grad=False), None, True, 0)

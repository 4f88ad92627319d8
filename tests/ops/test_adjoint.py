"""The adjoint against the difference of two runs' states: every path against float64 and autograd."""

import os

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))

from mambascope import ops
from mambascope.errors import InputError
from mambascope.ops import Course
from mambascope.ops.dispatch import Backend
from mambascope.ops.scan import reference
from tests.ops.tolerance import assert_within, error

PATHS = ("torch", "cpu")


def case(batch: int, length: int, channels: int, states: int, seed: int = 0) -> dict[str, Tensor]:
    """Two runs' inputs and a third's adjoint, float64."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x: dict[str, Tensor] = {"A": -(torch.arange(states).double() + 1) * (1 + 0.1 * rand(channels, 1).abs())}
    for run in ("1", "2"):
        x |= {f"u{run}": rand(batch, length, channels), f"B{run}": rand(batch, length, states)}
        x |= {f"delta{run}": rand(batch, length, channels).exp() * 0.05, f"h{run}": rand(batch, channels, states)}
    return x | {"dy": rand(batch, length, channels), "C": rand(batch, length, states), "delta": x["delta1"]}


def contract(x: dict[str, Tensor], dtype: torch.dtype, boundaries: int, backend: Backend) -> Tensor:
    y = {name: value.to(dtype) for name, value in x.items()}
    if x["delta"] is x["delta1"]:
        y["delta"] = y["delta1"]
    runs = []
    for k in ("1", "2"):
        u, delta, B, h0 = (y[f"{name}{k}"] for name in ("u", "delta", "B", "h"))
        h = ops.selective_scan(u, delta, y["A"], B, y["C"], h0=h0, boundaries=boundaries, backend=backend).h_boundary
        assert h is not None
        runs.append(Course(u, delta, B, h))
    return ops.state_contraction(y["dy"], y["delta"], y["C"], y["A"], *runs, boundaries=boundaries, backend=backend)


def check(x: dict[str, Tensor], boundaries: int, backend: Backend) -> None:
    truth = contract(x, torch.float64, boundaries, "reference")
    sequential = contract(x, torch.float32, boundaries, "reference")
    assert_within(contract(x, torch.float32, boundaries, backend), truth, sequential)


SHAPES = [(1, 1, 1, 1, 64), (2, 63, 5, 3, 16), (1, 130, 33, 16, 64), (2, 65, 17, 4, 7), (1, 200, 16, 16, 32)]


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("batch", "length", "channels", "states", "boundaries"), SHAPES)
def test_shapes(batch: int, length: int, channels: int, states: int, boundaries: int, backend: Backend) -> None:
    check(case(batch, length, channels, states), boundaries, backend)


@pytest.mark.parametrize("backend", PATHS)
def test_the_adjoint_may_be_another_run_s(backend: Backend) -> None:
    x = case(2, 70, 19, 5)
    x["delta"] = x["delta2"] * 0.5 + 0.01
    check(x, 64, backend)


@pytest.mark.parametrize("backend", PATHS)
def test_large_steps_underflow_and_nothing_else(backend: Backend) -> None:
    x = case(1, 70, 18, 16)
    g = torch.Generator().manual_seed(4)
    for name in ("delta1", "delta2"):
        x[name] = torch.exp(torch.empty_like(x[name]).uniform_(-9.2, 3.9, generator=g))
    x["delta"] = x["delta1"]
    check(x, 64, backend)


def test_it_is_autograd_s_gradient_times_the_difference() -> None:
    x = case(2, 40, 7, 4)
    h = reference.window(x["u1"], x["delta1"], x["A"], x["B1"], x["h1"])
    other = reference.window(x["u2"], x["delta2"], x["A"], x["B2"], x["h2"])
    state, leaves, loss = x["h1"], [], torch.zeros((), dtype=torch.float64)
    for t in range(40):
        A_bar = torch.exp(x["delta1"][:, t, :, None] * x["A"])
        state = A_bar * state + (x["delta1"] * x["u1"])[:, t, :, None] * x["B1"][:, t, None]
        leaf = torch.zeros_like(state, requires_grad=True)
        leaves.append(leaf)
        state = state + leaf
        loss = loss + ((state * x["C"][:, t, None]).sum(-1) * x["dy"][:, t]).sum()
    grads = torch.stack(torch.autograd.grad(loss, leaves), 1)
    want = (grads * (other - h)).sum(-1)
    assert error(contract(x, torch.float64, 64, "reference"), want) < 1e-12
    assert error(contract(x, torch.float64, 64, "torch"), want) < 1e-12


def test_a_wrong_state_is_seen() -> None:
    x = case(1, 70, 16, 4)
    truth = contract(x, torch.float64, 64, "reference")
    x["h2"] = x["h2"] * 1.001
    assert error(contract(x, torch.float32, 64, "cpu"), truth) > 1e-5


def test_strided_and_half_inputs() -> None:
    x = {name: value.float() for name, value in case(2, 50, 20, 6).items()}
    wide = torch.cat([x["u1"], x["u2"]], -1).to(torch.bfloat16)
    u1, u2 = wide[..., :20], wide[..., 20:]
    runs = []
    for u, k in ((u1, "1"), (u2, "2")):
        out = ops.selective_scan(u, x[f"delta{k}"], x["A"], x[f"B{k}"], x["C"], h0=x[f"h{k}"], boundaries=64)
        assert out.h_boundary is not None
        runs.append(Course(u, x[f"delta{k}"], x[f"B{k}"], out.h_boundary))
    found = [
        ops.state_contraction(x["dy"], x["delta1"], x["C"], x["A"], *runs, backend=b) for b in ("cpu", "reference")
    ]
    assert error(*found) < 1e-6


def test_bad_input() -> None:
    x = case(1, 70, 16, 4)
    with pytest.raises(InputError, match="boundaries must lie in 1…64"):
        contract(x, torch.float32, 65, "torch")
    runs = [Course(x[f"u{k}"], x[f"delta{k}"], x[f"B{k}"], x[f"h{k}"][:, None]) for k in "12"]
    with pytest.raises(InputError, match="here.h_boundary must have shape"):
        ops.state_contraction(x["dy"], x["delta1"], x["C"], x["A"], *runs)
    runs = [r._replace(h_boundary=r.h_boundary.repeat(1, 2, 1, 1)) for r in runs]
    with pytest.raises(InputError, match="C "):
        ops.state_contraction(x["dy"], x["delta1"], x["C"][:, 1:], x["A"], *runs)

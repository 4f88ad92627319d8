"""Contractions of windows of states against the states themselves; the kernel's are in test_triton.py."""

from typing import Any

import pytest
import torch
from cases import backend_params, scan_inputs
from tolerance import assert_within, error
from torch import Tensor

from mambascope import ops
from mambascope.errors import BackendError, InputError
from mambascope.ops.scan import contraction

BACKENDS = backend_params("reference", "torch", "cpu", "auto")


def window(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    x = scan_inputs(batch, length, channels, states)
    return [x["u"], ops.softplus(x["delta"]), x["A"], x["B"], x["h0"]]


def weights(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 21, 20, 5), (1, 1, 20, 1), (2, 21, 1, 5), (1, 1, 20, 5), (1, 21, 1, 1)])
def test_contractions_are_those_of_the_states(backend: Any, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contraction, "_MOST", 2 * 20 * 5 * 4)  # pieces of four steps
    x, weight = window(2, 21, 20, 5), weights(*shape)
    exact = ops.state_window(*(t.double() for t in x), backend="reference") * weight.double()
    rough = ops.state_window(*x, backend="reference") * weight
    assert_within(ops.window_dot(*x, weight, backend=backend), exact.sum(-1), rough.sum(-1))
    both = ops.window_dot(*x, weight, over="D N", backend=backend)
    assert both.shape == (2, 21)
    assert_within(both, exact.sum((-2, -1)), rough.sum((-2, -1)))


def test_gradients_are_those_of_the_states() -> None:
    x = [t.requires_grad_() for t in (*window(2, 9, 4, 3), weights(2, 9, 4, 3))]
    grads = torch.autograd.grad(ops.window_dot(*x).square().sum(), x)
    truth = torch.autograd.grad((ops.state_window(*x[:5], backend="reference") * x[5]).sum(-1).square().sum(), x)
    for a, b in zip(grads, truth, strict=True):
        assert error(a, b) < 1e-5
    with pytest.raises(BackendError, match="window_dot has no gradient on backend 'cpu'"):
        ops.window_dot(*x, backend="cpu")


def test_no_step_gives_nothing() -> None:
    x = window(2, 3, 4, 3)
    empty = [x[0][:, :0], x[1][:, :0], x[2], x[3][:, :0], x[4]]
    assert ops.window_dot(*empty, weights(2, 1, 4, 3)).shape == (2, 0, 4)


def test_what_does_not_fit_is_refused() -> None:
    x = window(2, 9, 4, 3)
    with pytest.raises(InputError, match=r"weight must be B W D N = \(2, 9, 4, 3\)"):
        ops.window_dot(*x, weights(2, 8, 4, 3))
    with pytest.raises(InputError, match="weight must be floating point"):
        ops.window_dot(*x, torch.ones(3, dtype=torch.int64))
    with pytest.raises(InputError, match="over must be 'N'"):
        ops.window_dot(*x, weights(2, 9, 4, 3), over="D")  # type: ignore[arg-type]

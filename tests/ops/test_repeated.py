"""The scan with gradients, repeated: what `operators` gives, and replays only of what is surely the same."""

import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from cases import scan_inputs
from triton.runtime.interpreter import InterpretedFunction

from mambascope import ops
from mambascope.errors import BackendError
from mambascope.ops.repeated import ScanOfKind
from mambascope.ops.scan import triton as kernels

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)
DEVICE = "cuda" if CUDA else "cpu"


def leaves() -> list[Any]:
    x = {name: t.to(DEVICE).requires_grad_() for name, t in scan_inputs(2, 10, 6, 3).items()}
    return [*x.values(), torch.tensor([10, 4], device=DEVICE)]


def scan_of_kind(boundaries: int | None, interval: int) -> ScanOfKind:
    forward = partial(kernels.scan_forward, dt_softplus=True, boundaries=interval)
    return ScanOfKind("triton", True, boundaries, interval, forward)


def gradients(out: Any, x: list[Any]) -> tuple[Tensor, ...]:
    weights = [torch.linspace(-1, 1, t.numel(), device=DEVICE).view(t.shape) for t in out if t is not None]
    return torch.autograd.grad([t for t in out if t is not None], x[:9], weights)


@pytest.mark.parametrize(("boundaries", "interval"), [(None, 8), (8, 8), (8, 4)])
def test_it_gives_what_the_operator_gives(boundaries: int | None, interval: int) -> None:
    x = leaves()
    names = ("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "h0", "lengths")
    named = dict(zip(names, x, strict=True))
    usual = ops.selective_scan(**named, dt_softplus=True, boundaries=boundaries, backend="triton")
    again = scan_of_kind(boundaries, interval)(*x)
    for a, b in zip(usual, again, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(usual, x), gradients(again, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_gradient_at_the_last_state_alone() -> None:
    x = leaves()
    own = scan_of_kind(None, 8)
    (found,) = torch.autograd.grad(own(*x)[1].sum(), x[0])
    y, h_last, _ = kernels.scan_forward.function(*x, dt_softplus=True, boundaries=None)
    assert found.shape == x[0].shape
    assert found.abs().sum() > 0
    assert torch.equal(own(*x)[0].detach(), y)
    assert torch.equal(own(*x)[1].detach(), h_last)


def test_second_derivatives_are_refused_by_name() -> None:
    x = leaves()
    y = scan_of_kind(None, 8)(*x)[0]
    (first,) = torch.autograd.grad(y.square().sum(), x[0], create_graph=True)
    with pytest.raises(BackendError, match="selective_scan on backend 'triton' has no second derivative"):
        torch.autograd.grad(first.sum(), x[1])


def test_replays_serve_tensors_of_the_kind_that_was_learned_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, calls = leaves(), []
    own = scan_of_kind(None, 8)
    truth = gradients(own(*x), x)

    def replay(*args: Any) -> Any:
        calls.append(args)
        return kernels.scan_backward(*args, dt_softplus=True, boundaries=8)

    replay.aligned = True  # type: ignore[attr-defined]
    monkeypatch.setattr(kernels.scan_backward, "ready", lambda *_, **__: replay)
    seeds = [torch.ones_like(t) for t in own(*x)[:2]]

    def of(out: Any, grads: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out[:2], x[:9], grads)

    usual = of(own(*x), seeds)  # looked at, and learned
    assert not calls
    for a, b in zip(of(own(*x), seeds), usual, strict=True):
        assert torch.equal(a, b)
    assert len(calls) == 1
    of(own(*x), [torch.ones_like(seeds[0][..., :1]).expand_as(seeds[0]), seeds[1]])  # other strides
    assert len(calls) == 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        out = own(*x)
    of(out, seeds)  # other tensors of the same kind
    assert len(calls) == 2
    for a, b in zip(gradients(own(*x), x), truth, strict=True):  # other seeds
        assert torch.equal(a, b)

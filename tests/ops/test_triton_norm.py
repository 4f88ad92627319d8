"""The norm's backward kernel, alone and behind ``ops.rms_norm`` and ``ops.add_norm``: interpreted, or on a GPU."""

import os
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from mambascope import ops
from mambascope.ops import norm
from mambascope.ops.scan import triton_norm
from tests.ops.tolerance import error

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)
DEVICE = "cuda" if CUDA else "cpu"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, grads: tuple[Any, Any]) -> Any:
    """Gradients in float64 of the formulas, by autograd."""
    given = [None if t is None else t.double().requires_grad_() for t in (x, residual, weight)]
    a, r, w = given
    assert a is not None
    added = a if r is None else a + r
    out = norm.norm_formula(added, w, 1e-5)[0]
    total = (out * grads[0].double()).sum()
    if grads[1] is not None:
        total = total + (added * grads[1].double()).sum()
    return torch.autograd.grad(total, [t for t in given if t is not None])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (67, 24), (40, 100)])
def test_against_float64(rows: int, columns: int) -> None:
    x, weight = normal(rows, columns), normal(columns, seed=1)
    dout, beside = normal(rows, columns, seed=2), normal(rows, columns, seed=3)
    for other in (None, beside):
        want = exact(x, None, weight, (dout, other))
        dx, narrow, dweight = triton_norm.norm_backward(x, weight, dout, other, 1e-5, torch.float16)
        # where only one column is, dx is 0 but for eps: rounding is measured against what cancels
        scale = max(1.0, (dout.double().abs().max() / want[0].abs().max()).item()) if columns == 1 else 1.0
        assert error(dx, want[0]) < 2e-6 * scale
        assert error(dweight, want[1]) < 1e-6
        assert narrow is not None
        assert torch.equal(narrow, dx.half())
    assert error(triton_norm.norm_backward(x, weight, dout, None, 0.5)[0], want[0]) > 1e-3


def test_two_calls_give_the_same_bits() -> None:
    x, weight, dout = normal(50, 24), normal(24, seed=1), normal(50, 24, seed=2)
    first, second = (triton_norm.norm_backward(x, weight, dout, None, 1e-5) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("joined", [False, True])
def test_the_public_functions_use_it(dtype: torch.dtype, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    kernel = triton_norm.norm_backward
    from mambascope.ops.scan import triton

    monkeypatch.setattr(triton, "norm_backward", lambda *a: (used.append(1), kernel(*a))[1])
    x, weight = normal(2, 9, 20, dtype=dtype).requires_grad_(), normal(20, dtype=dtype, seed=1).requires_grad_()
    residual = normal(2, 9, 20, seed=4).requires_grad_()
    dout, beside = normal(2, 9, 20, dtype=dtype, seed=2), normal(2, 9, 20, seed=3)
    if joined:
        found = ops.add_norm(x, residual, weight, 1e-5, backend="triton")
        plain = ops.add_norm(x.detach(), residual.detach(), weight.detach(), 1e-5, backend="triton")
        assert torch.equal(found.residual, plain.residual)
        total = (found.out * dout).sum() + (found.residual * beside).sum()
        leaves, grads = [x, residual, weight], (dout, beside)
    else:
        found = ops.rms_norm(x, weight, 1e-5, backend="triton")
        total, leaves, grads = (found.out * dout).sum(), [x, weight], (dout, None)
    got = torch.autograd.grad(total, leaves)
    assert used == [1]
    want = exact(x.detach(), residual.detach() if joined else None, weight.detach(), grads)
    for a, b, leaf in zip(got, want, leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert error(a, b) < (2e-6 if a.dtype == torch.float32 and dtype == torch.float32 else 2e-3)


def test_parts_without_gradient_and_second_derivatives() -> None:
    x, residual = normal(3, 8), normal(3, 8, seed=1).requires_grad_()
    weight = normal(8, seed=2).requires_grad_()
    only = ops.add_norm(x, residual, weight, 1e-5, backend="triton").residual.sum()
    assert torch.equal(torch.autograd.grad(only, residual)[0], torch.ones_like(residual))

    def twice(backend: Any, dtype: torch.dtype) -> torch.Tensor:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, residual, weight)]
        found = ops.add_norm(*leaves, 1e-5, backend=backend)
        (slope,) = torch.autograd.grad((found.out**2).sum(), leaves[1], create_graph=True)
        return torch.autograd.grad((slope**2).sum(), leaves[1])[0]

    assert error(twice("triton", torch.float32), twice("reference", torch.float64)) < 1e-5

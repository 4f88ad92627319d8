"""Turning tensors between ``B D L``, other libraries' layout, and ``B L D``, ours: an exact copy, as cheap as it gets.

A tensor that already lies in memory as asked is only viewed. Otherwise it is copied once: on a CPU row by row, because
torch has a blocked transposing copy for matrices only (6 to 12 times its speed for three axes); on a GPU by a kernel
that turns tiles in shared memory.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mambascope.errors import BackendError
from mambascope.ops import dispatch

__all__ = ["observed", "turned"]

_SMALLEST = 60 * 60  # entries of a matrix, from which torch has its blocked copy


def observed(*tensors: Tensor | None) -> bool:
    """Whether somebody traces, compiles, transforms or wraps these tensors, and must see ordinary operators."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return True
    if dispatch._transformed():
        return True
    return any(x is not None and type(x) is not Tensor and type(x) is not nn.Parameter for x in tensors)


def _copy(x: Tensor) -> Tensor:
    batch, rows, columns = x.shape
    if x.device.type == "cpu" and rows * columns >= _SMALLEST:
        out = x.new_empty(batch, columns, rows)
        for b in range(batch):
            out[b].copy_(x[b].contiguous().t())
        return out
    if x.device.type == "cuda" and x.numel():
        try:
            dispatch.kernels("triton")
        except BackendError:  # auto's notice says it, once, for the scan itself
            return x.transpose(1, 2).contiguous()
        from mambascope.ops.scan import triton_turn

        return triton_turn.turn(x)
    return x.transpose(1, 2).contiguous()


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _copy(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return turned(grads[0])


def turned(x: Tensor) -> Tensor:
    """``B I J`` as ``B J I`` with a dense last axis: a view where memory allows it, else one copy. Differentiable."""
    view = x.transpose(1, 2)
    if view.shape[-1] == 1 or view.stride(-1) == 1:
        return view
    if observed(x):
        return view.contiguous()
    return _Turn.apply(x) if torch.is_grad_enabled() and x.requires_grad else _copy(x)  # type: ignore[return-value]

"""The backward pass of RMSNorm, with the residual addition before it: one walk over the rows, no atomics.

With n = x / s, s = sqrt(mean(x²) + eps), out = n w and g = dout w:

    dx = (g − n mean(g n)) / s (+ the gradient that arrives at x beside the norm),    dw = Σ_rows dout n
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import check, launch, processor_count
from mambascope.ops.scan.triton_math import steps
from mambascope.ops.scan.triton_replay import replayed
from mambascope.ops.scan.triton_sum import sum_parts

__all__ = ["norm_backward"]

_PROGRAMS = 8  # of a multiprocessor; each sums dw over its rows
_LANES = 32  # entries of a row, a thread: a row to a warp needs no barrier
_SUMS = 8  # entries of dw a program that adds up


@triton.jit(do_not_specialize=["rows", "programs"])
def _norm_backward_kernel(
    x, weight, dout, beside, dx, dnarrow, dweight, columns, eps, rows, programs,
    HAS_BESIDE: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: programs, each of which takes every ``programs``-th row, from the last."""
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    inside = i < columns
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for turn in steps(0, tl.cdiv(rows, programs)):
        row = rows - 1 - (turn * programs + pid)  # as `triton_math.backwards`
        there = inside & (row >= 0)
        at = row.to(tl.int64) * columns + i
        v = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        g = tl.load(dout + at, mask=there, other=0.0).to(tl.float32)
        root = tl.sqrt_rn(tl.sum(v * v, axis=0) / columns + eps)
        along = tl.sum(g * w * v, axis=0)  # two sums that do not wait for each other
        n = v / root
        dw += tl.where(there, g * n, 0.0)
        d = (g * w - n * (along / root / columns)) / root
        if HAS_BESIDE:
            d += tl.load(beside + at, mask=there, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=there)
        if NARROW:
            tl.store(dnarrow + at, d.to(dnarrow.dtype.element_ty), mask=there)
    tl.store(dweight + pid.to(tl.int64) * columns + i, dw, mask=inside)


@replayed(tensors=4)
def _norm_backward(
    x: Tensor, weight: Tensor, dout: Tensor, beside: Tensor | None, eps: float, narrow: torch.dtype | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    columns = x.shape[-1]
    rows = x.numel() // columns
    programs = max(1, min(rows, _PROGRAMS * processor_count(x.device)))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dnarrow = None if narrow is None else torch.empty(x.shape, dtype=narrow, device=x.device)
    dweight = torch.empty((columns,), dtype=weight.dtype, device=x.device)
    parts = torch.empty((programs, columns), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    flags = {
        "HAS_BESIDE": beside is not None,
        "NARROW": narrow is not None,
        "BLOCK": block,
        "num_warps": max(1, min(8, block // (32 * _LANES))),
        "enable_fp_fusion": False,
    }
    pointers = (x, weight, dout, beside, dx, dnarrow, parts)
    launch(_norm_backward_kernel, programs, x.device, *pointers, columns, eps, rows, programs, **flags)
    sum_parts(parts, dweight, block=_SUMS)
    return dx, dnarrow, dweight


def norm_backward(
    x: Tensor, weight: Tensor, dout: Tensor, beside: Tensor | None, eps: float, narrow: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x (x's dtype; with ``narrow`` also rounded to that) and of the weight, in its dtype.

    ``beside`` is what arrives at x from its other readers; it is added. Two calls give the same bits.
    """
    check(x)
    whole = (x.contiguous(), weight.contiguous(), dout.contiguous(), None if beside is None else beside.contiguous())
    return _norm_backward(*whole, eps, narrow)

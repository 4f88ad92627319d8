"""The softmax's cross-entropy of a tile of logits in Triton, and its gradient in the logits' place.

One program a row, all its threads on the row at once, so that few rows are under way: the row's second visit, which
writes softmax − one-hot, finds it in the L2 cache. Memory traffic is one read and one write of the logits. Sums run in
a fixed order.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import check, launch
from mambascope.ops.scan.triton_math import LOG2E, steps
from mambascope.ops.scan.triton_replay import replayed

__all__ = ["loss_forward"]

_BLOCK = 8192  # logits of a row at a time
_LANES = 8  # of them, a thread


@triton.jit
def _expm1(x):
    """e^x − 1 for x ≤ 0; near 0 by its series to x^8, whose next term is under 1e-9 of the result."""
    p = tl.fma(x, 1.0 / 40320.0, 1.0 / 5040.0)
    p = tl.fma(x, p, 1.0 / 720.0)
    p = tl.fma(x, p, 1.0 / 120.0)
    p = tl.fma(x, p, 1.0 / 24.0)
    p = tl.fma(x, p, 1.0 / 6.0)
    p = tl.fma(x, p, 0.5)
    p = tl.fma(x, p, 1.0)
    return tl.where(x > -0.35, x * p, tl.exp2(x * LOG2E) - 1.0)


@triton.jit(do_not_specialize=["ignored"])
def _loss_kernel(logits, targets, losses, columns, ignored, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: rows. −log softmax(row)[target] in nats, 0 for a target that is ignored, NaN for one out of range."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    scored = target != ignored
    known = (target >= 0) & (target < columns)
    at = logits + row * columns
    right = tl.load(at + target, mask=known, other=float("nan")).to(tl.float32)
    i = tl.arange(0, BLOCK)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.cdiv(columns, BLOCK)
    for block in steps(0, blocks):
        column = block * BLOCK + i
        v = tl.load(at + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(v, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2((top - base) * LOG2E) + tl.exp2((v - base) * LOG2E)
        top = higher
    top = tl.where(top == float("-inf"), 0.0, top)
    whole = tl.sum(total, axis=0)
    logp = right - top - tl.log(whole)
    tl.store(losses + row + tl.arange(0, 1), tl.where(scored, -logp, 0.0))
    if GRADIENT:
        there = _expm1(logp)
        share = 1.0 / whole
        for block in steps(0, blocks):
            column = block * BLOCK + i
            inside = column < columns
            v = tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
            v = tl.where(column == target, there, tl.exp2((v - top) * LOG2E) * share)
            tl.store(at + column, tl.where(scored, v, 0.0).to(logits.dtype.element_ty), mask=inside)


@replayed(tensors=2)
def loss_forward(logits: Tensor, targets: Tensor, gradient: bool, ignored: int = -100) -> Tensor:
    """Losses ``R`` in float32 of logits ``R V``, which with ``gradient`` are overwritten by softmax − one-hot, in their
    dtype: zeros where the target is ``ignored``. Both tensors are contiguous."""
    check(logits)
    rows, columns = logits.shape
    losses = torch.empty((rows,), dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(columns))
    flags = {
        "GRADIENT": gradient,
        "BLOCK": block,
        "num_warps": max(1, min(32, block // (32 * _LANES))),
        "enable_fp_fusion": False,
    }
    launch(_loss_kernel, rows, logits.device, logits, targets, losses, columns, ignored, **flags)
    return losses

"""The softmax's cross-entropy of a tile of logits in Triton, and its gradient in the logits' place.

One program a row, all its threads on the row at once. A row of 16-bit logits they hold in registers: it is read once,
all of its loads in flight. A longer row is read twice, and few rows are under way, so that the second visit finds it in
the L2 cache. Memory traffic is one read and one write of the logits. Sums run in a fixed order.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# ruff: noqa: RUF005

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import check, launch
from mambascope.ops.scan.triton_math import LOG2E, steps
from mambascope.ops.scan.triton_replay import replayed

__all__ = ["loss_forward", "scaled"]

_BLOCK, _LANES = 4096, 8  # logits of a row at a time, and of them a thread, where it is held
_HELD = 112  # of 16 bits, that a thread of 128 registers holds
_LONG_BLOCK, _LONG_LANES = 8192, 16  # where it is not
_SCALED = 4096  # entries a program


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
def _loss_kernel(
    logits, targets, losses, units, ignored,
    GRADIENT: tl.constexpr, ALIGN: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows. −log softmax(row)[target] in nats, 0 for a target that is ignored, NaN for one out of range.

    A row has ``units`` times ALIGN columns: so the compiler sees how they are aligned. HELD: the row's blocks, held in
    registers; 0: they are read twice.
    """
    columns = units * ALIGN
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    scored = target != ignored
    known = (target >= 0) & (target < columns)
    at = logits + row * units * ALIGN
    right = tl.load(at + target, mask=known, other=float("nan")).to(tl.float32)
    i = tl.arange(0, BLOCK)
    blocks = tl.cdiv(columns, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    values = ()
    if HELD:
        high = tl.full([BLOCK], float("-inf"), tl.float32)
        for block in tl.static_range(HELD - 1):
            values = values + (tl.load(at + block * BLOCK + i),)
        column = (HELD - 1) * BLOCK + i
        values = values + (tl.load(at + column, mask=column < columns, other=float("-inf")),)
        for block in tl.static_range(HELD):
            high = tl.maximum(high, values[block].to(tl.float32))
        top = tl.max(high, axis=0)
        top = tl.where(top == float("-inf"), 0.0, top)
        for block in tl.static_range(HELD):
            total += tl.exp2((values[block].to(tl.float32) - top) * LOG2E)
    else:
        top = tl.max(tl.full([BLOCK], float("-inf"), tl.float32), axis=0)
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
    tl.store(losses + row, tl.where(scored, -logp, 0.0))
    if GRADIENT:
        share = 1.0 / whole
        if HELD:
            for block in tl.static_range(HELD - 1):
                v = tl.exp2((values[block].to(tl.float32) - top) * LOG2E) * share
                tl.store(at + block * BLOCK + i, tl.where(scored, v, 0.0).to(logits.dtype.element_ty))
            v = tl.exp2((values[HELD - 1].to(tl.float32) - top) * LOG2E) * share
            column = (HELD - 1) * BLOCK + i
            tl.store(at + column, tl.where(scored, v, 0.0).to(logits.dtype.element_ty), mask=column < columns)
        else:
            for block in steps(0, blocks):
                column = block * BLOCK + i
                inside = column < columns
                v = tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
                v = tl.exp2((v - top) * LOG2E) * share
                tl.store(at + column, tl.where(scored, v, 0.0).to(logits.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # the target's own entry again, after the threads that wrote it with its block
        tl.store(at + target, _expm1(logp).to(logits.dtype.element_ty), mask=known & scored)


@replayed(tensors=2)
def loss_forward(logits: Tensor, targets: Tensor, gradient: bool, ignored: int = -100) -> Tensor:
    """Losses ``R`` in float32 of logits ``R V``, which with ``gradient`` are overwritten by softmax − one-hot, in their
    dtype: zeros where the target is ``ignored``. Both tensors are contiguous."""
    check(logits)
    rows, columns = logits.shape
    losses = torch.empty((rows,), dtype=torch.float32, device=logits.device)
    align, most = math.gcd(columns, 16), _BLOCK // _LANES * _HELD
    held = logits.element_size() == 2 and align > 1 and columns <= most
    block, lanes = (_BLOCK, _LANES) if held else (_LONG_BLOCK, _LONG_LANES)
    block = min(block, triton.next_power_of_2(columns))
    flags = {
        "GRADIENT": gradient,
        "ALIGN": align,
        "HELD": triton.cdiv(columns, block) if held else 0,
        "BLOCK": block,
        "num_warps": max(1, min(32, block // (32 * lanes))),
        "enable_fp_fusion": False,
    }
    launch(_loss_kernel, rows, logits.device, logits, targets, losses, columns // align, ignored, **flags)
    return losses


@triton.jit
def _scale_kernel(x, factor, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + i, v.to(out.dtype.element_ty), mask=i < size)


@replayed(tensors=2)
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x, contiguous, times ``factor`` (one entry) in float32, rounded once to ``dtype``."""
    check(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    options = {"BLOCK": _SCALED, "num_warps": 8, "enable_fp_fusion": False}
    launch(_scale_kernel, triton.cdiv(x.numel(), _SCALED), x.device, x, factor, out, x.numel(), **options)
    return out

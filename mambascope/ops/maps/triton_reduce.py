"""Reductions over channels on a GPU: one more value, and the shares of a map put together."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from mambascope.ops.scan.triton_math import steps

__all__ = ["MAX", "MEAN_ABS", "RMS", "SIGNED", "both", "finish_kernel", "joined", "larger"]

MEAN_ABS = tl.constexpr(0)
RMS = tl.constexpr(1)
SIGNED = tl.constexpr(2)
MAX = tl.constexpr(3)
SHARES = tl.constexpr(4)  # of the channels, added together


@triton.jit
def joined(acc, value, REDUCE: tl.constexpr):
    """The running reduction over channels with one more value; NaN stays NaN."""
    if REDUCE == MEAN_ABS:
        return acc + tl.abs(value)
    if REDUCE == RMS:
        return tl.fma(value, value, acc)
    if REDUCE == SIGNED:
        return acc + value
    return tl.maximum(acc, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def both(x, y, REDUCE: tl.constexpr):
    if REDUCE == MAX:
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    return x + y


@triton.jit
def larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["row0", "row1", "col0", "col1", "far_split", "near_split", "far_shares", "near_shares",
                               "tile0", "n_near", "scale"])  # fmt: skip
def finish_kernel(
    far, near, out, row0, row1, col0, col1, far_split, near_split, far_shares, near_shares, tile0, n_near, scale,
    REACH: tl.constexpr, REDUCE: tl.constexpr, WHOLE: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The map from its shares, reduced, 0 above the diagonal. Grid: tiles of the window × rows."""
    pid = tl.program_id(0)
    down = tl.cdiv(row1 - row0, BT)
    across = tl.cdiv(col1 - col0, BS)
    u = (pid // across) % down
    v = pid % across
    row = (pid // (across * down)).to(tl.int64)
    t = row0 + u * BT + tl.arange(0, BT)[:, None]
    s = col0 + v * BS + tl.arange(0, BS)[None, :]
    height = row1 - row0
    width = col1 - col0
    wanted = (t < row1) & (s < col1)
    m = s // WHOLE
    is_near = (t - REACH < (m + 1) * WHOLE) & (s <= t)
    is_far = t - REACH >= (m + 1) * WHOLE
    cell = (t - row0).to(tl.int64) * width + (s - col0)
    spot = (m - tile0).to(tl.int64) * ((WHOLE + REACH) * WHOLE) + (t - m * WHOLE) * WHOLE + (s - m * WHOLE)
    acc = tl.zeros([BT, BS], tl.float32)
    top = row0 + u * BT  # of this tile, to leave out what it does not need
    left = col0 + v * BS
    far_shares = tl.where(top + BT - 1 - REACH >= (left // WHOLE + 1) * WHOLE, far_shares, 0)
    near_top = (left + BS - 1) // WHOLE * WHOLE + WHOLE
    near_shares = tl.where((top - REACH < near_top) & (top + BT > left), near_shares, 0)
    far += row * height * width
    near += row * n_near * ((WHOLE + REACH) * WHOLE)
    for some in steps(0, tl.cdiv(far_shares, SHARES)):  # several loads under way
        for one in tl.static_range(SHARES):
            share = some * SHARES + one
            value = tl.load(far + share * far_split + cell, mask=wanted & is_far & (share < far_shares), other=0.0)
            acc = both(acc, value, REDUCE)
    for some in steps(0, tl.cdiv(near_shares, SHARES)):
        for one in tl.static_range(SHARES):
            share = some * SHARES + one
            value = tl.load(near + share * near_split + spot, mask=wanted & is_near & (share < near_shares), other=0.0)
            acc = both(acc, value, REDUCE)
    if REDUCE != MAX:
        acc = acc * scale
    if REDUCE == RMS:
        acc = tl.sqrt(acc)
    tl.store(out + row * height * width + cell, acc, mask=wanted)

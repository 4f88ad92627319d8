"""Blocks of 16 steps on the diagonal of a map on a GPU, walked step by step: no step lies between source and query."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005, B007

import triton
import triton.language as tl

from mambascope.ops.maps.triton_reduce import MAX, RMS, SIGNED, both, joined, larger
from mambascope.ops.scan.triton_math import steps

__all__ = ["block_kernel", "diagonal_kernel"]

BLOCK = tl.constexpr(16)


@triton.constexpr_function
def _place(t, i):
    """Where the tensor i of step t lies in a block's tuple."""
    return 2 * (t // 4) * (t // 4 + 1) + t % 4 * (t // 4 + 1) + i


@triton.jit(do_not_specialize=["L", "D", "wide", "n_blocks", "share", "out_split", "out_batch", "tile0"])
def block_kernel(
    delta, gain, read, A2, BT, CT, out, delta_b, delta_l, gain_b, gain_l, read_b, read_l,
    L, D, wide, n_blocks, share, out_split, out_batch, tile0,
    N: tl.constexpr, REDUCE: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_READ: tl.constexpr, WHOLE: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Blocks of 16 x 16 steps without a convolution: what each source wrote is carried on step by step, so that a
    decay is taken once a step and state, not once a pair. Grid: blocks × shares of channels × rows; out as in
    `pair_kernel` near the diagonal. BT, CT: B and C as ``B N wide``, ``wide`` a whole number of blocks.

    Source 4 i + q lies in tensor i, place q: a step has four tensors at most, and those of later sources none yet.
    """
    pid = tl.program_id(0)
    shares = tl.cdiv(D, share)
    block = pid % n_blocks
    part = (pid // n_blocks) % shares
    row = (pid // (n_blocks * shares)).to(tl.int64)
    start = tile0 * WHOLE + block * BLOCK
    q = tl.arange(0, 4)[None, :]
    lane = tl.arange(0, BD)[:, None]
    none = tl.zeros([BD, 4], tl.int32)
    total = ()
    for t in tl.static_range(BLOCK):
        for i in tl.static_range(t // 4 + 1):
            total = total + (tl.zeros([BD, 4], tl.float32),)
    first = part * share
    last = tl.minimum(first + share, D)
    for group in steps(0, tl.cdiv(last - first, BD)):
        d = first + group * BD + lane + none
        there = d < last
        step = ()
        for t in tl.static_range(BLOCK):
            at = tl.minimum(start + t, L - 1).to(tl.int64)  # what is beyond the text reaches nothing in it
            step = step + (tl.load(delta + row * delta_b + at * delta_l + d, mask=there, other=0.0),)
        y = ()
        for t in tl.static_range(BLOCK):
            for i in tl.static_range(t // 4 + 1):
                y = y + (tl.zeros([BD, 4], tl.float32),)
        for n in steps(0, N):
            a = tl.load(A2 + d * N + n, mask=there, other=0.0)
            line = (row * N + n) * wide + start
            H = ()
            added = ()
            for t in tl.static_range(BLOCK):
                b = tl.load(BT + line + t)
                c = tl.load(CT + line + t)
                fall = tl.exp2(a * step[t])
                carried = ()
                for i in tl.static_range(t // 4 + 1):
                    if i < t // 4:
                        h = H[i] * fall
                    elif t % 4 == 0:
                        h = tl.where(q + none == 0, b, 0.0)
                    else:
                        h = tl.where(q + none == t % 4, b, H[i] * fall)
                    carried = carried + (h,)
                    added = added + (tl.fma(h, c, y[_place(t, i)]),)
                H = carried
            y = added
        factor = ()
        for i in tl.static_range(4):
            s = tl.minimum(start + 4 * i + q + none, L - 1).to(tl.int64)
            value = tl.load(delta + row * delta_b + s * delta_l + d, mask=there, other=0.0)
            if HAS_GAIN:
                value = value * tl.load(gain + row * gain_b + s * gain_l + d, mask=there, other=0.0)
            factor = factor + (value,)
        reduced = ()
        for t in tl.static_range(BLOCK):
            scale = 1.0
            if HAS_READ:
                at = tl.minimum(start + t, L - 1).to(tl.int64)
                scale = tl.load(read + row * read_b + at * read_l + d, mask=there, other=0.0)
            for i in tl.static_range(t // 4 + 1):
                reduced = reduced + (joined(total[_place(t, i)], y[_place(t, i)] * factor[i] * scale, REDUCE),)
        total = reduced
    m = start // WHOLE
    base = out + part * out_split + row * out_batch + (m - tile0).to(tl.int64) * (WHOLE * WHOLE)
    q1 = tl.arange(0, 4)
    for t in tl.static_range(BLOCK):
        for i in tl.static_range(4):
            cell = base + (start + t - m * WHOLE) * WHOLE + (start - m * WHOLE) + 4 * i + q1
            if i > t // 4:
                tl.store(cell, tl.zeros([4], tl.float32))
            else:
                if REDUCE == MAX:
                    tl.store(cell, tl.reduce(total[_place(t, i)], 0, larger))
                else:
                    tl.store(cell, tl.sum(total[_place(t, i)], axis=0))


@triton.jit(do_not_specialize=["L", "D", "n_blocks", "share", "out_split", "out_batch", "tile0"])
def diagonal_kernel(
    delta, write, read, A2, B, C, taps, out, delta_b, delta_l, write_b, write_l, read_b, read_l, B_b, B_l, C_b, C_l,
    L, D, n_blocks, share, out_split, out_batch, tile0,
    N: tl.constexpr, REACH: tl.constexpr, REDUCE: tl.constexpr, HAS_READ: tl.constexpr, WHOLE: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Blocks of 16 sources and the queries up to 15 + REACH steps later: every source's state, step by step.

    Grid: blocks × shares of channels × rows; out as in `pair_kernel` near the diagonal.
    """
    pid = tl.program_id(0)
    shares = tl.cdiv(D, share)
    block = pid % n_blocks
    part = (pid // n_blocks) % shares
    row = (pid // (n_blocks * shares)).to(tl.int64)
    start = tile0 * WHOLE + block * BLOCK
    r = tl.arange(0, BLOCK)
    acc = ()
    for t in tl.static_range(BLOCK + REACH):
        acc = acc + (tl.zeros([BLOCK], tl.float32),)
    first = part * share
    last = tl.minimum(first + share, D)
    for group in steps(0, tl.cdiv(last - first, BD)):
        d = first + group * BD + tl.arange(0, BD)
        d_in = d < last
        tap = ()
        for j in tl.static_range(REACH + 1):
            if REACH > 0:
                tap = tap + (tl.load(taps + d * (REACH + 1) + REACH - j, mask=d_in, other=0.0),)
            else:
                tap = tap + (tl.full([BD], 1.0, tl.float32),)
        step = ()
        wrote = ()  # at each step: what every source writes then, before B
        y = ()
        for t in tl.static_range(BLOCK + REACH):
            at = start + t
            there = d_in & (at < L)
            long = at.to(tl.int64)
            step = step + (tl.load(delta + row * delta_b + long * delta_l + d, mask=there, other=0.0),)
            value = tl.load(write + row * write_b + long * write_l + d, mask=there, other=0.0)
            each = tl.zeros([BD, BLOCK], tl.float32)
            for j in tl.static_range(REACH + 1):
                each = tl.where((r == t - j)[None, :], (value * tap[j])[:, None], each)
            wrote = wrote + (each,)
            y = y + (tl.zeros([BD, BLOCK], tl.float32),)
        for n in steps(0, N):
            a = tl.load(A2 + d * N + n, mask=d_in, other=0.0)
            H = tl.zeros([BD, BLOCK], tl.float32)
            added = ()
            for t in tl.static_range(BLOCK + REACH):
                at = start + t
                long = at.to(tl.int64)
                b = tl.load(B + row * B_b + long * B_l + n, mask=at < L, other=0.0).to(tl.float32)
                c = tl.load(C + row * C_b + long * C_l + n, mask=at < L, other=0.0).to(tl.float32)
                H = tl.fma(wrote[t], b, H * tl.exp2(a * step[t])[:, None])
                added = added + (tl.fma(H, c, y[t]),)
            y = added
        total = ()
        for t in tl.static_range(BLOCK + REACH):
            value = y[t]
            if HAS_READ:
                at = start + t
                factor = tl.load(read + row * read_b + at.to(tl.int64) * read_l + d, mask=d_in & (at < L), other=0.0)
                value = value * factor[:, None]
            if REDUCE == MAX:
                total = total + (both(acc[t], tl.reduce(tl.abs(value), 0, larger), REDUCE),)
            elif REDUCE == RMS:
                total = total + (acc[t] + tl.sum(value * value, axis=0),)
            elif REDUCE == SIGNED:
                total = total + (acc[t] + tl.sum(value, axis=0),)
            else:
                total = total + (acc[t] + tl.sum(tl.abs(value), axis=0),)
        acc = total
    m = start // WHOLE
    base = out + part * out_split + row * out_batch + (m - tile0).to(tl.int64) * ((WHOLE + REACH) * WHOLE)
    for t in tl.static_range(BLOCK + REACH):
        tl.store(base + (start + t - m * WHOLE) * WHOLE + (start - m * WHOLE) + r, acc[t])

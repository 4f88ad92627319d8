"""Effective kernels on a GPU: tiles of the map as thin matrix products, a channel at a time, reduced in registers.

Time is cut in tiles of T steps. With r the step between a tile of sources and a later tile of queries,

    alpha[t, s, d] = Σ_n (C[t, n] exp(A[d, n] since[t, d])) · (B[s, n] exp(A[d, n] until[s, d]) write[s, d])

where since sums delta over (r, t] and until over (s, r]: both factors are ``T N``, both exponents ≤ 0. A program takes
one pair of tiles and a share of the channels, and adds up |alpha| (or alpha², …) without ever storing alpha.

The tile on the diagonal has no such r. It is halved: its lower left quarter is a pair of tiles of half the size, and so
on down to blocks of 16 steps, which a kernel of their own walks step by step.

With a convolution of K taps before the scan, a source writes at its own step and the K-1 after it. Tiles of queries
then begin K-1 steps later than tiles of sources, so that r still lies between: that shift is ``REACH``.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005, B007

import triton
import triton.language as tl

from mambascope.ops.maps.triton_reduce import RMS, SIGNED, joined
from mambascope.ops.scan.triton_math import steps

__all__ = ["HALF_TOP", "LANES", "between_kernel", "pair_kernel", "sums_kernel", "turn_kernel"]

LANES = tl.constexpr(128)  # channels looked at together before a tile
HALF_TOP = tl.constexpr(2.0**-12)  # factors are scaled to 2^12 at most: squares and sums of their products stay finite


@triton.jit
def _power(x):
    """The power of two at or below the largest finite |x|; 1 where there is none."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    top = tl.max(tl.where(bits < 0x7F800000, bits, 0))
    return tl.where(top > 0, tl.maximum(top, 27 << 23), 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def product(P, Q, acc):
    """acc + P Qᵀ, each factor as two float16, the second what the first leaves; the product of those is left out."""
    p = P.to(tl.float16)
    q = Q.to(tl.float16)
    acc = tl.dot((P - p.to(tl.float32)).to(tl.float16), tl.trans(q), acc)
    acc = tl.dot(p, tl.trans((Q - q.to(tl.float32)).to(tl.float16)), acc)
    return tl.dot(p, tl.trans(q), acc)


@triton.jit(do_not_specialize=["L", "D", "n_tiles"])
def sums_kernel(
    delta, since, until, total, delta_b, delta_l, L, D, n_tiles,
    T: tl.constexpr, REACH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """since ``B D tiles T``, until ``B D tiles T+REACH``, total ``B tiles D`` of every tile. Grid: tiles × blocks of
    channels × rows."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BD)
    tile = pid % n_tiles
    block = (pid // n_tiles) % blocks
    row = (pid // (n_tiles * blocks)).to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    k = tl.arange(0, T)
    first = tile * T + REACH
    base = delta + row * delta_b + d[None, :]
    t = first + k
    inside = (t < L)[:, None] & (d < D)[None, :]
    step = tl.load(base + t.to(tl.int64)[:, None] * delta_l, mask=inside, other=0.0).to(tl.float32)
    after = (t + 1 < L)[:, None] & (k + 1 < T)[:, None] & (d < D)[None, :]
    later = tl.load(base + (t + 1).to(tl.int64)[:, None] * delta_l, mask=after, other=0.0).to(tl.float32)
    forward = tl.cumsum(step, axis=0)
    backward = tl.cumsum(later, axis=0, reverse=True)
    whole = tl.sum(step, axis=0)
    line = (row * D + d) * n_tiles + tile
    kept = (d < D)[None, :]
    tl.store(since + line[None, :] * T + k[:, None], forward, mask=kept & (k >= 0)[:, None])
    tl.store(until + line[None, :] * (T + REACH) + REACH + k[:, None], backward, mask=kept & (k >= 0)[:, None])
    tl.store(total + (row * n_tiles + tile) * D + d, whole, mask=d < D)
    tail = whole
    for j in tl.static_range(REACH):  # the steps that the tile of sources has and that of queries has not
        at = first - 1 - j
        tl.store(until + line * (T + REACH) + REACH - 1 - j, tail, mask=d < D)
        tail += tl.load(delta + row * delta_b + at.to(tl.int64) * delta_l + d, mask=(d < D) & (at < L), other=0.0)


@triton.jit(do_not_specialize=["L", "D"])
def turn_kernel(
    x, gain, out, top, x_b, x_l, gain_b, gain_l, L, D, HAS_GAIN: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """out ``B D L`` = x · gain, of ``B L D``, and the largest finite |out|, as an integer's bits, in ``top``.

    Grid: tiles of time × blocks of channels × rows.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(L, BT)
    blocks = tl.cdiv(D, BD)
    d = (pid // tiles) % blocks * BD + tl.arange(0, BD)
    row = (pid // (tiles * blocks)).to(tl.int64)
    t = (pid % tiles) * BT + tl.arange(0, BT)
    inside = (t < L)[:, None] & (d < D)[None, :]
    cells = t.to(tl.int64)[:, None]
    value = tl.load(x + row * x_b + cells * x_l + d[None, :], mask=inside, other=0.0)
    if HAS_GAIN:
        value = value * tl.load(gain + row * gain_b + cells * gain_l + d[None, :], mask=inside, other=0.0)
    tl.store(out + (row * D + d)[None, :] * L + cells, value, mask=inside)
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(top, tl.max(tl.where(bits < 0x7F800000, bits, 0)))  # a maximum does not depend on the order


@triton.jit(do_not_specialize=["D", "n_tiles", "n_pairs"])
def between_kernel(total, pairs, between, D, n_tiles, n_pairs, BD: tl.constexpr):
    """delta summed over the tiles between each pair, ``B pairs D``, added up afresh. Grid: pairs × blocks of channels ×
    rows."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BD)
    pair = pid % n_pairs
    block = (pid // n_pairs) % blocks
    row = (pid // (n_pairs * blocks)).to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    i = tl.load(pairs + 2 * pair)
    j = tl.load(pairs + 2 * pair + 1)
    acc = tl.zeros([BD], tl.float32)
    for tile in steps(j + 1, i):
        acc += tl.load(total + (row * n_tiles + tile) * D + d, mask=d < D, other=0.0)
    tl.store(between + (row * n_pairs + pair) * D + d, acc, mask=d < D)


@triton.jit(do_not_specialize=[
    "L", "D", "i_tiles", "j_tiles", "n_pairs", "share", "row0", "row1", "col0", "col1", "out_split", "out_batch",
    "out_row", "tile0",
])  # fmt: skip
def pair_kernel(
    since, until, write, read, A2, B, C, taps, between, tops, pairs, out,
    B_b, B_l, C_b, C_l, L, D, i_tiles, j_tiles, n_pairs, share, row0, row1, col0, col1, out_split, out_batch, out_row,
    tile0,
    N: tl.constexpr, NP: tl.constexpr, TI: tl.constexpr, TJ: tl.constexpr, REACH: tl.constexpr, REDUCE: tl.constexpr,
    HAS_READ: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One pair of tiles, TI queries and TJ sources, over ``share`` channels. Grid: pairs × shares × rows.

    ``WHOLE`` 0: out is ``shares B rows cols``. Else: near the diagonal, out is ``shares B tiles WHOLE+REACH WHOLE``.
    """
    pid = tl.program_id(0)
    shares = tl.cdiv(D, share)
    pair = pid % n_pairs
    part = (pid // n_pairs) % shares
    row = (pid // (n_pairs * shares)).to(tl.int64)
    i = tl.load(pairs + 2 * pair)
    j = tl.load(pairs + 2 * pair + 1)
    k = tl.arange(0, TI)
    m = tl.arange(0, TJ)
    n = tl.arange(0, NP)
    t = i * TI + REACH + k
    s = j * TJ + m
    n_in = (n < N)[None, :]
    c = tl.load(C + row * C_b + t.to(tl.int64)[:, None] * C_l + n[None, :], mask=(t < L)[:, None] & n_in, other=0.0)
    c = c.to(tl.float32)
    b = ()
    for tap in tl.static_range(REACH + 1):
        at = s + tap
        there = (at < L)[:, None] & n_in
        value = tl.load(B + row * B_b + at.to(tl.int64)[:, None] * B_l + n[None, :], mask=there, other=0.0)
        b = b + (value.to(tl.float32),)
    acc = tl.zeros([TI, TJ], tl.float32)
    first = part * share
    last = tl.minimum(first + share, D)
    size_c = _power(c) * HALF_TOP  # into the range of float16 by powers of two, which go out again below
    size_b = _power(b[0])
    for tap in tl.static_range(1, REACH + 1):
        size_b = tl.maximum(size_b, _power(b[tap]))
    size_b = size_b * (HALF_TOP * (REACH + 1))
    for which in tl.static_range(3):  # what is written, the taps, what is read
        size = _power(tl.load(tops + which + tl.arange(0, 1)).to(tl.float32, bitcast=True))
        if which < 2:
            size_b = size_b * size
        else:
            size_c = size_c * size
    c = c / size_c
    scaled = ()
    for tap in tl.static_range(REACH + 1):
        scaled = scaled + (b[tap] / size_b,)
    lift = 0.0
    if WHOLE == 0:  # how far the channel that forgets least has forgotten between the tiles
        least = tl.full([LANES], float("-inf"), tl.float32)
        for step in steps(0, tl.cdiv(last - first, LANES)):
            lane = first + step * LANES + tl.arange(0, LANES)
            gone = tl.load(between + (row * n_pairs + pair) * D + lane, mask=lane < last, other=0.0)
            rates = tl.load(A2 + lane[:, None] * N + n[None, :], mask=(lane < last)[:, None] & n_in, other=-1e30)
            least = tl.maximum(least, tl.where(lane < last, gone * tl.max(rates, 1), float("-inf")))
        lift = tl.minimum(-tl.max(least), 126.0)
    for d in steps(first, last):
        line = row * D + d
        a = tl.load(A2 + d * N + n, mask=n < N, other=0.0)[None, :]
        if WHOLE == 0:
            gone = tl.load(between + (row * n_pairs + pair) * D + d)
        else:
            gone = 0.0
        x = tl.load(since + (line * i_tiles + i) * TI + k)
        P = c * tl.exp2(x[:, None] * a)
        if HAS_READ:
            P = P * tl.load(read + line * L + t, mask=t < L, other=0.0)[:, None]
        for tap in tl.static_range(REACH + 1):
            r = tl.load(until + (line * j_tiles + j) * (TJ + REACH) + m + tap) + gone
            w = tl.load(write + line * L + s + tap, mask=s + tap < L, other=0.0)
            if REACH > 0:
                w = w * tl.load(taps + d * (REACH + 1) + REACH - tap)
            grown = scaled[tap] * (tl.exp2(tl.fma(r[:, None], a, lift)) * w[:, None])
            if tap == 0:
                Q = grown
            else:
                Q = Q + grown
        if REDUCE == SIGNED:
            acc = product(P, Q, acc)
        else:
            acc = joined(acc, product(P, Q, tl.zeros([TI, TJ], tl.float32)), REDUCE)
    for once in tl.static_range(2 if REDUCE == RMS else 1):
        acc = acc * size_c * size_b * tl.exp2(-lift)
    if WHOLE == 0:
        base = out + part * out_split + row * out_batch
        cell = base + (t - row0).to(tl.int64)[:, None] * out_row + (s - col0)[None, :]
        wanted = ((t >= row0) & (t < row1))[:, None] & ((s >= col0) & (s < col1))[None, :]
    else:
        tile = (j * TJ) // WHOLE
        base = out + part * out_split + row * out_batch + (tile - tile0).to(tl.int64) * ((WHOLE + REACH) * WHOLE)
        cell = base + (t - tile * WHOLE)[:, None] * WHOLE + (s - tile * WHOLE)[None, :]
        wanted = (k >= 0)[:, None] & (m >= 0)[None, :]
    tl.store(cell, acc, mask=wanted)

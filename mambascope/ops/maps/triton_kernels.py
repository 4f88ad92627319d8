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

from mambascope.ops.scan.triton_math import steps

__all__ = [
    "between_kernel",
    "block_kernel",
    "diagonal_kernel",
    "finish_kernel",
    "line_kernel",
    "pair_kernel",
    "sums_kernel",
    "total_kernel",
]

BLOCK = tl.constexpr(16)
MEAN_ABS = tl.constexpr(0)
RMS = tl.constexpr(1)
SIGNED = tl.constexpr(2)
MAX = tl.constexpr(3)


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
def _both(x, y, REDUCE: tl.constexpr):
    if REDUCE == MAX:
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    return x + y


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _high(x):
    """The part of a float32 that a TF32 product reads exactly."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def product(P, Q, acc, PRECISION: tl.constexpr):
    """acc + P Qᵀ to float32: in three TF32 products (what is left out is 2^-22 of it), or on the FMA units.

    The compiler's own "tf32x3" also looks for NaN in every product, which costs as much as the rest; here one only
    spreads to where it belongs.
    """
    if PRECISION == "ieee":
        return tl.dot(P, tl.trans(Q), acc, input_precision="ieee")
    p = _high(P)
    q = _high(Q)
    if PRECISION == "joined":  # one product of four times the inner length, so that one wait does
        zero = tl.zeros_like(p)
        left = tl.reshape(tl.join(tl.join(P - p, p), tl.join(p, zero)), [P.shape[0], 4 * P.shape[1]])
        right = tl.reshape(tl.join(tl.join(q, Q - q), tl.join(q, tl.zeros_like(q))), [Q.shape[0], 4 * Q.shape[1]])
        return tl.dot(left, tl.trans(right), acc, input_precision="tf32")
    acc = tl.dot(P - p, tl.trans(q), acc, input_precision="tf32")
    acc = tl.dot(p, tl.trans(Q - q), acc, input_precision="tf32")
    return tl.dot(p, tl.trans(q), acc, input_precision="tf32")


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


@triton.jit(do_not_specialize=["D", "n_tiles", "n_pairs"])
def between_kernel(total, pairs, between, D, n_tiles, n_pairs, RATIO: tl.constexpr, BD: tl.constexpr):
    """delta summed over the tiles of sources between each pair, ``B pairs D``, added up afresh; a tile of queries is
    ``RATIO`` of them long."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BD)
    pair = pid % n_pairs
    block = (pid // n_pairs) % blocks
    row = (pid // (n_pairs * blocks)).to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    i = tl.load(pairs + 2 * pair)
    j = tl.load(pairs + 2 * pair + 1)
    acc = tl.zeros([BD], tl.float32)
    for tile in steps(j + 1, i * RATIO):
        acc += tl.load(total + (row * n_tiles + tile) * D + d, mask=d < D, other=0.0)
    tl.store(between + (row * n_pairs + pair) * D + d, acc, mask=d < D)


@triton.jit(do_not_specialize=[
    "L", "D", "i_tiles", "j_tiles", "n_pairs", "share", "row0", "row1", "col0", "col1", "out_split", "out_batch",
    "out_row", "tile0",
])  # fmt: skip
def pair_kernel(
    since, until, write, read, A2, B, C, taps, between, pairs, out,
    B_b, B_l, C_b, C_l, L, D, i_tiles, j_tiles, n_pairs, share, row0, row1, col0, col1, out_split, out_batch, out_row,
    tile0,
    N: tl.constexpr, NP: tl.constexpr, TI: tl.constexpr, TJ: tl.constexpr, REACH: tl.constexpr, REDUCE: tl.constexpr,
    HAS_READ: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
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
            grown = b[tap] * (tl.exp2(r[:, None] * a) * w[:, None])
            if tap == 0:
                Q = grown
            else:
                Q = Q + grown
        if REDUCE == SIGNED:
            acc = product(P, Q, acc, PRECISION)
        else:
            acc = joined(acc, product(P, Q, tl.zeros([TI, TJ], tl.float32), PRECISION), REDUCE)
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


@triton.jit(do_not_specialize=["L", "D", "n_blocks", "share", "out_split", "out_batch", "tile0"])
def block_kernel(
    delta, write, read, A2, B, C, out, delta_b, delta_l, B_b, B_l, C_b, C_l,
    L, D, n_blocks, share, out_split, out_batch, tile0,
    N: tl.constexpr, REDUCE: tl.constexpr, HAS_READ: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Blocks of 16 x 16 steps without a convolution, every exponential of them: delta between s and t is summed for
    each pair by itself. Grid: blocks × shares of channels × rows; out as in `pair_kernel` near the diagonal."""
    pid = tl.program_id(0)
    shares = tl.cdiv(D, share)
    block = pid % n_blocks
    part = (pid // n_blocks) % shares
    row = (pid // (n_blocks * shares)).to(tl.int64)
    start = tile0 * WHOLE + block * BLOCK
    k = tl.arange(0, BLOCK)
    t = start + k
    inside = t < L
    cells = t.to(tl.int64)
    kept = k[None, :] <= k[:, None]
    both = ()
    for n in tl.static_range(N):
        c = tl.load(C + row * C_b + cells * C_l + n, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(B + row * B_b + cells * B_l + n, mask=inside, other=0.0).to(tl.float32)
        both = both + (tl.where(kept, c[:, None] * b[None, :], 0.0),)
    between = ()  # all ones where step j lies in (s, t]
    lines = ()
    for j in tl.static_range(1, BLOCK):
        lines = lines + (delta + row * delta_b + tl.minimum(start + j, L - 1).to(tl.int64) * delta_l,)
        between = between + (tl.where((k[None, :] < j) & (k[:, None] >= j), -1, 0).to(tl.int32),)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    first = part * share
    last = tl.minimum(first + share, D)
    for two in steps(0, tl.cdiv(last - first, 2)):
        for one in tl.static_range(2):
            d = first + 2 * two + one
            there = d < last
            S = tl.zeros([BLOCK, BLOCK], tl.float32)
            for j in tl.static_range(1, BLOCK):
                step = tl.load(lines[j - 1] + d, mask=there, other=0.0)
                S += (step.to(tl.int32, bitcast=True) & between[j - 1]).to(tl.float32, bitcast=True)
            value = tl.zeros([BLOCK, BLOCK], tl.float32)
            for n in tl.static_range(N):
                value = tl.fma(tl.exp2(tl.load(A2 + d * N + n, mask=there, other=0.0) * S), both[n], value)
            value = value * tl.load(write + (row * D + d) * L + t, mask=inside & there, other=0.0)[None, :]
            if HAS_READ:
                value = value * tl.load(read + (row * D + d) * L + t, mask=inside & there, other=0.0)[:, None]
            acc = joined(acc, value, REDUCE)
    m = start // WHOLE
    base = out + part * out_split + row * out_batch + (m - tile0).to(tl.int64) * (WHOLE * WHOLE)
    tl.store(base + (t - m * WHOLE)[:, None] * WHOLE + (t - m * WHOLE)[None, :], acc)


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
                total = total + (_both(acc[t], tl.reduce(tl.abs(value), 0, _larger), REDUCE),)
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
    for share in steps(0, far_shares):
        at = far + share * far_split + row * height * width + cell
        acc = _both(acc, tl.load(at, mask=wanted & is_far, other=0.0), REDUCE)
    for share in steps(0, near_shares):
        at = near + share * near_split + row * n_near * ((WHOLE + REACH) * WHOLE) + spot
        acc = _both(acc, tl.load(at, mask=wanted & is_near, other=0.0), REDUCE)
    if REDUCE != MAX:
        acc = acc * scale
    if REDUCE == RMS:
        acc = tl.sqrt(acc)
    tl.store(out + row * height * width + cell, acc, mask=wanted)


# ---- one row or one column


@triton.jit(do_not_specialize=["L", "D", "n_chunks"])
def total_kernel(
    delta, at, sums, delta_b, delta_l, L, D, n_chunks, BACKWARD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """delta of each chunk of BT steps that lie on the line's side of ``at``, ``B D chunks``."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BD)
    block = pid % blocks
    chunk = (pid // blocks) % n_chunks
    row = (pid // (blocks * n_chunks)).to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    t = chunk * BT + tl.arange(0, BT)
    place = tl.load(at + row)
    inside = (t <= place) if BACKWARD else (t > place)
    mask = (inside & (t < L))[:, None] & (d < D)[None, :]
    step = tl.load(delta + row * delta_b + t.to(tl.int64)[:, None] * delta_l + d[None, :], mask=mask, other=0.0)
    tl.store(sums + (row * D + d) * n_chunks + chunk, tl.sum(step, axis=0), mask=d < D)


@triton.jit(do_not_specialize=["L", "D", "n_chunks"])
def line_kernel(
    delta, at, tails, A2, fixed, moving, gain, scale, out, delta_b, delta_l, moving_b, moving_l, gain_b, gain_l,
    L, D, n_chunks,
    N: tl.constexpr, BACKWARD: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SCALE: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """line[t, d] = Σ_n fixed[n] moving[t, n] exp(A[d, n] R[t, d]) (· delta, going backward) (· gain) (· scale).

    Grid: blocks of channels × chunks × rows. Where everything is forgotten the exponentials are not taken.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BD)
    block = pid % blocks
    chunk = (pid // blocks) % n_chunks
    row = (pid // (blocks * n_chunks)).to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    t = chunk * BT + tl.arange(0, BT)
    d_in = d < D
    place = tl.load(at + row)
    seen = ((t <= place) if BACKWARD else (t >= place)) & (t < L)
    mask = seen[:, None] & d_in[None, :]
    cells = t.to(tl.int64)[:, None]
    step = tl.load(delta + row * delta_b + cells * delta_l + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        k = tl.arange(0, BT)
        later = (k + 1 < BT)[:, None] & (t + 1 <= place)[:, None] & (t + 1 < L)[:, None] & d_in[None, :]
        after = tl.load(delta + row * delta_b + (cells + 1) * delta_l + d[None, :], mask=later, other=0.0)
        R = tl.cumsum(after.to(tl.float32), axis=0, reverse=True)
    else:
        R = tl.cumsum(tl.where((t > place)[:, None], step, 0.0), axis=0)
    tail = tl.load(tails + (row * D + d) * n_chunks + chunk, mask=d_in, other=0.0)
    R = R + tail[None, :]
    acc = tl.zeros([BT, BD], tl.float32)
    for n in steps(0, N):
        a = tl.load(A2 + d * N + n, mask=d_in, other=0.0)
        f = tl.load(fixed + row * N + n).to(tl.float32)
        m = tl.load(moving + row * moving_b + t.to(tl.int64) * moving_l + n, mask=seen, other=0.0).to(tl.float32)
        acc = tl.fma(tl.exp2(a[None, :] * R), (m * f)[:, None], acc)
    if BACKWARD:
        acc = acc * step
    if HAS_GAIN:
        acc = acc * tl.load(gain + row * gain_b + cells * gain_l + d[None, :], mask=mask, other=0.0)
    if HAS_SCALE:
        acc = acc * tl.load(scale + row * D + d, mask=d_in, other=0.0)[None, :]
    kept = (t < L)[:, None] & d_in[None, :]
    tl.store(out + row * L * D + cells * D + d[None, :], tl.where(seen[:, None], acc, 0.0), mask=kept)

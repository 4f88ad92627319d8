"""The pairs of tiles far from the diagonal on Hopper-class GPUs, in Triton's Gluon.

What `triton_pairs.pair_kernel` computes, with the work of a channel laid out by hand: while the products of one channel
run on the tensor cores, the factors of the next are made in registers; its numbers are on their way from memory since
the channel before. Both factors go through shared memory. The tensor cores could take one of them from registers, but
they read those late, and the compiler, which sees no use of them after the instruction, gives them to others before.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

from typing import Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mambascope.ops.maps import triton_pairs, triton_reduce
from mambascope.ops.scan.gluon_math import exp2

__all__ = ["far_kernel"]

MEAN_ABS = gl.constexpr(triton_reduce.MEAN_ABS.value)
RMS = gl.constexpr(triton_reduce.RMS.value)
SIGNED = gl.constexpr(triton_reduce.SIGNED.value)
NP = gl.constexpr(16)
HALF_TOP = gl.constexpr(triton_pairs.HALF_TOP.value)
LANES = gl.constexpr(triton_pairs.LANES.value)


@gluon.constexpr_function
def _factor_layout(T: int, warps: int) -> Any:
    """``[T, 16]``: a thread has up to eight states of a step, 16 bytes as float16."""
    each = T * 16 // (32 * warps)
    columns = min(8, each)
    across = 16 // columns
    return gl.BlockedLayout([each // columns, columns], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def _power(x, AXES: gl.constexpr):
    """The power of two at or below the largest finite |x|; 1 where there is none."""
    bits = x.to(gl.int32, bitcast=True) & 0x7F800000
    bits = gl.where(bits < 0x7F800000, bits, 0)
    top = gl.max(gl.max(bits, 1), 0) if AXES == 2 else gl.max(bits, 0)
    return gl.where(top > 0, gl.maximum(top, 27 << 23), 127 << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _size(top, LAYOUT: gl.constexpr):
    """The power of two at or below what the bits of an integer in memory mean."""
    return _power(gl.load(top + gl.arange(0, 1, LAYOUT)).to(gl.float32, bitcast=True), 1)


@gluon.jit
def _halves(x):
    """x as two float16: the second is what the first leaves."""
    high = x.to(gl.float16)
    return high, (x - high.to(gl.float32)).to(gl.float16)


@gluon.jit
def _add_abs(acc, x):
    """acc + |x| in one instruction."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; abs.f32 t, $2; add.f32 $0, $1, t; }", "=f,f,f", [acc, x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _reduced(acc, x, REDUCE: gl.constexpr):
    if REDUCE == MEAN_ABS:
        return _add_abs(acc, x)
    elif REDUCE == RMS:
        return gl.fma(x, x, acc)
    elif REDUCE == SIGNED:
        return acc + x
    else:
        return gl.maximum(acc, gl.abs(x), propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _numbers(
    since, until, write, read, between, A2, d, last, i_step, j_step, L, kp, np_, mq, nq, r_in,
    SAME: gl.constexpr, HAS_READ: gl.constexpr,
):  # fmt: skip
    """What the factors of channel d are made of; beyond the last one nothing is written."""
    there = d < last
    d = gl.minimum(d, last - 1)
    x = gl.load(since + d * i_step + kp)
    r = gl.load(until + d * j_step + mq) + gl.load(between + d)
    w = gl.load(write + d.to(gl.int64) * L + mq)
    w = gl.where(there, w, 0.0)
    ap = gl.load(A2 + d * NP + np_)
    if SAME:
        aq = ap
    else:
        aq = gl.load(A2 + d * NP + nq)
    if HAS_READ:
        g = gl.load(read + d.to(gl.int64) * L + kp, mask=r_in, other=0.0)
    else:
        g = x
    return x, r, w, ap, aq, g


@gluon.jit
def _factors(numbers, c, b, lift, HAS_READ: gl.constexpr):
    """P and Q, each as two float16."""
    x, r, w, ap, aq, g = numbers
    P = c * exp2(x[:, None] * ap[None, :])
    if HAS_READ:
        P = P * g[:, None]
    p_high, p_low = _halves(P)
    q_high, q_low = _halves(b * (exp2(gl.fma(r[:, None], aq[None, :], lift)) * w[:, None]))
    return p_high, p_low, q_high, q_low


@gluon.jit
def _put(factors, shared):
    for k in gl.static_range(4):
        shared[k].store(factors[k])
    fence_async_shared()


@gluon.jit
def _products(shared, zero):
    """P Qᵀ under way, but for the product of what is left of both."""
    high = shared[2].permute((1, 0))
    prod = warpgroup_mma(shared[1], high, zero, use_acc=False, is_async=True)
    prod = warpgroup_mma(shared[0], shared[3].permute((1, 0)), prod, is_async=True)
    return warpgroup_mma(shared[0], high, prod, is_async=True)


@gluon.jit
def _room(TI: gl.constexpr, TJ: gl.constexpr):
    """Shared memory for the factors of one channel."""
    SL: gl.constexpr = gl.NVMMASharedLayout(32, 16, 2)
    p_high = gl.allocate_shared_memory(gl.float16, [TI, NP], SL)
    p_low = gl.allocate_shared_memory(gl.float16, [TI, NP], SL)
    q_high = gl.allocate_shared_memory(gl.float16, [TJ, NP], SL)
    q_low = gl.allocate_shared_memory(gl.float16, [TJ, NP], SL)
    return p_high, p_low, q_high, q_low


@gluon.jit(do_not_specialize=[
    "L", "D", "i_tiles", "j_tiles", "n_pairs", "share", "row0", "row1", "col0", "col1", "out_split", "out_batch",
    "out_row",
])  # fmt: skip
def far_kernel(
    since, until, write, read, A2, B, C, between, tops, pairs, out,
    B_b, B_l, C_b, C_l, L, D, i_tiles, j_tiles, n_pairs, share, row0, row1, col0, col1, out_split, out_batch, out_row,
    N: gl.constexpr, TI: gl.constexpr, TJ: gl.constexpr, REDUCE: gl.constexpr, HAS_READ: gl.constexpr,
):  # fmt: skip
    """One pair of tiles, TI queries and TJ sources, over ``share`` channels; A2 has 16 columns, N of them in use.
    Grid: pairs × shares × rows; out is ``shares B rows cols``."""
    WARPS: gl.constexpr = gl.num_warps()
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TJ, 16])
    PL: gl.constexpr = _factor_layout(TI, WARPS)
    QL: gl.constexpr = _factor_layout(TJ, WARPS)
    WL: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    AL: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])

    pid = gl.program_id(0)
    shares = gl.cdiv(D, share)
    pair = pid % n_pairs
    part = (pid // n_pairs) % shares
    row = (pid // (n_pairs * shares)).to(gl.int64)
    i = gl.load(pairs + 2 * pair)
    j = gl.load(pairs + 2 * pair + 1)
    first = part * share
    last = gl.minimum(first + share, D)

    kp = gl.arange(0, TI, gl.SliceLayout(1, PL))
    np_ = gl.arange(0, NP, gl.SliceLayout(0, PL))
    t = i * TI + kp
    c_in = (t < L)[:, None] & (np_ < N)[None, :]
    c = gl.load(C + row * C_b + t.to(gl.int64)[:, None] * C_l + np_[None, :], mask=c_in, other=0.0).to(gl.float32)
    mq = gl.arange(0, TJ, gl.SliceLayout(1, QL))
    nq = gl.arange(0, NP, gl.SliceLayout(0, QL))
    s = j * TJ + mq
    b_in = (s < L)[:, None] & (nq < N)[None, :]
    b = gl.load(B + row * B_b + s.to(gl.int64)[:, None] * B_l + nq[None, :], mask=b_in, other=0.0).to(gl.float32)
    size_c = _power(c, 2) * HALF_TOP * _size(tops + 2, WL)
    size_b = _power(b, 2) * HALF_TOP * _size(tops, WL)
    c = c / size_c
    b = b / size_b
    between += (row * n_pairs + pair) * D
    lane0 = gl.arange(0, LANES, gl.SliceLayout(1, AL))
    na = gl.arange(0, NP, gl.SliceLayout(0, AL))
    least = gl.full([LANES], float("-inf"), gl.float32, gl.SliceLayout(1, AL))
    for step in range(0, gl.cdiv(last - first, LANES)):  # how far the channel that forgets least has forgotten
        lane = first + step * LANES + lane0
        gone = gl.load(between + lane, mask=lane < last, other=0.0)
        kept = (lane < last)[:, None] & (na < N)[None, :]
        rates = gl.load(A2 + lane[:, None] * NP + na[None, :], mask=kept, other=-1e30)
        least = gl.maximum(least, gl.where(lane < last, gone * gl.max(rates, 1), float("-inf")))
    lift = gl.minimum(-gl.max(least, 0), 126.0)

    since += (row * D * i_tiles + i) * TI
    until += (row * D * j_tiles + j) * TJ
    write += row * D * L + j * TJ
    if HAS_READ:
        read += row * D * L + i * TI
    i_step = i_tiles.to(gl.int64) * TI
    j_step = j_tiles.to(gl.int64) * TJ
    even = _room(TI, TJ)
    odd = _room(TI, TJ)
    acc = gl.zeros([TI, TJ], gl.float32, MMA)
    zero = gl.zeros([TI, TJ], gl.float32, MMA)

    numbers = _numbers(
        since,
        until,
        write,
        read,
        between,
        A2,
        first,
        last,
        i_step,
        j_step,
        L,
        kp,
        np_,
        mq,
        nq,
        t < L,
        TI == TJ,
        HAS_READ,
    )
    factors = _factors(numbers, c, b, lift, HAS_READ)
    _put(factors, even)
    prod = _products(even, zero)
    numbers = _numbers(
        since, until, write, read, between, A2, first + 1, last, i_step, j_step, L, kp, np_, mq, nq, t < L, TI == TJ,
        HAS_READ,
    )  # fmt: skip
    for d in range(first, last, 2):  # d is under way, the numbers of d + 1 are here
        _put(_factors(numbers, c, b, lift, HAS_READ), odd)
        done = warpgroup_mma_wait(0, deps=[prod])
        prod = _products(odd, zero)
        numbers = _numbers(
            since, until, write, read, between, A2, d + 2, last, i_step, j_step, L, kp, np_, mq, nq, t < L, TI == TJ,
            HAS_READ,
        )  # fmt: skip
        acc = _reduced(acc, done, REDUCE)
        _put(_factors(numbers, c, b, lift, HAS_READ), even)
        done = warpgroup_mma_wait(0, deps=[prod])
        prod = _products(even, zero)
        numbers = _numbers(
            since, until, write, read, between, A2, d + 3, last, i_step, j_step, L, kp, np_, mq, nq, t < L, TI == TJ,
            HAS_READ,
        )  # fmt: skip
        acc = _reduced(acc, done, REDUCE)
    warpgroup_mma_wait(0, deps=[prod])  # of a channel beyond the last
    for _ in gl.static_range(2 if REDUCE == RMS else 1):
        acc = acc * size_c * size_b * exp2(-lift)
    t = i * TI + gl.arange(0, TI, gl.SliceLayout(1, MMA))
    s = j * TJ + gl.arange(0, TJ, gl.SliceLayout(0, MMA))
    cell = out + part * out_split + row * out_batch + (t - row0).to(gl.int64)[:, None] * out_row + (s - col0)[None, :]
    wanted = ((t >= row0) & (t < row1))[:, None] & ((s >= col0) & (s < col1))[None, :]
    gl.store(cell, acc, mask=wanted)

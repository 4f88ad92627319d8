"""The backward of the causal convolution in Triton: one walk along time, no atomics.

With g the derivative before the SiLU,

    dx[t] = Σ_j weight[K − 1 − j] g[t + j],    dweight[k] = Σ_t g[t] x[t − K + 1 + k],    dbias = Σ_t g[t]

A program computes g once for its steps (and again for the K − 1 after them), writes dx, and leaves the sums of its
steps, which a second launch adds up in a fixed order. Filters of more than four taps take tiles and one pass more.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# ruff: noqa: SIM102

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_conv import (
    CHANNELS,
    WALKED,
    dot,
    four,
    incoming,
    place,
    programs,
    taps,
    walk_plan,
    walk_start,
)
from mambascope.ops.scan.triton_launch import check, dense, launch, strides, whole
from mambascope.ops.scan.triton_math import backwards, sigmoids, steps
from mambascope.ops.scan.triton_replay import replayed
from mambascope.ops.scan.triton_sum import sum_parts

__all__ = ["conv_backward", "conv_backward_into"]

_BACK = 32  # steps of a tile
_MOST, _ENOUGH = 128, 11  # steps of a walking program; programs a multiprocessor, as many as its registers hold
_TILE = {"BT": _BACK, "BD": CHANNELS, "num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _slope(dy, v, like, SILU: tl.constexpr):
    """The derivative before the SiLU, whose input v was rounded as the forward pass rounds it."""
    if SILU:
        v = v.to(like.dtype.element_ty).to(tl.float32)
        s, rest = sigmoids(v)
        dy = dy * s * tl.fma(v, rest, 1.0)
    return dy


@triton.jit
def _turned(g3, g2, g1, g0, w3, w2, w1, w0, K: tl.constexpr):
    """dx, K − 1 steps before the newest g: the oldest g meets the newest tap."""
    if K == 4:
        total = dot(g3, g2, g1, g0, w0, w1, w2, w3, w0, K, False)
    elif K == 3:
        total = dot(g3, g2, g1, g0, w0, w0, w1, w2, w0, K, False)
    elif K == 2:
        total = dot(g3, g2, g1, g0, w0, w0, w0, w1, w0, K, False)
    else:
        total = dot(g3, g2, g1, g0, w0, w0, w0, w0, w0, K, False)
    return total


@triton.jit
def _give(
    v, t, dx_rows, dx_l, dnew, dstate, at_state, real, begin, L, d_in,
    K: tl.constexpr, HAS_DNEW: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The derivative by x at step t of this program's, or by the incoming state where t < 0."""
    if HAS_DNEW:
        j = t - real + (K - 1)
        v += tl.load(dnew + at_state + j, mask=(j >= 0) & (j < K - 1) & d_in, other=0.0).to(tl.float32)
    tl.store(dx_rows + t.to(tl.int64) * dx_l, v.to(dx_rows.dtype.element_ty), mask=(t >= begin) & (t < L) & d_in)
    if HAS_STATE:
        before = (t < 0) & (t >= 1 - K) & d_in
        tl.store(dstate + at_state + (t + K - 1), v.to(dstate.dtype.element_ty), mask=before)


@triton.jit(do_not_specialize=["L"])
def _conv_walk_back_kernel(
    x, weight, bias, state, lengths, dy, dnew, dx, dstate, dweight, dbias, x_b, x_l, dy_b, dy_l, dx_b, dx_l, L, D,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_DNEW: tl.constexpr, SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """K ≤ 4: all derivatives of BT steps, the sums as one part. Grid: channel blocks × step blocks × rows."""
    d_blocks = tl.cdiv(D, BD)
    t_blocks = tl.cdiv(L, BT)
    pid = backwards()
    d = (pid % d_blocks) * BD + tl.arange(0, BD)
    t_block = (pid // d_blocks) % t_blocks
    row = (pid // (d_blocks * t_blocks)).to(tl.int64)
    d_in = d < D
    begin = t_block * BT
    real = L
    if HAS_LENGTHS:
        real = tl.load(lengths + row).to(tl.int32)
    x_rows = x + row * x_b + d
    dy_rows = dy + row * dy_b + d
    dx_rows = dx + row * dx_b + d
    at_state = (row * D + d) * (K - 1)
    w0, w1, w2, w3, b, x1, x2, x3 = walk_start(
        x_rows, x_l, weight, bias, state, at_state, begin, d, d_in, L, K, HAS_BIAS, HAS_STATE
    )
    zero = tl.zeros([BD], tl.float32)
    g1, g2, g3 = zero, zero, zero
    s0, s1, s2, s3, sb = zero, zero, zero, zero, zero
    n0, n1, n2, n3 = four(x_rows, x_l, begin, d_in, L)
    q0, q1, q2, q3 = four(dy_rows, dy_l, begin, d_in, L)
    for i in steps(0, BT // 4):
        t = begin + i * 4
        a0, a1, a2, a3 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)
        p0, p1, p2, p3 = q0.to(tl.float32), q1.to(tl.float32), q2.to(tl.float32), q3.to(tl.float32)
        n0, n1, n2, n3 = four(x_rows, x_l, t + 4, d_in, L)  # of the next turn, on their way meanwhile
        q0, q1, q2, q3 = four(dy_rows, dy_l, t + 4, d_in, L)
        p0 = _slope(p0, dot(x3, x2, x1, a0, w3, w2, w1, w0, b, K, HAS_BIAS), x, SILU)
        p1 = _slope(p1, dot(x2, x1, a0, a1, w3, w2, w1, w0, b, K, HAS_BIAS), x, SILU)
        p2 = _slope(p2, dot(x1, a0, a1, a2, w3, w2, w1, w0, b, K, HAS_BIAS), x, SILU)
        p3 = _slope(p3, dot(a0, a1, a2, a3, w3, w2, w1, w0, b, K, HAS_BIAS), x, SILU)
        s0 = tl.fma(p3, a3, tl.fma(p2, a2, tl.fma(p1, a1, tl.fma(p0, a0, s0))))
        if K > 1:
            s1 = tl.fma(p3, a2, tl.fma(p2, a1, tl.fma(p1, a0, tl.fma(p0, x1, s1))))
        if K > 2:
            s2 = tl.fma(p3, a1, tl.fma(p2, a0, tl.fma(p1, x1, tl.fma(p0, x2, s2))))
        if K > 3:
            s3 = tl.fma(p3, a0, tl.fma(p2, x1, tl.fma(p1, x2, tl.fma(p0, x3, s3))))
        if HAS_BIAS:
            sb += (p0 + p1) + (p2 + p3)
        v0 = _turned(g3, g2, g1, p0, w3, w2, w1, w0, K)
        v1 = _turned(g2, g1, p0, p1, w3, w2, w1, w0, K)
        v2 = _turned(g1, p0, p1, p2, w3, w2, w1, w0, K)
        v3 = _turned(p0, p1, p2, p3, w3, w2, w1, w0, K)
        out = t - (K - 1)
        _give(v0, out, dx_rows, dx_l, dnew, dstate, at_state, real, begin, L, d_in, K, HAS_DNEW, HAS_STATE)
        _give(v1, out + 1, dx_rows, dx_l, dnew, dstate, at_state, real, begin, L, d_in, K, HAS_DNEW, HAS_STATE)
        _give(v2, out + 2, dx_rows, dx_l, dnew, dstate, at_state, real, begin, L, d_in, K, HAS_DNEW, HAS_STATE)
        _give(v3, out + 3, dx_rows, dx_l, dnew, dstate, at_state, real, begin, L, d_in, K, HAS_DNEW, HAS_STATE)
        x3, x2, x1 = a1, a2, a3
        g3, g2, g1 = p1, p2, p3
    for j in tl.static_range(K - 1):  # the steps after these, which dx of the last ones depends on
        t = begin + (BT + j)
        a0, p0 = n0.to(tl.float32), q0.to(tl.float32)
        n0, n1, q0, q1 = n1, n2, q1, q2
        p0 = _slope(p0, dot(x3, x2, x1, a0, w3, w2, w1, w0, b, K, HAS_BIAS), x, SILU)
        v0 = _turned(g3, g2, g1, p0, w3, w2, w1, w0, K)
        out = t - (K - 1)
        _give(v0, out, dx_rows, dx_l, dnew, dstate, at_state, real, begin, L, d_in, K, HAS_DNEW, HAS_STATE)
        x3, x2, x1 = x2, x1, a0
        g3, g2, g1 = g2, g1, p0
    part = row * t_blocks + t_block
    sums = dweight + (part * D + d) * K
    tl.store(sums + (K - 1), s0, mask=d_in)
    if K > 1:
        tl.store(sums + (K - 2), s1, mask=d_in)
    if K > 2:
        tl.store(sums + (K - 3), s2, mask=d_in)
    if K > 3:
        tl.store(sums + (K - 4), s3, mask=d_in)
    if HAS_BIAS:
        tl.store(dbias + part * D + d, sb, mask=d_in)


@triton.jit(do_not_specialize=["L"])
def _conv_weight_kernel(
    x, weight, bias, state, dy, pre, dweight, dbias, x_b, x_l, dy_b, dy_l, L, D,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Derivative before the SiLU to ``pre``; one step block's sums for the weight and the bias."""
    row, t_block, d = place(L, D, BT, BD)
    d_in = d < D
    t = t_block * BT + tl.arange(0, BT)[:, None]
    inside = (t < L) & d_in
    x_rows = x + row * x_b + d
    at_state = (row * D + d) * (K - 1)
    g = tl.load(dy + row * dy_b + t.to(tl.int64) * dy_l + d, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        v = taps(x_rows, x_l, weight, bias, state, at_state, t, d, d_in, L, K, HAS_BIAS, HAS_STATE)
        v = v.to(x.dtype.element_ty).to(tl.float32)
        s, rest = sigmoids(v)
        g = g * s * tl.fma(v, rest, 1.0)
        tl.store(pre + (row * L + t) * D + d, g, mask=inside)
    part = row * tl.cdiv(L, BT) + t_block
    for k in tl.static_range(K):
        v = incoming(x_rows, x_l, state, at_state, t + (1 - K + k), d_in, L, K, HAS_STATE).to(tl.float32)
        total = tl.sum(g * v, axis=0)[None, :]
        tl.store(dweight + (part * D + d) * K + k, total, mask=d_in)
    if HAS_BIAS:
        tl.store(dbias + part * D + d, tl.sum(g, axis=0)[None, :], mask=d_in)


@triton.jit(do_not_specialize=["L"])
def _conv_input_kernel(
    weight, lengths, pre, dnew, dx, dstate, pre_b, pre_l, dx_b, dx_l, L, D,
    K: tl.constexpr, HAS_DNEW: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx, and in the first step block the derivative by the incoming state (steps 1 − K … −1)."""
    row, t_block, d = place(L, D, BT, BD)
    d_in = d < D
    real = L
    if HAS_LENGTHS:
        real = tl.load(lengths + row).to(tl.int32)
    g_rows = pre + row * pre_b + d
    at_state = (row * D + d) * (K - 1)
    passes = 1
    if HAS_STATE:
        if t_block == 0:
            passes = 1 + tl.cdiv(K - 1, BT)
    for i in steps(0, passes):
        t = t_block * BT + tl.arange(0, BT)[:, None] - i * BT
        total = tl.zeros([BT, BD], tl.float32)
        for k in tl.static_range(K):
            later = t + (K - 1 - k)
            there = (later >= 0) & (later < L) & d_in
            g = tl.load(g_rows + later.to(tl.int64) * pre_l, mask=there, other=0.0).to(tl.float32)
            total = tl.fma(tl.load(weight + d * K + k, mask=d_in, other=0.0).to(tl.float32), g, total)
        if HAS_DNEW:
            j = t - real + (K - 1)
            total += tl.load(dnew + at_state + j, mask=(j >= 0) & (j < K - 1) & d_in, other=0.0).to(tl.float32)
        at = row * dx_b + t.to(tl.int64) * dx_l + d
        tl.store(dx + at, total.to(dx.dtype.element_ty), mask=(t >= 0) & (t < L) & d_in)
        if HAS_STATE:
            before = (t < 0) & (t >= 1 - K) & d_in
            tl.store(dstate + at_state + (t + K - 1), total.to(dstate.dtype.element_ty), mask=before)


@replayed(tensors=7)
def conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    dy: Tensor,
    dstate: Tensor | None,
    *,
    silu: bool,
) -> dict[str, Tensor | None]:
    """dx, dweight, dbias, dstate (None without an incoming state), each in the dtype of its own; sums in float32."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _conv_backward(x, weight, bias, state, lengths, dy, dstate, dx, silu)


@replayed(tensors=8)
def conv_backward_into(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    dy: Tensor,
    dstate: Tensor | None,
    dxz: Tensor,
    *,
    silu: bool,
) -> dict[str, Tensor | None]:
    """As `conv_backward`, but dx goes to the left columns of ``dxz``, of x's dtype, and is not among the results."""
    found = _conv_backward(x, weight, bias, state, lengths, dy, dstate, dxz[..., : x.shape[2]], silu)
    del found["dx"]
    return found


def _conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    lengths: Tensor | None,
    dy: Tensor,
    dstate: Tensor | None,
    dx: Tensor,
    silu: bool,
) -> dict[str, Tensor | None]:
    width = weight.shape[1]
    check(x, K=width)
    x, dy, weight, bias = dense(x), dense(dy), whole(weight), whole(bias)  # type: ignore[assignment]
    state, lengths, dnew = whole(state), whole(lengths), whole(dstate)
    dbefore = None if state is None else torch.empty(state.shape, dtype=state.dtype, device=x.device)
    inputs = (x, weight, bias, state, lengths, dy, dnew, dx, dbefore)
    flags = {
        "K": width,
        "HAS_BIAS": bias is not None,
        "HAS_STATE": state is not None and width > 1,
        "HAS_LENGTHS": lengths is not None,
        "HAS_DNEW": dnew is not None and width > 1,
        "SILU": silu,
    }
    dweight_parts, dbias_parts = (_backward_in_tiles if width > WALKED else _backward_walking)(inputs, flags)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    sum_parts(dweight_parts, dweight, dbias_parts, dbias)
    return {"dx": dx, "dweight": dweight, "dbias": dbias, "dstate": dbefore}


def _parts(x: Tensor, count: int, flags: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """For the sums of the weight's and the bias's derivatives that programs leave."""
    shape, wide = (count, x.shape[2]), torch.float32
    parts = torch.empty((*shape, flags["K"]), dtype=wide, device=x.device)
    return parts, torch.empty(shape, dtype=wide, device=x.device) if flags["HAS_BIAS"] else None


def _backward_walking(inputs: tuple[Any, ...], flags: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """One pass; the sums' parts."""
    x, dy, dx = inputs[0], inputs[5], inputs[7]
    batch, length, channels = x.shape
    steps, block, count = walk_plan(x, _MOST, _ENOUGH)
    parts = _parts(x, batch * triton.cdiv(length, steps), flags)
    options = {"BT": steps, "BD": block, "num_warps": 1, "enable_fp_fusion": False}
    arguments = (*inputs, *parts, *strides(x, dy, dx), length, channels)
    launch(_conv_walk_back_kernel, count, x.device, *arguments, **flags, **options)
    return parts


def _backward_in_tiles(inputs: tuple[Any, ...], flags: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Two passes, the derivative before the SiLU between them in memory; the sums' parts."""
    x, weight, bias, state, lengths, dy, dnew, dx, dbefore = inputs
    batch, length, channels = x.shape
    pre = torch.empty(x.shape, dtype=torch.float32, device=x.device) if flags["SILU"] else dy
    parts = _parts(x, batch * triton.cdiv(length, _BACK), flags)
    first = {key: flags[key] for key in ("K", "HAS_BIAS", "HAS_STATE", "SILU")}
    arguments = (x, weight, bias, state, dy, pre, *parts, *strides(x, dy), length, channels)
    launch(_conv_weight_kernel, programs(x, _BACK), x.device, *arguments, **first, **_TILE)
    second = {key: flags[key] for key in ("K", "HAS_DNEW", "HAS_STATE", "HAS_LENGTHS")}
    arguments = (weight, lengths, pre, dnew, dx, dbefore, *strides(pre, dx), length, channels)
    launch(_conv_input_kernel, programs(x, _BACK), x.device, *arguments, **second, **_TILE)
    return parts

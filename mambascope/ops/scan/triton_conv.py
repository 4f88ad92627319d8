"""The causal depthwise convolution in Triton, with bias, SiLU and states; its backward in two passes, no atomics."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# ruff: noqa: SIM102

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import check, dense, launch, processor_count, strides, whole
from mambascope.ops.scan.triton_math import sigmoids, silu, steps
from mambascope.ops.scan.triton_replay import replayed

__all__ = ["conv_backward", "conv_forward"]

_STEPS, _CHANNELS = 16, 64  # one program's tile, forward
_BACK = 32  # steps of a tile of the backward
_WALKED = 4  # taps that are kept in registers
_WIDE, _ENOUGH = 256, 16  # bytes of a step that a walking program takes; programs a multiprocessor
_SUMS, _TERMS = 32, 64  # entries of a sum a program, terms at a time: few entries, many terms
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_BACK_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def _input(x_rows, x_l, state, at_state, t, d_in, L, K: tl.constexpr, HAS_STATE: tl.constexpr):
    """x at step t, from the incoming state where t < 0, and 0 past the text."""
    v = tl.load(x_rows + t.to(tl.int64) * x_l, mask=(t >= 0) & (t < L) & d_in, other=0.0)
    if HAS_STATE:
        before = (t < 0) & (t >= 1 - K) & d_in
        v = tl.where(t < 0, tl.load(state + at_state + (t + K - 1), mask=before, other=0.0).to(v.dtype), v)
    return v


@triton.jit
def _taps(
    x_rows, x_l, weight, bias, state, at_state, t, d, d_in, L,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """bias + Σ_k weight[k] x[t − K + 1 + k] in float32."""
    total = tl.load(weight + d * K, mask=d_in, other=0.0).to(tl.float32) * _input(
        x_rows, x_l, state, at_state, t + (1 - K), d_in, L, K, HAS_STATE
    ).to(tl.float32)
    for k in tl.static_range(1, K):
        w = tl.load(weight + d * K + k, mask=d_in, other=0.0).to(tl.float32)
        v = _input(x_rows, x_l, state, at_state, t + (1 - K + k), d_in, L, K, HAS_STATE).to(tl.float32)
        total = tl.fma(w, v, total)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=d_in, other=0.0).to(tl.float32)
    return total


@triton.jit
def _place(L, D, BT: tl.constexpr, BD: tl.constexpr):
    """This program's row, first step and channels. Grid: channel blocks × step blocks × rows."""
    d_blocks = tl.cdiv(D, BD)
    t_blocks = tl.cdiv(L, BT)
    pid = tl.program_id(0)
    d = (pid % d_blocks) * BD + tl.arange(0, BD)[None, :]
    t_block = (pid // d_blocks) % t_blocks
    row = (pid // (d_blocks * t_blocks)).to(tl.int64)
    return row, t_block, d


@triton.jit(do_not_specialize=["L"])
def _conv_kernel(
    x, weight, bias, state, lengths, y, new_state, x_b, x_l, L, D,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, t_block, d = _place(L, D, BT, BD)
    d_in = d < D
    t = t_block * BT + tl.arange(0, BT)[:, None]
    x_rows = x + row * x_b + d
    at_state = (row * D + d) * (K - 1)
    v = _taps(x_rows, x_l, weight, bias, state, at_state, t, d, d_in, L, K, HAS_BIAS, HAS_STATE)
    kind = y.dtype.element_ty
    v = v.to(kind)
    if SILU:
        v = silu(v.to(tl.float32)).to(kind)
    tl.store(y + (row * L + t) * D + d, v, mask=(t < L) & d_in)
    if K > 1:
        if t_block == 0:
            real = L
            if HAS_LENGTHS:
                real = tl.load(lengths + row).to(tl.int32)
            for j in tl.static_range(K - 1):
                last = _input(x_rows, x_l, state, at_state, d * 0 + (real + (j + 1 - K)), d_in, L, K, HAS_STATE)
                tl.store(new_state + at_state + j, last.to(new_state.dtype.element_ty), mask=d_in)


@triton.jit
def _dot(x3, x2, x1, x0, w3, w2, w1, w0, b, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """bias + Σ_k w_k x_k of the K newest, the oldest first, as `_taps` adds them up."""
    if K == 4:
        total = w3 * x3
        total = tl.fma(w2, x2, total)
        total = tl.fma(w1, x1, total)
        total = tl.fma(w0, x0, total)
    elif K == 3:
        total = w2 * x2
        total = tl.fma(w1, x1, total)
        total = tl.fma(w0, x0, total)
    elif K == 2:
        total = w1 * x1
        total = tl.fma(w0, x0, total)
    else:
        total = w0 * x0
    if HAS_BIAS:
        total += b
    return total


@triton.jit
def _put(y, v, inside, SILU: tl.constexpr):
    kind = y.dtype.element_ty
    v = v.to(kind)
    if SILU:
        v = silu(v.to(tl.float32)).to(kind)
    tl.store(y, v, mask=inside)


@triton.jit(do_not_specialize=["L"])
def _conv_walk_kernel(
    x, weight, bias, state, lengths, y, new_state, x_b, x_l, L, D,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """K ≤ 4: walks BT steps, every x loaded once, the taps in registers. Grid: channel blocks × step blocks × rows."""
    d_blocks = tl.cdiv(D, BD)
    t_blocks = tl.cdiv(L, BT)
    pid = tl.program_id(0)
    d = (pid % d_blocks) * BD + tl.arange(0, BD)
    t_block = (pid // d_blocks) % t_blocks
    row = (pid // (d_blocks * t_blocks)).to(tl.int64)
    d_in = d < D
    begin = t_block * BT
    x_rows = x + row * x_b + d
    at_state = (row * D + d) * (K - 1)
    w0 = tl.load(weight + d * K + (K - 1), mask=d_in, other=0.0).to(tl.float32)
    w1, w2, w3, b = w0, w0, w0, w0  # those that K and HAS_BIAS leave out are never used
    x1 = _input(x_rows, x_l, state, at_state, begin - 1, d_in, L, K, HAS_STATE).to(tl.float32)
    x2, x3 = x1, x1
    if K > 1:
        w1 = tl.load(weight + d * K + (K - 2), mask=d_in, other=0.0).to(tl.float32)
    if K > 2:
        w2 = tl.load(weight + d * K + (K - 3), mask=d_in, other=0.0).to(tl.float32)
        x2 = _input(x_rows, x_l, state, at_state, begin - 2, d_in, L, K, HAS_STATE).to(tl.float32)
    if K > 3:
        w3 = tl.load(weight + d * K + (K - 4), mask=d_in, other=0.0).to(tl.float32)
        x3 = _input(x_rows, x_l, state, at_state, begin - 3, d_in, L, K, HAS_STATE).to(tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + d, mask=d_in, other=0.0).to(tl.float32)
    for i in steps(0, BT // 4):
        t = begin + i * 4
        place = x_rows + t.to(tl.int64) * x_l
        in0, in1, in2, in3 = (t < L) & d_in, (t + 1 < L) & d_in, (t + 2 < L) & d_in, (t + 3 < L) & d_in
        a0 = tl.load(place, mask=in0, other=0.0).to(tl.float32)
        a1 = tl.load(place + x_l, mask=in1, other=0.0).to(tl.float32)
        a2 = tl.load(place + 2 * x_l, mask=in2, other=0.0).to(tl.float32)
        a3 = tl.load(place + 3 * x_l, mask=in3, other=0.0).to(tl.float32)
        out = y + (row * L + t) * D + d
        _put(out, _dot(x3, x2, x1, a0, w3, w2, w1, w0, b, K, HAS_BIAS), in0, SILU)
        _put(out + D, _dot(x2, x1, a0, a1, w3, w2, w1, w0, b, K, HAS_BIAS), in1, SILU)
        _put(out + 2 * D, _dot(x1, a0, a1, a2, w3, w2, w1, w0, b, K, HAS_BIAS), in2, SILU)
        _put(out + 3 * D, _dot(a0, a1, a2, a3, w3, w2, w1, w0, b, K, HAS_BIAS), in3, SILU)
        x3, x2, x1 = a1, a2, a3
    if K > 1:
        if t_block == 0:
            real = L
            if HAS_LENGTHS:
                real = tl.load(lengths + row).to(tl.int32)
            for j in tl.static_range(K - 1):
                last = _input(x_rows, x_l, state, at_state, d * 0 + (real + (j + 1 - K)), d_in, L, K, HAS_STATE)
                tl.store(new_state + at_state + j, last.to(new_state.dtype.element_ty), mask=d_in)


@triton.jit(do_not_specialize=["L"])
def _conv_weight_kernel(
    x, weight, bias, state, dy, pre, dweight, dbias, x_b, x_l, dy_b, dy_l, L, D,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    SILU: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Derivative before the SiLU to ``pre``; one step block's sums for the weight and the bias."""
    row, t_block, d = _place(L, D, BT, BD)
    d_in = d < D
    t = t_block * BT + tl.arange(0, BT)[:, None]
    inside = (t < L) & d_in
    x_rows = x + row * x_b + d
    at_state = (row * D + d) * (K - 1)
    g = tl.load(dy + row * dy_b + t.to(tl.int64) * dy_l + d, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        v = _taps(x_rows, x_l, weight, bias, state, at_state, t, d, d_in, L, K, HAS_BIAS, HAS_STATE)
        v = v.to(x.dtype.element_ty).to(tl.float32)
        s, rest = sigmoids(v)
        g = g * s * tl.fma(v, rest, 1.0)
        tl.store(pre + (row * L + t) * D + d, g, mask=inside)
    part = row * tl.cdiv(L, BT) + t_block
    for k in tl.static_range(K):
        v = _input(x_rows, x_l, state, at_state, t + (1 - K + k), d_in, L, K, HAS_STATE).to(tl.float32)
        total = tl.sum(g * v, axis=0)[None, :]
        tl.store(dweight + (part * D + d) * K + k, total, mask=d_in)
    if HAS_BIAS:
        tl.store(dbias + part * D + d, tl.sum(g, axis=0)[None, :], mask=d_in)


@triton.jit
def _add_up(parts, out, i, size, terms, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = Σ parts[·, i], in a fixed order: TERMS at a time."""
    total = tl.zeros([BLOCK], tl.float32)
    for group in steps(0, tl.cdiv(terms, TERMS)):
        term = group * TERMS + tl.arange(0, TERMS)[:, None]
        inside = (term < terms) & (i < size)[None, :]
        total += tl.sum(tl.load(parts + term.to(tl.int64) * size + i[None, :], mask=inside, other=0.0), axis=0)
    tl.store(out + i, total, mask=i < size)


@triton.jit(do_not_specialize=["terms", "weights", "channels"])
def _sum_kernel(
    dweight_part, dbias_part, dweight, dbias, terms, weights, channels,
    HAS_BIAS: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over the step blocks. Grid: blocks of ``weights`` entries, then of the bias's ``channels``."""
    many = tl.cdiv(weights, BLOCK)
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if pid < many:
        _add_up(dweight_part, dweight, pid * BLOCK + i, weights, terms, TERMS, BLOCK)
    else:
        if HAS_BIAS:
            _add_up(dbias_part, dbias, (pid - many) * BLOCK + i, channels, terms, TERMS, BLOCK)


@triton.jit(do_not_specialize=["L"])
def _conv_input_kernel(
    weight, lengths, pre, dnew, dx, dstate, pre_b, pre_l, L, D,
    K: tl.constexpr, HAS_DNEW: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx, and in the first step block the derivative by the incoming state (steps 1 − K … −1)."""
    row, t_block, d = _place(L, D, BT, BD)
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
        tl.store(dx + (row * L + t) * D + d, total.to(dx.dtype.element_ty), mask=(t >= 0) & (t < L) & d_in)
        if HAS_STATE:
            before = (t < 0) & (t >= 1 - K) & d_in
            tl.store(dstate + at_state + (t + K - 1), total.to(dstate.dtype.element_ty), mask=before)


def _programs(x: Tensor, steps: int) -> int:
    batch, length, channels = x.shape
    return batch * triton.cdiv(length, steps) * triton.cdiv(channels, _CHANNELS)


@replayed(tensors=5)
def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None, *, silu: bool
) -> tuple[Tensor, Tensor]:
    """``y B L D`` and the new state ``B D K-1``, both in x's dtype; see ``ops.causal_conv``. Needs L ≥ 1."""
    weight = weight[:, 0] if weight.dim() == 3 else weight
    width = weight.shape[1]
    check(x, K=width)
    batch, length, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_state = torch.empty((batch, channels, width - 1), dtype=x.dtype, device=x.device)
    x, weight, bias, state, lengths = dense(x), whole(weight), whole(bias), whole(state), whole(lengths)  # type: ignore[assignment]
    flags = {
        "K": width,
        "HAS_BIAS": bias is not None,
        "HAS_STATE": state is not None and width > 1,
        "HAS_LENGTHS": lengths is not None,
        "SILU": silu,
    }
    arguments = (x, weight, bias, state, lengths, y, new_state, *strides(x), length, channels)
    if width > _WALKED:
        options = {"BT": _STEPS, "BD": _CHANNELS, **_OPTIONS}
        launch(_conv_kernel, _programs(x, _STEPS), x.device, *arguments, **flags, **options)
        return y, new_state
    block = min(_WIDE // x.element_size(), max(32, triton.next_power_of_2(channels)))
    many = _ENOUGH * processor_count(x.device)
    columns = batch * triton.cdiv(channels, block)
    steps = next((n for n in (64, 32, 16) if columns * triton.cdiv(length, n) >= many), 8)
    options = {"BT": steps, "BD": block, "num_warps": 1, "enable_fp_fusion": False}
    launch(_conv_walk_kernel, columns * triton.cdiv(length, steps), x.device, *arguments, **flags, **options)
    return y, new_state


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
    """dx, dweight and dbias (float32), dstate (None without an incoming state)."""
    width = weight.shape[1]
    check(x, K=width)
    batch, length, channels = x.shape
    x, dy, weight, bias = dense(x), dense(dy), whole(weight), whole(bias)  # type: ignore[assignment]
    state, lengths, dnew = whole(state), whole(lengths), whole(dstate)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    pre = new(*x.shape) if silu else dy
    parts = batch * triton.cdiv(length, _BACK)
    dweight = new(parts, channels, width)
    dbias = None if bias is None else new(parts, channels)
    flags: dict[str, Any] = {"K": width, "HAS_STATE": state is not None and width > 1, "BT": _BACK, "BD": _CHANNELS}
    pointers = (x, weight, bias, state, dy, pre, dweight, dbias)
    own = {"HAS_BIAS": bias is not None, "SILU": silu}
    arguments = (*pointers, *strides(x, dy), length, channels)
    launch(_conv_weight_kernel, _programs(x, _BACK), x.device, *arguments, **flags, **own, **_BACK_OPTIONS)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbefore = None if state is None else torch.empty(state.shape, dtype=state.dtype, device=x.device)
    own = {"HAS_DNEW": dnew is not None and width > 1, "HAS_LENGTHS": lengths is not None}
    arguments = (weight, lengths, pre, dnew, dx, dbefore, *strides(pre), length, channels)
    launch(_conv_input_kernel, _programs(x, _BACK), x.device, *arguments, **flags, **own, **_BACK_OPTIONS)
    sums = new(channels, width), None if dbias is None else new(channels)
    programs = triton.cdiv(channels * width, _SUMS) + (0 if dbias is None else triton.cdiv(channels, _SUMS))
    flags = {"HAS_BIAS": dbias is not None, "TERMS": _TERMS, "BLOCK": _SUMS}
    arguments = (dweight, dbias, *sums, parts, channels * width, channels)
    launch(_sum_kernel, programs, x.device, *arguments, **flags, **_OPTIONS)
    return {"dx": dx, "dweight": sums[0], "dbias": sums[1], "dstate": dbefore}

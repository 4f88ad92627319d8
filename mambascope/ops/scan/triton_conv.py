"""The causal depthwise convolution in Triton, with bias, SiLU and states: forward.

Filters of up to four taps walk along time, the taps in registers, every value loaded once; wider ones take tiles.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# ruff: noqa: SIM102

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import check, dense, launch, processor_count, strides, whole
from mambascope.ops.scan.triton_math import backwards, silu, steps
from mambascope.ops.scan.triton_replay import replayed

__all__ = [
    "CHANNELS",
    "WALKED",
    "conv_forward",
    "dot",
    "four",
    "incoming",
    "place",
    "programs",
    "taps",
    "walk_plan",
    "walk_start",
]

CHANNELS = 64
"""Of a tile."""
WALKED = 4
"""Taps that are kept in registers."""
_STEPS = 16  # of a tile
_WIDE = 256  # bytes of a step that a walking program takes
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def incoming(x_rows, x_l, state, at_state, t, d_in, L, K: tl.constexpr, HAS_STATE: tl.constexpr):
    """x at step t, from the incoming state where t < 0, and 0 past the text."""
    v = tl.load(x_rows + t.to(tl.int64) * x_l, mask=(t >= 0) & (t < L) & d_in, other=0.0)
    if HAS_STATE:
        before = (t < 0) & (t >= 1 - K) & d_in
        v = tl.where(t < 0, tl.load(state + at_state + (t + K - 1), mask=before, other=0.0).to(v.dtype), v)
    return v


@triton.jit
def taps(
    x_rows, x_l, weight, bias, state, at_state, t, d, d_in, L,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """bias + Σ_k weight[k] x[t − K + 1 + k] in float32."""
    total = tl.load(weight + d * K, mask=d_in, other=0.0).to(tl.float32) * incoming(
        x_rows, x_l, state, at_state, t + (1 - K), d_in, L, K, HAS_STATE
    ).to(tl.float32)
    for k in tl.static_range(1, K):
        w = tl.load(weight + d * K + k, mask=d_in, other=0.0).to(tl.float32)
        v = incoming(x_rows, x_l, state, at_state, t + (1 - K + k), d_in, L, K, HAS_STATE).to(tl.float32)
        total = tl.fma(w, v, total)
    if HAS_BIAS:
        total += tl.load(bias + d, mask=d_in, other=0.0).to(tl.float32)
    return total


@triton.jit
def place(L, D, BT: tl.constexpr, BD: tl.constexpr):
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
    row, t_block, d = place(L, D, BT, BD)
    d_in = d < D
    t = t_block * BT + tl.arange(0, BT)[:, None]
    x_rows = x + row * x_b + d
    at_state = (row * D + d) * (K - 1)
    v = taps(x_rows, x_l, weight, bias, state, at_state, t, d, d_in, L, K, HAS_BIAS, HAS_STATE)
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
                last = incoming(x_rows, x_l, state, at_state, d * 0 + (real + (j + 1 - K)), d_in, L, K, HAS_STATE)
                tl.store(new_state + at_state + j, last.to(new_state.dtype.element_ty), mask=d_in)


@triton.jit
def dot(x3, x2, x1, x0, w3, w2, w1, w0, b, K: tl.constexpr, HAS_BIAS: tl.constexpr):
    """bias + Σ_k w_k x_k of the K newest, the oldest first, as `taps` adds them up."""
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
def walk_start(
    x_rows, x_l, weight, bias, state, at_state, begin, d, d_in, L,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The taps, the newest step's first, the bias, and the three steps before ``begin``, the newest first."""
    w0 = tl.load(weight + d * K + (K - 1), mask=d_in, other=0.0).to(tl.float32)
    w1, w2, w3, b = w0, w0, w0, w0  # those that K and HAS_BIAS leave out are never used
    x1 = incoming(x_rows, x_l, state, at_state, begin - 1, d_in, L, K, HAS_STATE).to(tl.float32)
    x2, x3 = x1, x1
    if K > 1:
        w1 = tl.load(weight + d * K + (K - 2), mask=d_in, other=0.0).to(tl.float32)
    if K > 2:
        w2 = tl.load(weight + d * K + (K - 3), mask=d_in, other=0.0).to(tl.float32)
        x2 = incoming(x_rows, x_l, state, at_state, begin - 2, d_in, L, K, HAS_STATE).to(tl.float32)
    if K > 3:
        w3 = tl.load(weight + d * K + (K - 4), mask=d_in, other=0.0).to(tl.float32)
        x3 = incoming(x_rows, x_l, state, at_state, begin - 3, d_in, L, K, HAS_STATE).to(tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + d, mask=d_in, other=0.0).to(tl.float32)
    return w0, w1, w2, w3, b, x1, x2, x3


@triton.jit
def four(rows, stride, t, d_in, L):
    """Steps t to t + 3, zeros past the text."""
    at = rows + t.to(tl.int64) * stride
    a0 = tl.load(at, mask=(t < L) & d_in, other=0.0)
    a1 = tl.load(at + stride, mask=(t + 1 < L) & d_in, other=0.0)
    a2 = tl.load(at + 2 * stride, mask=(t + 2 < L) & d_in, other=0.0)
    a3 = tl.load(at + 3 * stride, mask=(t + 3 < L) & d_in, other=0.0)
    return a0, a1, a2, a3


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
    pid = backwards()
    d = (pid % d_blocks) * BD + tl.arange(0, BD)
    t_block = (pid // d_blocks) % t_blocks
    row = (pid // (d_blocks * t_blocks)).to(tl.int64)
    d_in = d < D
    begin = t_block * BT
    x_rows = x + row * x_b + d
    at_state = (row * D + d) * (K - 1)
    w0, w1, w2, w3, b, x1, x2, x3 = walk_start(
        x_rows, x_l, weight, bias, state, at_state, begin, d, d_in, L, K, HAS_BIAS, HAS_STATE
    )
    end = tl.minimum(begin + BT, L)
    n0, n1, n2, n3 = four(x_rows, x_l, begin, d_in, end)
    for i in steps(0, BT // 4):
        t = begin + i * 4
        in0, in1, in2, in3 = (t < L) & d_in, (t + 1 < L) & d_in, (t + 2 < L) & d_in, (t + 3 < L) & d_in
        a0, a1, a2, a3 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)
        n0, n1, n2, n3 = four(x_rows, x_l, t + 4, d_in, end)  # of the next turn, on their way meanwhile
        out = y + (row * L + t) * D + d
        _put(out, dot(x3, x2, x1, a0, w3, w2, w1, w0, b, K, HAS_BIAS), in0, SILU)
        _put(out + D, dot(x2, x1, a0, a1, w3, w2, w1, w0, b, K, HAS_BIAS), in1, SILU)
        _put(out + 2 * D, dot(x1, a0, a1, a2, w3, w2, w1, w0, b, K, HAS_BIAS), in2, SILU)
        _put(out + 3 * D, dot(a0, a1, a2, a3, w3, w2, w1, w0, b, K, HAS_BIAS), in3, SILU)
        x3, x2, x1 = a1, a2, a3
    if K > 1:
        if t_block == 0:
            real = L
            if HAS_LENGTHS:
                real = tl.load(lengths + row).to(tl.int32)
            for j in tl.static_range(K - 1):
                last = incoming(x_rows, x_l, state, at_state, d * 0 + (real + (j + 1 - K)), d_in, L, K, HAS_STATE)
                tl.store(new_state + at_state + j, last.to(new_state.dtype.element_ty), mask=d_in)


def programs(x: Tensor, steps: int) -> int:
    batch, length, channels = x.shape
    return batch * triton.cdiv(length, steps) * triton.cdiv(channels, CHANNELS)


def walk_plan(x: Tensor, most: int = 64, enough: int = 16) -> tuple[int, int, int]:
    """Steps (at most ``most``) and channels of a walking program, and how many programs: ``enough`` a multiprocessor,
    if the tensor has them."""
    batch, length, channels = x.shape
    block = min(_WIDE // x.element_size(), max(32, triton.next_power_of_2(channels)))
    many = enough * processor_count(x.device)
    columns = batch * triton.cdiv(channels, block)
    steps = next((n for n in (128, 64, 32, 16) if n <= most and columns * triton.cdiv(length, n) >= many), 8)
    return steps, block, columns * triton.cdiv(length, steps)


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
    if width > WALKED:
        options = {"BT": _STEPS, "BD": CHANNELS, **_OPTIONS}
        launch(_conv_kernel, programs(x, _STEPS), x.device, *arguments, **flags, **options)
        return y, new_state
    steps, block, count = walk_plan(x)
    options = {"BT": steps, "BD": block, "num_warps": 1, "enable_fp_fusion": False}
    launch(_conv_walk_kernel, count, x.device, *arguments, **flags, **options)
    return y, new_state

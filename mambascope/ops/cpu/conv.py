"""The causal depthwise convolution with its state, forward and backward, SiLU fused or not.

pre[t] = bias + Σ_k weight[k]·x[t − K + 1 + k], one chain of fma from k = 0 on. Inputs before the first position come
from the state (zeros without one), so a text cut at any position gives the bits of the whole.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mambascope.ops.cpu.blocks import (
    ZERO,
    cast,
    clear,
    copy,
    dense,
    gather,
    pointer,
    real_lengths,
    rows,
    scatter,
    scratch,
)
from mambascope.ops.cpu.compiling import kernel
from mambascope.ops.cpu.elementwise import silu_forward
from mambascope.ops.cpu.threads import Arguments, run
from mambascope.ops.cpu.vector import (
    BYTES,
    WIDTH,
    fetch_add,
    fma,
    keep,
    load,
    load_int,
    load_part,
    prefetch,
    reader,
    sigmoid,
    silu,
    splat,
    store,
    store_part,
)

ONE = np.float32(1)
SECTION = 64  # steps whose share of a weight's gradient is summed by itself, so that long sums keep their digits

AHEAD = 16  # rows; they lie pages apart, where no hardware guesses them

CONV = Arguments("length channels width with_silu x x_batch x_row weight bias state lengths y new_state")
read = reader(CONV)


@kernel(CONV)
def conv_forward_units(address: int) -> None:
    p = read(address)
    K, past = p.width, p.width - 1
    blocks = (p.channels + WIDTH - 1) // WIDTH
    memory, taps = scratch(K + 3 * past)
    early = taps + BYTES * K  # the K-1 inputs of the state, then the first K-1 of x
    last = early + BYTES * 2 * past
    while True:
        unit = fetch_add(address, 1)
        if unit >= p.units:
            break
        b = unit // blocks
        d = (unit - b * blocks) * WIDTH
        lanes = min(WIDTH, p.channels - d)
        gather(p.weight + 4 * d * K, K, lanes, taps)
        bias = load_part(p.bias + 4 * d, lanes) if p.bias != 0 else splat(ZERO)
        if p.state != 0:
            gather(p.state + 4 * (b * p.channels + d) * past, past, lanes, early)
        else:
            clear(early, past)
        first = p.x + 4 * (b * p.x_batch + d)
        row = 4 * p.x_row
        for t in range(min(past, p.length)):
            store(early + BYTES * (past + t), load_part(first + t * row, lanes))

        y = p.y + 4 * (b * p.length * p.channels + d)
        for t in range(p.length):
            total = bias
            if t < past:
                for k in range(K):
                    total = fma(load(taps + BYTES * k), load(early + BYTES * (t + k)), total)
            else:
                source = first + (t - past) * row
                prefetch(source + (past + AHEAD) * row)
                for k in range(K):
                    total = fma(load(taps + BYTES * k), load_part(source, lanes), total)
                    source += row
            if p.with_silu != 0:
                total = silu(total)
            store_part(y, total, lanes)
            y += 4 * p.channels

        real = load_int(p.lengths + 8 * b) if p.lengths != 0 else p.length
        for j in range(past):
            t = real + j - past
            store(last + BYTES * j, load_part(first + t * row, lanes) if t >= 0 else load(early + BYTES * (real + j)))
        scatter(last, past, lanes, p.new_state + 4 * (b * p.channels + d) * past)
        fetch_add(address + 8, 1)
    keep(memory)


CONV_BACKWARD = Arguments(
    "batch length channels width with_silu x x_batch x_row weight bias state lengths dy dy_batch dy_row dnew_state "
    "dx dweight dbias dstate"
)
read_backward = reader(CONV_BACKWARD)


@kernel(CONV_BACKWARD)
def conv_backward_units(address: int) -> None:
    p = read_backward(address)
    K, past = p.width, p.width - 1
    memory, taps = scratch(6 * K)
    window = taps + BYTES * K  # the K inputs that step t reads
    pending = window + BYTES * K  # gradients of those inputs, still to be added to
    total = pending + BYTES * K  # of weight
    section = total + BYTES * K
    before = section + BYTES * K  # of the state
    while True:
        unit = fetch_add(address, 1)  # a block of channels in all batch rows: their sum needs no second pass
        if unit >= p.units:
            break
        d = unit * WIDTH
        lanes = min(WIDTH, p.channels - d)
        gather(p.weight + 4 * d * K, K, lanes, taps)
        bias = load_part(p.bias + 4 * d, lanes) if p.bias != 0 else splat(ZERO)
        clear(total, K)
        total_bias = splat(ZERO)
        for b in range(p.batch):
            state_row = 4 * (b * p.channels + d) * past
            clear(window, K)
            if p.state != 0:
                gather(p.state + state_row, past, lanes, window + BYTES)
            clear(pending, K)
            x = p.x + 4 * (b * p.x_batch + d)
            dy = p.dy + 4 * (b * p.dy_batch + d)
            dx = p.dx + 4 * (b * p.length * p.channels + d)
            for start in range(0, p.length, SECTION):
                clear(section, K)
                section_bias = splat(ZERO)
                for t in range(start, min(start + SECTION, p.length)):
                    prefetch(x + 4 * (t + AHEAD) * p.x_row)
                    prefetch(dy + 4 * (t + AHEAD) * p.dy_row)
                    copy(window + BYTES, window, past)
                    store(window + BYTES * past, load_part(x + 4 * t * p.x_row, lanes))
                    d_pre = load_part(dy + 4 * t * p.dy_row, lanes)
                    if p.with_silu != 0:
                        pre = bias
                        for k in range(K):
                            pre = fma(load(taps + BYTES * k), load(window + BYTES * k), pre)
                        s = sigmoid(pre)
                        d_pre = d_pre * (s * fma(pre, splat(ONE) - s, splat(ONE)))
                    section_bias = section_bias + d_pre
                    for k in range(K):
                        at = section + BYTES * k
                        store(at, fma(d_pre, load(window + BYTES * k), load(at)))
                        at = pending + BYTES * k
                        store(at, fma(d_pre, load(taps + BYTES * k), load(at)))
                    if t >= past:
                        store_part(dx + 4 * (t - past) * p.channels, load(pending), lanes)
                    else:
                        store(before + BYTES * t, load(pending))
                    copy(pending + BYTES, pending, past)
                    store(pending + BYTES * past, splat(ZERO))
                for k in range(K):
                    store(total + BYTES * k, load(total + BYTES * k) + load(section + BYTES * k))
                total_bias = total_bias + section_bias
            for k in range(past):
                t = p.length - past + k
                if t >= 0:
                    store_part(dx + 4 * t * p.channels, load(pending + BYTES * k), lanes)
                else:
                    store(before + BYTES * (p.length + k), load(pending + BYTES * k))
            if p.dnew_state != 0:
                real = load_int(p.lengths + 8 * b) if p.lengths != 0 else p.length
                gather(p.dnew_state + state_row, past, lanes, window)
                for j in range(past):
                    t = real + j - past
                    at = dx + 4 * t * p.channels if t >= 0 else before + BYTES * (real + j)
                    width = lanes if t >= 0 else WIDTH
                    store_part(at, load_part(at, width) + load(window + BYTES * j), width)
            scatter(before, past, lanes, p.dstate + state_row)
        scatter(total, K, lanes, p.dweight + 4 * d * K)
        store_part(p.dbias + 4 * d, total_bias, lanes)
        fetch_add(address + 8, 1)
    keep(memory)


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None, *, silu: bool
) -> tuple[Tensor, Tensor]:
    """``(y B L D, new_state B D K-1)`` in x's dtype; see `mambascope.ops.causal_conv`. Arguments are taken as checked.

    In a reduced dtype the sum is rounded before SiLU, as it is when a hook stands between the two."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    source = rows(x)
    weight = dense(weight)
    bias = None if bias is None else dense(bias)
    state = None if state is None else dense(state)
    lengths = real_lengths(lengths)
    y = source.new_empty(batch, length, channels)
    new_state = source.new_empty(batch, channels, width - 1)
    exact = x.dtype is torch.float32
    xb, xr, _ = source.stride()
    units = batch * ((channels + WIDTH - 1) // WIDTH)
    run(
        conv_forward_units,
        units,
        4 * batch * length * channels,
        *(length, channels, width, silu and exact, source.data_ptr(), xb, xr, weight.data_ptr(), pointer(bias)),
        *(pointer(state), pointer(lengths), y.data_ptr(), new_state.data_ptr()),
    )
    if exact:
        return y, new_state
    y = y.to(x.dtype)
    return (silu_forward(y) if silu else y), new_state.to(x.dtype)


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
    """Gradients ``dx, dweight, dbias, dstate`` in their tensors' dtypes (None where the tensor is absent)."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    source, dy = rows(x), rows(dy)
    taps = dense(weight)
    offset = None if bias is None else dense(bias)
    before = None if state is None else dense(state)
    dnew = None if dstate is None else dense(dstate)
    lengths = real_lengths(lengths)
    dx = source.new_empty(batch, length, channels)
    dweight, dbias = torch.empty_like(taps), taps.new_empty(channels)
    dbefore = source.new_empty(batch, channels, width - 1)
    xb, xr, _ = source.stride()
    yb, yr, _ = dy.stride()
    run(
        conv_backward_units,
        (channels + WIDTH - 1) // WIDTH,
        8 * batch * length * channels,
        *(batch, length, channels, width, silu, source.data_ptr(), xb, xr, taps.data_ptr(), pointer(offset)),
        *(pointer(before), pointer(lengths), dy.data_ptr(), yb, yr, pointer(dnew)),
        *(dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), dbefore.data_ptr()),
    )
    return {
        "dx": cast(dx, x.dtype),
        "dweight": cast(dweight, weight.dtype),
        "dbias": None if bias is None else cast(dbias, bias.dtype),
        "dstate": None if state is None else cast(dbefore, state.dtype),
    }

"""One row or one column of an effective kernel on a CPU: blocks of channels, walked outward from the line's place."""

from __future__ import annotations

import torch
from torch import Tensor

from mambascope.ops.cpu.blocks import ZERO, dense, gather, pointer, rows, scratch
from mambascope.ops.cpu.compiling import kernel
from mambascope.ops.cpu.threads import Arguments, run
from mambascope.ops.cpu.vector import (
    BYTES,
    LOG2E,
    WIDTH,
    exp2_product,
    fetch_add,
    fma,
    keep,
    load,
    load_int,
    load_part,
    load_splat,
    reader,
    splat,
    store_part,
)
from mambascope.ops.maps.problem import Problem

__all__ = ["line"]

LINE = Arguments(
    "length channels states backward delta delta_batch delta_row A fixed moving moving_batch moving_row gain "
    "gain_batch gain_row scale at out total"
)
line_arguments = reader(LINE)


@kernel(LINE)
def line_units(address: int) -> None:
    p = line_arguments(address)
    N = p.states
    blocks = (p.channels + WIDTH - 1) // WIDTH
    memory, a = scratch(N + 1)
    while True:
        unit = fetch_add(address, 1)
        if unit >= p.units:
            break
        b = unit // blocks
        d = (unit - b * blocks) * WIDTH
        lanes = min(WIDTH, p.channels - d)
        gather(p.A + 4 * d * N, N, lanes, a)
        at = load_int(p.at + 8 * b)
        fixed = p.fixed + 4 * b * N
        total = splat(ZERO)
        t = at
        while 0 <= t < p.length:
            step = load_part(p.delta + 4 * (b * p.delta_batch + t * p.delta_row + d), lanes)
            if p.backward == 0 and t != at:
                total = total + step
            moving = p.moving + 4 * (b * p.moving_batch + t * p.moving_row)
            value = splat(ZERO)
            for n in range(N):
                both = load_splat(fixed + 4 * n) * load_splat(moving + 4 * n)
                value = fma(exp2_product(total, load(a + BYTES * n)), both, value)
            if p.backward != 0:
                value = value * step
                total = total + step
            if p.gain != 0:
                value = value * load_part(p.gain + 4 * (b * p.gain_batch + t * p.gain_row + d), lanes)
            if p.scale != 0:
                value = value * load_part(p.scale + 4 * (b * p.channels + d), lanes)
            store_part(p.out + 4 * ((b * p.length + t) * p.channels + d), value, lanes)
            t += -1 if p.backward != 0 else 1
        store_part(p.total + 4 * (b * p.channels + d), total, lanes)
        fetch_add(address + 8, 1)
    keep(memory)


def line(
    p: Problem, fixed: Tensor, moving: Tensor, at: Tensor, backward: bool, gain: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `lines.line`: a line ``B L D`` and delta summed over it, ``B D``."""
    batch, length, channels = p.delta.shape
    states = p.A.shape[1]
    delta, moving, fixed = rows(p.delta), rows(moving), dense(fixed)
    gain = None if gain is None else rows(gain)
    scale = None if scale is None else dense(scale)
    A, at = dense(p.A * LOG2E), at.contiguous()
    out, total = torch.zeros(batch, length, channels), torch.empty(batch, channels)
    gains = (0, 0, 0) if gain is None else (gain.data_ptr(), gain.stride(0), gain.stride(1))
    run(
        line_units,
        batch * ((channels + WIDTH - 1) // WIDTH),
        batch * length * channels * states,
        *(length, channels, states, backward, delta.data_ptr(), delta.stride(0), delta.stride(1), A.data_ptr()),
        *(fixed.data_ptr(), moving.data_ptr(), moving.stride(0), moving.stride(1), *gains, pointer(scale)),
        *(at.data_ptr(), out.data_ptr(), total.data_ptr()),
    )
    return out, total

"""The adjoint of a run against the difference of two runs' states; see `mambascope.ops.scan.adjoint`.

A unit is one batch row's block of 16 channels. It walks back interval by interval: both runs are replayed forward from
their boundary states and recorded, then the adjoint passes over the records.
"""

from __future__ import annotations

import torch
from numba import njit
from torch import Tensor

from mambascope.ops.cpu.blocks import ZERO, clear, dense, gather, rows, scratch
from mambascope.ops.cpu.compiling import kernel
from mambascope.ops.cpu.recurrence import prepare_rates, record, step_sizes
from mambascope.ops.cpu.threads import Arguments, run
from mambascope.ops.cpu.vector import (
    BYTES,
    WIDTH,
    exp2_product,
    fetch_add,
    fma,
    keep,
    load,
    load_part,
    load_splat,
    reader,
    splat,
    store,
    store_part,
)

CONTRACTION = Arguments(
    "length channels states interval A dy dy_batch dy_row delta delta_batch delta_row C C_batch C_row "
    "u1 u1_batch u1_row delta1 delta1_batch delta1_row B1 B1_batch B1_row h1 "
    "u2 u2_batch u2_row delta2 delta2_batch delta2_row B2 B2_batch B2_row h2 out"
)
read = reader(CONTRACTION)


@njit
def decays_of(A_bar: int, a: int, N: int, deltas: int, steps: int) -> None:
    "exp(delta·A) of each step"
    for j in range(steps):
        delta = load(deltas + BYTES * j)
        for n in range(N):
            store(A_bar + BYTES * (j * N + n), exp2_product(delta, load(a + BYTES * n)))


@njit
def contract(
    h: int,
    other: int,
    A_bar: int,
    N: int,
    dy: int,
    dy_row: int,
    C: int,
    C_row: int,
    steps: int,
    G: int,
    out: int,
    out_row: int,
    lanes: int,
) -> None:
    "from the last step to the first: Σ_n G·(other − h), and G becomes dL/dh before the first"
    for j in range(steps - 1, -1, -1):
        gradient, total = load_part(dy + 4 * j * dy_row, lanes), splat(ZERO)
        row = BYTES * N * j
        for n in range(N):
            at = BYTES * n
            after = BYTES * N + row + at
            g = fma(gradient, load_splat(C + 4 * (j * C_row + n)), load(G + at))
            total = fma(g, load(other + after) - load(h + after), total)
            store(G + at, g * load(A_bar + row + at))
        store_part(out + 4 * j * out_row, total, lanes)


@kernel(CONTRACTION)
def contraction_units(address: int) -> None:
    p = read(address)
    N = p.states
    state = BYTES * N
    blocks = (p.channels + WIDTH - 1) // WIDTH
    intervals = (p.length + p.interval - 1) // p.interval
    tile = p.interval
    memory, a = scratch((3 * tile + 4) * N + 3 * tile + 2)
    G = a + state
    h = G + state
    other = h + state * (tile + 1)
    A_bar = other + state * (tile + 1)
    deltas = A_bar + state * tile
    writes = deltas + BYTES * tile
    totals = writes + BYTES * tile
    limits = totals + BYTES * tile
    while True:
        unit = fetch_add(address, 1)
        if unit >= p.units:
            break
        b = unit // blocks
        d = (unit - b * blocks) * WIDTH
        lanes = min(WIDTH, p.channels - d)
        gather(p.A + 4 * d * N, N, lanes, a)
        prepare_rates(a, N, limits)
        clear(G, N)
        for interval in range(intervals - 1, -1, -1):
            t = interval * p.interval
            steps = min(p.interval, p.length - t)
            slot = 4 * ((b * intervals + interval) * p.channels + d) * N
            C = p.C + 4 * (b * p.C_batch + t * p.C_row)
            dy = p.dy + 4 * (b * p.dy_batch + t * p.dy_row + d)
            u2 = p.u2 + 4 * (b * p.u2_batch + t * p.u2_row + d)
            raw2 = p.delta2 + 4 * (b * p.delta2_batch + t * p.delta2_row + d)
            B2 = p.B2 + 4 * (b * p.B2_batch + t * p.B2_row)
            u1 = p.u1 + 4 * (b * p.u1_batch + t * p.u1_row + d)
            raw1 = p.delta1 + 4 * (b * p.delta1_batch + t * p.delta1_row + d)
            B1 = p.B1 + 4 * (b * p.B1_batch + t * p.B1_row)
            raw = p.delta + 4 * (b * p.delta_batch + t * p.delta_row + d)

            step_sizes(raw2, p.delta2_row, u2, p.u2_row, 0, limits, 0, steps, lanes, deltas, writes)
            gather(p.h2 + slot, N, lanes, other)
            soon = (raw1, p.delta1_row, u1, p.u1_row, dy, p.dy_row, raw, p.delta_row)
            record(other, A_bar, a, N, deltas, writes, B2, p.B2_row, C, p.C_row, steps, totals, soon)

            step_sizes(raw1, p.delta1_row, u1, p.u1_row, 0, limits, 0, steps, lanes, deltas, writes)
            gather(p.h1 + slot, N, lanes, h)
            record(h, A_bar, a, N, deltas, writes, B1, p.B1_row, C, p.C_row, steps, totals, soon)
            if p.delta != p.delta1:
                step_sizes(raw, p.delta_row, u1, p.u1_row, 0, limits, 0, steps, lanes, deltas, writes)
                decays_of(A_bar, a, N, deltas, steps)
            out = p.out + 4 * ((b * p.length + t) * p.channels + d)
            contract(h, other, A_bar, N, dy, p.dy_row, C, p.C_row, steps, G, out, p.channels, lanes)
        fetch_add(address + 8, 1)
    keep(memory)


def state_contraction(
    dy: Tensor,
    delta: Tensor,
    C: Tensor,
    A: Tensor,
    u1: Tensor,
    delta1: Tensor,
    B1: Tensor,
    h1: Tensor,
    u2: Tensor,
    delta2: Tensor,
    B2: Tensor,
    h2: Tensor,
    *,
    boundaries: int,
) -> Tensor:
    """``Σ_n G·(h2 − h1)``, ``B L D`` float32. Memory beyond it: 64·(3·64 + 4)·N bytes a thread."""
    batch, length, channels = dy.shape
    states = A.shape[1]
    same = delta1 is delta
    dy, delta, C, u1, B1, u2, delta2, B2 = (rows(x) for x in (dy, delta, C, u1, B1, u2, delta2, B2))
    delta1 = delta if same else rows(delta1)
    A, h1, h2 = dense(A), dense(h1), dense(h2)
    out = torch.empty(batch, length, channels, dtype=torch.float32)

    def at(x: Tensor) -> tuple[int, int, int]:
        return x.data_ptr(), x.stride(0), x.stride(1)

    run(
        contraction_units,
        batch * ((channels + WIDTH - 1) // WIDTH),
        3 * batch * length * channels * states,
        *(length, channels, states, min(boundaries, length), A.data_ptr(), *at(dy), *at(delta), *at(C)),
        *(*at(u1), *at(delta1), *at(B1), h1.data_ptr(), *at(u2), *at(delta2), *at(B2), h2.data_ptr()),
        out.data_ptr(),
    )
    return out

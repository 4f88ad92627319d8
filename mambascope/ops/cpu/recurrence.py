"""The recurrence of a block over a tile of steps, in the parts that the forward and the backward kernel share.

What is once per step and channel (softplus, delta·u, skip, gate) is done for the whole tile before or after what is
once per state: a step's chain of dependent operations is long, and one loop over all of it would wait half the time.
Every function works on scratch memory, one vector a step (`deltas`, `writes`, `totals`) or N vectors a step (states).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from mambascope.ops.cpu.blocks import ZERO
from mambascope.ops.cpu.vector import (
    BYTES,
    LOG2E,
    exp2_product,
    fma,
    greater,
    lesser,
    load,
    load_part,
    load_splat,
    nan_where_it_overflows,
    prefetch,
    silu,
    softplus,
    splat,
    store,
    store_part,
)

TILE = 64  # steps
LOG2, ONE = np.float32(LOG2E), np.float32(1)


@njit
def prepare_rates(a: int, N: int, limits: int) -> None:
    "A → A·log2 e, for exp(delta·A) = 2^(delta·(A·log2 e)); and its least and greatest value per channel"
    low, high = splat(ZERO), splat(ZERO)
    for n in range(N):
        rate = load(a + BYTES * n) * splat(LOG2)
        store(a + BYTES * n, rate)
        low, high = lesser(low, rate), greater(high, rate)
    store(limits, low)
    store(limits + BYTES, high)


@njit
def step_sizes(
    raw: int,
    raw_row: int,
    u: int,
    u_row: int,
    bias: int,
    limits: int,
    with_softplus: int,
    steps: int,
    lanes: int,
    deltas: int,
    writes: int,
) -> None:
    """delta, after bias (an address, or 0) and softplus, and delta·u.

    A delta that would make exp(delta·A) overflow (delta negative, or A positive) becomes NaN: seen, not wrapped."""
    for j in range(steps):
        delta = load_part(raw + 4 * j * raw_row, lanes)
        if bias != 0:
            delta = delta + load(bias)
        if with_softplus != 0:
            delta = softplus(delta)
        delta = nan_where_it_overflows(delta, load(limits), load(limits + BYTES))
        store(deltas + BYTES * j, delta)
        store(writes + BYTES * j, delta * load_part(u + 4 * j * u_row, lanes))


@njit
def advance(
    h: int,
    a: int,
    N: int,
    deltas: int,
    writes: int,
    B: int,
    B_row: int,
    C: int,
    C_row: int,
    steps: int,
    totals: int,
    soon: tuple[int, ...],
) -> None:
    """h through `steps` steps in place, and Σ_n C·h after each.

    `soon`: addresses and row lengths of what the next tile reads; rows lie pages apart, where no hardware guesses."""
    raw, raw_row, u, u_row, z, z_row = soon
    for j in range(steps):
        prefetch(raw + 4 * j * raw_row)
        prefetch(u + 4 * j * u_row)
        prefetch(z + 4 * j * z_row)
        delta, write, total = load(deltas + BYTES * j), load(writes + BYTES * j), splat(ZERO)
        for n in range(N):
            kept = exp2_product(delta, load(a + BYTES * n)) * load(h + BYTES * n)
            state = fma(write, load_splat(B + 4 * n), kept)
            store(h + BYTES * n, state)
            total = fma(state, load_splat(C + 4 * n), total)
        store(totals + BYTES * j, total)
        B += 4 * B_row
        C += 4 * C_row


@njit
def hold(h: int, N: int, C: int, C_row: int, steps: int, totals: int) -> None:
    "Σ_n C·h at steps of padding, where h stays"
    for j in range(steps):
        total = splat(ZERO)
        for n in range(N):
            total = fma(load(h + BYTES * n), load_splat(C + 4 * n), total)
        store(totals + BYTES * j, total)
        C += 4 * C_row


@njit
def record(
    h: int,
    A_bar: int,
    a: int,
    N: int,
    deltas: int,
    writes: int,
    B: int,
    B_row: int,
    C: int,
    C_row: int,
    steps: int,
    totals: int,
    soon: tuple[int, ...],
) -> None:
    "`advance` that keeps every state (h: steps + 1 of them, the first given) and every A_bar"
    raw, raw_row, u, u_row, z, z_row, dy, dy_row = soon
    for j in range(steps):
        prefetch(raw + 4 * j * raw_row)
        prefetch(u + 4 * j * u_row)
        prefetch(z + 4 * j * z_row)
        prefetch(dy + 4 * j * dy_row)
        delta, write, total = load(deltas + BYTES * j), load(writes + BYTES * j), splat(ZERO)
        after = h + BYTES * N
        for n in range(N):
            decay = exp2_product(delta, load(a + BYTES * n))
            state = fma(write, load_splat(B + 4 * n), decay * load(h + BYTES * n))
            store(A_bar + BYTES * n, decay)
            store(after + BYTES * n, state)
            total = fma(state, load_splat(C + 4 * n), total)
        store(totals + BYTES * j, total)
        h = after
        A_bar += BYTES * N
        B += 4 * B_row
        C += 4 * C_row


@njit
def record_hold(h: int, A_bar: int, N: int, deltas: int, writes: int, steps: int) -> None:
    "what `step_sizes` and `record` would have left of steps of padding: delta 0, A_bar 1, h as it is"
    for j in range(steps):
        store(deltas + BYTES * j, splat(ZERO))
        store(writes + BYTES * j, splat(ZERO))
        for n in range(N):
            store(A_bar + BYTES * (j * N + n), splat(ONE))
            store(h + BYTES * ((j + 1) * N + n), load(h + BYTES * n))


@njit
def add_skip(totals: int, skip: int, u: int, u_row: int, steps: int, lanes: int) -> None:
    for j in range(steps):
        added = load(skip) * load_part(u + 4 * j * u_row, lanes)  # rounded before it is added, as torch.mul is
        store(totals + BYTES * j, load(totals + BYTES * j) + added)


@njit
def write_out(totals: int, z: int, z_row: int, y: int, y_row: int, steps: int, lanes: int) -> None:
    "y, gated if z (an address, or 0) is there"
    for j in range(steps):
        total = load(totals + BYTES * j)
        if z != 0:
            total = total * silu(load_part(z + 4 * j * z_row, lanes))
        store_part(y + 4 * j * y_row, total, lanes)

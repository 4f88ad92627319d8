"""The selective scan, backward. States are not stored by the forward pass but replayed from its boundary states.

With G[t] = dL/dh[t]: G[t] = dy[t]·C[t] + exp(delta[t+1]·A)·G[t+1], and

    dC[t] = Σ_d dy·h[t]    dB[t] = Σ_d G·delta·u    du = delta·Σ_n G·B + dy·D
    ddelta = u·Σ_n G·B + Σ_n A·(G·A_bar·h[t−1])     dA = Σ_t delta·(G·A_bar·h[t−1])

A unit of work is one batch row and a group of channel blocks; the groups depend on D alone, and the shares of groups
and rows are added in a fixed order. So gradients repeat to the bit, for any number of threads. Within a unit time runs
in tiles: replayed forward and recorded, then walked backward. Sums over time are taken tile by tile first, which keeps
the digits of long ones.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
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
from mambascope.ops.cpu.elementwise import fold
from mambascope.ops.cpu.recurrence import (
    ONE,
    TILE,
    add_skip,
    advance,
    hold,
    prepare_rates,
    record,
    record_hold,
    step_sizes,
)
from mambascope.ops.cpu.threads import Arguments, run
from mambascope.ops.cpu.vector import (
    BYTES,
    WIDTH,
    fetch_add,
    fma,
    keep,
    lane_sum,
    load,
    load_float,
    load_int,
    load_part,
    load_splat,
    reader,
    sigmoid,
    splat,
    store,
    store_float,
    store_part,
    sum_each,
)

GROUPS = 16  # at most; more would spread one row over more threads, at the price of as many shares of dB and dC
LN2 = np.float32(0.6931471805599453)

SCAN_BACKWARD = Arguments(
    "batch length channels states interval group with_softplus u u_batch u_row delta delta_batch delta_row A "
    "B B_batch B_row C C_batch C_row skip z z_batch z_row dt_bias lengths h_boundary dy dy_batch dy_row dh_last "
    "dh_boundary du ddelta dz dA dskip ddt_bias dB dC dh0"
)
read = reader(SCAN_BACKWARD)


@njit
def open_gate(
    dy: int, dy_row: int, z: int, z_row: int, dz: int, out_row: int, totals: int, steps: int, lanes: int
) -> None:
    "dz, and in place of each total the gradient at the gate's input (without a gate: dy as it comes)"
    for j in range(steps):
        gradient = load_part(dy + 4 * j * dy_row, lanes)
        if z != 0:
            gate = load_part(z + 4 * j * z_row, lanes)
            s = sigmoid(gate)
            slope = s * fma(gate, splat(ONE) - s, splat(ONE))
            store_part(dz + 4 * j * out_row, gradient * load(totals + BYTES * j) * slope, lanes)
            gradient = gradient * (gate * s)
        store(totals + BYTES * j, gradient)


@njit
def add_sums(source: int, vectors: int, target: int) -> None:
    "adds the sum of each vector's lanes to a row of floats"
    done = 0
    while done + WIDTH <= vectors:
        at = target + 4 * done
        store(at, load(at) + sum_each(source + BYTES * done))
        done += WIDTH
    for i in range(done, vectors):
        store_float(target + 4 * i, load_float(target + 4 * i) + lane_sum(load(source + BYTES * i)))


@njit
def walk_back(
    h: int,
    A_bar: int,
    a: int,
    N: int,
    deltas: int,
    writes: int,
    dys: int,
    B: int,
    B_row: int,
    C: int,
    C_row: int,
    steps: int,
    G: int,
    dA: int,
    dB: int,
    dC: int,
    by_channel: int,
    through_B: int,
    through_A: int,
) -> None:
    """From the last step to the first: G becomes dL/dh before the first; dA (vectors), dB and dC (rows of N floats) are
    added to. Summing over channels at once, through `by_channel` (2 N vectors), keeps a tile in the nearer caches."""
    for j in range(steps - 1, -1, -1):
        dy, delta, write = load(dys + BYTES * j), load(deltas + BYTES * j), load(writes + BYTES * j)
        sum_B, sum_A = splat(ZERO), splat(ZERO)
        row = BYTES * N * j
        for n in range(N):
            at = BYTES * n
            g = fma(dy, load_splat(C + 4 * (j * C_row + n)), load(G + at))
            store(by_channel + BYTES * N + at, dy * load(h + BYTES * N + row + at))
            store(by_channel + at, g * write)
            sum_B = fma(g, load_splat(B + 4 * (j * B_row + n)), sum_B)
            g = g * load(A_bar + row + at)
            store(G + at, g)
            g = g * load(h + row + at)
            sum_A = fma(g, load(a + at), sum_A)
            store(dA + at, fma(g, delta, load(dA + at)))
        add_sums(by_channel, N, dB + 4 * j * N)
        add_sums(by_channel + BYTES * N, N, dC + 4 * j * N)
        store(through_B + BYTES * j, sum_B)
        store(through_A + BYTES * j, sum_A)


@njit
def finish(
    raw: int,
    raw_row: int,
    u: int,
    u_row: int,
    bias: int,
    with_softplus: int,
    skip: int,
    deltas: int,
    dys: int,
    through_B: int,
    through_A: int,
    du: int,
    ddelta: int,
    out_row: int,
    moving: int,
    steps: int,
    lanes: int,
    sums: int,
) -> None:
    "du and ddelta of each step, and what they add to the two sums: ddt_bias and dD"
    sum_delta, sum_skip = splat(ZERO), splat(ZERO)
    for j in range(steps):
        dy, value = load(dys + BYTES * j), load_part(u + 4 * j * u_row, lanes)
        to_u, to_delta = splat(ZERO), splat(ZERO)
        if skip != 0:
            to_u = dy * load(skip)
            sum_skip = fma(dy, value, sum_skip)
        if j < moving:  # the delta of padding is no function of anything
            at_B = load(through_B + BYTES * j)
            to_u = fma(load(deltas + BYTES * j), at_B, to_u)
            to_delta = fma(at_B, value, load(through_A + BYTES * j) * splat(LN2))
            if with_softplus != 0:
                before = load_part(raw + 4 * j * raw_row, lanes)
                if bias != 0:
                    before = before + load(bias)
                to_delta = to_delta * sigmoid(before)
                sum_delta = sum_delta + to_delta
        store_part(du + 4 * j * out_row, to_u, lanes)
        store_part(ddelta + 4 * j * out_row, to_delta, lanes)
    store(sums, load(sums) + sum_delta)
    store(sums + BYTES, load(sums + BYTES) + sum_skip)


@njit
def add_vectors(target: int, source: int, vectors: int) -> None:
    for i in range(vectors):
        store(target + BYTES * i, load(target + BYTES * i) + load(source + BYTES * i))


@kernel(SCAN_BACKWARD)
def scan_backward_units(address: int) -> None:
    p = read(address)
    N = p.states
    state = BYTES * N
    blocks = (p.channels + WIDTH - 1) // WIDTH
    groups = (blocks + p.group - 1) // p.group
    intervals = (p.length + p.interval - 1) // p.interval
    per_interval = (p.interval + TILE - 1) // TILE
    tile = min(TILE, p.interval)
    # for each block of the group
    memory, a = scratch(p.group * ((3 + per_interval) * N + 6) + (2 * tile + 4) * N + 5 * tile)
    G = a + state * p.group
    dA = G + state * p.group
    entering = dA + state * p.group  # states entering each tile of an interval
    limits = entering + state * p.group * per_interval
    constants = limits + 2 * BYTES * p.group  # dt_bias, skip
    sums = constants + 2 * BYTES * p.group  # ddt_bias, dskip
    # for the tile at hand
    h = sums + 2 * BYTES * p.group
    A_bar = h + state * (tile + 1)
    by_channel = A_bar + state * tile
    spare = by_channel + 2 * state
    deltas = spare + state
    writes = deltas + BYTES * tile
    totals = writes + BYTES * tile
    through_B = totals + BYTES * tile
    through_A = through_B + BYTES * tile
    while True:
        unit = fetch_add(address, 1)
        if unit >= p.units:
            break
        b = unit // groups
        group = unit - b * groups
        first = group * p.group
        count = min(p.group, blocks - first)
        real = load_int(p.lengths + 8 * b) if p.lengths != 0 else p.length
        for i in range(count):
            d = (first + i) * WIDTH
            lanes = min(WIDTH, p.channels - d)
            gather(p.A + 4 * d * N, N, lanes, a + state * i)
            prepare_rates(a + state * i, N, limits + 2 * BYTES * i)
            if p.dt_bias != 0:
                store(constants + 2 * BYTES * i, load_part(p.dt_bias + 4 * d, lanes))
            if p.skip != 0:
                store(constants + 2 * BYTES * i + BYTES, load_part(p.skip + 4 * d, lanes))
            if p.dh_last != 0:
                gather(p.dh_last + 4 * (b * p.channels + d) * N, N, lanes, G + state * i)
            else:
                clear(G + state * i, N)
        clear(dA, count * N)
        clear(sums, 2 * count)

        for interval in range(intervals - 1, -1, -1):
            start = interval * p.interval
            end = min(start + p.interval, p.length)
            tiles = (end - start + TILE - 1) // TILE
            for section in range(tiles - 1, -1, -1):
                begin = start + section * TILE
                steps = min(TILE, end - begin)
                moving = min(max(real - begin, 0), steps)
                B = p.B + 4 * (b * p.B_batch + begin * p.B_row)
                C = p.C + 4 * (b * p.C_batch + begin * p.C_row)
                share = 4 * ((group * p.batch + b) * p.length + begin) * N
                dB, dC = p.dB + share, p.dC + share
                for k in range(steps * N):
                    store_float(dB + 4 * k, ZERO)
                    store_float(dC + 4 * k, ZERO)
                for i in range(count):
                    d = (first + i) * WIDTH
                    lanes = min(WIDTH, p.channels - d)
                    bias = constants + 2 * BYTES * i if p.dt_bias != 0 else 0
                    skip = constants + 2 * BYTES * i + BYTES if p.skip != 0 else 0
                    range_at = limits + 2 * BYTES * i
                    held = entering + state * per_interval * i
                    if section == tiles - 1:  # the first of this interval to be walked: replay up to it
                        gather(p.h_boundary + 4 * ((b * intervals + interval) * p.channels + d) * N, N, lanes, held)
                        for k in range(tiles - 1):
                            copy(held + state * k, held + state * (k + 1), N)
                            t = start + k * TILE
                            before = min(max(real - t, 0), TILE)
                            raw = p.delta + 4 * (b * p.delta_batch + t * p.delta_row + d)
                            u = p.u + 4 * (b * p.u_batch + t * p.u_row + d)
                            B_t = p.B + 4 * (b * p.B_batch + t * p.B_row)
                            step_sizes(
                                *(raw, p.delta_row, u, p.u_row, bias, range_at, p.with_softplus, before, lanes),
                                *(deltas, writes),
                            )
                            soon = (raw, p.delta_row, u, p.u_row, u, p.u_row)
                            advance(
                                *(held + state * (k + 1), a + state * i, N, deltas, writes, B_t, p.B_row, B_t, p.B_row),
                                *(before, totals, soon),
                            )

                    raw = p.delta + 4 * (b * p.delta_batch + begin * p.delta_row + d)
                    u = p.u + 4 * (b * p.u_batch + begin * p.u_row + d)
                    z = p.z + 4 * (b * p.z_batch + begin * p.z_row + d) if p.z != 0 else 0
                    dy = p.dy + 4 * (b * p.dy_batch + begin * p.dy_row + d)
                    out = 4 * ((b * p.length + begin) * p.channels + d)
                    step_sizes(
                        raw, p.delta_row, u, p.u_row, bias, range_at, p.with_softplus, moving, lanes, deltas, writes
                    )
                    copy(held + state * section, h, N)
                    third, third_row = (z, p.z_row) if p.z != 0 else (u, p.u_row)
                    soon_4 = (
                        *(raw + BYTES, p.delta_row, u + BYTES, p.u_row),
                        *(third + BYTES, third_row, dy + BYTES, p.dy_row),
                    )
                    record(
                        *(h, A_bar, a + state * i, N, deltas, writes, B, p.B_row, C, p.C_row, moving, totals, soon_4)
                    )
                    padding = steps - moving
                    if padding > 0:
                        at = moving * BYTES
                        last = h + state * moving
                        hold(last, N, C + 4 * moving * p.C_row, p.C_row, padding, totals + at)
                        record_hold(last, A_bar + N * at, N, deltas + at, writes + at, padding)
                    if skip != 0:
                        add_skip(totals, skip, u, p.u_row, steps, lanes)
                    open_gate(dy, p.dy_row, z, p.z_row, p.dz + out, p.channels, totals, steps, lanes)
                    clear(spare, N)
                    walk_back(
                        *(h, A_bar, a + state * i, N, deltas, writes, totals, B, p.B_row, C, p.C_row, steps),
                        *(G + state * i, spare, dB, dC, by_channel, through_B, through_A),
                    )
                    add_vectors(dA + state * i, spare, N)
                    finish(
                        *(raw, p.delta_row, u, p.u_row, bias, p.with_softplus, skip, deltas, totals),
                        *(through_B, through_A, p.du + out, p.ddelta + out, p.channels, moving, steps, lanes),
                        sums + 2 * BYTES * i,
                    )

            if p.dh_boundary != 0:
                for i in range(count):
                    d = (first + i) * WIDTH
                    lanes = min(WIDTH, p.channels - d)
                    gather(p.dh_boundary + 4 * ((b * intervals + interval) * p.channels + d) * N, N, lanes, spare)
                    add_vectors(G + state * i, spare, N)

        for i in range(count):
            d = (first + i) * WIDTH
            lanes = min(WIDTH, p.channels - d)
            row = 4 * (b * p.channels + d)
            scatter(G + state * i, N, lanes, p.dh0 + row * N)
            scatter(dA + state * i, N, lanes, p.dA + row * N)
            store_part(p.ddt_bias + row, load(sums + 2 * BYTES * i), lanes)
            store_part(p.dskip + row, load(sums + 2 * BYTES * i + BYTES), lanes)
        fetch_add(address + 8, 1)
    keep(memory)


def scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    h_boundary: Tensor,
    dy: Tensor,
    dh_last: Tensor | None,
    dh_boundary: Tensor | None,
    *,
    dt_softplus: bool,
    boundaries: int,
) -> dict[str, Tensor | None]:
    """Gradients of `scan_forward`: du, ddelta, dA, dB, dC, dD, dz, ddt_bias, dh0, in their tensors' dtypes.

    ``h_boundary`` must be the forward's, at interval ``boundaries``. dD, dz and ddt_bias are None where D, z and
    dt_bias are; dh0 (float32) always comes. Memory beyond the results: 128·N·min(T, 64) bytes a thread, a state for
    every 64 steps of an interval, and at most 16 shares of dB and dC."""
    batch, length, channels = u.shape
    states = A.shape[1]
    v = {"u": rows(u), "delta": rows(delta), "B": rows(B), "C": rows(C), "dy": rows(dy)}
    gate = None if z is None else rows(z)
    optional = [None if x is None else dense(x) for x in (D, dt_bias, dh_last, dh_boundary)]
    skip, bias, last, boundary_gradient = optional
    rates, entering = dense(A), dense(h_boundary)
    real = real_lengths(lengths)
    blocks = (channels + WIDTH - 1) // WIDTH
    group = -(-blocks // GROUPS)
    groups = -(-blocks // group)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32)

    du, ddelta = new(batch, length, channels), new(batch, length, channels)
    dz = None if z is None else new(batch, length, channels)
    dA, dskip, dbias = new(batch, channels, states), new(batch, channels), new(batch, channels)
    shares = new(2, groups, batch, length, states)
    dh0 = new(batch, channels, states)
    gate_strides = (0, 0) if gate is None else (gate.stride(0), gate.stride(1))

    def strided(x: Tensor) -> tuple[int, int, int]:
        return x.data_ptr(), x.stride(0), x.stride(1)

    run(
        scan_backward_units,
        batch * groups,
        3 * batch * length * channels * states,
        *(batch, length, channels, states, max(1, min(boundaries, length)), group, dt_softplus),
        *(*strided(v["u"]), *strided(v["delta"]), rates.data_ptr(), *strided(v["B"]), *strided(v["C"])),
        *(pointer(skip), pointer(gate), *gate_strides, pointer(bias), pointer(real), entering.data_ptr()),
        *(*strided(v["dy"]), pointer(last), pointer(boundary_gradient), du.data_ptr(), ddelta.data_ptr(), pointer(dz)),
        *(dA.data_ptr(), dskip.data_ptr(), dbias.data_ptr(), shares[0].data_ptr(), shares[1].data_ptr()),
        dh0.data_ptr(),
    )
    return {
        "du": cast(du, u.dtype),
        "ddelta": cast(ddelta, delta.dtype),
        "dA": cast(fold(dA), A.dtype),
        "dB": cast(fold(shares[0]), B.dtype),
        "dC": cast(fold(shares[1]), C.dtype),
        "dD": None if D is None else cast(fold(dskip), D.dtype),
        "dz": None if dz is None or z is None else cast(dz, z.dtype),
        "ddt_bias": None if dt_bias is None else cast(fold(dbias), dt_bias.dtype),
        "dh0": dh0,
    }

"""The selective scan, backward. States are not stored by the forward pass but replayed from its boundary states.

With G[t] = dL/dh[t]: G[t] = dy[t]·C[t] + exp(delta[t+1]·A)·G[t+1], and

    dC[t] = Σ_d dy·h[t]    dB[t] = Σ_d G·delta·u    du = delta·Σ_n G·B + dy·D
    ddelta = u·Σ_n G·B + Σ_n A·(G·A_bar·h[t−1])     dA = Σ_t delta·(G·A_bar·h[t−1])

A unit of work is one batch row and a group of channel blocks; the groups depend on D alone, and the shares of groups
and rows are added in a fixed order. So gradients repeat to the bit, for any number of threads. Within a unit time runs
in sections of at most SECTION steps: replayed forward, recorded, then walked backward; sums over time are
taken by section first, which keeps the digits of long ones.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mambascope.ops.cpu.blocks import ZERO, clear, copy, dense, gather, pointer, real_lengths, rows, scatter, scratch
from mambascope.ops.cpu.compiling import kernel
from mambascope.ops.cpu.elementwise import fold
from mambascope.ops.cpu.scan import LOG2
from mambascope.ops.cpu.threads import Arguments, run
from mambascope.ops.cpu.vector import (
    BYTES,
    WIDTH,
    exp2_product,
    fetch_add,
    fma,
    keep,
    lane_sum,
    load,
    load_int,
    load_part,
    load_splat,
    reader,
    sigmoid,
    softplus,
    splat,
    store,
    store_float,
    store_part,
)

SECTION = 32
GROUPS = 16  # at most; more would spread one row over more threads, at the price of as many shares of dB and dC
ONE, LN2 = np.float32(1), np.float32(0.6931471805599453)

SCAN_BACKWARD = Arguments(
    "batch length channels states interval group with_softplus u u_batch u_row delta delta_batch delta_row A "
    "B B_batch B_row C C_batch C_row skip z z_batch z_row dt_bias lengths h_boundary dy dy_batch dy_row dh_last "
    "dh_boundary du ddelta dz dA dskip ddt_bias dB dC dh0"
)
read = reader(SCAN_BACKWARD)


@njit
def step_size(raw: int, bias: int, with_softplus: int, lanes: int):
    delta = load_part(raw, lanes)
    if bias != 0:
        delta = delta + load_part(bias, lanes)
    if with_softplus != 0:
        delta = softplus(delta)
    return delta


@kernel(SCAN_BACKWARD)
def scan_backward_units(address: int) -> None:
    p = read(address)
    N = p.states
    block_bytes = BYTES * N
    blocks = (p.channels + WIDTH - 1) // WIDTH
    groups = (blocks + p.group - 1) // p.group
    intervals = (p.length + p.interval - 1) // p.interval
    per_interval = (p.interval + SECTION - 1) // SECTION
    # for each block of the group
    memory, a = scratch((3 + per_interval) * p.group * N + 2 * p.group + (4 * SECTION + 3) * N + 2 * SECTION)
    adjoint = a + block_bytes * p.group
    dA = adjoint + block_bytes * p.group
    entering = dA + block_bytes * p.group  # states entering each section of an interval
    ddt_bias = entering + block_bytes * p.group * per_interval
    dskip = ddt_bias + BYTES * p.group
    # for the section at hand
    h = dskip + BYTES * p.group  # states 0…SECTION
    A_bar = h + block_bytes * (SECTION + 1)
    dB = A_bar + block_bytes * SECTION
    dC = dB + block_bytes * SECTION
    section_dA = dC + block_bytes * SECTION
    spare = section_dA + block_bytes
    delta_of = spare + block_bytes
    total_of = delta_of + BYTES * SECTION
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
            gather(p.A + 4 * d * N, N, lanes, a + block_bytes * i)
            for n in range(i * N, i * N + N):
                store(a + BYTES * n, load(a + BYTES * n) * splat(LOG2))
            if p.dh_last != 0:
                gather(p.dh_last + 4 * (b * p.channels + d) * N, N, lanes, adjoint + block_bytes * i)
            else:
                clear(adjoint + block_bytes * i, N)
        clear(dA, count * N)
        clear(ddt_bias, count)
        clear(dskip, count)

        for interval in range(intervals - 1, -1, -1):
            start = interval * p.interval
            end = min(start + p.interval, p.length)
            sections = (end - start + SECTION - 1) // SECTION
            for i in range(count):
                d = (first + i) * WIDTH
                lanes = min(WIDTH, p.channels - d)
                held = entering + block_bytes * per_interval * i
                gather(p.h_boundary + 4 * ((b * intervals + interval) * p.channels + d) * N, N, lanes, held)
                for t in range(start, start + (sections - 1) * SECTION):
                    if (t - start) % SECTION == 0:
                        copy(held, held + block_bytes, N)
                        held += block_bytes
                    if t < real:
                        raw = p.delta + 4 * (b * p.delta_batch + t * p.delta_row + d)
                        bias_at = p.dt_bias + 4 * d if p.dt_bias != 0 else 0
                        delta = step_size(raw, bias_at, p.with_softplus, lanes)
                        write = delta * load_part(p.u + 4 * (b * p.u_batch + t * p.u_row + d), lanes)
                        B = p.B + 4 * (b * p.B_batch + t * p.B_row)
                        for n in range(N):
                            kept = exp2_product(delta, load(a + block_bytes * i + BYTES * n)) * load(held + BYTES * n)
                            store(held + BYTES * n, fma(write, load_splat(B + 4 * n), kept))

            for section in range(sections - 1, -1, -1):
                begin = start + section * SECTION
                steps = min(SECTION, end - begin)
                clear(dB, steps * N)
                clear(dC, steps * N)
                for i in range(count):
                    d = (first + i) * WIDTH
                    lanes = min(WIDTH, p.channels - d)
                    bias_at = p.dt_bias + 4 * d if p.dt_bias != 0 else 0
                    a_i = a + block_bytes * i
                    G = adjoint + block_bytes * i
                    skip = load_part(p.skip + 4 * d, lanes) if p.skip != 0 else splat(ZERO)
                    copy(entering + block_bytes * (per_interval * i + section), h, N)
                    for j in range(steps):
                        t = begin + j
                        u = load_part(p.u + 4 * (b * p.u_batch + t * p.u_row + d), lanes)
                        C = p.C + 4 * (b * p.C_batch + t * p.C_row)
                        old = h + block_bytes * j
                        keep_at = A_bar + block_bytes * j
                        total = splat(ZERO)
                        if t < real:
                            raw = p.delta + 4 * (b * p.delta_batch + t * p.delta_row + d)
                            delta = step_size(raw, bias_at, p.with_softplus, lanes)
                            write = delta * u
                            B = p.B + 4 * (b * p.B_batch + t * p.B_row)
                            for n in range(N):
                                kept = exp2_product(delta, load(a_i + BYTES * n))
                                state = fma(write, load_splat(B + 4 * n), kept * load(old + BYTES * n))
                                store(keep_at + BYTES * n, kept)
                                store(old + block_bytes + BYTES * n, state)
                                total = fma(state, load_splat(C + 4 * n), total)
                            store(delta_of + BYTES * j, delta)
                        else:
                            for n in range(N):
                                state = load(old + BYTES * n)
                                store(keep_at + BYTES * n, splat(ONE))
                                store(old + block_bytes + BYTES * n, state)
                                total = fma(state, load_splat(C + 4 * n), total)
                            store(delta_of + BYTES * j, splat(ZERO))
                        if p.skip != 0:
                            total = total + skip * u
                        store(total_of + BYTES * j, total)

                    clear(section_dA, N)
                    section_dskip, section_dt_bias = splat(ZERO), splat(ZERO)
                    for j in range(steps - 1, -1, -1):
                        t = begin + j
                        out = 4 * ((b * p.length + t) * p.channels + d)
                        B = p.B + 4 * (b * p.B_batch + t * p.B_row)
                        C = p.C + 4 * (b * p.C_batch + t * p.C_row)
                        u = load_part(p.u + 4 * (b * p.u_batch + t * p.u_row + d), lanes)
                        dy = load_part(p.dy + 4 * (b * p.dy_batch + t * p.dy_row + d), lanes)
                        if p.z != 0:
                            z = load_part(p.z + 4 * (b * p.z_batch + t * p.z_row + d), lanes)
                            s = sigmoid(z)
                            slope = s * fma(z, splat(ONE) - s, splat(ONE))
                            store_part(p.dz + out, dy * load(total_of + BYTES * j) * slope, lanes)
                            dy = dy * (z * s)
                        delta = load(delta_of + BYTES * j)
                        write = delta * u if t < real else splat(ZERO)
                        old = h + block_bytes * j
                        keep_at = A_bar + block_bytes * j
                        through_B, through_A = splat(ZERO), splat(ZERO)
                        for n in range(N):
                            at = BYTES * n
                            g = fma(dy, load_splat(C + 4 * n), load(G + at))
                            row = block_bytes * j + at
                            store(dC + row, fma(dy, load(old + block_bytes + at), load(dC + row)))
                            store(dB + row, fma(g, write, load(dB + row)))
                            through_B = fma(g, load_splat(B + 4 * n), through_B)
                            g = g * load(keep_at + at)
                            store(G + at, g)
                            g = g * load(old + at)
                            through_A = fma(g, load(a_i + at), through_A)
                            store(section_dA + at, fma(g, delta, load(section_dA + at)))
                        du, ddelta = splat(ZERO), splat(ZERO)
                        if p.skip != 0:
                            du = dy * skip
                            section_dskip = fma(dy, u, section_dskip)
                        if t < real:
                            du = fma(delta, through_B, du)
                            ddelta = fma(through_B, u, through_A * splat(LN2))
                            if p.with_softplus != 0:
                                raw = load_part(p.delta + 4 * (b * p.delta_batch + t * p.delta_row + d), lanes)
                                if bias_at != 0:
                                    raw = raw + load_part(bias_at, lanes)
                                ddelta = ddelta * sigmoid(raw)
                                section_dt_bias = section_dt_bias + ddelta
                        store_part(p.du + out, du, lanes)
                        store_part(p.ddelta + out, ddelta, lanes)
                    for n in range(N):
                        at = dA + block_bytes * i + BYTES * n
                        store(at, load(at) + load(section_dA + BYTES * n))
                    store(ddt_bias + BYTES * i, load(ddt_bias + BYTES * i) + section_dt_bias)
                    store(dskip + BYTES * i, load(dskip + BYTES * i) + section_dskip)

                share = 4 * ((group * p.batch + b) * p.length + begin) * N
                for j in range(steps * N):
                    store_float(p.dB + share + 4 * j, lane_sum(load(dB + BYTES * j)))
                    store_float(p.dC + share + 4 * j, lane_sum(load(dC + BYTES * j)))

            if p.dh_boundary != 0:
                for i in range(count):
                    d = (first + i) * WIDTH
                    lanes = min(WIDTH, p.channels - d)
                    gather(p.dh_boundary + 4 * ((b * intervals + interval) * p.channels + d) * N, N, lanes, spare)
                    for n in range(N):
                        at = adjoint + block_bytes * i + BYTES * n
                        store(at, load(at) + load(spare + BYTES * n))

        for i in range(count):
            d = (first + i) * WIDTH
            lanes = min(WIDTH, p.channels - d)
            row = 4 * (b * p.channels + d)
            scatter(adjoint + block_bytes * i, N, lanes, p.dh0 + row * N)
            scatter(dA + block_bytes * i, N, lanes, p.dA + row * N)
            store_part(p.ddt_bias + row, load(ddt_bias + BYTES * i), lanes)
            store_part(p.dskip + row, load(dskip + BYTES * i), lanes)
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

    ``h_boundary`` must be the forward's, at interval ``boundaries``. dD, dz and ddt_bias are None where D, z and dt_bias
    are; dh0 (float32) always comes. Memory beyond the results: 16·min(T, L)·N·4 bytes a block and thread, and the shares of dB and dC."""
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
        "du": du.to(u.dtype),
        "ddelta": ddelta.to(delta.dtype),
        "dA": fold(dA).to(A.dtype),
        "dB": fold(shares[0]).to(B.dtype),
        "dC": fold(shares[1]).to(C.dtype),
        "dD": None if D is None else fold(dskip).to(D.dtype),
        "dz": None if dz is None or z is None else dz.to(z.dtype),
        "ddt_bias": None if dt_bias is None else fold(dbias).to(dt_bias.dtype),
        "dh0": dh0,
    }

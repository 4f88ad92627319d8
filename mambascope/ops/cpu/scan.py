"""The selective scan, forward: one block of 16 channels walks through all positions with its states at hand.

h[t] = exp(delta[t]·A)·h[t−1] + delta[t]·u[t]·B[t], y[t] = Σ_n C[t,n]·h[t,n] (+ D·u[t]) (·silu(z[t])): Mamba
(2312.00752), algorithm 2. The sum over n is one chain in the order of n; skip and gate round separately, as
`torch.mul`, `torch.add` and the lone gate kernel do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mambascope.ops.cpu.blocks import clear, dense, gather, pointer, real_lengths, rows, scatter, scratch
from mambascope.ops.cpu.compiling import kernel
from mambascope.ops.cpu.recurrence import TILE, add_skip, advance, hold, prepare_rates, step_sizes, write_out
from mambascope.ops.cpu.threads import Arguments, run
from mambascope.ops.cpu.vector import BYTES, WIDTH, fetch_add, keep, load_int, load_part, reader, store

SCAN = Arguments(
    "length channels states interval with_softplus u u_batch u_row delta delta_batch delta_row A B B_batch B_row "
    "C C_batch C_row skip z z_batch z_row dt_bias h0 lengths y h_last h_boundary h_each"
)
read = reader(SCAN)


@kernel(SCAN)
def scan_forward_units(address: int) -> None:
    p = read(address)
    N = p.states
    blocks = (p.channels + WIDTH - 1) // WIDTH
    intervals = (p.length + p.interval - 1) // p.interval
    tile = min(TILE, p.length)
    memory, h = scratch(2 * N + 3 * tile + 4)
    a = h + BYTES * N
    deltas = a + BYTES * N
    writes = deltas + BYTES * tile
    totals = writes + BYTES * tile
    dt_bias = totals + BYTES * tile
    skip = dt_bias + BYTES
    limits = skip + BYTES
    while True:
        unit = fetch_add(address, 1)
        if unit >= p.units:
            break
        b = unit // blocks
        d = (unit - b * blocks) * WIDTH
        lanes = min(WIDTH, p.channels - d)
        state_row = 4 * (b * p.channels + d) * N  # bytes, into B D N

        gather(p.A + 4 * d * N, N, lanes, a)
        prepare_rates(a, N, limits)
        if p.h0 != 0:
            gather(p.h0 + state_row, N, lanes, h)
        else:
            clear(h, N)
        if p.dt_bias != 0:
            store(dt_bias, load_part(p.dt_bias + 4 * d, lanes))
        if p.skip != 0:
            store(skip, load_part(p.skip + 4 * d, lanes))
        real = load_int(p.lengths + 8 * b) if p.lengths != 0 else p.length

        t = 0
        next_boundary = 0
        while t < p.length:
            if t == next_boundary:
                if p.h_boundary != 0:
                    slot = b * intervals + t // p.interval
                    scatter(h, N, lanes, p.h_boundary + 4 * (slot * p.channels + d) * N)
                next_boundary += p.interval
            steps = min(tile, min(next_boundary, p.length) - t)
            moving = min(max(real - t, 0), steps)
            u = p.u + 4 * (b * p.u_batch + t * p.u_row + d)
            raw = p.delta + 4 * (b * p.delta_batch + t * p.delta_row + d)
            B = p.B + 4 * (b * p.B_batch + t * p.B_row)
            C = p.C + 4 * (b * p.C_batch + t * p.C_row)
            bias_at = dt_bias if p.dt_bias != 0 else 0
            z = p.z + 4 * (b * p.z_batch + t * p.z_row + d) if p.z != 0 else 0
            step_sizes(raw, p.delta_row, u, p.u_row, bias_at, limits, p.with_softplus, moving, lanes, deltas, writes)
            ahead = 4 * steps  # z has the shape of u; without one, u's rows are asked for twice
            third, third_row = (z, p.z_row) if p.z != 0 else (u, p.u_row)
            soon = (
                *(raw + ahead * p.delta_row, p.delta_row, u + ahead * p.u_row, p.u_row),
                *(third + ahead * third_row, third_row),
            )
            advance(h, a, N, deltas, writes, B, p.B_row, C, p.C_row, moving, totals, soon)
            hold(h, N, C + 4 * moving * p.C_row, p.C_row, steps - moving, totals + BYTES * moving)
            if p.skip != 0:
                add_skip(totals, skip, u, p.u_row, steps, lanes)
            write_out(totals, z, p.z_row, p.y + 4 * ((b * p.length + t) * p.channels + d), p.channels, steps, lanes)
            if p.h_each != 0:
                scatter(h, N, lanes, p.h_each + 4 * ((b * p.length + t) * p.channels + d) * N)
            t += steps
        scatter(h, N, lanes, p.h_last + state_row)
        fetch_add(address + 8, 1)
    keep(memory)


def scan_forward(
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
    *,
    dt_softplus: bool,
    boundaries: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y B L D, h_last B D N, h_boundary B ceil(L/boundaries) D N or None)``, see `mambascope.ops.selective_scan`.

    Arguments are taken as checked. y is float32, with z in u's dtype."""
    batch, length, channels = u.shape
    states = A.shape[1]
    h_boundary = None
    if boundaries is not None:
        h_boundary = A.new_empty(batch, -(-length // boundaries), channels, states, dtype=torch.float32)
    y, h_last = _launch(
        u, delta, A, B, C, D, z, dt_bias, h0, lengths, dt_softplus, boundaries or length, h_boundary, None
    )
    return (y if z is None or u.dtype is torch.float32 else y.to(u.dtype)), h_last, h_boundary


def state_window(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor) -> Tensor:
    """``h B W D N`` after each of the W steps; delta after softplus. The same bits as the scan that passes there."""
    batch, length, channels = u.shape
    h = A.new_empty(batch, length, channels, A.shape[1], dtype=torch.float32)
    _launch(u, delta, A, B, B, None, None, None, h_start, None, False, 1, None, h)
    return h


def _launch(
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
    with_softplus: bool,
    interval: int,
    h_boundary: Tensor | None,
    h_each: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, length, channels = u.shape
    states = A.shape[1]
    u, delta, B, C = rows(u), rows(delta), rows(B), rows(C)
    A = dense(A)
    skip = None if D is None else dense(D)
    z = None if z is None else rows(z)
    dt_bias = None if dt_bias is None else dense(dt_bias)
    h0 = None if h0 is None else dense(h0)
    lengths = real_lengths(lengths)
    y = u.new_empty(batch, length, channels)
    h_last = A.new_empty(batch, channels, states)
    ub, ur, _ = u.stride()
    db, dr, _ = delta.stride()
    Bb, Br, _ = B.stride()
    Cb, Cr, _ = C.stride()
    zb, zr, _ = (0, 0, 0) if z is None else z.stride()
    units = batch * ((channels + WIDTH - 1) // WIDTH)
    run(
        scan_forward_units,
        units,
        batch * length * channels * states,
        *(length, channels, states, max(interval, 1), with_softplus),
        *(u.data_ptr(), ub, ur, delta.data_ptr(), db, dr, A.data_ptr(), B.data_ptr(), Bb, Br, C.data_ptr(), Cb, Cr),
        *(pointer(skip), pointer(z), zb, zr, pointer(dt_bias), pointer(h0), pointer(lengths)),
        *(y.data_ptr(), h_last.data_ptr(), pointer(h_boundary), pointer(h_each)),
    )
    return y, h_last

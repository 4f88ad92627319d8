"""Effective kernels on a CPU: tiles of the map as thin matrix products, channel by channel, on torch's threads.

The cut of time is that of `triton_pairs`: pairs of tiles with a step between them, where both exponents are sums of
delta away from that step; on the diagonal pairs of half the size, and so on down to blocks of 16 steps, which are
walked step by step. A unit of work is one pair or one block with all channels, so nothing is added up between threads:
the bits are the same for any number of them. In a pair a vector holds 16 steps of one channel; delta is summed with 16
channels a vector and then turned.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mambascope.ops.cpu.blocks import ZERO, clear, dense, pointer, rows, scratch
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
    load_float,
    load_int,
    load_part,
    load_splat,
    reader,
    splat,
    store,
    store_float,
    transpose,
)
from mambascope.ops.maps.cpu_lines import line
from mambascope.ops.maps.cpu_products import MAX, RMS, joined, products
from mambascope.ops.maps.problem import REDUCTIONS, Problem, Reduction

__all__ = ["kernel_map", "line"]

MAP = Arguments(
    "length channels states reach reduce tile tiles row0 row1 col0 col1 delta delta_batch delta_row gain gain_batch "
    "gain_row read read_batch read_row taps A B B_batch B_row C C_batch C_row totals table out"
)
arguments = reader(MAP)


@njit
def turned(source: int, steps: int, target: int) -> None:
    "`steps` vectors of 16 channels → 16 rows of `steps` floats"
    for k in range(0, steps, WIDTH):
        transpose(source + BYTES * k, BYTES, target + 4 * k, 4 * steps)


@njit
def columns_of(values: int, row: int, first: int, length: int, N: int, steps: int, target: int) -> None:
    "rows first … first + steps of an ``L N`` tensor → N rows of `steps` floats, 0 beyond the text"
    for k in range(steps):
        for n in range(N):
            inside = first + k < length
            value = load_float(values + 4 * ((first + k) * row + n)) if inside else ZERO
            store_float(target + 4 * (n * steps + k), value)


@njit
def sum_tiles(p: Any, b: int, T: int, i: int, j: int, d: int, lanes: int, x: int, r: int, w: int, q: int) -> None:
    """For 16 channels: delta over (step between, t] for queries, over (s, step between] for sources, what the sources
    write, what the queries read."""
    W = T + (p.reach + WIDTH - 1) // WIDTH * WIDTH
    delta = p.delta + 4 * (b * p.delta_batch + d)
    gain = p.gain + 4 * (b * p.gain_batch + d)
    read = p.read + 4 * (b * p.read_batch + d)
    total = splat(ZERO)
    for k in range(T):
        t = i * T + p.reach + k
        if t < p.length:
            total = total + load_part(delta + 4 * t * p.delta_row, lanes)
            if p.read != 0:
                store(q + BYTES * k, load_part(read + 4 * t * p.read_row, lanes))
        elif p.read != 0:
            store(q + BYTES * k, splat(ZERO))
        store(x + BYTES * k, total)
    total = splat(ZERO)
    for tile in range(j + 1, i):
        total = total + load_part(p.totals + 4 * ((b * p.tiles + tile) * p.channels + d), lanes)
    for k in range(W - 1, -1, -1):
        s = j * T + k
        store(r + BYTES * k, total)
        if k < T + p.reach and s < p.length:
            step = load_part(delta + 4 * s * p.delta_row, lanes)
            total = total + step
            if p.gain != 0:
                step = step * load_part(gain + 4 * s * p.gain_row, lanes)
            store(w + BYTES * k, step)
        else:
            store(w + BYTES * k, splat(ZERO))


@njit
def factors(p: Any, T: int, d: int, ct: int, bt: int, x: int, r: int, w: int, q: int, P: int, Q: int, E: int) -> None:
    "One channel's factors: P of the queries, Q of the sources, N rows of T; x, r, w, q are that channel's own rows"
    N, reach = p.states, p.reach
    W = T + (reach + WIDTH - 1) // WIDTH * WIDTH
    for n in range(N):
        rate = load_splat(p.A + 4 * (d * N + n))
        for k in range(0, 4 * T, BYTES):
            value = load(ct + 4 * n * T + k) * exp2_product(rate, load(x + k))
            if p.read != 0:
                value = value * load(q + k)
            store(P + 4 * n * T + k, value)
        target, step = (E, 4 * W) if reach > 0 else (Q, 4 * T)
        for k in range(0, step, BYTES):
            value = load(bt + n * step + k) * load(w + k)
            store(target + n * step + k, value * exp2_product(rate, load(r + k)))
        if reach > 0:
            for k in range(0, 4 * T, BYTES):
                value = splat(ZERO)
                for behind in range(reach + 1):
                    tap = load_splat(p.taps + 4 * (d * (reach + 1) + reach - behind))
                    value = fma(tap, load(E + n * step + k + 4 * behind), value)
                store(Q + 4 * n * T + k, value)


@njit
def write_tile(p: Any, b: int, first: int, steps: int, source: int, T: int, acc: int) -> None:
    "the part of a tile that the window holds, reduced: `steps` queries from `first`, T sources from `source`"
    scale = np.float32(1.0) if p.reduce == MAX else np.float32(1.0 / p.channels)
    height, width = p.row1 - p.row0, p.col1 - p.col0
    for k in range(steps):
        t = first + k
        if p.row0 <= t < p.row1:
            place = p.out + 4 * ((b * height + t - p.row0) * width - p.col0)
            for s in range(max(source, p.col0), min(source + T, p.col1)):
                value = load_float(acc + 4 * (k * T + s - source)) * scale
                if p.reduce == RMS:
                    value = np.float32(math.sqrt(value))
                store_float(place + 4 * s, value)


@njit
def pair(p: Any, b: int, T: int, i: int, j: int, acc: int, room: int) -> None:
    "tile i of queries, earlier tile j of sources"
    N = p.states
    W = T + (p.reach + WIDTH - 1) // WIDTH * WIDTH
    x = room
    r = x + BYTES * T
    w = r + BYTES * W
    q = w + BYTES * W
    xt = q + BYTES * T
    rt = xt + BYTES * T
    wt = rt + BYTES * W
    qt = wt + BYTES * W
    ct = qt + BYTES * T
    bt = ct + 4 * N * T
    P = bt + 4 * N * W
    Q = P + 4 * N * T
    E = Q + 4 * N * T
    clear(acc, T * T // WIDTH)
    columns_of(p.C + 4 * b * p.C_batch, p.C_row, i * T + p.reach, p.length, N, T, ct)
    columns_of(p.B + 4 * b * p.B_batch, p.B_row, j * T, p.length, N, W, bt)
    for d in range(0, p.channels, WIDTH):
        lanes = min(WIDTH, p.channels - d)
        sum_tiles(p, b, T, i, j, d, lanes, x, r, w, q)
        turned(x, T, xt)
        turned(r, W, rt)
        turned(w, W, wt)
        if p.read != 0:
            turned(q, T, qt)
        for c in range(lanes):
            own, wide = 4 * c * T, 4 * c * W
            factors(p, T, d + c, ct, bt, xt + own, rt + wide, wt + wide, qt + own, P, Q, E)
            products(P, Q, T, N, acc, p.reduce)
    write_tile(p, b, i * T + p.reach, T, j * T, T, acc)


@njit
def diagonal(p: Any, b: int, block: int, acc: int, room: int) -> None:
    "16 sources and the queries up to 15 + reach steps later: lane r is source r, every step in turn"
    N, reach, first = p.states, p.reach, block * WIDTH
    V = WIDTH + (reach + WIDTH - 1) // WIDTH * WIDTH
    steps = min(WIDTH + reach, p.length - first)
    x = room
    w = x + BYTES * V
    xt = w + BYTES * V
    wt = xt + BYTES * V
    E = wt + BYTES * V
    H = E + 4 * N * V
    taps = H + BYTES * N
    clear(acc, WIDTH + reach)
    clear(taps, (2 * V + WIDTH) // WIDTH + 1)
    if reach == 0:
        store_float(taps + 4 * V, np.float32(1.0))
    for d in range(0, p.channels, WIDTH):
        lanes = min(WIDTH, p.channels - d)
        for k in range(V):
            store(x + BYTES * k, splat(ZERO))
            store(w + BYTES * k, splat(ZERO))
            if k < steps:
                step = load_part(p.delta + 4 * (b * p.delta_batch + (first + k) * p.delta_row + d), lanes)
                store(x + BYTES * k, step)
                if p.gain != 0:
                    step = step * load_part(p.gain + 4 * (b * p.gain_batch + (first + k) * p.gain_row + d), lanes)
                store(w + BYTES * k, step)
        turned(x, V, xt)
        for c in range(lanes):
            for n in range(N):
                rate = load_splat(p.A + 4 * ((d + c) * N + n))
                for k in range(0, 4 * V, BYTES):
                    store(E + 4 * n * V + k, exp2_product(rate, load(xt + 4 * c * V + k)))
            if reach > 0:
                for behind in range(reach + 1):
                    tap = load_float(p.taps + 4 * ((d + c) * (reach + 1) + reach - behind))
                    store_float(taps + 4 * (V - behind), tap)
            clear(H, N)
            for k in range(steps):
                B = p.B + 4 * (b * p.B_batch + (first + k) * p.B_row)
                C = p.C + 4 * (b * p.C_batch + (first + k) * p.C_row)
                written = load(taps + 4 * (V - k)) * load_splat(w + BYTES * k + 4 * c)  # lane r: tap k - r
                total = splat(ZERO)
                for n in range(N):
                    kept = load(H + BYTES * n) * load_splat(E + 4 * (n * V + k))
                    state = fma(written, load_splat(B + 4 * n), kept)
                    store(H + BYTES * n, state)
                    total = fma(state, load_splat(C + 4 * n), total)
                if p.read != 0:
                    place = p.read + 4 * (b * p.read_batch + (first + k) * p.read_row + d + c)
                    total = total * load_splat(place)
                store(acc + BYTES * k, joined(load(acc + BYTES * k), total, p.reduce))
    write_tile(p, b, first, steps, first, WIDTH, acc)


@kernel(MAP)
def map_units(address: int) -> None:
    p = arguments(address)
    wide = p.tile + 2 * WIDTH + p.reach
    memory, acc = scratch(p.tile * p.tile // WIDTH + 8 * wide + 5 * p.states * wide // WIDTH + 8 * p.states + 64)
    room = acc + 4 * p.tile * p.tile
    while True:
        unit = fetch_add(address, 1)
        if unit >= p.units:
            break
        entry = p.table + 32 * unit
        b, T, i, j = load_int(entry), load_int(entry + 8), load_int(entry + 16), load_int(entry + 24)
        if T == 0:
            diagonal(p, b, i, acc, room)
        else:
            pair(p, b, T, i, j, acc, room)
        fetch_add(address + 8, 1)
    keep(memory)


def _units(batch: int, length: int, wanted: range, sources: range, tile: int, reach: int) -> Tensor:
    """The pairs (batch row, tile size, tile of queries, tile of sources) and blocks (size 0), largest first."""
    table: list[tuple[int, int, int, int]] = []
    first = (sources.start // tile) * tile
    for j in range(sources.start // tile, (sources.stop - 1) // tile + 1):
        for i in range(max(j + 1, (wanted.start - reach) // tile), (wanted.stop - 1 - reach) // tile + 1):
            table += [(b, tile, i, j) for b in range(batch)]
    size = tile // 2
    while size >= WIDTH:
        for j in range(first // size, (sources.stop - 1) // size + 1, 2):  # pairs 2k+1, 2k
            begin = (j + 1) * size + reach
            if begin < wanted.stop and begin + size > wanted.start and (j + 1) * size > sources.start:
                table += [(b, size, j + 1, j) for b in range(batch)]
        size //= 2
    for block in range(sources.start // WIDTH, (sources.stop - 1) // WIDTH + 1):
        begin = block * WIDTH
        if begin < min(wanted.stop, length) and begin + WIDTH + reach > wanted.start:
            table += [(b, 0, block, block) for b in range(batch)]
    return torch.tensor(table, dtype=torch.int64).view(-1, 4)


def kernel_map(p: Problem, reduce: Reduction, wanted: range, sources: range, tile: int | None = None) -> Tensor:
    """alpha reduced over channels for queries in ``wanted`` and sources in ``sources``, ``B T S``."""
    batch, length, channels = p.delta.shape
    states, reach = p.A.shape[1], p.reach
    tile = (128 if length >= 512 else 64) if tile is None else tile
    out = torch.zeros(batch, len(wanted), len(sources))
    table = _units(batch, length, wanted, sources, tile, reach)
    delta, B, C = rows(p.delta), rows(p.B), rows(p.C)
    gain, read = (None if x is None else rows(x) for x in (p.gain, p.read))
    taps = None if p.taps is None else dense(p.taps)
    A = dense(p.A * LOG2E)
    tiles = -(-length // tile)
    late = delta[:, reach:]
    totals = late.new_zeros(batch, tiles * tile, channels)
    totals[:, : late.shape[1]] = late
    totals = totals.view(batch, tiles, tile, channels).sum(2)

    def of(x: Tensor | None) -> tuple[int, int, int]:
        return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))

    run(
        map_units,
        len(table),
        batch * len(wanted) * len(sources) * channels * states,
        *(length, channels, states, reach, REDUCTIONS.index(reduce), tile, tiles),
        *(wanted.start, wanted.stop, sources.start, sources.stop),
        *(*of(delta), *of(gain), *of(read), pointer(taps), A.data_ptr(), *of(B), *of(C)),
        *(totals.data_ptr(), table.data_ptr(), out.data_ptr()),
    )
    return out

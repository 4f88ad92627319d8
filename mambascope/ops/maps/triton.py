"""Effective kernels on a GPU, the host's side: plans, scratch memory and launches of `triton_kernels`.

Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mambascope.ops.maps import tiled
from mambascope.ops.maps.problem import REDUCTIONS, Problem, Reduction
from mambascope.ops.maps.triton_kernels import (
    between_kernel,
    block_kernel,
    diagonal_kernel,
    finish_kernel,
    line_kernel,
    pair_kernel,
    sums_kernel,
    total_kernel,
)
from mambascope.ops.scan.triton_launch import dense, launch, processor_count, strides

__all__ = ["Plan", "kernel_map", "line"]

MAX_STATES = 64
"""Beyond it the factors of a tile do not fit on a multiprocessor, and the torch tiles are taken."""

_BLOCK = 16
_LOG2E = 1.4426950408889634
_SCRATCH = 96 << 20  # bytes that the shares of a map may take beyond the first


class Plan(NamedTuple):
    """How a map is cut: queries a tile, warps, precision of the products, shares of the channels far from the diagonal
    and near it, channels a step of the diagonal kernel, sources a tile (None: as many as queries), the most registers
    that a thread of the far products may take (None: the compiler's choice)."""

    tile: int
    warps: int
    precision: str
    far: int
    near: int
    lanes: int = 32
    across: int | None = None
    registers: int | None = None


def plan_of(p: Problem, rows: range, cols: range) -> Plan:
    """Enough programs to fill the GPU, in as few shares as do it: each costs one more map of scratch memory."""
    batch, length, channels = p.delta.shape
    states = p.A.shape[1]
    tile = 32 if states > 32 else 64 if states > 16 or length <= 512 else 128
    processors = processor_count(p.delta.device)
    pairs = batch * max(1, len(rows) // tile) * max(1, len(cols) // tile) // 2 + 1
    bytes_each = 4 * batch * len(rows) * len(cols)
    most = max(1, min(channels // 32, _SCRATCH // max(bytes_each, 1)))
    far = max(1, min(most, -(-4 * processors // pairs)))
    tiles = batch * -(-min(len(rows), len(cols)) // tile)
    near = max(1, min(channels // 32, -(-3 * processors // max(tiles, 1))))
    return Plan(tile, 8 if tile == 128 else 4, "tf32x3", far, near)


def _shares(channels: int, wanted: int) -> int:
    """How many equal shares of the channels there are when each is as large as ``wanted`` of them make it."""
    return -(-channels // -(-channels // wanted))


def _padded(N: int) -> int:
    return max(16, 1 << (N - 1).bit_length())


def kernel_map(p: Problem, reduce: Reduction, rows: range, cols: range, plan: Plan | None = None) -> Tensor:
    """alpha reduced over channels for queries in ``rows`` and sources in ``cols``, ``B T S``."""
    if p.A.shape[1] > MAX_STATES:
        return tiled.kernel_map(p, reduce, rows, cols)
    batch, _, channels = p.delta.shape
    plan = plan_of(p, rows, cols) if plan is None else plan
    T, reach = plan.tile, p.reach
    across = plan.across or T
    out = p.delta.new_empty(batch, len(rows), len(cols))
    call = _Call(p, reduce, plan)
    pairs = _far_pairs(rows, cols, T, across, reach, out.device)
    window = (rows.start, rows.stop, cols.start, cols.stop)
    far = p.delta.new_empty(_shares(channels, plan.far) if len(pairs) else 0, *out.shape)
    if len(pairs):
        between = p.delta.new_empty(batch, len(pairs), channels)
        since = call.sums(T)
        if across != T:
            since = since.clone()
            call.sums(across)
        programs = len(pairs) * -(-channels // 128) * batch
        sizes = (channels, call.tiles(across), len(pairs))
        launch(between_kernel, programs, out.device, call.total, pairs, between, *sizes, RATIO=T // across, BD=128)
        place = (far.stride(0), far.stride(1), len(cols), 0)
        call.pairs((T, across), since, pairs, between, far, len(far), window, place, 0, plan.warps)
    first = max(cols.start // T, (rows.start - reach) // T, 0)
    last = min((cols.stop - 1) // T, (rows.stop - 1) // T)
    near = p.delta.new_empty(_shares(channels, plan.near), batch, max(0, last - first + 1), T + reach, T)
    if near.shape[2]:
        _fill_near(call, near, first)
    programs = -(-len(rows) // 16) * -(-len(cols) // 128) * batch
    scale = 1.0 / channels
    counts = (far.stride(0) if len(pairs) else 0, near.stride(0), len(far), len(near), first, near.shape[2], scale)
    own = {"REACH": reach, "REDUCE": call.reduce, "WHOLE": T, "BT": 16, "BS": 128}
    launch(finish_kernel, programs, out.device, far, near, out, *window, *counts, **own, num_warps=4)
    return out


class _Call:
    """The tensors of one call as the kernels take them; those of ``sums`` are of the last tile size asked for."""

    def __init__(self, p: Problem, reduce: Reduction, plan: Plan) -> None:
        self.p, self.plan, self.reduce = p, plan, REDUCTIONS.index(reduce)
        self.delta, self.B, self.C = (dense(x) for x in (p.delta, p.B, p.C))
        self.A2 = (p.A * _LOG2E).contiguous()
        self.taps = None if p.taps is None else p.taps.contiguous()
        self.written = dense(p.write)
        self.write = self.written.transpose(1, 2).contiguous()  # B D L
        self.read = None if p.read is None else p.read.transpose(1, 2).contiguous()  # B D L
        batch, _, channels = p.delta.shape
        sizes = [self.tiles(T) * (T + extra) for T in self.sizes() for extra in (0, p.reach)]
        self.since, self.until = p.delta.new_empty(2, batch * channels * max(sizes))
        self.total = p.delta.new_empty(batch * self.tiles(_BLOCK) * channels)

    def sizes(self) -> list[int]:
        """Tile sizes from the smallest up to the plan's."""
        return [_BLOCK << k for k in range((self.plan.tile // _BLOCK).bit_length())]

    def tiles(self, T: int) -> int:
        return -(-self.p.delta.shape[1] // T)

    def sums(self, T: int) -> Tensor:
        """Sums of delta within tiles of T steps; ``since``, until the next call."""
        batch, length, channels = self.p.delta.shape
        lanes = 32 if T > 32 else 64
        programs = self.tiles(T) * -(-channels // lanes) * batch
        sizes = (length, channels, self.tiles(T))
        outputs = (self.since, self.until, self.total)
        own = {"T": T, "REACH": self.p.reach, "BD": lanes, "num_warps": 4}
        launch(sums_kernel, programs, self.delta.device, self.delta, *outputs, *strides(self.delta), *sizes, **own)
        return self.since

    def pairs(
        self,
        tile: tuple[int, int],
        since: Tensor,
        pairs: Tensor,
        between: Tensor | None,
        out: Tensor,
        shares: int,
        window: tuple[int, int, int, int],
        place: tuple[int, int, int, int],
        whole: int,
        warps: int,
    ) -> None:
        p, N = self.p, self.p.A.shape[1]
        batch, length, channels = p.delta.shape
        share = -(-channels // shares)
        programs = len(pairs) * -(-channels // share) * batch
        tensors = (since, self.until, self.write, self.read, self.A2, self.B, self.C, self.taps, between, pairs, out)
        sizes = (length, channels, *(self.tiles(T) for T in tile), len(pairs), share, *window, *place)
        own = {"N": N, "NP": _padded(N), "TI": tile[0], "TJ": tile[1], "REACH": p.reach, "REDUCE": self.reduce}
        own |= {"HAS_READ": self.read is not None, "PRECISION": self.plan.precision, "WHOLE": whole, "num_warps": warps}
        if whole == 0 and self.plan.registers is not None:
            own["maxnreg"] = self.plan.registers
        launch(pair_kernel, programs, out.device, *tensors, *strides(self.B, self.C), *sizes, **own)


@lru_cache(maxsize=64)
def _far_pairs(rows: range, cols: range, T: int, across: int, reach: int, device: torch.device) -> Tensor:
    """The pairs (tile of T queries, earlier tile of ``across`` sources) that a window touches, ``pairs 2`` int32."""
    i = torch.arange(max(0, (rows.start - reach) // T), (rows.stop - 1 - reach) // T + 1, device=device)
    j = torch.arange(cols.start // across, (cols.stop - 1) // across + 1, device=device)
    both = torch.cartesian_prod(i, j).view(-1, 2)
    return both[both[:, 0] * (T // across) > both[:, 1]].int().contiguous()


@lru_cache(maxsize=64)
def _near_pairs(begin: int, end: int, size: int, tiles: int, device: torch.device) -> Tensor:
    """The pairs (2k+1, 2k) of tiles of ``size`` steps between two steps, as far as there are ``tiles``."""
    k = torch.arange(begin // (2 * size), min(-(-end // (2 * size)), tiles // 2), device=device, dtype=torch.int32)
    return torch.stack([2 * k + 1, 2 * k], 1)


def _fill_near(call: _Call, near: Tensor, first: int) -> None:
    """The tiles on the diagonal: blocks of 16 step by step, and pairs of tiles from 16 steps on."""
    p, plan = call.p, call.plan
    batch, length, channels = p.delta.shape
    shares, _, tiles, _, T = near.shape
    share = -(-channels // shares)
    begin, end = first * T, min((first + tiles) * T, length)
    blocks = -(-(end - begin) // _BLOCK)
    programs = blocks * -(-channels // share) * batch
    sizes = (length, channels, blocks, share, near.stride(0), near.stride(1), first)
    own = {"N": p.A.shape[1], "REDUCE": call.reduce, "HAS_READ": p.read is not None, "WHOLE": T, "num_warps": 4}
    if p.reach == 0 and p.A.shape[1] <= 16:
        tensors = (call.delta, call.write, call.read, call.A2, call.B, call.C, near)
        launch(block_kernel, programs, near.device, *tensors, *strides(call.delta, call.B, call.C), *sizes, **own)
    else:
        read = p.read if p.read is None else dense(p.read)
        tensors = (call.delta, call.written, read, call.A2, call.B, call.C, call.taps, near)
        rows = strides(call.delta, call.written, read, call.B, call.C)
        own = {"N": own.pop("N"), "REACH": p.reach} | own | {"BD": plan.lanes}
        launch(diagonal_kernel, programs, near.device, *tensors, *rows, *sizes, **own)
    for size in call.sizes()[:-1]:
        pairs = _near_pairs(begin, end, size, call.tiles(size), near.device)
        if len(pairs):
            since, place = call.sums(size), (near.stride(0), near.stride(1), 0, first)
            warps = 4 if size > 32 else 2
            call.pairs((size, size), since, pairs, None, near, shares, (0, 0, 0, 0), place, T, warps)


_CHUNK = 64


def line(
    p: Problem, fixed: Tensor, moving: Tensor, at: Tensor, backward: bool, gain: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `lines.line`: a line ``B L D`` and delta summed over it, ``B D``."""
    delta, moving = dense(p.delta), dense(moving)
    batch, length, channels = delta.shape
    chunks, lanes = -(-length // _CHUNK), 64
    programs = -(-channels // lanes) * chunks * batch
    sums = delta.new_empty(batch, channels, chunks)
    sizes = (length, channels, chunks)
    own = {"BACKWARD": backward, "BT": _CHUNK, "BD": lanes, "num_warps": 4}
    launch(total_kernel, programs, delta.device, delta, at, sums, *strides(delta), *sizes, **own)
    tails = torch.zeros_like(sums)  # what lies between a chunk and the end that is held, added outward from it
    if backward:
        tails[..., :-1] = sums[..., 1:].flip(-1).cumsum(-1).flip(-1)
        total = tails[..., 0] + sums[..., 0]
    else:
        tails[..., 1:] = sums[..., :-1].cumsum(-1)
        total = tails[..., -1] + sums[..., -1]
    out = torch.empty(batch, length, channels, dtype=delta.dtype, device=delta.device)
    gain = None if gain is None else dense(gain)
    scale = None if scale is None else scale.contiguous()
    tensors = (delta, at, tails, (p.A * _LOG2E).contiguous(), fixed.contiguous(), moving, gain, scale, out)
    own = {"N": p.A.shape[1], "BACKWARD": backward, "HAS_GAIN": gain is not None, "HAS_SCALE": scale is not None}
    own |= {"BT": _CHUNK, "BD": lanes, "num_warps": 4}
    launch(line_kernel, programs, delta.device, *tensors, *strides(delta, moving, gain), *sizes, **own)
    return out, total

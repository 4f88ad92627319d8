"""Effective kernels on a GPU, the host's side: plans, scratch memory and launches of the `triton_*` kernels.

Under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mambascope.ops.maps import tiled
from mambascope.ops.maps.problem import REDUCTIONS, Problem, Reduction
from mambascope.ops.maps.triton_diagonal import block_kernel, diagonal_kernel
from mambascope.ops.maps.triton_lines import line_kernel, total_kernel
from mambascope.ops.maps.triton_pairs import between_kernel, pair_kernel, sums_kernel, turn_kernel
from mambascope.ops.maps.triton_reduce import finish_kernel
from mambascope.ops.scan.triton import hopper
from mambascope.ops.scan.triton_launch import dense, launch, processor_count, strides

__all__ = ["Plan", "kernel_map", "line"]

MAX_STATES = 64
"""Beyond it the factors of a tile do not fit on a multiprocessor, and the torch tiles are taken."""

_BLOCK = 16
_LOG2E = 1.4426950408889634
_SCRATCH = 96 << 20  # bytes that the shares of a map may take together


class Plan(NamedTuple):
    """How a map is cut: steps a tile, warps, shares of the channels far from the diagonal and near it, and whether the
    Hopper kernel takes the far products."""

    tile: int
    warps: int
    far: int
    near: int
    hopper: bool = False


def plan_of(p: Problem, rows: range, cols: range) -> Plan:
    """Programs that come out even on the GPU, in few shares: each beyond the first costs one more map of memory."""
    batch, length, channels = p.delta.shape
    states = p.A.shape[1]
    tile = 32 if states > 32 else 64 if states > 16 or length <= 512 else 128
    processors, hopper_takes_it = processor_count(p.delta.device), _hopper(p)
    slots = processors * (1 if tile == 128 else 4 if hopper_takes_it else 3)  # programs at a time
    pairs = batch * max(1, (len(rows) // tile) * (len(cols) // tile) // 2)
    bytes_each = 4 * batch * len(rows) * len(cols)
    most = max(1, min(channels // 32, _SCRATCH // max(bytes_each, 1)))

    def cost(shares: int) -> float:
        """Time against a GPU that is full all along; a share's maps are written and read again."""
        programs = pairs * shares
        return -(-programs // slots) * slots / programs * (1 + 0.01 * shares)

    far = min(range(1, most + 1), key=cost)
    tiles = batch * -(-min(len(rows), len(cols)) // tile)
    near = max(1, min(channels // 32, -(-3 * processors // max(tiles, 1))))
    return Plan(tile, 8 if tile == 128 else 4, far, near, hopper_takes_it)


def _hopper(p: Problem) -> bool:
    """Whether the Hopper kernel takes the far products."""
    return p.reach == 0 and hopper(p.delta.device, torch.float32, p.A.shape[1], None) is not None


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
    out = p.delta.new_empty(batch, len(rows), len(cols))
    call = _Call(p, reduce, plan)
    first = max(cols.start // T, (rows.start - reach) // T, 0)
    last = min((cols.stop - 1) // T, (rows.stop - 1) // T)
    near = p.delta.new_empty(_shares(channels, plan.near), batch, max(0, last - first + 1), T + reach, T)
    if near.shape[2]:
        _fill_blocks(call, near, first)  # needs the least, and gives the GPU something to do
    pairs = _far_pairs(rows, cols, T, reach, out.device)
    window = (rows.start, rows.stop, cols.start, cols.stop)
    shares = _shares(channels, plan.far) if len(pairs) else 0
    far = out[None] if shares == 1 else p.delta.new_empty(shares, *out.shape)  # a single share is finished in place
    call.turn()
    if len(pairs):
        between = p.delta.new_empty(batch, len(pairs), channels)
        call.sums(T)
        programs = len(pairs) * -(-channels // 128) * batch
        sizes = (channels, call.tiles(T), len(pairs))
        launch(between_kernel, programs, out.device, call.total, pairs, between, *sizes, BD=128)
        place = (far.stride(0), far.stride(1), len(cols), 0)
        call.pairs(T, pairs, between, far, shares, window, place, 0, plan.warps)
    if near.shape[2]:
        _fill_near(call, near, first)
    programs = -(-len(rows) // 8) * -(-len(cols) // 128) * batch
    scale = 1.0 / channels
    counts = (far.stride(0) if shares else 0, near.stride(0), shares, len(near), first, near.shape[2], scale)
    own = {"REACH": reach, "REDUCE": call.reduce, "WHOLE": T, "BT": 8, "BS": 128}
    launch(finish_kernel, programs, out.device, far, near, out, *window, *counts, **own, num_warps=4)
    return out


class _Call:
    """The tensors of one call as the kernels take them; those of ``sums`` are of the last tile size asked for."""

    def __init__(self, p: Problem, reduce: Reduction, plan: Plan) -> None:
        self.p, self.plan, self.reduce = p, plan, REDUCTIONS.index(reduce)
        self.delta, self.B, self.C = (dense(x) for x in (p.delta, p.B, p.C))
        self.A2 = (p.A * _LOG2E).contiguous()
        self.taps = None if p.taps is None else p.taps.contiguous()
        batch, _, channels = p.delta.shape
        sizes = [self.tiles(T) * (T + extra) for T in self.sizes() for extra in (0, p.reach)]
        self.since, self.until = p.delta.new_empty(2, batch * channels * max(sizes))
        self.total = p.delta.new_empty(batch * self.tiles(_BLOCK) * channels)

    def turn(self) -> None:
        """What is written and read as ``B D L``, and the largest magnitudes of both and of the taps."""
        p = self.p
        self.tops = torch.zeros(3, dtype=torch.int32, device=self.delta.device)  # their bits
        self.write = self.turned(self.delta, dense(p.gain), 0)
        self.read = None if p.read is None else self.turned(dense(p.read), None, 2)
        if self.taps is not None:
            self.tops[1] = self.taps.abs().max().view(torch.int32)

    def turned(self, x: Tensor, gain: Tensor | None, which: int) -> Tensor:
        """x · gain as ``B D L``; its largest magnitude goes into ``tops``."""
        batch, length, channels = x.shape
        out = x.new_empty(batch, channels, length)
        programs = -(-length // 64) * -(-channels // 32) * batch
        own = {"HAS_GAIN": gain is not None, "BT": 64, "BD": 32, "num_warps": 4}
        tensors = (x, gain, out, self.tops[which:])
        launch(turn_kernel, programs, x.device, *tensors, *strides(x, gain), length, channels, **own)
        return out

    def sizes(self) -> list[int]:
        """Tile sizes from the smallest up to the plan's."""
        return [_BLOCK << k for k in range((self.plan.tile // _BLOCK).bit_length())]

    def tiles(self, T: int) -> int:
        return -(-self.p.delta.shape[1] // T)

    def sums(self, T: int) -> None:
        """Sums of delta within tiles of T steps."""
        batch, length, channels = self.p.delta.shape
        lanes = 32 if T > 32 else 64
        programs = self.tiles(T) * -(-channels // lanes) * batch
        sizes = (length, channels, self.tiles(T))
        outputs = (self.since, self.until, self.total)
        own = {"T": T, "REACH": self.p.reach, "BD": lanes, "num_warps": 4}
        launch(sums_kernel, programs, self.delta.device, self.delta, *outputs, *strides(self.delta), *sizes, **own)

    def pairs(
        self,
        T: int,
        pairs: Tensor,
        between: Tensor | None,
        out: Tensor,
        shares: int,
        window: tuple[int, int, int, int],
        place: tuple[int, int, int, int],
        whole: int,
        warps: int,
    ) -> None:
        """The products of pairs of tiles of T steps, whose sums are the last that were asked for."""
        p, N = self.p, self.p.A.shape[1]
        batch, length, channels = p.delta.shape
        share = -(-channels // shares)
        programs = len(pairs) * -(-channels // share) * batch
        sizes = (length, channels, self.tiles(T), self.tiles(T), len(pairs), share, *window, *place)
        own = {"N": N, "TI": T, "TJ": T, "REDUCE": self.reduce, "HAS_READ": self.read is not None}
        own |= {"num_warps": warps}
        if whole == 0 and self.plan.hopper:
            from mambascope.ops.maps.gluon_pairs import far_kernel

            A2 = self.A2 if N == 16 else functional.pad(self.A2, (0, 16 - N))
            tensors = (
                self.since,
                self.until,
                self.write,
                self.read,
                A2,
                self.B,
                self.C,
                between,
                self.tops,
                pairs,
                out,
            )
            launch(far_kernel, programs, out.device, *tensors, *strides(self.B, self.C), *sizes[:-1], **own)
            return
        tensors = (self.since, self.until, self.write, self.read, self.A2, self.B, self.C, self.taps, between)
        tensors += (self.tops, pairs, out)
        own |= {"NP": _padded(N), "REACH": p.reach, "WHOLE": whole}
        launch(pair_kernel, programs, out.device, *tensors, *strides(self.B, self.C), *sizes, **own)


@lru_cache(maxsize=64)
def _far_pairs(rows: range, cols: range, T: int, reach: int, device: torch.device) -> Tensor:
    """The pairs (tile of queries, earlier tile of sources) that a window touches, ``pairs 2`` int32."""
    i = torch.arange(max(0, (rows.start - reach) // T), (rows.stop - 1 - reach) // T + 1, device=device)
    j = torch.arange(cols.start // T, (cols.stop - 1) // T + 1, device=device)
    both = torch.cartesian_prod(i, j).view(-1, 2)
    return both[both[:, 0] > both[:, 1]].int().contiguous()


@lru_cache(maxsize=64)
def _near_pairs(begin: int, end: int, size: int, tiles: int, device: torch.device) -> Tensor:
    """The pairs (2k+1, 2k) of tiles of ``size`` steps between two steps, as far as there are ``tiles``."""
    k = torch.arange(begin // (2 * size), min(-(-end // (2 * size)), tiles // 2), device=device, dtype=torch.int32)
    return torch.stack([2 * k + 1, 2 * k], 1)


def _fill_blocks(call: _Call, near: Tensor, first: int) -> None:
    """Blocks of 16 steps on the diagonal, step by step."""
    p = call.p
    batch, length, channels = p.delta.shape
    shares, _, tiles, _, T = near.shape
    share = -(-channels // shares)
    blocks = -(-(min((first + tiles) * T, length) - first * T) // _BLOCK)
    programs = blocks * -(-channels // share) * batch
    place = (blocks, share, near.stride(0), near.stride(1), first)
    own = {"N": p.A.shape[1], "REDUCE": call.reduce, "HAS_READ": p.read is not None, "WHOLE": T, "num_warps": 4}
    read, gain = dense(p.read), dense(p.gain)
    if p.reach == 0:
        wide = -(-length // _BLOCK) * _BLOCK
        turned = (functional.pad(x.transpose(1, 2), (0, wide - length)).contiguous() for x in (p.B, p.C))
        tensors = (call.delta, gain, read, call.A2, *turned, near)
        own |= {"BD": 32, "HAS_GAIN": gain is not None, "maxnreg": 168}  # three programs a multiprocessor, not two
        rows = strides(call.delta, gain, read)
        launch(block_kernel, programs, near.device, *tensors, *rows, length, channels, wide, *place, **own)
    else:
        written = call.delta if gain is None else call.delta * gain
        tensors = (call.delta, written, read, call.A2, call.B, call.C, call.taps, near)
        rows = strides(call.delta, written, read, call.B, call.C)
        own |= {"REACH": p.reach, "BD": 32}
        launch(diagonal_kernel, programs, near.device, *tensors, *rows, length, channels, *place, **own)


def _fill_near(call: _Call, near: Tensor, first: int) -> None:
    """The rest of the tiles on the diagonal: pairs of tiles from 16 steps on."""
    shares, _, tiles, _, T = near.shape
    begin, end = first * T, min((first + tiles) * T, call.p.delta.shape[1])
    for size in call.sizes()[:-1]:
        pairs = _near_pairs(begin, end, size, call.tiles(size), near.device)
        if len(pairs):
            call.sums(size)
            place = (near.stride(0), near.stride(1), 0, first)
            call.pairs(size, pairs, None, near, shares, (0, 0, 0, 0), place, T, 4 if size > 32 else 2)


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

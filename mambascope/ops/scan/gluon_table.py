"""From shape to launch configuration of the Hopper kernels: a small table, no tuning at run time.

The forward's programs walk all of time: on an H100 cutting it in parts, each of which first walks what lies before it,
lost at every size (1 × 16,384: 333 µs in one part, 457 in two), because two programs on a multiprocessor slow each
other down. It has two forms: 16 channels a program and 8 lanes a channel where every program has a multiprocessor to
itself; 32 and 4, which costs fewer instructions. What differs besides is when u, delta, B, C and z are loaded into
registers, tiles before they are used or at once (another warp computes meanwhile), and the registers for that, of which
float32 takes twice as many as what has half of its width. Saving states changes no choice: what is best without them is
best with them (at 64 × 2,048; 64 channels and 2 lanes, each of which then writes half a sector, lost 9 % there).

The backward has one form, and parts of time where there are few programs. Where channels are so `few` that most of a
GPU would idle, the portable kernels with their many chunks of time serve.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

__all__ = [
    "BACKWARD_TILE",
    "BackwardPlan",
    "ForwardPlan",
    "backward_plan",
    "few",
    "forward_plan",
]

BACKWARD_TILE = 16
"""Steps between the states that the backward needs, and between those that the forward can save."""

_LEAST_TILES = 4  # of a part
_MOST_PARTS = 16


@dataclass(frozen=True)
class ForwardPlan:
    """Channels a program, lanes a channel, steps a tile, tiles in flight, groups of four steps between stores of
    partial sums, steps a thread of a producer; tiles ahead of their use that a producer, a finisher load, and that are
    prefetched into L2; registers of a producer, of a finisher, of all on average."""

    block: int = 32
    lanes: int = 4
    tile: int = 32
    slots: int = 2
    groups: int = 8
    per_thread: int = 2
    producer_early: int = 1
    finisher_early: int = 1
    ahead: int = 4
    producer_registers: int = 80
    finisher_registers: int = 64
    registers: int = 80

    def __str__(self) -> str:
        return f"forward: {self.block} channels a program, {self.lanes} lanes a channel, one pass"


@dataclass(frozen=True)
class BackwardPlan:
    """Channels a program, lanes a channel (the kernel is made for these), parts of time; registers of a thread."""

    block: int = 32
    lanes: int = 4
    parts: int = 1
    registers: int = 168

    def __str__(self) -> str:
        cut = "one pass" if self.parts == 1 else f"{self.parts} parts of time side by side"
        return f"backward: {self.block} channels a program, {self.lanes} lanes a channel, {cut}"


_FORWARD_WIDE = ForwardPlan(producer_early=0, finisher_early=0, producer_registers=72, finisher_registers=56)
_FORWARD_WIDE_FLOAT = ForwardPlan(producer_registers=88)
_FORWARD_MANY_FLOAT = ForwardPlan()
_NARROW = ForwardPlan(block=16, lanes=8, slots=4, producer_registers=96, finisher_registers=96, registers=128)
_FORWARD_NARROW = replace(_NARROW, producer_early=0)
_FORWARD_NARROW_FLOAT = replace(_NARROW, producer_early=2)
_BACKWARD = BackwardPlan()


@lru_cache(4096)
def forward_plan(B: int, L: int, D: int, processors: int, entry: int = 2) -> ForwardPlan:
    """The forward's configuration for a shape, of inputs of ``entry`` bytes, on a GPU with so many multiprocessors."""
    if B * -(-D // _NARROW.block) <= processors:
        return _FORWARD_NARROW_FLOAT if entry > 2 else _FORWARD_NARROW
    if entry <= 2:
        return _FORWARD_WIDE
    return _FORWARD_MANY_FLOAT if B * -(-D // _FORWARD_WIDE.block) >= 16 * processors else _FORWARD_WIDE_FLOAT


def few(B: int, L: int, D: int) -> bool:
    """Whether so few channels walk so long a time that the portable kernels are faster.

    On an H100 one pass takes 20 ns a step whatever B · D is, up to 2,112; the portable kernels' chunks take 0.02 ns a
    step and channel, and at least about 20 µs in all.
    """
    return 20 + 2e-5 * L * B * D < 0.02 * L


@lru_cache(4096)
def backward_plan(B: int, L: int, D: int, processors: int) -> BackwardPlan:
    """The backward's configuration."""
    programs = B * -(-D // _BACKWARD.block)
    if programs >= 2 * processors:
        return _BACKWARD
    tiles = -(-L // BACKWARD_TILE)
    parts = min(3 * processors // programs, tiles // _LEAST_TILES, _MOST_PARTS)
    return replace(_BACKWARD, parts=max(1, parts))

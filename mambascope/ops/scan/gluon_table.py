"""From shape to launch configuration of the Hopper kernels: a small table, no tuning at run time.

Two forms: 32 channels a program and 4 lanes a channel, which costs the fewest instructions, where there are enough
programs; else 16 channels and 8 lanes. Where these are too few as well, time is cut in parts that run side by side.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

__all__ = [
    "BACKWARD_TILE",
    "BackwardPlan",
    "ForwardPlan",
    "backward_cuts",
    "backward_plan",
    "cuts",
    "forward_cuts",
    "forward_plan",
]

BACKWARD_TILE = 16
"""Steps between the states that the backward needs, and between those that the forward can save."""

_FORWARD_CHEAP = 0.6  # cost of a step without outputs, in full steps
_BACKWARD_CHEAP = 0.25
_LEAST_TILES = 4  # of a part


@dataclass(frozen=True)
class ForwardPlan:
    """Channels a program, lanes a channel, steps a tile, tiles of staged inputs and of partial sums, groups of four
    steps between stores of partial sums, steps a thread of a producer, tiles prefetched into L2, parts of time;
    registers of a producer, of a finisher, of all on average."""

    block: int = 32
    lanes: int = 4
    tile: int = 16
    stages: int = 2
    sums: int = 3
    groups: int = 4
    per_thread: int = 2
    ahead: int = 4
    parts: int = 1
    producer_registers: int = 56
    finisher_registers: int = 48
    registers: int = 56

    def __str__(self) -> str:
        cut = "one pass" if self.parts == 1 else f"{self.parts} parts of time side by side"
        return f"forward: {self.block} channels a program, {self.lanes} lanes a channel, {cut}"


@dataclass(frozen=True)
class BackwardPlan:
    """Channels a program, lanes a channel, steps a thread of the elementwise work, parts of time; at most that many
    registers (0: as many as wanted)."""

    block: int = 32
    lanes: int = 4
    per_thread: int = 2
    parts: int = 1
    registers: int = 168

    def __str__(self) -> str:
        cut = "one pass" if self.parts == 1 else f"{self.parts} parts of time side by side"
        return f"backward: {self.block} channels a program, {self.lanes} lanes a channel, {cut}"


_FORWARD_WIDE = ForwardPlan()
_FORWARD_NARROW = ForwardPlan(
    block=16, lanes=8, tile=32, stages=3, producer_registers=72, finisher_registers=64, registers=80
)
_BACKWARD_WIDE = BackwardPlan()
_BACKWARD_NARROW = BackwardPlan(block=16, lanes=8, per_thread=1, registers=0)


def cuts(tiles: int, parts: int, cheap: float) -> tuple[int, int, int]:
    """Where time is cut, in tiles, so that all parts end together: part k + 1 is (1 − cheap) times as long as part k.

    A part first walks what lies before it, at ``cheap`` of a full step's cost. Unused cuts are at the end.
    """
    shares = [(1.0 - cheap) ** k for k in range(parts)]
    at, found = 0.0, []
    for share in shares[:-1]:
        at += share / sum(shares) * tiles
        found.append(min(max(round(at), len(found) + 1), tiles))
    found += [tiles] * (3 - len(found))
    return found[0], found[1], found[2]


def _parts(programs: int, slots: int, tiles: int, most: int) -> int:
    return max(1, min(most, slots // programs, tiles // _LEAST_TILES))


@lru_cache(4096)
def forward_plan(B: int, L: int, D: int, processors: int) -> ForwardPlan:
    """The forward's configuration for a shape on a GPU with that many multiprocessors."""
    if B * -(-D // _FORWARD_WIDE.block) >= 2 * processors:
        return _FORWARD_WIDE
    programs = B * -(-D // _FORWARD_NARROW.block)
    tiles = -(-L // _FORWARD_NARROW.tile)
    return replace(_FORWARD_NARROW, parts=_parts(programs, 2 * processors, tiles, 3))


@lru_cache(4096)
def backward_plan(B: int, L: int, D: int, processors: int) -> BackwardPlan:
    """The backward's configuration."""
    if B * -(-D // _BACKWARD_WIDE.block) >= 2 * processors:
        return _BACKWARD_WIDE
    programs = B * -(-D // _BACKWARD_NARROW.block)
    tiles = -(-L // BACKWARD_TILE)
    return replace(_BACKWARD_NARROW, parts=_parts(programs, 3 * processors, tiles, 4))


def forward_cuts(plan: ForwardPlan, L: int) -> tuple[int, int, int]:
    """Cuts of the forward's tiles."""
    return cuts(-(-L // plan.tile), plan.parts, _FORWARD_CHEAP)


def backward_cuts(plan: BackwardPlan, L: int) -> tuple[int, int, int]:
    """Cuts of the backward's tiles, counted from the right."""
    return cuts(-(-L // BACKWARD_TILE), plan.parts, _BACKWARD_CHEAP)

"""From shape to launch configuration of the Hopper kernels: a small table, no tuning at run time.

Two forms: 32 channels a program and 4 lanes a channel, which costs the fewest instructions, where there are enough
programs; else 16 channels and 8 lanes. The forward's programs walk all of time: on an H100 cutting it in parts, each of
which first walks what lies before it, lost at every size (1 × 16,384: 333 µs in one part, 457 in two), because two
programs on a multiprocessor slow each other down. The backward's may, and it gains. Where channels are so `few` that
most of a GPU would idle, the portable kernels with their many chunks of time serve.
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
    "few",
    "forward_plan",
]

BACKWARD_TILE = 16
"""Steps between the states that the backward needs, and between those that the forward can save."""

_BACKWARD_CHEAP = 0.25  # cost of a step of the adjoint alone, in full steps
_LEAST_TILES = 4  # of a part


@dataclass(frozen=True)
class ForwardPlan:
    """Channels a program, lanes a channel, steps a tile, tiles in flight, groups of four steps between stores of
    partial sums, steps a thread of a producer, tiles prefetched into L2; registers of a producer, of a finisher, of all
    on average."""

    block: int = 32
    lanes: int = 4
    tile: int = 32
    slots: int = 2
    groups: int = 8
    per_thread: int = 2
    ahead: int = 4
    sectors: bool = False
    stream: bool = False
    producer_registers: int = 72
    finisher_registers: int = 56
    registers: int = 80

    def __str__(self) -> str:
        return f"forward: {self.block} channels a program, {self.lanes} lanes a channel, one pass"


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
_FORWARD_NARROW = ForwardPlan(block=16, lanes=8, slots=4, producer_registers=96, finisher_registers=96, registers=128)
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
    return _FORWARD_NARROW if B * -(-D // _FORWARD_NARROW.block) <= processors else _FORWARD_WIDE


def few(B: int, L: int, D: int) -> bool:
    """Whether so few channels walk so long a time that the portable kernels are faster.

    On an H100 one pass takes 20 ns a step whatever B · D is, up to 2,112; the portable kernels' chunks take 0.02 ns a
    step and channel, and at least about 20 µs in all.
    """
    return 20 + 2e-5 * L * B * D < 0.02 * L


@lru_cache(4096)
def backward_plan(B: int, L: int, D: int, processors: int) -> BackwardPlan:
    """The backward's configuration."""
    if B * -(-D // _BACKWARD_WIDE.block) >= 2 * processors:
        return _BACKWARD_WIDE
    programs = B * -(-D // _BACKWARD_NARROW.block)
    tiles = -(-L // BACKWARD_TILE)
    return replace(_BACKWARD_NARROW, parts=_parts(programs, 3 * processors, tiles, 4))


def backward_cuts(plan: BackwardPlan, L: int) -> tuple[int, int, int]:
    """Cuts of the backward's tiles, counted from the right."""
    return cuts(-(-L // BACKWARD_TILE), plan.parts, _BACKWARD_CHEAP)

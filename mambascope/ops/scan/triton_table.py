"""From shape to launch configuration: a small table, no tuning at run time.

A program is one warp that owns ``block`` channels with all their states. Two widths: 16 channels (at N = 16: 8 states a
thread), and 32 where there are so many programs that the fewer instructions a channel count for more than parallelism.
The numbers below are warps a multiprocessor, for GPUs with four schedulers each: the forward hides its latencies with
about three a scheduler, the backward holds two (255 registers a thread). Where one pass would leave schedulers idle,
time is cut in chunks that run side by side, at the price of one more pass over part of the work.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

__all__ = ["SEGMENT", "BackwardPlan", "ForwardPlan", "backward_plan", "forward_plan", "padded"]

SEGMENT = 64
"""The backward replays at most this many steps from one state."""

_MIN_CHUNK = 32  # steps
_WIDE = 16  # from here on, 32 channels a program
_FORWARD_ENOUGH, _FORWARD_TARGET = 5, 12  # one pass from the first on, else chunks up to the second
_BACKWARD_ENOUGH, _BACKWARD_TARGET = 5, 8


@dataclass(frozen=True)
class ForwardPlan:
    """``block`` channels a program, ``n_chunks`` chunks of ``chunk`` steps."""

    block: int
    chunk: int
    n_chunks: int

    def __str__(self) -> str:
        passes = "one pass" if self.n_chunks == 1 else f"{self.n_chunks} chunks of {self.chunk} steps in two passes"
        return f"forward: {self.block} channels a program, {passes}"


@dataclass(frozen=True)
class BackwardPlan:
    """``block`` channels a program, ``n_chunks`` chunks of ``chunk`` segments of at most ``segment`` steps."""

    block: int
    segment: int
    chunk: int
    n_chunks: int
    n_segments: int

    def __str__(self) -> str:
        passes = "one pass" if self.n_chunks == 1 else f"{self.n_chunks} chunks of {self.chunk} of them in two passes"
        return f"backward: {self.block} channels a program, segments of {self.segment} steps, {passes}"


def padded(N: int) -> int:
    """The power of two that holds N states."""
    return 1 << max(0, N - 1).bit_length()


def _most_chunks(L: int) -> int:
    """Each chunk folds the ends of those before it, four in about the time of four steps: that stays a small part."""
    return max(32, isqrt(L // 16))


def _block(B: int, D: int, N: int, processors: int) -> tuple[int, int]:
    """Channels a program, and programs a pass over all of time."""
    width = 16 / max(16, padded(N))
    for channels in (32, 16):
        block = max(2, int(channels * width))
        programs = B * -(-D // block)
        if programs >= _WIDE * processors:
            break
    return block, programs


@lru_cache(4096)
def forward_plan(B: int, L: int, D: int, N: int, processors: int, boundaries: int | None) -> ForwardPlan:
    """The forward's configuration for a shape on a GPU with that many multiprocessors.

    A chunk holds whole intervals between boundary states, so a very wide interval limits the number of chunks. Without
    boundaries chunks are cut as for the intervals that divide 64: asking for states must not change a bit of y.
    """
    block, programs = _block(B, D, N, processors)
    if programs >= _FORWARD_ENOUGH * processors or L < 2 * _MIN_CHUNK:
        return ForwardPlan(block, _round_up(max(L, 1), boundaries or 1), 1)
    wanted = min(_most_chunks(L), -(-_FORWARD_TARGET * processors // programs))
    chunk = _round_up(max(_MIN_CHUNK, -(-L // wanted)), _round_up(SEGMENT, boundaries) if boundaries else SEGMENT)
    return ForwardPlan(block, chunk, -(-L // chunk))


@lru_cache(4096)
def backward_plan(B: int, L: int, D: int, N: int, processors: int, boundaries: int) -> BackwardPlan:
    """The backward's configuration; ``boundaries`` is the interval of the states that it is given."""
    block, programs = _block(B, D, N, processors)
    segment = min(boundaries, SEGMENT)
    n_segments = -(-L // boundaries) * -(-boundaries // segment)
    n_chunks = 1
    if programs < _BACKWARD_ENOUGH * processors:
        least = -(-_MIN_CHUNK // segment)  # segments
        wanted = min(_most_chunks(L), _BACKWARD_TARGET * processors // programs)
        n_chunks = max(1, min(wanted, n_segments // least))
    chunk = -(-n_segments // n_chunks)
    return BackwardPlan(block, segment, chunk, -(-n_segments // chunk), n_segments)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit

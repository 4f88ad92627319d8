"""From shape to launch configuration: a small table, no tuning at run time.

Measured unit: programs a multiprocessor. A program is one warp; the forward needs about three warps a scheduler to hide
its latencies, the backward holds two (255 registers a thread). Below that, time is cut in chunks that run side by side,
at the price of one more pass over part of the work.
"""

from dataclasses import dataclass

__all__ = ["SEGMENT", "BackwardPlan", "ForwardPlan", "backward_plan", "forward_plan", "padded"]

SEGMENT = 64
"""The backward replays at most this many steps from one state."""

_MIN_CHUNK = 32
_FORWARD_ENOUGH, _FORWARD_TARGET = 5, 14  # programs a multiprocessor: above the first, one pass; else up to the second
_BACKWARD_ENOUGH, _BACKWARD_TARGET = 5, 8


@dataclass(frozen=True)
class ForwardPlan:
    """``block`` channels a program, ``n_chunks`` chunks of ``chunk`` steps."""

    block: int
    chunk: int
    n_chunks: int

    def __str__(self) -> str:
        passes = "one pass" if self.n_chunks == 1 else f"{self.n_chunks} chunks of {self.chunk} steps in three passes"
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
        passes = "one pass" if self.n_chunks == 1 else f"{self.n_chunks} chunks of {self.chunk} of them in three passes"
        return f"backward: {self.block} channels a program, segments of {self.segment} steps, {passes}"


def padded(N: int) -> int:
    """The power of two that holds N states."""
    return 1 << max(0, N - 1).bit_length()


def _blocks(D: int, block: int) -> int:
    return -(-D // block)


def forward_plan(B: int, L: int, D: int, N: int, processors: int, boundaries: int | None) -> ForwardPlan:
    """The forward's configuration for a shape on a GPU with that many multiprocessors.

    A chunk holds whole intervals between boundary states, so a very wide interval limits the number of chunks.
    """
    block = min(32, max(4, 512 // padded(N)))
    programs = B * _blocks(D, block)
    if programs >= _FORWARD_ENOUGH * processors or L < 2 * _MIN_CHUNK:
        return ForwardPlan(block, _round_up(max(L, 1), boundaries or 1), 1)
    wanted = -(-_FORWARD_TARGET * processors // programs)
    chunk = _round_up(max(_MIN_CHUNK, -(-L // wanted)), boundaries or 8)
    n_chunks = -(-L // chunk)
    return ForwardPlan(block, chunk, n_chunks)


def backward_plan(B: int, L: int, D: int, N: int, processors: int, boundaries: int) -> BackwardPlan:
    """The backward's configuration; ``boundaries`` is the interval of the states that it is given."""
    block = min(32, max(2, 512 // padded(N)))
    segment = min(boundaries, SEGMENT)
    n_segments = -(-L // boundaries) * -(-boundaries // segment)
    programs = B * _blocks(D, block)
    n_chunks = 1
    if programs < _BACKWARD_ENOUGH * processors:
        least = -(-_MIN_CHUNK // segment)  # segments
        n_chunks = max(1, min(_BACKWARD_TARGET * processors // programs, n_segments // least))
    chunk = -(-n_segments // n_chunks)
    return BackwardPlan(block, segment, chunk, -(-n_segments // chunk), n_segments)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit

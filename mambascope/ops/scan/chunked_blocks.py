"""How the chunked scan cuts a text: super-blocks of n chunks of T steps, and what enters each chunk."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Block",
    "Marks",
    "Plan",
    "cut",
    "entering_states",
    "make_block",
    "plan",
    "rows_of",
    "step_decays",
    "super_blocks",
]

# Bytes of kept decays: on a CPU about the last-level cache; on a GPU enough work for a launch.
_BUDGET = {"cpu": 12 << 20, "cuda": 256 << 20}


class Plan(NamedTuple):
    rows: int  # batch rows at a time
    steps: int  # T
    chunks: int  # n


def plan(batch: int, length: int, channels: int, states: int, device: str, itemsize: int) -> Plan:
    """Sizes of a super-block, from the shape alone."""
    token = channels * states * itemsize
    budget = _BUDGET.get(device, _BUDGET["cuda"])
    rows = max(1, min(batch, budget // (256 * token)))
    tokens = max(64, min(2048, budget // (rows * token)))
    if length < 64:
        steps = max(1, round(length**0.5))
    else:
        steps = 16 if tokens <= 512 else 32
    return Plan(rows, steps, max(1, min(tokens, length + steps - 1) // steps))


class Block(NamedTuple):
    """One super-block, cut in chunks and filled up with steps of delta = 0, which change nothing."""

    delta: Tensor  # B n T D
    write: Tensor  # B n T D: delta u
    B: Tensor  # B n T N
    C: Tensor  # B n T N

    def at(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """delta, delta u (``B n 1 D``), B and C (``B n N 1``) at step i of every chunk."""
        return self.delta[:, :, i, None], self.write[:, :, i, None], self.B[:, :, i, :, None], self.C[:, :, i, :, None]


def cut(x: Tensor, steps: int) -> Tensor:
    missing = -x.shape[1] % steps
    x = functional.pad(x, (0, 0, 0, missing)) if missing else x
    return x.reshape(x.shape[0], -1, steps, x.shape[2])  # B n T D


def make_block(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, steps: int) -> Block:
    return Block(cut(delta, steps), cut(delta * u, steps), cut(B, steps), cut(C, steps))


class Marks(NamedTuple):
    """Where the states entering every ``every``-th step are, in a super-block that starts at ``start``."""

    start: int
    length: int
    every: int | None

    def at(self, i: int, steps: int) -> tuple[slice, slice] | None:
        """(boundary numbers, chunk numbers) that step i of every chunk meets: two arithmetic progressions."""
        if self.every is None:
            return None
        chunks = [c for c in range(-(-(self.length - i) // steps)) if (self.start + c * steps + i) % self.every == 0]
        if not chunks:
            return None
        hop = chunks[1] - chunks[0] if len(chunks) > 1 else 1
        first = (self.start + chunks[0] * steps + i) // self.every
        slot_hop = hop * steps // self.every if len(chunks) > 1 else 1
        slots = slice(first, first + slot_hop * (len(chunks) - 1) + 1, slot_hop)
        return slots, slice(chunks[0], chunks[-1] + 1, hop)


def step_decays(block: Block, A_T: Tensor, kept: list[Tensor]) -> list[Tensor]:
    """exp(delta A) of each step, ``B n N D``, in the buffers of the last super-block where they fit."""
    shape = (*block.delta.shape[:2], *A_T.shape)
    if not kept or kept[0].shape != shape:
        kept[:] = [A_T.new_empty(shape) for _ in range(block.delta.shape[2])]
    for i, decay in enumerate(kept):
        torch.mul(block.delta[:, :, i, None], A_T, out=decay).exp_()
    return kept


def entering_states(block: Block, A_T: Tensor, decays: list[Tensor], h: Tensor) -> Tensor:
    """The state that enters each chunk, ``B n N D``, from h ``B N D``, which enters the first."""
    chunks = block.delta.shape[1]
    if chunks == 1:
        return h[:, None].clone()
    end = torch.zeros_like(decays[0])
    for i, decay in enumerate(decays):
        _, write, B, _ = block.at(i)
        end.mul_(decay).addcmul_(write, B)
    total = torch.exp(block.delta.sum(2)[:, :, None] * A_T)
    starts = torch.empty_like(end)
    for c in range(chunks):
        starts[:, c] = h
        h = torch.addcmul(end[:, c], total[:, c], h)
    return starts


def rows_of(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def super_blocks(shape: torch.Size, at: Plan) -> Iterator[tuple[slice, list[slice]]]:
    tokens = at.steps * at.chunks
    for row in range(0, shape[0], at.rows):
        spans = [slice(s, min(s + tokens, shape[1])) for s in range(0, shape[1], tokens)]
        yield slice(row, min(row + at.rows, shape[0])), spans

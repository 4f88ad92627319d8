"""The backward pass of the chunked scan: the adjoint recurrence g[t] = C[t] dy[t] + A_bar[t+1] g[t+1], g = dLoss/dh.

It is cut like the forward and runs from the last super-block to the first. Of each, the states are replayed from those
that entered its chunks; all chunks walk back together, from zero, then from the gradient that truly arrives.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambascope.ops.scan.chunked_blocks import Block, Marks, cut, make_block, plan, rows_of, step_decays, super_blocks
from mambascope.ops.scan.reference import mask_delta

__all__ = ["Pull", "backward", "states_of"]


def backward(
    inputs: Sequence[Any],
    lengths: Tensor | None,
    boundaries: int | None,
    starts: Tensor,
    dy: Tensor | None,
    dh_last: Tensor | None,
    dh_boundary: Tensor | None,
) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, h0 = inputs
    batch, length, channels = u.shape
    wide = starts.dtype
    A_T = A.to(wide).t().contiguous()
    at = plan(batch, length, channels, A.shape[1], u.device.type, wide.itemsize)
    du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
    dA_T = torch.zeros_like(A_T)
    dh0 = A_T.new_empty(batch, *A_T.shape)
    dentering = None if dh_boundary is None else dh_boundary.to(wide).transpose(2, 3)
    kept: list[Tensor] = []
    states: list[Tensor] = []
    for rows, spans in super_blocks(u.shape, at):
        g = torch.zeros_like(dh0[rows]) if dh_last is None else dh_last[rows].to(wide).transpose(1, 2)
        for span in reversed(spans):
            size, first = span.stop - span.start, span.start // at.steps
            block_u = u[rows, span].to(wide)
            block_delta = mask_delta(delta[rows, span].to(wide), rows_of(lengths, rows), span.start)
            block = make_block(block_u, block_delta, B[rows, span].to(wide), C[rows, span].to(wide), at.steps)
            decays = step_decays(block, A_T, kept)
            h = starts[rows, first : first + block.delta.shape[1]]
            block_dy = torch.zeros_like(block_u) if dy is None else dy[rows, span].to(wide)
            marks = Marks(span.start, size, None if dentering is None else boundaries)
            into = None if dentering is None else dentering[rows]
            pull = Pull(block, A_T, decays, cut(block_dy, at.steps), marks, into)
            dwrite, dexponent, block_dB, block_dC, g = pull.run(states_of(block, decays, h, states), g, dA_T)
            dwrite = dwrite[:, :size]
            du[rows, span] = dwrite * block_delta
            ddelta[rows, span] = mask_delta(dwrite * block_u + dexponent[:, :size], rows_of(lengths, rows), span.start)
            dB[rows, span], dC[rows, span] = block_dB[:, :size], block_dC[:, :size]
        dh0[rows] = g
    dh0 = None if h0 is None else dh0.transpose(1, 2).to(h0.dtype)
    return du, ddelta, dA_T.t().to(A.dtype), dB, dC, dh0


def states_of(block: Block, decays: list[Tensor], h: Tensor, kept: list[Tensor]) -> list[Tensor]:
    """States before each step and after the last, T + 1 tensors ``B n N D``, replayed from the entering ones."""
    if not kept or kept[0].shape != h.shape:
        kept[:] = [torch.empty_like(decays[0]) for _ in range(len(decays) + 1)]
    kept[0].copy_(h)
    for i, decay in enumerate(decays):
        _, write, B, _ = block.at(i)
        torch.mul(kept[i], decay, out=kept[i + 1]).addcmul_(write, B)
    return kept


class Pull(NamedTuple):
    """The adjoint recurrence of one super-block: g[t] = C[t] dy[t] + A_bar[t+1] g[t+1], g = dLoss/dh."""

    block: Block
    A_T: Tensor
    decays: list[Tensor]
    dy: Tensor  # B n T D
    marks: Marks
    dentering: Tensor | None  # B boundaries N D

    def step(self, i: int, g: Tensor) -> None:
        """From the gradient of the state after step i, without y's share, to that of the state before it."""
        g.mul_(self.decays[i])
        mark = self.marks.at(i, len(self.decays))
        if mark is not None and self.dentering is not None:
            g[:, mark[1]] += self.dentering[:, mark[0]]

    def leaving(self, g: Tensor) -> Tensor:
        """The gradient of each chunk's end state, ``B n N D``, from that of the last one, ``B N D``."""
        if self.block.delta.shape[1] == 1:
            return g[:, None].clone()
        start = torch.zeros_like(self.decays[0])
        for i in reversed(range(len(self.decays))):
            start.addcmul_(self.dy[:, :, i, None], self.block.at(i)[3])
            self.step(i, start)
        total = torch.exp(self.block.delta.sum(2)[:, :, None] * self.A_T)
        ends = torch.empty_like(start)
        for c in reversed(range(ends.shape[1])):
            ends[:, c] = g
            g = torch.addcmul(start[:, c], total[:, c], g)
        return ends

    def run(self, states: list[Tensor], g: Tensor, dA_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of delta·u, of delta in the exponent, of B, C (``B nT …``) and of the entering state; adds dA."""
        block = self.block
        g = self.leaving(g)
        dwrite, dexponent = torch.empty_like(block.delta), torch.empty_like(block.delta)
        dB, dC = torch.empty_like(block.B), torch.empty_like(block.C)
        product, dA = torch.empty_like(g), torch.zeros_like(g)
        for i in reversed(range(len(self.decays))):
            delta, write, B, C = block.at(i)
            dy = self.dy[:, :, i, None]
            g.addcmul_(dy, C)
            dC[:, :, i] = torch.mul(states[i + 1], dy, out=product).sum(3)
            dB[:, :, i] = torch.mul(g, write, out=product).sum(3)
            dwrite[:, :, i] = torch.mul(g, B, out=product).sum(2)
            torch.mul(g, self.decays[i], out=product).mul_(states[i])
            dA.addcmul_(product, delta)
            dexponent[:, :, i] = product.mul_(self.A_T).sum(2)
            self.step(i, g)
        dA_T += dA.sum((0, 1))
        return dwrite.flatten(1, 2), dexponent.flatten(1, 2), dB.flatten(1, 2), dC.flatten(1, 2), g[:, 0]

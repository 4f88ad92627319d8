"""The selective scan in ordinary torch operators, without a loop over tokens: any device, any floating dtype.

1. A text is taken in super-blocks of n chunks of T steps; only one super-block's N-fold tensors exist at a time.
2. All chunks of a super-block advance together, one of the T steps after the other: from zero (their end states), then,
   after a short carry from chunk to chunk, from their true entering states (the outputs). The decays of the first
   round are kept for the second, so that each exponential is taken once.
3. Backward: the same with time reversed, from the entering states of all chunks, which are all that is saved.

A chunk's total decay exp(A Σ delta) multiplies what enters it. Nothing divides by a decay, and no sum of delta reaches
beyond a chunk, so large delta underflows to 0 and nothing else. Inside, states are ``N D``: the long axis is last.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.ops.checks import compute_dtype

__all__ = ["Finish", "recurrence", "scan", "scan_with_grad", "window"]

# Bytes of kept decays: on a CPU about the last-level cache; on a GPU enough work for a launch.
_BUDGET = {"cpu": 24 << 20, "cuda": 256 << 20}


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


def _cut(x: Tensor, steps: int) -> Tensor:
    missing = -x.shape[1] % steps
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.reshape(x.shape[0], -1, steps, x.shape[2])  # B n T D


def _block(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, steps: int) -> Block:
    return Block(_cut(delta, steps), _cut(delta * u, steps), _cut(B, steps), _cut(C, steps))


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


def _decays(block: Block, A_T: Tensor, kept: list[Tensor]) -> list[Tensor]:
    """exp(delta A) of each step, ``B n N D``, in the buffers of the last super-block where they fit."""
    shape = (*block.delta.shape[:2], *A_T.shape)
    if not kept or kept[0].shape != shape:
        kept[:] = [A_T.new_empty(shape) for _ in range(block.delta.shape[2])]
    for i, decay in enumerate(kept):
        torch.mul(block.delta[:, :, i, None], A_T, out=decay).exp_()
    return kept


def _entering(block: Block, A_T: Tensor, decays: list[Tensor], h: Tensor) -> Tensor:
    """The state that enters each chunk, ``B n N D``, from h ``B N D``, which enters the first."""
    batch, chunks = block.delta.shape[:2]
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


def _forward_block(
    block: Block, decays: list[Tensor], h: Tensor, marks: Marks, entering: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y ``B nT D`` and the last state ``B N D``, from the states h that enter the chunks (overwritten)."""
    steps = len(decays)
    y = torch.empty_like(block.delta)
    product = torch.empty_like(h)
    for i, decay in enumerate(decays):
        _, write, B, C = block.at(i)
        mark = marks.at(i, steps)
        if mark is not None and entering is not None:
            entering[:, mark[0]] = h[:, mark[1]]
        h.mul_(decay).addcmul_(write, B)
        y[:, :, i] = torch.mul(h, C, out=product).sum(2)
    return y.flatten(1, 2), h[:, -1]


class Finish(NamedTuple):
    """What to do around the recurrence, super-block by super-block."""

    delta: Any  # (raw delta of a super-block) -> delta
    y: Any  # (y, u, z of a super-block) -> output


def _super_blocks(shape: torch.Size, at: Plan) -> Iterator[tuple[slice, list[slice]]]:
    tokens = at.steps * at.chunks
    for row in range(0, shape[0], at.rows):
        spans = [slice(s, min(s + tokens, shape[1])) for s in range(0, shape[1], tokens)]
        yield slice(row, min(row + at.rows, shape[0])), spans


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    boundaries: int | None,
    wide: torch.dtype,
    finish: Finish,
    out_dtype: torch.dtype,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``y B L D``, ``h_last B D N``, ``h_boundary``, without autograd; only one super-block is in memory beside them.

    ``wide`` is the dtype of the arithmetic. ``starts``, ``B chunks N D``, if given receives what enters each chunk.
    """
    batch, length, channels = u.shape
    A_T = A.to(wide).t().contiguous()
    at = plan(batch, length, channels, A.shape[1], u.device.type, A_T.element_size())
    y = u.new_empty(u.shape, dtype=out_dtype)
    h_last = A_T.new_empty(batch, *A_T.shape)
    entering = None
    if boundaries is not None:
        entering = A_T.new_empty(batch, -(-length // boundaries), *A_T.shape)
    kept: list[Tensor] = []
    for rows, spans in _super_blocks(u.shape, at):
        h = A_T.new_zeros(rows.stop - rows.start, *A_T.shape) if h0 is None else h0[rows].to(wide).transpose(1, 2)
        for span in spans:
            size = span.stop - span.start
            block_u = u[rows, span].to(wide)
            block_delta = _masked(finish.delta(delta[rows, span]).to(wide), lengths, rows, span)
            block = _block(block_u, block_delta, B[rows, span].to(wide), C[rows, span].to(wide), at.steps)
            decays = _decays(block, A_T, kept)
            h = _entering(block, A_T, decays, h)
            if starts is not None:
                first = span.start // at.steps
                starts[rows, first : first + h.shape[1]] = h
            marks = Marks(span.start, size, boundaries)
            y_block, h = _forward_block(block, decays, h, marks, None if entering is None else entering[rows])
            y[rows, span] = finish.y(y_block[:, :size], block_u, None if z is None else z[rows, span])
        h_last[rows] = h
    h_boundary = None if entering is None else entering.transpose(2, 3).contiguous()
    return y, h_last.transpose(1, 2).contiguous(), h_boundary


def _masked(delta: Tensor, lengths: Tensor | None, rows: slice, span: slice) -> Tensor:
    if lengths is None:
        return delta
    real = torch.arange(span.start, span.stop, device=delta.device) < lengths[rows, None]
    return torch.where(real[:, :, None], delta, 0.0)


def scan_with_grad(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    boundaries: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with first and higher derivatives. Saved for backward: the inputs, and N/T of ``B L D`` for states."""
    y, h_last, h_boundary = _Scan.apply(u, delta, A, B, C, h0, lengths, boundaries)
    return y, h_last, None if boundaries is None else h_boundary


_PLAIN = Finish(delta=lambda delta: delta, y=lambda y, u, z: y)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        h0: Tensor | None,
        lengths: Tensor | None,
        boundaries: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, channels = u.shape
        wide = compute_dtype(u, delta, A, B, C, h0)
        at = plan(batch, length, channels, A.shape[1], u.device.type, wide.itemsize)
        starts = u.new_empty(batch, -(-length // at.steps), A.shape[1], channels, dtype=wide)
        y, h_last, h_boundary = scan(
            u, delta, A, B, C, None, h0, lengths, boundaries, wide, _PLAIN, out_dtype=wide, starts=starts
        )
        ctx.save_for_backward(u, delta, A, B, C, h0, lengths, starts)
        ctx.boundaries = boundaries
        ctx.set_materialize_grads(False)
        return y, h_last, h_last.new_empty(0) if h_boundary is None else h_boundary

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_last: Tensor | None, dh_boundary: Tensor | None) -> Any:
        *inputs, lengths, starts = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Second derivatives are asked for: differentiate the recurrence that keeps all its states instead.
            grads = _open_backward(inputs, lengths, ctx.boundaries, (dy, dh_last, dh_boundary), ctx.needs_input_grad)
        else:
            grads = _backward(inputs, lengths, ctx.boundaries, starts, dy, dh_last, dh_boundary)
        return *grads, None, None


def _backward(
    inputs: list[Tensor],
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
    for rows, spans in _super_blocks(u.shape, at):
        g = torch.zeros_like(dh0[rows]) if dh_last is None else dh_last[rows].to(wide).transpose(1, 2)
        for span in reversed(spans):
            size, first = span.stop - span.start, span.start // at.steps
            block_u = u[rows, span].to(wide)
            block_delta = _masked(delta[rows, span].to(wide), lengths, rows, span)
            block = _block(block_u, block_delta, B[rows, span].to(wide), C[rows, span].to(wide), at.steps)
            decays = _decays(block, A_T, kept)
            h = starts[rows, first : first + block.delta.shape[1]]
            block_dy = torch.zeros_like(block_u) if dy is None else dy[rows, span].to(wide)
            marks = Marks(span.start, size, None if dentering is None else boundaries)
            into = None if dentering is None else dentering[rows]
            pull = _Pull(block, A_T, decays, _cut(block_dy, at.steps), marks, into)
            dwrite, dexponent, block_dB, block_dC, g = pull.run(_states(block, decays, h, states), g, dA_T)
            dwrite = dwrite[:, :size]
            du[rows, span] = dwrite * block_delta
            ddelta[rows, span] = _masked(dwrite * block_u + dexponent[:, :size], lengths, rows, span)
            dB[rows, span], dC[rows, span] = block_dB[:, :size], block_dC[:, :size]
        dh0[rows] = g
    dh0 = None if h0 is None else dh0.transpose(1, 2).to(h0.dtype)
    return du, ddelta, dA_T.t().to(A.dtype), dB, dC, dh0


def _states(block: Block, decays: list[Tensor], h: Tensor, kept: list[Tensor]) -> list[Tensor]:
    """States before each step and after the last, T + 1 tensors ``B n N D``, replayed from the entering ones."""
    if not kept or kept[0].shape != h.shape:
        kept[:] = [torch.empty_like(decays[0]) for _ in range(len(decays) + 1)]
    kept[0].copy_(h)
    for i, decay in enumerate(decays):
        _, write, B, _ = block.at(i)
        torch.mul(kept[i], decay, out=kept[i + 1]).addcmul_(write, B)
    return kept


class _Pull(NamedTuple):
    """The adjoint recurrence of one super-block: g[t] = C[t] dy[t] + A_bar[t+1] g[t+1], g = dLoss/dh."""

    block: Block
    A_T: Tensor
    decays: list[Tensor]
    dy: Tensor  # B n T D
    marks: Marks
    dentering: Tensor | None  # B boundaries N D

    def _step(self, i: int, g: Tensor) -> None:
        """From the gradient of the state after step i, without y's share, to that of the state before it."""
        g.mul_(self.decays[i])
        mark = self.marks.at(i, len(self.decays))
        if mark is not None and self.dentering is not None:
            g[:, mark[1]] += self.dentering[:, mark[0]]

    def _leaving(self, g: Tensor) -> Tensor:
        """The gradient of each chunk's end state, ``B n N D``, from that of the last one, ``B N D``."""
        if self.block.delta.shape[1] == 1:
            return g[:, None].clone()
        start = torch.zeros_like(self.decays[0])
        for i in reversed(range(len(self.decays))):
            start.addcmul_(self.dy[:, :, i, None], self.block.at(i)[3])
            self._step(i, start)
        total = torch.exp(self.block.delta.sum(2)[:, :, None] * self.A_T)
        ends = torch.empty_like(start)
        for c in reversed(range(ends.shape[1])):
            ends[:, c] = g
            g = torch.addcmul(start[:, c], total[:, c], g)
        return ends

    def run(self, states: list[Tensor], g: Tensor, dA_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of delta·u, of delta in the exponent, of B, C (``B nT …``) and of the entering state; adds dA."""
        block = self.block
        g = self._leaving(g)
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
            self._step(i, g)
        dA_T += dA.sum((0, 1))
        return dwrite.flatten(1, 2), dexponent.flatten(1, 2), dB.flatten(1, 2), dC.flatten(1, 2), g[:, 0]


def _open_backward(
    inputs: list[Tensor],
    lengths: Tensor | None,
    boundaries: int | None,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again; memory O(B L D N)."""
    outputs = open_scan(*inputs, lengths, boundaries)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
    wanted = [x for x, need in zip(inputs, needed, strict=False) if need]
    outs, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if need else None for _, need in zip(inputs, needed, strict=False)]


def open_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    boundaries: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The scan by way of all its states, in operators that differentiate to any order; memory O(B L D N)."""
    wide = compute_dtype(u, delta, A, B, C, h0)
    u, delta, A, B, C = (x.to(wide) for x in (u, delta, A, B, C))
    delta = _masked(delta, lengths, slice(None), slice(0, delta.shape[1]))
    start = u.new_zeros(u.shape[0], *A.shape) if h0 is None else h0.to(wide)
    h = window(u, delta, A, B, start)
    y = (h * C[:, :, None]).sum(-1)
    h_boundary = None
    if boundaries is not None:
        h_boundary = torch.cat((start[:, None], h[:, :-1]), 1)[:, ::boundaries]
    return y, h[:, -1], h_boundary


def window(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor) -> Tensor:
    """``h B W D N`` after each of the given steps."""
    wide = compute_dtype(u, delta, A, B, h_start)
    u, delta, A, B = (x.to(wide) for x in (u, delta, A, B))
    A_bar = torch.exp(delta[..., None] * A)  # B W D N
    return recurrence(A_bar, (delta * u)[..., None] * B[:, :, None], h_start.to(wide))


def recurrence(A_bar: Tensor, write: Tensor, h0: Tensor) -> Tensor:
    """``h[t] = A_bar[t] · h[t−1] + write[t]``, ``B L D N``; differentiable to any order."""
    return _Recurrence.apply(A_bar, write, h0)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A_bar: Tensor, write: Tensor, h0: Tensor) -> Tensor:
        h = _all_states(A_bar, write, h0)
        ctx.save_for_backward(A_bar, h0, h)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        A_bar, h0, h = ctx.saved_tensors
        # g[t] = dh[t] + A_bar[t+1] g[t+1]: the same recurrence, backwards.
        later = torch.cat((torch.ones_like(A_bar[:, :1]), A_bar.flip(1)[:, :-1]), 1)
        g = recurrence(later, dh.flip(1), torch.zeros_like(h0)).flip(1)
        return g * torch.cat((h0[:, None], h[:, :-1]), 1), g, A_bar[:, 0] * g[:, 0]


def _all_states(A_bar: Tensor, write: Tensor, h0: Tensor) -> Tensor:
    length = write.shape[1]
    steps = max(1, round(length**0.5)) if length < 256 else 16
    missing = -length % steps
    pad = (0, 0, 0, 0, 0, missing)
    a = (F.pad(A_bar, pad, value=1.0) if missing else A_bar).unflatten(1, (-1, steps))  # B n T D N
    w = (F.pad(write, pad) if missing else write).unflatten(1, (-1, steps))
    end, total = torch.zeros_like(w[:, :, 0]), torch.ones_like(a[:, :, 0])
    for i in range(steps):
        end = torch.addcmul(w[:, :, i], a[:, :, i], end)
        total = total * a[:, :, i]
    h, entering = h0, []
    for c in range(end.shape[1]):
        entering.append(h)
        h = torch.addcmul(end[:, c], total[:, c], h)
    h = torch.stack(entering, 1)
    states = torch.empty_like(w)
    for i in range(steps):
        h = torch.addcmul(w[:, :, i], a[:, :, i], h)
        states[:, :, i] = h
    return states.flatten(1, 2)[:, :length]

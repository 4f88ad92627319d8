"""The selective scan in ordinary torch operators, without a loop over tokens: any device, any floating dtype.

1. A text is taken in super-blocks of n chunks of T steps; only one super-block's N-fold tensors exist at a time.
2. All chunks of a super-block advance together, one of the T steps after the other: from zero (their end states), then,
   after a short carry from chunk to chunk, from their true entering states (the outputs). The decays of the first
   round are kept for the second, so that each exponential is taken once.
3. Backward: the same with time reversed, from the entering states of all chunks, which are all that is saved.

A chunk's total decay exp(A Σ delta) multiplies what enters it. Nothing divides by a decay, and no sum of delta reaches
beyond a chunk, so large delta underflows to 0 and nothing else. Inside, states are ``N D``: the long axis is last.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambascope.errors import BackendError
from mambascope.ops.checks import compute_dtype
from mambascope.ops.scan.chunked_backward import backward
from mambascope.ops.scan.chunked_blocks import (
    Block,
    Marks,
    entering_states,
    make_block,
    plan,
    rows_of,
    step_decays,
    super_blocks,
)
from mambascope.ops.scan.recurrence import open_scan
from mambascope.ops.scan.reference import mask_delta

__all__ = ["Finish", "scan", "scan_backward", "scan_forward", "scan_keeping_starts", "scan_with_grad", "supports"]


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

    delta: Callable[[Tensor], Tensor]  # (raw delta of a super-block) -> delta
    y: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (y, u, z of a super-block) -> output


# The recurrence alone: delta is given, y is returned as it is.
_PLAIN = Finish(delta=lambda delta: delta, y=lambda y, u, z: y)


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
    for rows, spans in super_blocks(u.shape, at):
        h = A_T.new_zeros(rows.stop - rows.start, *A_T.shape) if h0 is None else h0[rows].to(wide).transpose(1, 2)
        for span in spans:
            size = span.stop - span.start
            block_u = u[rows, span].to(wide)
            block_delta = mask_delta(finish.delta(delta[rows, span]).to(wide), rows_of(lengths, rows), span.start)
            block = make_block(block_u, block_delta, B[rows, span].to(wide), C[rows, span].to(wide), at.steps)
            decays = step_decays(block, A_T, kept)
            h = entering_states(block, A_T, decays, h)
            if starts is not None:
                first = span.start // at.steps
                starts[rows, first : first + h.shape[1]] = h
            marks = Marks(span.start, size, boundaries)
            y_block, h = _forward_block(block, decays, h, marks, None if entering is None else entering[rows])
            y[rows, span] = finish.y(y_block[:, :size], block_u, None if z is None else z[rows, span])
        h_last[rows] = h
    h_boundary = None if entering is None else entering.transpose(2, 3).contiguous()
    return y, h_last.transpose(1, 2).contiguous(), h_boundary


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


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: None,
    z: None,
    dt_bias: None,
    h0: Tensor | None,
    lengths: Tensor | None,
    *,
    dt_softplus: bool,
    boundaries: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernel interface, for the operator that compilers see; delta is after softplus, skip and gate are apart."""
    if dt_softplus or not (D is None and z is None and dt_bias is None):
        raise BackendError("selective_scan_torch is the recurrence alone; call mambascope.ops.selective_scan")
    wide = compute_dtype(u, delta, A, B, C, h0)
    return scan(u, delta, A, B, C, None, h0, lengths, boundaries, wide, _PLAIN, wide)


def scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: None,
    z: None,
    dt_bias: None,
    h0: Tensor | None,
    lengths: Tensor | None,
    h_boundary: Tensor,
    dy: Tensor,
    dh_last: Tensor | None,
    dh_boundary: Tensor | None,
    *,
    dt_softplus: bool,
    boundaries: int,
) -> dict[str, Tensor | None]:
    """The kernel interface; replays all chunks' entering states, whatever the boundaries' spacing."""
    wide = compute_dtype(u, delta, A, B, C, h0)
    starts = scan_keeping_starts(u, delta, A, B, C, h0, lengths, None, wide)[1]
    grads = backward([u, delta, A, B, C, h0], lengths, boundaries, starts, dy, dh_last, dh_boundary)
    found = dict(zip(("du", "ddelta", "dA", "dB", "dC", "dh0"), grads, strict=True))
    return {**found, "dD": None, "dz": None, "ddt_bias": None}


def scan_keeping_starts(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    boundaries: int | None,
    wide: torch.dtype,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]:
    """The scan's outputs, and the entering states of all chunks."""
    batch, length, channels = u.shape
    at = plan(batch, length, channels, A.shape[1], u.device.type, wide.itemsize)
    starts = u.new_empty(batch, -(-length // at.steps), A.shape[1], channels, dtype=wide)
    return scan(u, delta, A, B, C, None, h0, lengths, boundaries, wide, _PLAIN, wide, starts), starts


def supports(device: torch.device, dtype: torch.dtype, N: int, K: int) -> str:
    """Nothing is refused: any device, any floating dtype."""
    return ""


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
        wide = compute_dtype(u, delta, A, B, C, h0)
        (y, h_last, h_boundary), starts = scan_keeping_starts(u, delta, A, B, C, h0, lengths, boundaries, wide)
        ctx.save_for_backward(u, delta, A, B, C, h0, lengths, starts)
        ctx.boundaries = boundaries
        ctx.set_materialize_grads(False)
        return y, h_last, h_last.new_empty(0) if h_boundary is None else h_boundary

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        dy, dh_last, dh_boundary = grad_outputs
        if ctx.boundaries is None:
            dh_boundary = None  # a compiler may pass zeros for the empty placeholder
        *inputs, lengths, starts = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Second derivatives are asked for: differentiate the recurrence that keeps all its states instead.
            grads = _open_backward(inputs, lengths, ctx.boundaries, (dy, dh_last, dh_boundary), ctx.needs_input_grad)
        else:
            grads = backward(inputs, lengths, ctx.boundaries, starts, dy, dh_last, dh_boundary)
        return *grads, None, None


def _open_backward(
    inputs: list[Any],
    lengths: Tensor | None,
    boundaries: int | None,
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients that can be differentiated again; memory O(B L D N)."""
    u, delta, A, B, C, h0 = inputs
    outputs = open_scan(u, delta, A, B, C, h0, lengths, boundaries)
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
    wanted = [x for x, need in zip(inputs, needed, strict=False) if need]
    outs, given = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, wanted, given, create_graph=True, allow_unused=True))
    return [next(found) if need else None for _, need in zip(inputs, needed, strict=False)]

"""How much each state's change matters: the adjoint of one run against the difference of two runs' states.

    out[t, d] = Σ_n G[t, d, n] · (h'[t, d, n] − h[t, d, n]),    G[t] = C[t] dy[t] + exp(delta[t+1] A) G[t+1]

G is dLoss/dh[t] (see the backward pass), h and h' are the states of two runs of the recurrence. All positions and
channels come from one walk back through time that replays the states of both runs from their boundary states:
``B L D N`` is never held. That is attribution patching (gradient × difference) at every state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.ops.checks import check_window, compute_dtype
from mambascope.ops.dispatch import KERNEL_BACKENDS, Backend, choose, kernels
from mambascope.ops.scan import chunked, reference
from mambascope.ops.scan.chunked_backward import Pull, states_of
from mambascope.ops.scan.chunked_blocks import Marks, cut, make_block, plan, step_decays, super_blocks

__all__ = ["Course", "state_contraction"]

MOST = 64
"""Steps between boundary states, at most: what the kernels replay at a time."""


class Course(NamedTuple):
    """One run: ``u``, ``delta`` ``B L D``, ``B`` ``B L N``, and h entering every ``boundaries``-th step."""

    u: Tensor
    delta: Tensor
    B: Tensor
    h_boundary: Tensor  # B ceil(L/boundaries) D N


def state_contraction(
    dy: Tensor,
    delta: Tensor,
    C: Tensor,
    A: Tensor,
    here: Course,
    there: Course,
    *,
    boundaries: int = MOST,
    backend: Backend = "auto",
) -> Tensor:
    """``Σ_n G (h' − h)``, ``B L D``: the first-order effect of putting h'[t] in place of h[t], channel by channel.

    Args:
        dy: ``B L D``, the loss's derivative by y = C h. delta (after softplus), C: of the run that dy belongs to.
        A: ``D N``. here, there: the runs of h and of h'.
        boundaries: 1 … 64, the spacing of both runs' boundary states (`selective_scan` gives them).

    Returns:
        float32 (float64 if an input is). Time O(B L D N), about two scans and a backward; memory O(B L D), and
        2·64·N values for each block of channels that is being walked.

    Raises:
        InputError: shapes that do not fit. BackendError: an explicit backend that cannot run.
    """
    batch, length, channels = dy.shape
    if not 1 <= boundaries <= MOST:
        raise InputError(f"boundaries must lie in 1…{MOST} here, got {boundaries}")
    shape = (batch, -(-length // boundaries), channels, A.shape[1])
    for name, run in (("here", here), ("there", there)):
        if tuple(run.h_boundary.shape) != shape:
            raise InputError(f"{name}.h_boundary must have shape {shape}, got {tuple(run.h_boundary.shape)}")
        check_window(run.u, run.delta, A, run.B, run.h_boundary[:, 0] if length else run.h_boundary.sum(1))
        if run.u.shape != dy.shape:
            raise InputError(f"{name}.u must have dy's shape {tuple(dy.shape)}, got {tuple(run.u.shape)}")
    if delta.shape != dy.shape or C.shape != here.B.shape:
        raise InputError(
            f"delta must be {tuple(dy.shape)} and C {tuple(here.B.shape)}, got {tuple(delta.shape)}, {tuple(C.shape)}"
        )
    name = choose(backend, dy, delta, C, A, *here, *there, d_state=A.shape[1])
    with torch.no_grad():
        if dy.numel() == 0:
            return dy.new_zeros(dy.shape, dtype=compute_dtype(dy, delta, C, A, *here, *there))
        if name == "reference":
            return _plain(dy, delta, C, A, here, there)
        if name in KERNEL_BACKENDS:
            return kernels(name).state_contraction(dy, delta, C, A, *here, *there, boundaries=boundaries)
        return _chunked(dy, delta, C, A, here, there)


def _plain(dy: Tensor, delta: Tensor, C: Tensor, A: Tensor, here: Course, there: Course) -> Tensor:
    """As the equations say it; memory O(B L D N)."""
    h, other = (reference.window(run.u, run.delta, A, run.B, run.h_boundary[:, 0]) for run in (here, there))
    wide = compute_dtype(dy, delta, C, A, h, other)
    dy, delta, C, A = (x.to(wide) for x in (dy, delta, C, A))
    G = torch.zeros_like(h[:, 0])  # B D N
    out = torch.empty_like(dy)
    for t in reversed(range(dy.shape[1])):
        G = G + dy[:, t, :, None] * C[:, t, None]
        out[:, t] = (G * (other[:, t] - h[:, t])).sum(-1)
        G = torch.exp(delta[:, t, :, None] * A) * G
    return out


def _chunked(dy: Tensor, delta: Tensor, C: Tensor, A: Tensor, here: Course, there: Course) -> Tensor:
    """In the chunks of the chunked scan, one super-block's states at a time."""
    wide = compute_dtype(dy, delta, C, A, *here, *there)
    batch, length, channels = dy.shape
    A_T = A.to(wide).t().contiguous()
    at = plan(batch, length, channels, A.shape[1], dy.device.type, wide.itemsize)
    starts = [
        chunked.scan_keeping_starts(run.u, run.delta, A, run.B, C, run.h_boundary[:, 0], None, None, wide)[1]
        for run in (here, there)
    ]
    out = torch.empty(dy.shape, dtype=wide, device=dy.device)
    kept: list[Tensor] = []
    states: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rows, spans in super_blocks(dy.shape, at):
        g = A_T.new_zeros(rows.stop - rows.start, *A_T.shape)
        for span in reversed(spans):
            size, first = span.stop - span.start, span.start // at.steps
            c = C[rows, span].to(wide)
            for run, entering, mine in zip((here, there), starts, states, strict=True):
                given = (run.u[rows, span].to(wide), run.delta[rows, span].to(wide), run.B[rows, span].to(wide))
                block = make_block(*given, c, at.steps)
                chunks = block.delta.shape[1]
                states_of(block, step_decays(block, A_T, kept), entering[rows, first : first + chunks], mine)
            block = make_block(dy[rows, span].to(wide), delta[rows, span].to(wide), c, c, at.steps)
            decays = step_decays(block, A_T, kept)
            pull = Pull(block, A_T, decays, cut(dy[rows, span].to(wide), at.steps), Marks(span.start, size, None), None)
            g, found = pull.leaving(g), torch.empty_like(block.delta)
            for i in reversed(range(len(decays))):
                g.addcmul_(pull.dy[:, :, i, None], block.at(i)[3])
                found[:, :, i] = states[1][i + 1].sub_(states[0][i + 1]).mul_(g).sum(2)
                pull.step(i, g)
            out[rows, span] = found.flatten(1, 2)[:, :size]
            g = g[:, 0]
    return out

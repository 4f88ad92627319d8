"""The recurrence with all its states: vectorised over chunks, differentiable to any order, memory O(B L D N).

For windows of states, for edits of A_bar and of the write, and for second derivatives of the chunked scan.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mambascope.ops.checks import compute_dtype
from mambascope.ops.scan.reference import mask_delta

__all__ = ["open_scan", "recurrence", "window"]


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
    delta = mask_delta(delta, lengths)
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
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (dh,) = grad_outputs
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
    a = (functional.pad(A_bar, pad, value=1.0) if missing else A_bar).unflatten(1, (-1, steps))  # B n T D N
    w = (functional.pad(write, pad) if missing else write).unflatten(1, (-1, steps))
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

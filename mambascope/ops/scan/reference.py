"""The selective scan as its equations say it, one step at a time: the truth for every other backend.

Mamba (2312.00752), algorithm 2, with the discretisation of the authors' code: zero-order hold for A (equation 4),
Euler for B.

Every operation in it is elementwise, rounded once, or a sum over N alone. So bits do not depend on where a text is
cut, on the number of threads, or on the batch neighbours. Differentiable to any order; float32 or float64.
"""

import torch
from torch import Tensor

from mambascope.ops.checks import compute_dtype

__all__ = ["recurrence", "scan", "window"]


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    boundaries: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``y B L D``, ``h_last B D N``, ``h_boundary B ceil(L/boundaries) D N``; delta is after softplus."""
    batch, length, channels = u.shape
    wide = compute_dtype(u, delta, A, B, C, h0)
    u, delta, A, B, C = (x.to(wide) for x in (u, delta, A, B, C))
    h = u.new_zeros(batch, channels, A.shape[1]) if h0 is None else h0.to(wide)
    delta = mask_delta(delta, lengths)
    ys: list[Tensor] = []
    entering: list[Tensor] = []
    for t in range(length):
        if boundaries is not None and t % boundaries == 0:
            entering.append(h)
        A_bar = torch.exp(delta[:, t, :, None] * A)  # B D N
        write = (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]  # B D N
        h = A_bar * h + write
        ys.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, 1) if ys else u.new_zeros(batch, 0, channels)
    h_boundary = None
    if boundaries is not None:
        h_boundary = torch.stack(entering, 1) if entering else h.new_zeros(batch, 0, *h.shape[1:])
    return y, h.clone() if h is h0 else h, h_boundary


def window(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor) -> Tensor:
    """``h B W D N`` after each of the given steps."""
    wide = compute_dtype(u, delta, A, B, h_start)
    u, delta, A, B, h = (x.to(wide) for x in (u, delta, A, B, h_start))
    states: list[Tensor] = []
    for t in range(u.shape[1]):
        A_bar = torch.exp(delta[:, t, :, None] * A)
        h = A_bar * h + (delta[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        states.append(h)
    return torch.stack(states, 1) if states else h.new_zeros(h.shape[0], 0, *h.shape[1:])


def recurrence(A_bar: Tensor, write: Tensor, h0: Tensor) -> Tensor:
    """``h[t] = A_bar[t] · h[t−1] + write[t]``, all ``B L D N``."""
    h, states = h0, []
    for t in range(A_bar.shape[1]):
        h = A_bar[:, t] * h + write[:, t]
        states.append(h)
    return torch.stack(states, 1) if states else torch.zeros_like(write)


def mask_delta(delta: Tensor, lengths: Tensor | None, start: int = 0) -> Tensor:
    """delta, of positions from ``start`` on, with exact zeros at t ≥ lengths[b]: padding neither decays nor writes."""
    if lengths is None:
        return delta
    real = torch.arange(start, start + delta.shape[1], device=delta.device) < lengths[:, None]  # B L
    return torch.where(real[:, :, None], delta, 0.0)

"""Maps in plain torch: any device, any floating dtype, gigabytes never.

For each tile of sources the state that each of them alone would leave, H[s, d, n], is walked forward step by step:

    H = exp(delta[t] A) H,   plus tap · delta[t] gain[t] B[t] at the steps where s writes

which gives the tile on the diagonal. From the tile's end on, H is a thin factor: for every later tile of queries
P[t, d, n] = C[t, n] exp(A Σdelta since that tile began), the tile of alpha is one matrix product a channel, P Hᵀ, and H
is then decayed through the tile. All exponents are sums within one tile, and ≤ 0; nothing is divided by a decay.

The reference is the same walk with one tile that holds all sources: a recurrence for every source, step by step.
"""

import torch
from torch import Tensor

from mambascope.ops.maps.problem import Problem, Reduction, over_channels

__all__ = ["kernel_map", "kernel_map_reference"]

_TILE = 32


def kernel_map(p: Problem, reduce: Reduction, rows: range, cols: range, tile: int = _TILE) -> Tensor:
    """alpha reduced over channels for queries in ``rows`` and sources in ``cols``, ``B T S``.

    Time O(T S D N), memory O(tile D N + tile² D) a batch row beyond the result.
    """
    out = p.delta.new_zeros(p.delta.shape[0], len(rows), len(cols))
    for begin in range(cols.start, min(cols.stop, rows.stop), tile):
        columns = range(begin, min(begin + tile, cols.stop))
        place = out[:, :, columns.start - cols.start : columns.stop - cols.start]
        start = min(columns.stop + p.reach, rows.stop)
        H = _walk(p, reduce, rows, columns, start, place)
        if start < rows.start:  # nobody asks there: one step over all of it
            H = H * _decay(p.delta[:, start : rows.start].sum(1), p.A)
            start = rows.start
        for first in range(start, rows.stop, tile):
            here = slice(first, min(first + tile, rows.stop))
            since = p.delta[:, here].cumsum(1)  # B T D, over [first, t]
            P = torch.exp(since[..., None] * p.A).mul_(p.C[:, here, None, :])  # B T D N
            with torch.autocast(P.device.type, enabled=False):
                alpha = torch.einsum("btdn,bsdn->btsd", P, H)
            place[:, here.start - rows.start : here.stop - rows.start] = _seen(p, alpha, here, reduce)
            H = H * _decay(since[:, -1], p.A)
            if not bool(H.any()):  # all later weights are exactly 0
                break
    return out


def kernel_map_reference(p: Problem, reduce: Reduction, rows: range, cols: range) -> Tensor:
    """The same by the recurrence alone, step by step; memory O(S D N)."""
    out = p.delta.new_zeros(p.delta.shape[0], len(rows), len(cols))
    _walk(p, reduce, rows, cols, rows.stop, out)
    return out


def _decay(total: Tensor, A: Tensor) -> Tensor:
    return torch.exp(total[..., None] * A)[:, None]  # B 1 D N


def _seen(p: Problem, alpha: Tensor, here: slice, reduce: Reduction) -> Tensor:
    return over_channels(alpha if p.read is None else alpha * p.read[:, here, None], reduce)


def _walk(p: Problem, reduce: Reduction, rows: range, columns: range, stop: int, place: Tensor) -> Tensor:
    """H ``B S D N`` of the sources in ``columns`` before step ``stop``; fills their rows on the way there."""
    batch, _, channels = p.delta.shape
    H = p.delta.new_zeros(batch, len(columns), channels, p.A.shape[1])
    for t in range(columns.start, stop):
        H *= _decay(p.delta[:, t], p.A)
        wrote = p.delta[:, t] if p.gain is None else p.delta[:, t] * p.gain[:, t]  # B D
        for behind in range(p.reach + 1):
            if t - behind in columns:
                H[:, t - behind - columns.start] += (wrote * p.tap(behind))[..., None] * p.B[:, t, None, :]
        if t in rows:
            known = slice(0, min(t - columns.start + 1, len(columns)))
            alpha = (H[:, known] * p.C[:, t, None, None, :]).sum(-1)  # B S D
            place[:, t - rows.start, known] = _seen(p, alpha[:, None], slice(t, t + 1), reduce)[:, 0]
    return H

"""One row or one column of an effective kernel, all channels, in plain torch.

Both are the same sum: with one end held at its place, and R the delta summed from there to the other end,

    line[t, d] = Σ_n fixed[n] moving[t, n] exp(A[d, n] R[t, d])

A row holds C of the query and moves B backward over the sources (each then times its delta), a column holds B of the
source and moves C forward over the queries. R is summed outward from the end that is held, so it is small where the
line is large.
"""

import torch
from torch import Tensor

from mambascope.ops.maps.problem import Problem

__all__ = ["line"]

_BLOCK = 1 << 21  # elements of a ``block D N`` tensor of exponentials: 8 MB in float32


def line(
    p: Problem, fixed: Tensor, moving: Tensor, at: Tensor, backward: bool, gain: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The line ``B L D`` · gain ``B L D`` · scale ``B D``, zero on the far side of ``at`` ``B``, and delta summed over
    it, ``B D``.

    Backward: places s ≤ at, R over (s, at], the sum over [0, at]. Forward: places t ≥ at, R over (at, t], the sum over
    (at, L). ``fixed`` is ``B N``, ``moving`` ``B L N``. Time O(L D N), memory a block.
    """
    delta, A = p.delta, p.A
    batch, length, width = delta.shape
    places = torch.arange(length, device=delta.device)
    out = torch.zeros_like(delta)
    tail = delta.new_zeros(batch, width)
    size = max(1, _BLOCK // (batch * width * A.shape[1]))
    low, high = (int(v) for v in torch.stack(torch.aminmax(at)).tolist())
    starts = range(0, high + 1, size) if backward else range(low, length, size)
    for begin in reversed(starts) if backward else starts:
        stop = min(begin + size, high + 1 if backward else length)
        here = places[None, begin:stop]  # 1 T
        inside = here <= at[:, None] if backward else here > at[:, None]
        block = delta[:, begin:stop] * inside[..., None]  # B T D
        if backward:
            through = block.flip(1).cumsum(1).flip(1)  # over [s, stop)
            R = torch.cat([through[:, 1:], torch.zeros_like(through[:, :1])], 1) + tail[:, None]
            tail = tail + through[:, 0]
        else:
            R = block.cumsum(1) + tail[:, None]
            tail = R[:, -1]
        weight = torch.exp(R[..., None] * A)  # B T D N
        both = (moving[:, begin:stop] * fixed[:, None])[:, :, None]  # B T 1 N
        seen = here <= at[:, None] if backward else here >= at[:, None]
        value = weight.mul_(both).sum(-1) * seen[..., None]
        out[:, begin:stop] = value * delta[:, begin:stop] if backward else value
    for factor in (gain, None if scale is None else scale[:, None]):
        out = out if factor is None else out.mul_(factor)
    return out, tail

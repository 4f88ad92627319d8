"""One block for batches of different lengths at once: what looks at each token by itself runs once for all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambascope import ops
from mambascope.hooks.run import Run
from mambascope.model.block import Block
from mambascope.model.mixer import MambaMixer
from mambascope.model.mixers.base import project
from mambascope.model.mixers.conv import apply_gate

__all__ = ["through_lanes"]


def through_lanes(
    block: Block, stream: Tensor, shapes: Sequence[tuple[int, int]], states: Sequence[Any], run: Run
) -> Tensor:
    """The residual stream ``T M`` after the block, from that before it: the tokens of all lanes one after the other.

    A lane is a batch of ``shapes[i]`` = (rows, length), and starts from ``states[i]`` (None: the start of its text).
    Norm and projections run over all tokens, conv and scan lane by lane.
    """
    stream, mixer = stream.to(block.residual_dtype), block.mixer
    cuts = [rows * length for rows, length in shapes]
    if not isinstance(mixer, MambaMixer):
        parts = zip(stream.split(cuts), shapes, states, strict=True)
        return torch.cat([block(x.unflatten(0, shape), run, state)[0].flatten(0, 1) for x, shape, state in parts])

    def lanes(x: Tensor) -> list[Tensor]:
        return [part.unflatten(0, shape) for part, shape in zip(x.split(cuts), shapes, strict=True)]

    xz = project(block.norm(stream, run), mixer.in_proj, run.backend)  # T 2D
    x, z = xz.chunk(2, -1)
    us = [mixer.conv(part, run, state)[0] for part, state in zip(lanes(x), states, strict=True)]
    dt_low, B, C = mixer.select(_joined(us), run)
    raw = project(dt_low, mixer.dt_proj, run.backend)  # T D
    fused = mixer.cfg.activation == "silu"
    A, D, gated = mixer.decay(), mixer.D if fused else None, []
    for u, d, b, c, gate, state in zip(us, lanes(raw), lanes(B), lanes(C), lanes(z), states, strict=True):
        h0 = None if state is None else state.ssm
        options: Any = {"dt_softplus": True, "h0": h0, "backend": run.backend}
        y = ops.selective_scan(u, d, A, b, c, D, gate if fused else None, **options).y
        if not fused:
            y = apply_gate(y + u.to(y.dtype) * mixer.D.to(y.dtype), gate, mixer.cfg.activation, run)
        gated.append(y)
    return stream + project(_joined(gated), mixer.out_proj, run.backend)


def _joined(parts: list[Tensor]) -> Tensor:
    """Batches ``R L D`` as their tokens, ``T D``."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)

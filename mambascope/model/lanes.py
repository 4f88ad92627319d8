"""One block for batches of different lengths at once: what looks at each token by itself runs once for all of them."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mambascope import ops
from mambascope.hooks.run import Run
from mambascope.model.block import Block
from mambascope.model.mixer import MambaMixer
from mambascope.model.mixers.base import project, watched
from mambascope.model.mixers.conv import apply_gate

__all__ = ["through_lanes"]

T = TypeVar("T")

_MOST_BRANCHES = 7
_streams: dict[torch.device, list[Any]] = {}


def through_lanes(
    block: Block,
    stream: Tensor,
    shapes: Sequence[tuple[int, int]],
    states: Sequence[Any],
    run: Run,
    keep: int | None = None,
) -> Tensor:
    """The residual stream ``T M`` after the block, from that before it: the tokens of all lanes one after the other.

    A lane is a batch of ``shapes[i]`` = (rows, length), and starts from ``states[i]`` (None: the start of its text).
    Norm and projections run over all tokens, conv and scan lane by lane. ``keep``: only the last so many tokens of
    every row are wanted (of a shorter row all of them); what gate and output read is then computed for those alone.
    """
    stream, mixer = stream.to(block.residual_dtype), block.mixer
    lanes = _Lanes(shapes, keep)
    if not isinstance(mixer, MambaMixer):
        parts = zip(lanes.cut(stream), states, strict=True)
        return lanes.kept(_joined([block(x, run, state)[0] for x, state in parts]))
    normed = block.norm(stream, run)
    x, z = _inputs(mixer, normed, lanes, run)
    us = _side_by_side(
        [partial(mixer.conv, part, run, state) for part, state in zip(lanes.cut(x), states, strict=True)]
    )
    u = _joined([part for part, _ in us])
    dt_low, B, C = mixer.select(u, run)
    raw = project(dt_low, mixer.dt_proj, run.backend)  # T D
    fused = mixer.cfg.activation == "silu" and not lanes.fewer
    A, D = mixer.decay(), mixer.D if fused else None
    gates = lanes.cut(z) if fused else [None] * len(shapes)
    options: Any = {"dt_softplus": True, "backend": run.backend}
    operands = zip(map(itemgetter(0), us), *map(lanes.cut, (raw, B, C)), gates, states, strict=True)
    found = _side_by_side(
        [
            partial(ops.selective_scan, v, d, A, b, c, D, gate, h0=None if state is None else state.ssm, **options)
            for v, d, b, c, gate, state in operands
        ]
    )
    y = _joined([lanes.last(x.y) for x in found])  # T D, or what is kept of it
    if not fused:
        y = apply_gate(y + lanes.kept(u).to(y.dtype) * mixer.D.to(y.dtype), z, mixer.cfg.activation, run)
    return lanes.kept(stream) + project(y, mixer.out_proj, run.backend)


def _inputs(mixer: MambaMixer, normed: Tensor, lanes: "_Lanes", run: Run) -> tuple[Tensor, Tensor]:
    """x of all tokens, and z, the gate's input, of those that are kept."""
    linear, width = mixer.in_proj, mixer.cfg.d_inner
    if not lanes.fewer or type(linear) is not nn.Linear or watched(linear):
        x, z = project(normed, linear, run.backend).chunk(2, -1)
        return x, lanes.kept(z)
    bias = (None, None) if linear.bias is None else linear.bias.chunk(2)
    x = ops.linear(normed, linear.weight[:width], bias[0], backend=run.backend)
    return x, ops.linear(lanes.kept(normed), linear.weight[width:], bias[1], backend=run.backend)


class _Lanes:
    """Batches (rows, length) whose tokens stand one after the other."""

    def __init__(self, shapes: Sequence[tuple[int, int]], keep: int | None) -> None:
        self._shapes, self._keep = shapes, keep
        self._sizes = [rows * length for rows, length in shapes]
        self.fewer = keep is not None and any(length > keep for _, length in shapes)

    def cut(self, x: Tensor) -> list[Tensor]:
        """Tokens ``T *`` as batches ``R L *``."""
        return [part.unflatten(0, shape) for part, shape in zip(x.split(self._sizes), self._shapes, strict=True)]

    def last(self, batch: Tensor) -> Tensor:
        """What is kept of a batch."""
        return batch[:, -self._keep :] if self.fewer and self._keep is not None else batch

    def kept(self, x: Tensor) -> Tensor:
        """Those tokens of ``T *`` that are kept."""
        return _joined([self.last(part) for part in self.cut(x)]) if self.fewer else x


def _joined(parts: list[Tensor]) -> Tensor:
    """Batches ``R L *`` as their tokens, ``T *``."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _side_by_side(calls: list[Callable[[], T]]) -> list[T]:
    """What the calls give; while a CUDA graph is recorded they become branches of it, for none fills the GPU."""
    if len(calls) == 1 or not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return [call() for call in calls]
    main = torch.cuda.current_stream()
    known = _streams.setdefault(main.device, [])
    while len(known) < min(_MOST_BRANCHES, len(calls) - 1):
        known.append(torch.cuda.Stream(main.device))
    used, found = known[: len(calls) - 1], []
    for i, call in enumerate(calls[1:]):
        branch = used[i % len(used)]
        branch.wait_stream(main)
        with torch.cuda.stream(branch):
            found.append(call())
    first = calls[0]()
    for branch in used:
        main.wait_stream(branch)
    return [first, *found]

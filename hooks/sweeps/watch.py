"""A recorder that keeps what a sweep starts from: residual streams, some activations, states at regular places."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mambascope.hooks.lazy import states_between
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.points import BEFORE_SCAN, tail_of
from mambascope.hooks.recorder import compact
from mambascope.hooks.run import Anchors
from mambascope.hooks.sites import Padding

__all__ = ["WINDOW", "Watch"]

WINDOW = ("mixer.hook_u_write", "mixer.hook_delta", "mixer.hook_B")
"""What windows of h are computed from, besides the states kept."""


class Watch:
    """Keeps, of one forward pass: ``names``, the stream entering every block, and h every ``interval`` tokens."""

    def __init__(self, names: set[str], interval: int | None, resid: bool = True, end: str = "") -> None:
        """``end``: one more name, the stream that leaves the last block, which a pass has at hand anyway."""
        self.boundaries = interval
        tails = frozenset(tail_of(name)[1] for name in names)
        self.early = tails if tails <= BEFORE_SCAN else frozenset[str]()
        self._few = tails <= BEFORE_SCAN
        self._names = names | {end}
        self._keep_resid = resid
        self.values: dict[str, Tensor] = {}
        self.resid: dict[int, Tensor] = {}  # B L M
        self.anchors: dict[str, Anchors] = {}
        self.backend = "auto"

    def begin(
        self,
        tokens: Tensor | None,
        padding: Padding | None,
        bos: bool | None,
        backend: str,
        shape: tuple[int, int],
        plain: bool = False,
    ) -> None:
        self.backend = backend

    def only_inputs(self) -> bool:
        return self._few

    def check_room(self) -> None:
        """Part of the Recorder protocol; a sweep has asked before it began."""

    def begin_block(self, layer: int, resid: Tensor, state: Any, plain: bool = False) -> None:
        if self._keep_resid:
            self.resid[layer] = resid.detach()

    def wants(self, name: str) -> bool:
        return name in self._names

    def take(self, name: str, value: Tensor) -> None:
        if name in self._names:
            self.values[name] = compact(value.detach())

    def take_anchors(self, name: str, anchors: Anchors) -> None:
        if name.endswith("hook_h"):
            self.anchors[name] = anchors.map(torch.detach)

    def take_norms(self, norms: Tensor) -> None:
        """Part of the Recorder protocol: a sweep ends before anybody changes a weight."""

    def rows(self, rows: slice) -> "Watch":
        """What was kept of some rows of the batch."""
        return self.over(iter([x[rows] for x in self.tensors()]))

    def tensors(self) -> list[Tensor]:
        """All that was kept."""
        return [*self.values.values(), *self.resid.values(), *(a.states for a in self.anchors.values())]

    def over(self, tensors: Iterator[Tensor]) -> "Watch":
        """The same with other tensors, in the order of `tensors`."""
        other = copy.copy(self)
        other.values = {name: next(tensors) for name in self.values}
        other.resid = {layer: next(tensors) for layer in self.resid}
        other.anchors = {name: dataclasses.replace(a, states=next(tensors)) for name, a in self.anchors.items()}
        return other

    def state(self, layer: int, start: int) -> Tensor:
        """h before step ``start``, a multiple of the interval: ``B D N``."""
        anchors = self.anchors[f"blocks.{layer}.mixer.hook_h"]
        return anchors.states[:, anchors.columns.index(start - 1)]

    def leaving(self, layer: int, layers: int) -> Tensor:
        """The stream that leaves a block, ``B L M``; of the last one, if that was to be kept."""
        return self.resid[layer + 1] if layer + 1 < layers else self.values[f"blocks.{layer}.hook_resid_post"]

    def states(self, model: Runnable, layer: int, start: int, stop: int) -> Tensor:
        """h after the steps [start, stop), ``B W D N``; needs an interval, and what :data:`WINDOW` names or, of a run
        that nobody hooked, the stream."""
        anchors = self.anchors[f"blocks.{layer}.mixer.hook_h"]
        first = min(start, max(c for c in anchors.columns if c <= start) + 1)
        if f"blocks.{layer}.{WINDOW[0]}" in self.values:
            u, delta, B = (self.values[f"blocks.{layer}.{name}"][:, first:stop] for name in WINDOW)
        else:  # the conv reads a few columns before the first
            begin = max(0, first - (model.cfg.d_conv - 1))
            found = model.scan_inputs(layer, self.resid[layer][:, begin:stop], None, self.backend)
            u, delta, B = (x[:, first - begin :] for x in found)
        inputs = (u, delta, model.decay(layer), B)
        backend: Any = self.backend
        return states_between(inputs, anchors, first, start, stop, backend)

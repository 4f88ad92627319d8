"""What a cache did not store, computed again from what it did: a whole block, or the scan's inputs in a window."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from mambascope.errors import CacheError
from mambascope.hooks.points import LAZY, ON_DEMAND, tail_of
from mambascope.hooks.recorder import BlockRecord, Recording
from mambascope.hooks.run import Anchors
from mambascope.hooks.seals import Seals
from mambascope.hooks.sites import Padding

__all__ = ["AgainMethods"]

_REPLAYS = 2
"""Blocks whose recomputed activations are kept: 67 KB a token each at 130m size."""


class _Replay:
    """A recorder that keeps everything one block computes, for the cache to read; what is made on demand, if named."""

    boundaries = None
    early: frozenset[str] = frozenset()

    def __init__(self, demanded: str = "") -> None:
        self._demanded = demanded
        self.values: dict[str, Tensor] = {}

    def begin(self, *_: Any) -> None:
        """Part of the Recorder protocol; a replay starts at a block."""

    def begin_block(self, *_: Any) -> None:
        """Part of the Recorder protocol; there is only one block."""

    def only_inputs(self) -> bool:
        return False

    def check_room(self) -> None:
        """Part of the Recorder protocol; what a block gives fits, or torch says so."""

    def wants(self, name: str) -> bool:
        tail = tail_of(name)[1]
        return tail not in LAZY and (tail not in ON_DEMAND or name == self._demanded)

    def take(self, name: str, value: Tensor) -> None:
        self.values[name] = value

    def take_anchors(self, name: str, anchors: Anchors) -> None:
        """Part of the Recorder protocol; the recording has the anchors already."""

    def take_norms(self, *_: Any) -> None:
        """Part of the Recorder protocol; a replay is no recording."""


class AgainMethods:
    """Mixed into MambaCache."""

    recording: Recording
    model: Any
    _device: torch.device | None  # where what is stored was moved to
    _replays: OrderedDict[int, dict[str, Tensor]]  # by layer, the latest last
    _seals: Seals

    @property
    def device(self) -> torch.device:
        return self._device if self._device is not None else self.model.device

    def _replay(self, record: BlockRecord) -> dict[str, Tensor]:
        layer = record.layer
        if layer not in self._replays:
            self._replays[layer] = self._replay_again(record)
            self._seals.add(self._replays[layer].values())
            while len(self._replays) > _REPLAYS:
                self._seals.forget(self._replays.popitem(last=False)[1].values())
        self._replays.move_to_end(layer)
        return self._replays[layer]

    def _replay_again(self, record: BlockRecord, demanded: str = "") -> dict[str, Tensor]:
        layer = record.layer
        if record.x is None:
            raise CacheError(f"block {layer} kept no input to recompute from")
        self._seals.check_source(record)
        self.check_fresh(layer)
        values = self._run_again(record, record.x, record.state, self.recording.padding, demanded)
        self._check_same(layer, values)
        return values

    def _run_again(
        self, record: BlockRecord, x: Tensor, state: Any, padding: Padding | None, demanded: str = ""
    ) -> dict[str, Tensor]:
        device = self.model.device
        if x.device != device:
            x, state = x.to(device), None if state is None else state.map(lambda t: t.to(device))
            padding = None if padding is None else _padding_to(padding, device)
        replay, dtype = _Replay(demanded), self.recording.autocast
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            self.model.replay(record.layer, x, state, padding, self.recording.backend, replay)
        return {name: value.to(self.device) for name, value in replay.values.items()}

    def check_fresh(self, layer: int) -> None:
        """CacheError if a weight of this block was changed, trained or moved since the recording."""
        self._asked_fresh(layer)()

    def _asked_fresh(self, layer: int) -> Callable[[], None]:
        """The same, but for what a GPU must compare first: that is looked at when the result is called."""
        seen = self.recording.weights
        _refuse(seen.moved(self.model, layer))
        answer = seen.edited(self.model, layer)
        return lambda: _refuse(answer())

    def _check_same(self, layer: int, values: dict[str, Tensor]) -> None:
        """CacheError if a block that ran again did not come out where it did when it was recorded."""
        name, after = f"blocks.{layer}.hook_resid_post", self.recording.blocks.get(layer + 1)
        then = self.recording.blocks[layer].stored.get(name) if after is None else after.x
        if then is None:
            return
        self._seals.check(name, then)
        now, written = values[name], values[f"blocks.{layer}.hook_mixer_out"]
        rounding = max(5e-3, 8 * torch.finfo(written.dtype).eps)  # of other devices, threads, pieces
        allowed = rounding * written.abs().max() + 2 * torch.finfo(now.dtype).eps * now.abs().max()
        if bool(((now - then.to(now.device)).abs() > allowed).any()):
            raise CacheError(
                f"block {layer} does not compute any more what it did when this cache was recorded: its weights, its "
                "config or a module in it has changed; run the model again"
            )

    def _scan_inputs(self, record: BlockRecord, first: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """u, delta, B for columns [first, stop): stored, replayed, or from that window of the block's input."""
        layer = record.layer
        names = [f"blocks.{layer}.mixer.hook_{n}" for n in ("u_write", "delta", "B")]
        ready = record.stored if all(n in record.stored for n in names) else self._replays.get(layer)
        if ready is not None:
            self._seals.check(
                f"what blocks.{layer}.mixer.hook_h follows from (u_write, delta or B)", *map(ready.get, names)
            )
        if ready is None and record.x is not None and self.recording.padding is None:
            warm = max(0, first - (self.model.cfg.d_conv - 1))  # the conv looks back K-1 tokens
            state = record.state if warm == 0 else None
            if record.x.device == self.model.device == self.device and self.recording.autocast is None:
                part = (record.x[:, warm:stop], state, self.recording.backend)
                u, delta, B = (v[:, first - warm :] for v in self.model.scan_inputs(layer, *part))
                return u, delta, B
            ready = self._run_again(record, record.x[:, warm:stop], state, None)
            return cast(tuple[Tensor, Tensor, Tensor], tuple(ready[n][:, first - warm :] for n in names))
        if ready is None:
            ready = self._replay(record)
        return cast(tuple[Tensor, Tensor, Tensor], tuple(ready[n][:, first:stop] for n in names))


def _refuse(changed: str | None) -> None:
    if changed is not None:
        raise CacheError(
            f"{changed} has changed since this cache was recorded, so what was not stored cannot be recomputed; "
            "run the model again"
        )


def _padding_to(padding: Padding, device: torch.device) -> Padding:
    return Padding(padding.mask.to(device), padding.left.to(device), padding.lengths.to(device))

"""Windows of the states and the other ``B L D N`` activations, from the nearest stored states on."""

from typing import Any, cast

import torch
from torch import Tensor

from mambascope import ops
from mambascope.errors import BackendError, CacheError
from mambascope.hooks.cache_again import AgainMethods
from mambascope.hooks.lazy import states_between, states_of_chunks
from mambascope.hooks.points import tail_of
from mambascope.hooks.recorder import BlockRecord
from mambascope.hooks.run import Anchors

__all__ = ["WindowMethods"]


class WindowMethods(AgainMethods):
    """Mixed into MambaCache."""

    def lazy_window(self, name: str, rows: slice, start: int, stop: int, channels: slice) -> Tensor:
        """Steps [start, stop) of a lazy activation for some rows and channels, ``B W D N``."""
        if torch.is_autocast_enabled(self.device.type):
            with torch.autocast(self.device.type, enabled=False):
                return self._window(name, rows, start, stop, channels)
        return self._window(name, rows, start, stop, channels)

    def _window(self, name: str, rows: slice, start: int, stop: int, channels: slice) -> Tensor:
        layer, tail = tail_of(name)
        record = self.recording.blocks[cast(int, layer)]
        self._seals.check_source(record)
        if name in record.exposed:
            return record.exposed[name][rows, start:stop, channels]
        anchors = record.anchors
        if anchors is None:
            raise CacheError(f"{name}: no states were recorded")
        if record.exposed and tail == "mixer.hook_h":  # every step is an anchor
            return anchors.states[rows, start + 1 : stop + 1, channels]
        unchanged = self._asked_fresh(record.layer)
        if anchors.aligned:
            window = self._aligned_window(record, name, rows, start, stop, channels)
        else:
            window = self._column_window(record, anchors, tail, rows, start, stop, channels)
        unchanged()
        return window

    def _column_window(
        self, record: BlockRecord, anchors: Anchors, tail: str, rows: slice, start: int, stop: int, channels: slice
    ) -> Tensor:
        first, end, chunks = start, stop, None
        if tail == "mixer.hook_h" and start < stop:
            first, chunks = min(anchors.columns[anchors.before(start)] + 1, start), anchors.chunks(start, stop)
            if chunks is not None and chunks.count * chunks.size <= 2 * (stop - first):
                first = anchors.columns[chunks.begin] + 1
                end = first + chunks.count * chunks.size
            else:
                chunks = None
        u, delta, B = (v[rows] for v in self._scan_inputs(record, first, end))
        A = self.model.decay(record.layer).to(delta.device)[channels]
        u, delta = u[:, :, channels], delta[:, :, channels]
        if tail != "mixer.hook_h":
            return _exposed_value(tail, u, delta, A, B)
        states, inputs = Anchors(anchors.columns, anchors.states[rows][:, :, channels]), (u, delta, A, B)
        if chunks is None:
            return states_between(inputs, states, first, start, stop, self._backend(delta))
        return states_of_chunks(inputs, states, chunks, self._backend(delta))[:, start - first : stop - first]

    def _backend(self, like: Tensor) -> Any:
        """The recording's backend, or what there is if it cannot run here."""
        try:
            return ops.resolve_backend(self.recording.backend, like.device, like.dtype)[0]
        except BackendError:
            return "auto"

    def _aligned_window(
        self, record: BlockRecord, name: str, rows: slice, start: int, stop: int, channels: slice
    ) -> Tensor:
        """Left-padded rows whose h was hooked: their states are kept by token, not by column."""
        padding, anchors = self.recording.padding, record.anchors
        assert padding is not None and anchors is not None
        length = self.recording.shape[1]
        u, delta, B = self._scan_inputs(record, 0, length)
        A = self.model.decay(record.layer).to(delta.device)
        if tail_of(name)[1] != "mixer.hook_h":
            value = _exposed_value(tail_of(name)[1], u, delta, A, B)
            return value[rows, start:stop, channels]
        real = (torch.arange(length, device=delta.device) < padding.lengths[:, None])[..., None]
        inputs = (padding.align(u), padding.align(delta) * real, A, padding.align(B))
        h = states_between(inputs, anchors, 0, 0, length, self._backend(delta))
        pad = torch.arange(length, device=delta.device) < padding.left[:, None]  # nothing was read yet
        h = torch.where(pad[..., None, None], anchors.states[:, :1], padding.unalign(h))
        return h[rows, start:stop, channels]


def _exposed_value(tail: str, u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> Tensor:
    if tail == "mixer.hook_A_bar":
        return torch.exp(delta[..., None] * A)
    B_bar = delta[..., None] * B[:, :, None, :].to(delta.dtype)
    return B_bar if tail == "mixer.hook_B_bar" else B_bar * u[..., None].to(delta.dtype)

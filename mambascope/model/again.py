"""Work on a GPU that is done again with other values: recorded when it comes for the second time, then replayed.

For work that is many short launches, whatever they compute, such as the walk of a sweep over all layers. The inputs are
copied into memory of the recording's own and the outputs out of it. A recording is used once it has given what the work
itself gave.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambascope.model import graphs, recording
from mambascope.ops import resolve_backend

if TYPE_CHECKING:
    from mambascope.model.language_model import HookedMamba

__all__ = ["Repeats"]

_MOST = 64  # recordings
_MOST_SEEN = 256

_ROUNDING = 1e-4  # of the largest value: libraries may choose other kernels while a recording is made

Work = Callable[[list[Tensor]], list[Tensor]]


@dataclass
class _Taped:
    graph: recording.Recorded
    inputs: list[Tensor]
    outputs: list[Tensor]
    work: Work  # holds what else the recording reads


class Repeats:
    """One model's recordings of such work. Where the model's own recordings are off (``model.graphs.enabled``), or
    anybody hooked it, the work just runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Any, _Taped | str] = OrderedDict()  # or why there is none; "" after the first time
        self._pool: Any = None  # all recordings share it: they replay one at a time, and are read before the next
        self.held = 0  # bytes of it and of what stands beside
        self._stream: Any = None  # of the last replay

    def __reduce__(self) -> Any:
        """A copy of a model, or one from a file, records for itself."""
        return (Repeats, ())

    def __len__(self) -> int:
        return sum(isinstance(known, _Taped) for known in self._known.values())

    def clear(self) -> None:
        """Drop every recording and its memory."""
        with self._lock:
            self._clear()

    def _clear(self) -> None:
        self._known.clear()
        self._pool, self.held = None, 0

    def run(self, model: "HookedMamba", key: Any, inputs: list[Tensor], work: Work) -> list[Tensor]:
        """``work(inputs)``. ``key`` tells all that the work depends on but the values of inputs and weights."""
        if not self._possible(model) or not self._lock.acquire(blocking=False):
            return work(inputs)
        try:
            kinds = tuple((x.shape, x.dtype) for x in inputs)
            key = (key, kinds, model.graphs.watch.places(), graphs._matmul_switches())
            known = self._known.get(key)
            if known is None:
                self._known[key] = ""
                self._trim()
                return work(inputs)
            if known == "":  # before the recording: what the work keeps for itself must be there
                found = work(inputs)
                self._known[key] = self._record(model.device, inputs, work, found)
                self._trim()
                return found
            self._known.move_to_end(key)
            return work(inputs) if isinstance(known, str) else self._replay(model.device, known, inputs)
        finally:
            self._lock.release()

    def _possible(self, model: "HookedMamba") -> bool:
        if not model.graphs.enabled or torch.is_grad_enabled() or not graphs._undisturbed(model.device):
            return False
        backend, _ = resolve_backend(model.backend, model.device, model.dtype)
        return backend in graphs.RECORDED_BACKENDS and not model.graphs.watch.why_not(model)

    def _record(self, device: torch.device, inputs: list[Tensor], work: Work, found: list[Tensor]) -> _Taped | str:
        """The recording, once it has given ``found``, what the work itself gave; or why there is none."""
        if self.held > graphs._limit(device):
            self._clear()
        mine = [x.clone() for x in inputs]
        try:
            self._pool = recording.new_pool(device) if self._pool is None else self._pool
            with torch.inference_mode(False), torch.no_grad():
                graph, outputs, grown = recording.record(lambda: work(mine), device, self._pool)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self._clear()  # the memory may be what is missing
            return recording.notice("work that comes again", error)
        self.held += grown + sum(x.numel() * x.element_size() for x in mine)
        made = _Taped(graph, mine, outputs, work)
        apart = max((_apart(x, y) for x, y in zip(self._replay(device, made, inputs), found, strict=True)), default=0.0)
        if not apart < _ROUNDING:
            error = ValueError(f"it gives other values than the work itself, by {apart:.2g} of the largest")
            return recording.notice("work that comes again", error)
        return made

    def _replay(self, device: torch.device, taped: _Taped, inputs: list[Tensor]) -> list[Tensor]:
        self._stream = recording.follow(device, self._stream)
        foreach: Any = torch
        foreach._foreach_copy_(taped.inputs, inputs)
        taped.graph.replay()
        return [x.clone() for x in taped.outputs]

    def _trim(self) -> None:
        taped = [key for key, known in self._known.items() if isinstance(known, _Taped)]
        for key in taped[: max(0, len(taped) - _MOST)]:
            del self._known[key]
        while len(self._known) > _MOST_SEEN:
            self._known.popitem(last=False)


def _apart(x: Tensor, y: Tensor) -> float:
    """The largest difference, of the largest value."""
    if torch.equal(x, y):
        return 0.0
    return float((x - y).abs().max() / y.abs().max())

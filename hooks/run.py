"""One forward pass as the blocks see it: which hooks may fire, what is recorded, which path computes."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mambascope.hooks.sites import Clock, Padding, SitePoint, Witness
from mambascope.ops import Backend

__all__ = ["Anchors", "Chunks", "EditDone", "PathTaken", "Recorder", "Run"]


@dataclass
class EditDone:
    """What an intervention did in a forward pass: at which site, in how many calls, and how much it changed.

    ``change`` is the largest absolute difference between what was there and what was put there.
    """

    what: str
    site: str
    layer: int | None
    calls: int = 0
    _changes: list[Tensor] = field(default_factory=list)

    def add(self, change: Tensor) -> None:
        self.calls += 1
        self._changes.append(change)
        if len(self._changes) > 64:
            self._changes = [torch.stack(self._changes).amax()]

    @property
    def change(self) -> float:
        return float(torch.stack(self._changes).amax()) if self._changes else 0.0

    def __repr__(self) -> str:
        where = "" if self.site in self.what else f" ({self.site})"
        return f"EditDone({self.what}{where}, {self.calls} call{'s' * (self.calls != 1)}, change {self.change:.3g})"


@dataclass(frozen=True)
class PathTaken:
    """How a layer was computed: backend, form, and why.

    ``form`` is ``"fused"`` (softplus, skip and gate inside the scan), ``"open"`` (apart, each value
    passed through its hook point, same bits), ``"split"`` (the recurrence ran in pieces around edited
    states), ``"exposed"`` (A_bar, B_bar or write were edited: the recurrence ran on them), ``"graph"`` (fused, and
    replayed from a recording, same bits) or ``"step"`` (kernels for one token, in ``step`` and ``generate``).
    Other mixers: ``"sdpa"`` and ``"explicit"`` (attention without and with its scores as tensors), ``"fft"``,
    ``"step"`` and ``"kernel"`` (a time-invariant SSM by its kernel, one token, an edited kernel), ``"open"``.
    ``edits`` lists what interventions did in this layer.
    """

    backend: str
    form: str
    why: str
    edits: tuple[EditDone, ...] = ()


@dataclass
class Anchors:
    """States at known positions, from which any window of h is recomputed.

    ``states[:, i]`` is h after column ``columns[i]``; -1 is the state at entry. With ``aligned`` the columns
    count a row's real tokens instead of the padded tensor's columns.
    """

    columns: list[int]
    states: Tensor  # B len(columns) D N
    aligned: bool = False

    def chunks(self, start: int, stop: int) -> "Chunks | None":
        """The stretches between anchors that hold steps [start, stop), if they are of one length."""
        begin = self.before(start - 1)
        last = bisect.bisect_left(self.columns, stop - 1)
        if not begin < last < len(self.columns):
            return None
        low, count, size = self.columns[begin], last - begin, self.columns[begin + 1] - self.columns[begin]
        even = self.columns[begin : last + 1] == list(range(low, low + count * size + 1, size))
        return Chunks(begin, count, size) if even else None

    def before(self, step: int) -> int:
        """The index of the last one that is no later than ``step``; columns ascend."""
        return bisect.bisect_right(self.columns, step) - 1

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Anchors":
        return Anchors(self.columns, fn(self.states), self.aligned)


@dataclass(frozen=True)
class Chunks:
    """``count`` stretches of ``size`` steps, each from one anchor to the next, the first from anchor ``begin``."""

    begin: int
    count: int
    size: int


class Recorder(Protocol):
    """What a forward pass needs from whoever records it (the cache, or a replay)."""

    boundaries: int | None
    early: frozenset[str]
    """Points that a block has before its scan (`points.BEFORE_SCAN`), without the block's name, whose values are wanted
    although nothing later is."""

    def begin(
        self,
        tokens: Tensor | None,
        padding: Padding | None,
        bos: bool | None,
        backend: str,
        shape: tuple[int, int],
        plain: bool = False,
    ) -> None:
        """A forward pass starts; ``plain``: nobody hooked the model."""
        ...

    def begin_block(self, layer: int, resid: Tensor, state: Any, plain: bool = False) -> None:
        """A block starts, from this residual stream ``B L M`` and mixer state (or None); ``plain``: without hooks."""
        ...

    def only_inputs(self) -> bool:
        """Whether of the blocks nothing is wanted but their inputs, states, ``early``, and what leaves the last one."""
        ...

    def check_room(self) -> None:
        """CacheError if what will be kept cannot fit; a ``plain`` pass asks for it, or makes that memory at once."""
        ...

    def wants(self, name: str) -> bool:
        """Whether the value at this hook point must be computed although no hook sits there."""
        ...

    def take(self, name: str, value: Tensor) -> None:
        """Offer the value that left a hook point; kept only if wanted."""
        ...

    def take_anchors(self, name: str, anchors: Anchors) -> None:
        """Offer the states from which ``name`` (a ``hook_h``) can be recomputed."""
        ...

    def take_norms(self, norms: Tensor) -> None:
        """Offer the norms of the blocks' small weights (see `hooks.weights.small_norms`), where they are known."""
        ...


@dataclass
class Run:
    """The context of one forward pass.

    ``hooks=False`` while a block is replayed for a lazy read: the user's hooks must not fire again. ``quiet``: nobody
    looks into the blocks, so they may run without their hook points. ``grows``: the state given belongs to a running
    generation, which reads from it once: a mixer may append to its memory. ``unproven``: quiet is what was last found,
    and must be looked at before anything comes out (see `mambascope.model.graphs.Stack`).
    """

    backend: Backend
    why: str = ""
    clock: Clock = field(default_factory=Clock)
    hooks: bool = True
    recorder: Recorder | None = None
    padding: Padding | None = None
    needs_grad: bool = False
    quiet: bool = False
    grows: bool = False
    unproven: bool = False

    def exposes(self, point: SitePoint) -> bool:
        """Whether the value at ``point`` must exist as a tensor."""
        if self.hooks and point.live:
            return True
        return self.recorder is not None and self.recorder.wants(str(point.name))

    def emit(self, point: SitePoint, value: Tensor, fork: bool = False) -> Tensor:
        """Pass ``value`` through its hook point and offer it to the recorder.

        ``fork`` marks a tensor that others read as well: hooks then get a copy, so that an edit in place
        stays theirs.
        """
        if self.hooks:
            value = self._shown(point, self._given(value, fork)) if point.live else point(value)
        if self.recorder is not None:
            self.recorder.take(str(point.name), value)
        return value

    def emit_checked(self, point: SitePoint, value: Tensor) -> tuple[Tensor, bool]:
        """Like :meth:`emit`; also tells whether a hook replaced the value, changed it in place, or wants a gradient."""
        if not (self.hooks and point.live):
            return self.emit(point, value), False
        given = self._given(value, False)
        witness = Witness(given)
        out = self._shown(point, given)
        if self.recorder is not None:
            self.recorder.take(str(point.name), out)
        return out, out is not given or witness.changed(given)

    def _given(self, value: Tensor, fork: bool) -> Tensor:
        """What the hooks get: a copy where others read the value, autograd among them."""
        return value.clone() if fork or (value.requires_grad and torch.is_grad_enabled()) else value

    def _shown(self, point: SitePoint, given: Tensor) -> Tensor:
        return point.attach(point.checked(point(given), given))

    @property
    def boundaries(self) -> int | None:
        return self.recorder.boundaries if self.recorder is not None else None

    @property
    def lengths(self) -> Tensor | None:
        return self.padding.lengths if self.padding is not None else None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and step sizes: float32, or float64 in a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32

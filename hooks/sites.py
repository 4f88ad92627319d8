"""The points that serve sites: a hook sees, and replaces, the values at its positions."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint, LensHandle

from mambascope.errors import HookError
from mambascope.hooks.positions import Clock, Hits, Index, Padding, PerRow, Site, at, padding_of, parse_site

__all__ = [
    "Clock",
    "Index",
    "Padding",
    "Placed",
    "Site",
    "SitePoint",
    "Witness",
    "at",
    "padding_of",
    "parse_site",
]


@dataclass
class Placed:
    """A hook of ours at a point: its handle, the positions it was given, its direction."""

    handle: LensHandle
    index: Index
    dir: Literal["fwd", "bwd"]
    edits: bool = False  # known to edit whenever it is called: the recurrence need not look first


class SitePoint(HookPoint):
    """TransformerLens' HookPoint with positions, and with a check of what a hook gives back.

    ``pos`` holds, while a hook runs, the absolute positions that it was given: an int for one position of
    unpadded text, else a LongTensor; ``rows`` is None, or tells with a bool each which rows (or places, see
    :func:`~mambascope.hooks.positions.at`) it concerns. A returned tensor must keep shape, dtype and device. A
    backward hook belongs to the forward passes that ran while it was there, and counts positions as they did.
    """

    clock: Clock
    calling = "hooks are called as hook(value, hook=point)"

    def __init__(self, lazy: bool = False, axis: int = 1) -> None:
        super().__init__()
        self.lazy = lazy
        self.axis = axis  # of positions
        self.clock = Clock()
        self.pos: Any = None
        self.rows: Tensor | None = None
        self.beneath: Any = None  # see wants_beneath
        self.demand: Any = None  # who asks for states while the recurrence runs (hook_h: state_point.Demand)
        self.reached = False  # set when a hook of ours is called, or attached to a graph
        self.placed: list[Placed] = []
        self._on_gradient: OrderedDict[int, Callable[[Tensor, Any], Tensor | None]] = OrderedDict()

    @property
    def live(self) -> bool:
        """Whether any hook, of ours or of another library, sits here.

        nnsight replaces a wrapped module's ``forward`` instead of adding hooks. It wraps every module, so at
        the lazy points (``B L D N``, ``B H T S``) that alone does not count: exposing them costs too much unasked.
        """
        if self.placed and self.here():  # first: torch.compile watches lists, but not a module's empty dict of hooks
            return True
        if self._forward_hooks or self._forward_pre_hooks or self.live_backward or self.demand is not None:
            return True
        return not self.lazy and "forward" in self.__dict__

    @property
    def now(self) -> Any:
        """What tells one call of the hooks here from another in the same forward pass; None where there is one."""
        return None

    @property
    def live_backward(self) -> bool:
        return bool(self._on_gradient or self._backward_hooks or self._backward_pre_hooks)

    @property
    def wants_beneath(self) -> bool:
        """Whether a hook here needs to know what the value was computed from (hook_y: the recurrence's inputs)."""
        return any(getattr(p.handle.user_hook, "beneath", False) for p in self.here())

    def here(self) -> list[Placed]:
        """Our hooks that are still attached (a handle's ``hook.remove()`` tells nobody)."""
        return [p for p in self.placed if p.handle.hook.id in (self._forward_hooks, self._on_gradient)[p.dir == "bwd"]]

    def add_hook(
        self,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
        index: Index = None,
    ) -> LensHandle:
        """Add ``hook(value, hook=point)``; with ``index`` it sees and replaces those positions only."""
        if dir not in ("fwd", "bwd"):
            raise HookError(f"{self.name}: direction must be 'fwd' or 'bwd', got {dir!r}")
        if not callable(hook):
            raise HookError(f"{self.name}: a hook must be callable, got {type(hook).__name__}")
        user = hook
        if dir == "fwd":

            def guarded(tensor: Any, *, hook: Any) -> Any:
                return self._call(user, tensor, hook, index, self._moment())

            handle = super().add_hook(
                guarded, is_permanent=is_permanent, level=level, prepend=prepend, alias_names=alias_names
            )
            handle.user_hook = user
        else:
            if alias_names is not None:
                raise HookError(f"{self.name}: a backward hook has no alias names; add it once for each name")
            attached = RemovableHandle(self._on_gradient)
            self._on_gradient[attached.id] = lambda grad, moment: self._call(user, grad, self, index, moment)
            if prepend:
                self._on_gradient.move_to_end(attached.id, last=False)
            handle = LensHandle(attached, is_permanent, level, user)
            self.bwd_hooks.insert(0 if prepend else len(self.bwd_hooks), handle)
        self.placed.append(Placed(handle, index, dir, bool(getattr(user, "edits", False))))
        return handle

    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        if not (self.fwd_hooks or self.bwd_hooks or self.placed):
            return  # most points, most of the time
        super().remove_hooks(*args, **kwargs)
        self.placed = self.here()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's hooks are its own: they were bound to the point that was copied."""
        super().__setstate__(state)
        mine = {id(p.handle): p for p in self.here()}
        again = [mine[id(handle)] for handle in (*self.fwd_hooks, *self.bwd_hooks) if id(handle) in mine]
        for p in again:
            (self._forward_hooks if p.dir == "fwd" else self._on_gradient).pop(p.handle.hook.id)
        self.fwd_hooks, self.bwd_hooks, self.placed = [], [], []
        for p in again:
            user, permanent, level = p.handle.user_hook, p.handle.is_permanent, p.handle.context_level
            assert user is not None
            self.add_hook(user, p.dir, is_permanent=permanent, level=level, index=p.index)

    def attach(self, value: Tensor) -> Tensor:
        """Let the backward hooks see the gradient of ``value``, with the positions of the running call."""
        if not self._on_gradient or not value.requires_grad:
            return value
        moment = self._moment()
        for p in self.here():
            if p.dir == "bwd" and p.index is not None:
                self._find(p.index, moment)  # a position that is not there is an error now, not in the backward pass
        value = value.view_as(value)  # a node of its own: what else reads the value is not part of this point
        hooks = list(self._on_gradient.values())

        def on_gradient(grad: Tensor) -> Tensor | None:
            out = grad
            for fn in hooks:
                given = out.clone()  # autograd may share a gradient among readers: an edit in place stays here
                witness = Witness(given)
                answer = fn(given, moment)
                if answer is not None or witness.changed(given):
                    out = given if answer is None else answer
            return None if out is grad else out

        value.register_hook(on_gradient)
        self.reached = True
        return value

    def _moment(self) -> Any:
        """What the positions of the running call are, to be asked again in the backward pass."""
        return dataclasses.replace(self.clock)

    def _find(self, index: int | slice | PerRow, moment: Any) -> Any:
        if isinstance(index, PerRow):
            return moment.per_row(index, str(self.name))
        return (moment.rowwise if moment.scattered else moment.columns)(index, str(self.name))

    def _call(self, fn: Callable[..., Any], value: Any, point: Any, index: Index, moment: Any) -> Any:
        if index is None:
            return self._told(None, fn, value, point)
        if self.axis != 1:
            return self._call_turned(fn, value, point, index, moment)
        return self._call_at(fn, value, point, index, moment)

    def _call_turned(self, fn: Callable[..., Any], value: Any, point: Any, index: Index, moment: Any) -> Any:
        """As `_call_at` where another axis than the second counts positions; a hook sees the point's own layout."""
        one = isinstance(index, int) or (isinstance(index, PerRow) and index.one_each)

        def turned(piece: Tensor, hook: Any) -> Any:
            given = piece if one else piece.movedim(1, self.axis)
            answer = self.checked(fn(given, hook=hook), given)
            if answer is None or answer is given:
                return None  # what was changed in place was changed in the piece as well
            return answer if one else answer.movedim(self.axis, 1)

        out = self._call_at(turned, value.movedim(self.axis, 1), point, index, moment)
        return None if out is None else out.movedim(1, self.axis)

    def _call_at(self, fn: Callable[..., Any], value: Any, point: Any, index: Any, moment: Any) -> Any:
        """Show a hook the values at its positions, and put its answer back there."""
        found = self._find(index, moment)
        if found is None:
            return None
        if isinstance(found, Hits):
            one_each = index.one_each if isinstance(index, PerRow) else isinstance(index, int)
            return self._call_rows(fn, value, point, found, one_each)
        where, pos = found
        if isinstance(where, Tensor):
            rows = torch.arange(value.shape[0], device=value.device)
            where = (rows if where.ndim == 1 else rows[:, None], where.to(value.device))
        else:
            where = (slice(None), where)
        piece = value[where]
        witness = Witness(piece) if isinstance(where[0], Tensor) else None
        answer = self._told(pos, fn, piece, point)
        if answer is None or answer is piece:
            if not (watched(piece) if witness is None else witness.changed(piece)):
                return None  # nothing changed, or it was changed in place through the view
            answer = piece
        whole = value.clone()
        whole[where] = answer
        return whole

    def _call_rows(self, fn: Callable[..., Any], value: Any, point: Any, hits: Hits, one_each: bool) -> Any:
        """Show a hook every row's own places ``B k …`` (``B …`` with one a row), and put its answer back there."""
        every = torch.arange(value.shape[0], device=value.device)[:, None]  # B 1
        columns = hits.columns.to(value.device)
        piece, pos, on = value[every, columns], hits.positions.to(value.device), hits.on  # B k …
        if one_each:
            piece, pos, on = piece[:, 0], pos[:, 0], on[:, 0]
        witness = Witness(piece)
        whole_rows = bool(on.all())
        answer = self._told(pos, fn, piece, point, None if whole_rows else on.to(value.device))
        if answer is None or answer is piece:
            if not witness.changed(piece):
                return None
            answer = piece
        if one_each:
            answer = answer[:, None]
        whole = value.clone()
        if whole_rows:
            whole[every, columns] = answer
        else:  # a place that is off must not write: it may share its column with one that is on
            b, k = (i.to(value.device) for i in hits.on.nonzero(as_tuple=True))
            whole[b, columns[b, k]] = answer[b, k]
        return whole

    def _told(self, pos: Any, fn: Callable[..., Any], value: Any, point: Any, rows: Tensor | None = None) -> Any:
        """Call a hook with ``pos`` and ``rows`` set while it runs (it may run the model, and so this point, again)."""
        before, self.pos, self.rows, self.reached = (self.pos, self.rows), pos, rows, True
        try:
            return self.checked(fn(value, hook=point), value)
        except Exception as error:
            if not isinstance(error, HookError):
                error.add_note(f"raised by a hook at {self.name}; {self.calling}")
            raise
        finally:
            self.pos, self.rows = before

    def checked(self, answer: Any, value: Any) -> Any:
        """What a hook returned, if it can stand in for ``value``; HookError if not."""
        if answer is None or answer is value:
            return answer
        if not isinstance(answer, Tensor):
            raise HookError(f"{self.name}: a hook must return a tensor or None, got {type(answer).__name__}")
        for what in ("shape", "dtype", "device", "layout"):
            if getattr(answer, what) != getattr(value, what):
                got, want = getattr(answer, what), getattr(value, what)
                got, want = (tuple(got), tuple(want)) if what == "shape" else (got, want)
                raise HookError(f"{self.name}: the hook returned {what} {got}, expected {want}")
        return answer


def watched(value: Tensor) -> bool:
    """Whether somebody asked for this tensor's gradient, so that it must be part of the graph."""
    return value.requires_grad and (value.retains_grad or bool(value._backward_hooks))


class Witness:
    """Tells whether a tensor was changed in place since, or is :func:`watched` now.

    Versions miss edits through ``.data`` or numpy, and inference tensors have none, so a copy bears witness.
    """

    def __init__(self, value: Tensor) -> None:
        self._version = None if value.is_inference() else value._version
        self._copy = value.detach().clone()

    def changed(self, value: Tensor) -> bool:
        if self._version is not None and value._version != self._version:
            return True
        if watched(value):
            return True
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
        return not torch.equal(value.detach().view(bits), self._copy.view(bits))  # bits: NaN equals itself

"""Sites: a hook point's name with an optional position, and the points that serve them.

A site is ``"blocks.3.mixer.hook_h[100]"`` or ``"blocks.3.hook_resid_pre[-4:]"``: Python's own index
notation on the position axis. Positions count a row's real tokens, from the start of what this call was
given; in ``generate`` and ``step`` they are absolute, from where the state began.
"""

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint, LensHandle

from mambascope.errors import HookError, InputError

__all__ = ["Clock", "Index", "Padding", "Placed", "SitePoint", "Witness", "padding_of", "parse_site"]

Index = int | slice | None
_SITE = re.compile(r"^(?P<name>[^\[\]]+)(\[(?P<index>[^\[\]]*)\])?$")
_SLICE = re.compile(r"^\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(-?\d+)?\s*)?$")


def parse_site(site: str) -> tuple[str, Index]:
    """Split ``"name[index]"`` into name and index; HookError if the index is no int and no slice."""
    match = _SITE.match(site.strip())
    if match is None:
        raise HookError(f"{site!r} is not a site; write a hook point's name, with [t] or [a:b] for positions")
    text = match["index"]
    if text is None:
        return match["name"], None
    if re.fullmatch(r"\s*-?\d+\s*", text):
        return match["name"], int(text)
    parts = _SLICE.match(text)
    if parts is None:
        raise HookError(f"site {site!r}: position [{text}] is neither an integer nor a slice a:b")
    start, stop, step = (int(p) if p is not None else None for p in parts.groups())
    if step is not None and step < 1:
        raise HookError(f"site {site!r}: the step of a slice of positions must be positive, got {step}")
    return match["name"], slice(start, stop, step)


@dataclass(frozen=True)
class Padding:
    """Where each row's real tokens lie: one run of ``lengths[b]`` columns from ``left[b]`` on."""

    mask: Tensor  # B L bool
    left: Tensor  # B
    lengths: Tensor  # B

    @property
    def any_left(self) -> bool:
        return bool(self.left.any())

    def align(self, x: Tensor) -> Tensor:
        """Shift rows so that real tokens start at column 0 (what follows them is repeated, not real)."""
        return _shift(x, self.left)

    def unalign(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`align`; padded columns hold copies of real ones."""
        return _shift(x, -self.left)


def padding_of(mask: Tensor, shape: tuple[int, int], device: torch.device) -> Padding | None:
    """Check an attention mask: one run of ones in each row, zeros only before or after it."""
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"attention_mask must have the tokens' shape {shape}, got {got}")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("attention_mask must hold only 0 and 1")
    mask = mask.to(device=device, dtype=torch.bool)
    lengths = mask.sum(1)
    empty = (lengths == 0).nonzero()
    if len(empty):
        raise InputError(f"attention_mask hides every token of row {int(empty[0])}")
    left = mask.int().argmax(1)
    columns = torch.arange(shape[1], device=device)
    run = (columns >= left[:, None]) & (columns < (left + lengths)[:, None])
    holes = (run != mask).any(1).nonzero()
    if len(holes):
        raise InputError(
            f"attention_mask has a hole in row {int(holes[0])}: padding may stand before or after the real tokens only"
        )
    return None if bool(mask.all()) else Padding(mask, left, lengths)


def _shift(x: Tensor, by: Tensor) -> Tensor:
    columns = torch.arange(x.shape[1], device=x.device) + by[:, None]
    columns = columns.clamp(0, x.shape[1] - 1)  # B L
    return x[torch.arange(x.shape[0], device=x.device)[:, None], columns]


@dataclass
class Clock:
    """Which positions the running call covers; shared by all hook points of a model."""

    length: int = 0
    start: int | Tensor = 0  # absolute position of the first real token, one number or B
    padding: Padding | None = None
    absolute: bool = False  # generate, step: indices are absolute, negative ones refused

    def columns(self, index: int | slice, name: str) -> tuple[Any, Any] | None:
        """The columns that ``index`` means and the absolute positions there; None if not in this piece."""
        if self.absolute:
            return self._absolute(index, name)
        if self.padding is None:
            where = _resolve(index, self.length, name, "the text")
            return where, _positions(where, self.start)
        rows = [_resolve(index, int(n), name, f"row {b}") for b, n in enumerate(self.padding.lengths.tolist())]
        if isinstance(index, int):
            where = torch.tensor(rows, device=self.padding.left.device) + self.padding.left
            return where, where - self.padding.left + self.start
        ranges = [range(r.start, r.stop, r.step) for r in rows]
        if len({len(r) for r in ranges}) > 1:
            counts = ", ".join(f"row {b}: {len(r)}" for b, r in enumerate(ranges))
            raise HookError(f"{name}: the slice covers different numbers of tokens in the rows ({counts})")
        tokens = torch.tensor([list(r) for r in ranges], device=self.padding.left.device)  # B k
        start = self.start[:, None] if isinstance(self.start, Tensor) else self.start
        return tokens + self.padding.left[:, None], tokens + start

    def _absolute(self, index: int | slice, name: str) -> tuple[Any, Any] | None:
        edges = (index,) if isinstance(index, int) else (index.start, index.stop)
        if any(edge is not None and edge < 0 for edge in edges):
            raise HookError(f"{name}: negative positions have no meaning here, where the text still grows")
        start = self.start
        if isinstance(start, Tensor):
            if int(start.min()) != int(start.max()) or self.padding is not None:
                raise HookError(
                    f"{name}: rows of different lengths; give hooks without positions, or one row at a time"
                )
            start = int(start[0])
        if self.padding is not None:
            raise HookError(f"{name}: rows of different lengths; give hooks without positions, or one row at a time")
        if isinstance(index, int):
            column = index - start
            return (column, index) if 0 <= column < self.length else None
        every = range(index.start or 0, start + self.length if index.stop is None else index.stop, index.step or 1)
        inside = [p - start for p in every if 0 <= p - start < self.length]
        if not inside:
            return None
        where = slice(inside[0], inside[-1] + 1, index.step or 1)
        return where, _positions(where, start)


def _resolve(index: int | slice, length: int, name: str, whose: str) -> Any:
    if isinstance(index, int):
        if not -length <= index < length:
            raise HookError(f"{name}[{index}]: {whose} has only {length} tokens (positions {-length}…{length - 1})")
        return index % length
    where = slice(*index.indices(length))
    if not range(length)[where]:
        shown = f"{index.start if index.start is not None else ''}:{index.stop if index.stop is not None else ''}"
        raise HookError(f"{name}[{shown}] addresses no token: {whose} has {length}")
    return where


def _positions(where: int | slice, start: int | Tensor) -> Any:
    if isinstance(where, int):
        return where + start
    steps = torch.arange(where.start, where.stop, where.step)
    if isinstance(start, Tensor):
        return start[:, None] + steps.to(start.device)
    return steps + start


@dataclass
class Placed:
    """A hook of ours at a point: its handle, the positions it was given, its direction."""

    handle: LensHandle
    index: Index
    dir: Literal["fwd", "bwd"]


class SitePoint(HookPoint):
    """TransformerLens' HookPoint with positions, and with a check of what a hook gives back.

    ``pos`` holds, while a hook runs, the absolute positions that it was given: an int for one position of
    unpadded text, else a LongTensor. A returned tensor must keep shape, dtype and device. A backward hook
    belongs to the forward passes that ran while it was there, and counts positions as they did.
    """

    clock: Clock

    def __init__(self, lazy: bool = False) -> None:
        super().__init__()
        self.lazy = lazy
        self.clock = Clock()
        self.pos: Any = None
        self.reached = False  # set when a hook of ours is called, or attached to a graph
        self.placed: list[Placed] = []
        self._on_gradient: OrderedDict[int, Callable[[Tensor, Any], Tensor | None]] = OrderedDict()

    @property
    def live(self) -> bool:
        """Whether any hook, of ours or of another library, sits here.

        nnsight replaces a wrapped module's ``forward`` instead of adding hooks. It wraps every module, so at
        the lazy points (``B L D N``) that alone does not count: exposing them costs too much to do unasked.
        """
        if self._forward_hooks or self._forward_pre_hooks or self.live_backward:
            return True
        return not self.lazy and "forward" in self.__dict__

    @property
    def live_backward(self) -> bool:
        return bool(self._on_gradient or self._backward_hooks or self._backward_pre_hooks)

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

            def guarded(value: Any, hook: Any) -> Any:
                return self._call(user, value, hook, index, self._moment())

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
        self.placed.append(Placed(handle, index, dir))
        return handle

    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
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

    def _find(self, index: int | slice, moment: Any) -> tuple[Any, Any] | None:
        return moment.columns(index, str(self.name))

    def _call(self, fn: Callable[..., Any], value: Any, point: Any, index: Index, moment: Any) -> Any:
        if index is None:
            return self._told(None, fn, value, point)
        found = self._find(index, moment)
        if found is None:
            return None
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

    def _told(self, pos: Any, fn: Callable[..., Any], value: Any, point: Any) -> Any:
        """Call a hook with ``pos`` set while it runs (a hook may run the model, and with it this point, again)."""
        before, self.pos, self.reached = self.pos, pos, True
        try:
            return self.checked(fn(value, hook=point), value)
        finally:
            self.pos = before

    def checked(self, answer: Any, value: Any) -> Any:
        """What a hook returned, if it can stand in for ``value``; HookError if not."""
        if answer is None or answer is value:
            return answer
        if not isinstance(answer, Tensor):
            raise HookError(f"{self.name}: a hook must return a tensor or None, got {type(answer).__name__}")
        for what in ("shape", "dtype", "device"):
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

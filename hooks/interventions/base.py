"""What an intervention is: a kind, the sites it edits, what it holds, and how it is put into a model.

A kind is a function from an intervention and a model to hooks. Everything else (restriction to channels or state
dimensions, overlaps, the report, the record) is common to all kinds and lives here.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mambascope.errors import HookError, MambascopeError, nearest
from mambascope.hooks.interventions.given import choice
from mambascope.hooks.interventions.origin import Origin
from mambascope.hooks.points import resolve_name, spec_of, tail_of, widths
from mambascope.hooks.positions import Index, PerRow, Site, at
from mambascope.hooks.run import EditDone

__all__ = [
    "KINDS",
    "Bound",
    "Edit",
    "Intervention",
    "Kind",
    "Target",
    "expand",
    "index_from_json",
    "index_to_json",
    "kind",
    "missed",
]

Edit = Callable[[Tensor, Any], Tensor | None]
"""``(value, hook)`` -> the value to go on with, or None where there is nothing to do in this call."""


class Target(Protocol):
    """What an intervention needs from the model it is put into."""

    cfg: Any
    hook_dict: dict[str, Any]
    blocks: Any

    def weight_hash(self) -> str: ...


@dataclass(frozen=True)
class Kind:
    """How interventions of one kind work: ``place`` gives ``(site, edit)`` pairs; see :func:`kind`."""

    name: str
    place: Callable[["Intervention", Target], list[tuple[Site, Edit]]]
    overwrites: bool
    own_dims: bool = False


KINDS: dict[str, Kind] = {}


def kind(name: str, *, overwrites: bool, own_dims: bool = False) -> Callable[[Any], Any]:
    """Register a kind.

    ``overwrites``: what stood there before is gone, so it may not follow another edit there. ``own_dims``: it sees to
    the restriction to state dimensions itself.
    """

    def register(place: Callable[["Intervention", Target], list[tuple[Site, Edit]]]) -> Any:
        KINDS[name] = Kind(name, place, overwrites, own_dims)
        return place

    return register


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit of a run; made by the functions of :mod:`mambascope.interventions`.

    Use it as ``model.run_with(x, [iv, …])``, in ``with model.intervene([iv, …])``, or in a list of ``fwd_hooks``.
    ``options`` are JSON values, ``tensors`` what it holds; ``channels`` and ``dims`` restrict it to some channels
    (the D or M axis) and state dimensions (N). ``source``: whose activations it holds, by the model or the hash of its
    weights; with None nobody asks.
    """

    kind: str
    sites: tuple[Site, ...]
    options: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    channels: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    source: Origin | str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise HookError(f"unknown kind of intervention {self.kind!r}{nearest(self.kind, KINDS)}")
        object.__setattr__(self, "channels", choice("channels", self.channels))
        object.__setattr__(self, "dims", choice("dims", self.dims))

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        where = f"{self.sites[0]}" + (f" and {len(self.sites) - 1} more" if len(self.sites) > 1 else "")
        shown = {k: v for k, v in self.options.items() if k != "length" and isinstance(v, (int, float, str))}
        parts = [f"{key}={value}" for key, value in shown.items()]
        parts += [f"{len(c)} {n}" for n, c in (("channels", self.channels), ("dims", self.dims)) if c is not None]
        return f"{self.kind} at {where}" + (f" ({', '.join(parts)})" if parts else "")

    def only(self, channels: Any = None, dims: Any = None) -> "Intervention":
        """The same edit restricted to some channels (D, or M on the residual stream) and state dimensions (N)."""
        return dataclasses.replace(self, channels=channels, dims=dims)

    def hooks(self, model: Target) -> list[tuple[Site, "Bound"]]:
        """What it puts into ``model``: ``(site, hook)`` pairs.

        Raises
        ------
        UnknownNameError: a site that the model does not have. HookError: channels or dims that the point does not
            have, and what it holds coming from a model with other weights, or this one's before they changed.
        """
        self._check_source(model)
        everywhere = bool(self.options.get("all"))  # its kind says where that is
        known = [s if everywhere else Site(resolve_name(s.name, model.hook_dict), s.index) for s in self.sites]
        mine = dataclasses.replace(self, sites=tuple(known))
        try:
            pairs = KINDS[self.kind].place(mine, model)
        except MambascopeError:
            raise
        except (KeyError, IndexError, TypeError, AttributeError) as missing:
            raise HookError(f"{self.kind}: its record is damaged ({missing!r})") from None
        return [(site, Bound(mine, site, edit, model)) for site, edit in pairs]

    def _check_source(self, model: Target) -> None:
        if isinstance(self.source, Origin):
            self.source.check(str(self))
            if self.source.model is model:
                return
        held = self._hash()
        if held is not None and held != model.weight_hash():
            raise HookError(
                f"{self} holds activations of a model with other weights than {model.cfg.name!r}; record them with "
                "the model that is to run"
            )

    def _hash(self) -> str | None:
        return self.source.weight_hash(str(self)) if isinstance(self.source, Origin) else self.source

    # ---- its record: JSON, and the tensors apart

    def to_dict(self) -> dict[str, Any]:
        """A JSON value from which, with :attr:`tensors`, :meth:`from_dict` makes the same intervention.

        HookError if it holds activations of weights that have changed since.
        """
        return {
            "kind": self.kind,
            "sites": [{"name": s.name, "index": index_to_json(s.index)} for s in self.sites],
            "options": self.options,
            "tensors": sorted(self.tensors),
            "channels": None if self.channels is None else list(self.channels),
            "dims": None if self.dims is None else list(self.dims),
            "source": self._hash(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> "Intervention":
        """The inverse of :meth:`to_dict`; HookError where something is missing or unknown."""
        try:
            sites = tuple(Site(str(s["name"]), _site_index(s["index"])) for s in data["sites"])
            held = {name: (tensors or {})[name] for name in data["tensors"]}
            if not isinstance(data["source"], (str, type(None))):
                raise TypeError(f"source {data['source']!r} is no hash of weights")
            return cls(data["kind"], sites, dict(data["options"]), held, data["channels"], data["dims"], data["source"])
        except KeyError as missing:
            raise HookError(f"the record of an intervention lacks {missing}") from None
        except (TypeError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
            if isinstance(error, HookError):
                raise
            raise HookError(f"this is no record of an intervention: {error}") from None


def index_to_json(index: "Index | list[int]") -> Any:
    """An index, or a list of positions, as a JSON value."""
    if isinstance(index, slice):
        return {"slice": [index.start, index.stop, index.step]}
    if isinstance(index, PerRow):
        return {"rows": index.positions.tolist(), "on": None if index.rows is None else index.rows.tolist()}
    return index


def index_from_json(value: Any) -> Any:
    """The inverse of :func:`index_to_json`."""
    if not isinstance(value, dict):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, list))):
            raise TypeError(f"no positions: {value!r}")
        return value
    if "slice" in value:
        return slice(*value["slice"])
    return PerRow(torch.tensor(value["rows"]), None if value["on"] is None else torch.tensor(value["on"]))


def _site_index(value: Any) -> Index:
    if isinstance(value, list):
        raise TypeError(f"a site has one index, got {value!r}")
    index = index_from_json(value)
    if isinstance(index, PerRow):  # the checks of ms.at
        return at("a recorded site", index.positions, index.rows).index
    return index


class Bound:
    """An intervention at one site of one model: the hook that runs."""

    def __init__(self, made_by: Intervention, site: Site, edit: Edit, model: Target) -> None:
        self.made_by, self.site, self.edit = made_by, site, edit
        self.beneath = bool(getattr(edit, "beneath", False))
        self.reads = bool(getattr(edit, "reads", False))  # it only takes notes for another of its hooks
        self.edits = not self.reads
        self.fired, self.grew = 0, False
        self._seen: set[tuple[int, int]] = set()
        spec = spec_of(site.name)
        axes = spec.shape.split()[2:]
        self._channels = self._axis(made_by.channels, "channels", [a for a in axes if a in "DMRF"], spec.shape, model)
        dims = None if KINDS[made_by.kind].own_dims else made_by.dims
        self._dims = self._axis(dims, "dims", [a for a in axes if a == "N"], spec.shape, model)

    def _axis(
        self, chosen: tuple[int, ...] | None, what: str, axes: list[str], shape: str, model: Target
    ) -> Tensor | None:
        """The chosen numbers as a mask of their axis; HookError if the point has no such axis or it is too short."""
        if chosen is None or self.reads:
            return None
        if not axes:
            raise HookError(f"{self.made_by.kind} at {self.site}: values there are {shape}, which has no {what}")
        size = widths(model.cfg)[axes[0]]
        if chosen[-1] >= size:
            raise HookError(f"{self.made_by.kind} at {self.site}: {what} {chosen[-1]} is outside 0…{size - 1}")
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(chosen)] = True
        return mask[:, None] if what == "channels" and shape.split()[-1] == "N" else mask

    @property
    def within(self) -> Tensor | None:
        """Which entries of a value's last axes may change; None for all."""
        if self._channels is None or self._dims is None:
            return self._channels if self._dims is None else self._dims
        return self._channels & self._dims

    def __call__(self, value: Tensor, hook: Any) -> Tensor | None:
        if self.reads:
            self.edit(value, hook)
            return None
        with torch.no_grad():
            self._check_overlap(hook)
        new = self.edit(value, hook)
        if new is None:
            return None
        self.fired += 1
        self._mark(hook)
        if new is value:
            new = value.clone()
        if self.within is not None:
            new = torch.where(self.within.to(value.device), new, value)
        self._report(value, new, hook)
        return new

    def _mark(self, hook: Any) -> None:
        """In a growing text: which of the positions of their own the rows have come to."""
        if not hook.clock.absolute or not isinstance(self.site.index, PerRow):
            return
        pos = torch.as_tensor(hook.pos).cpu().reshape(hook.clock.batch, -1)
        on = torch.ones_like(pos, dtype=torch.bool) if hook.rows is None else hook.rows.cpu().reshape(pos.shape)
        self._seen |= {(b, int(pos[b, k])) for b, k in on.nonzero().tolist()}
        self.grew = True

    def missed(self) -> str:
        """What it was to edit and did not; empty if it did all."""
        if self.reads:
            return ""
        if not self.fired:
            return f"{self.site}"
        index = self.site.index
        if not self.grew or not isinstance(index, PerRow):
            return ""
        where = index.positions.reshape(index.positions.shape[0], -1)
        on = torch.ones_like(where, dtype=torch.bool) if index.rows is None else index.rows.reshape(where.shape)
        left = sorted({(b, int(where[b, k])) for b, k in on.nonzero().tolist()} - self._seen)
        return f"position {left[0][1]} of row {left[0][0]}" if left else ""

    def _report(self, value: Tensor, new: Tensor, hook: Any) -> None:
        """Note what was done; the size of the change stays on the device until somebody looks."""
        done = hook.clock.edits.get(id(self))
        if done is None:
            layer = tail_of(self.site.name)[0]
            done = hook.clock.edits[id(self)] = EditDone(str(self.made_by), str(self.site), layer)
        change = (new.detach() - value.detach()).abs()
        if hook.rows is not None:
            change = change * hook.rows.reshape(*hook.rows.shape, *[1] * (change.ndim - hook.rows.ndim))
        done.add(change.amax())

    # ---- overlaps: a later edit may change what an earlier one made, never replace it unasked

    def _check_overlap(self, hook: Any) -> None:
        if sum(isinstance(p.handle.user_hook, Bound) and not p.handle.user_hook.reads for p in hook.here()) < 2:
            return
        places = self._places(hook)
        earlier = hook.clock.applied.setdefault((self.site.name, hook.now), [])
        for other, theirs in earlier:
            if KINDS[self.made_by.kind].overwrites and self._meets(other, places, theirs):
                raise HookError(
                    f"{self.made_by} would overwrite what {other.made_by} does at the same place; leave one of the "
                    "two out, restrict them to different positions or channels, or put the overwriting one first"
                )
        earlier.append((self, places))

    def _places(self, hook: Any) -> set[tuple[int, int]] | None:
        """(row, position) pairs of this call, row -1 for all; None for all positions."""
        addressed = getattr(self.edit, "places", None)
        if addressed is not None:
            return addressed(hook)
        if hook.pos is None or (self.site.index is None):
            return None
        pos, batch = torch.as_tensor(hook.pos).cpu(), hook.clock.batch
        every_row = pos.ndim == 0 or not (isinstance(self.site.index, PerRow) or hook.clock.padding or pos.ndim == 2)
        if every_row and hook.rows is None:
            return {(-1, t) for t in pos.flatten().tolist()}
        if every_row:
            pos = pos.reshape(1, -1).expand(batch, -1)
        pos = pos[:, None] if pos.ndim == 1 else pos  # B k
        on = torch.ones_like(pos, dtype=torch.bool) if hook.rows is None else hook.rows.cpu().reshape(batch, -1)
        return {(b, int(pos[b, k])) for b, k in on.expand_as(pos).nonzero().tolist()}

    def _meets(self, other: "Bound", mine: set[tuple[int, int]] | None, theirs: set[tuple[int, int]] | None) -> bool:
        if self.within is not None and other.within is not None and not bool((self.within & other.within).any()):
            return False
        if mine is None or theirs is None:
            return True
        if mine & theirs:
            return True
        rows = {t for b, t in mine if b == -1} & {t for _, t in theirs}
        return bool(rows or {t for b, t in theirs if b == -1} & {t for _, t in mine})


def expand(hooks: Iterable[Any], model: Target) -> list[tuple[Any, Any]]:
    """A list of hooks in which interventions may stand beside ``(site, fn)`` pairs, as pairs alone."""
    pairs: list[tuple[Any, Any]] = []
    for item in hooks:
        if isinstance(item, Intervention):
            pairs += item.hooks(model)
        elif isinstance(item, (tuple, list)) and len(item) == 2:
            pairs.append((item[0], item[1]))
        else:
            raise HookError(f"a hook is a pair (site, function) or an intervention, got {type(item).__name__}")
    return pairs


def missed(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[Bound, str]]:
    """The interventions among ``pairs`` that did not do all they were to do, and what they missed."""
    found = [(fn, fn.missed()) for _, fn in pairs if isinstance(fn, Bound)]
    return [(fn, what) for fn, what in found if what]

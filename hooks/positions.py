"""Positions: what a site's index means in the running call, row by row.

A site is ``"blocks.3.mixer.hook_h[100]"`` or ``"blocks.3.hook_resid_pre[-4:]"``: Python's own index
notation on the position axis; :func:`at` builds one whose positions differ from row to row. Positions count a
row's real tokens, from the start of what this call was given; in ``generate`` and ``step`` they are absolute,
from where the state began.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import HookError, InputError

__all__ = [
    "Clock",
    "Hits",
    "Index",
    "Padding",
    "PerRow",
    "Site",
    "at",
    "index_text",
    "padding_of",
    "parse_site",
    "resolve",
]


@dataclass(frozen=True, eq=False)
class PerRow:
    """Positions of their own for every row of the batch: ``positions`` ``B`` or ``B k``; ``rows`` alike, bool."""

    positions: Tensor
    rows: Tensor | None = None
    key: int = field(default_factory=itertools.count().__next__)  # tells one from another

    @property
    def one_each(self) -> bool:
        """Whether a row has one position, so that values come without a position axis."""
        return self.positions.ndim == 1

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.positions.shape))
        return f"PerRow#{self.key}({shape})"


Index = int | slice | PerRow | None


@dataclass(frozen=True)
class Site:
    """A hook point and the positions there; wherever a site string stands, a Site may stand (see :func:`at`)."""

    name: str
    index: Index = None

    def __str__(self) -> str:
        return f"{self.name}{index_text(self.index)}"


def at(name: str, positions: int | slice | Sequence[int] | Sequence[Sequence[int]] | Tensor, rows: Any = None) -> Site:
    """A site with positions: one index for all rows (int, slice), or positions of its own for every row.

    ``positions``: with ``B`` numbers row b is addressed at ``positions[b]``, and a hook gets ``B …`` without a
    position axis; with ``B k`` numbers it gets ``B k …``. ``rows``, bool of the same shape, leaves places out
    (default: none). Negative numbers count from each row's end, except in ``generate`` and ``step``.

        batch = tokens.expand(32, -1)
        sites = ms.at("blocks.3.hook_resid_pre", range(32))                       # row t at position t
        model.run_with_hooks(batch, fwd_hooks=[(sites, lambda v, hook: v * 0)])   # v: 32 M

    While the hook runs, ``hook.pos`` (long, the shape of ``positions``) has the absolute positions and ``hook.rows``
    is None or a bool of that shape: False where a place is left out or not in this call; what the hook returns
    there is dropped. On ``hook_h`` every call is one edit a row: h ``B D N``, ``hook.pos`` and ``hook.rows`` ``B``; a
    hook at ``B k`` places, or beside others, is called several times, in order of the positions in each row.

    Cost: at ``hook_h`` one scan, and one more for each of the k places of a row, however many positions differ
    between rows (in a run that is cached: the scan is cut at every position). Elsewhere a gather and a copy.

    Raises
    ------
    HookError: positions that are no integers, not ``B`` or ``B k``, or ``rows`` of another shape. When the model
        runs: another batch, a position outside a row's tokens (both named), one position twice in a row.
    """
    if not isinstance(name, str) or "[" in name:
        raise HookError(f"ms.at takes a hook point's name, and the positions apart from it; got {name!r}")
    if isinstance(positions, slice) or (isinstance(positions, int) and not isinstance(positions, bool)):
        if rows is not None:
            raise HookError(f"{name}: rows= goes with positions for every row, not with one index for all")
        return Site(name, positions)
    try:
        where = torch.as_tensor(list(positions) if isinstance(positions, range) else positions).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise HookError(f"{name}: positions must be integers, B or B x k of them, got {positions!r}") from error
    if where.numel() == 0:
        raise HookError(f"{name}: no positions were given")
    if where.dtype == torch.bool or where.is_floating_point() or where.is_complex() or where.ndim not in (1, 2):
        raise HookError(
            f"{name}: positions must be integers, B or B x k of them, got {where.dtype} {tuple(where.shape)}"
        )
    mask = None
    if rows is not None:
        mask = torch.as_tensor(rows).detach().cpu()
        if mask.dtype != torch.bool or mask.shape != where.shape:
            raise HookError(
                f"{name}: rows must be bool of the positions' shape {tuple(where.shape)}, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
    return Site(name, PerRow(where.long(), mask))


def index_text(index: Index) -> str:
    """An index as it stands in a site: ``"[3]"``, ``"[2:5]"``, ``"[one of 8 for each row]"``."""
    if index is None:
        return ""
    if isinstance(index, int):
        return f"[{index}]"
    if isinstance(index, slice):
        edges = ["" if edge is None else str(edge) for edge in (index.start, index.stop)]
        return f"[{':'.join(edges)}{'' if index.step is None else f':{index.step}'}]"
    return f"[per row, {tuple(index.positions.shape)}]"


@dataclass(frozen=True)
class Hits:
    """What a :class:`PerRow` means in the running call, on the CPU: ``B k`` each.

    ``tokens``: the index among a row's real tokens; ``columns``: of the padded tensor; ``positions``: absolute;
    ``on``: whether the place is addressed in this call (elsewhere the numbers are 0).
    """

    tokens: Tensor
    columns: Tensor
    positions: Tensor
    on: Tensor


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
    mask = mask.to(device=device, dtype=torch.bool, copy=True)  # the caller may write into theirs afterwards
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
    batch: int = 0
    start: int | Tensor = 0  # absolute position of the first real token, one number or B
    padding: Padding | None = None
    absolute: bool = False  # generate, step: indices are absolute, negative ones refused
    grows: bool = False  # generate: a pass may append to the memory of the state that it is given
    ran: bool = False  # whether a forward pass began; a count would make torch.compile compile each pass anew
    edits: dict[int, Any] = field(default_factory=dict)  # what interventions did in this call
    applied: dict[Any, list[Any]] = field(default_factory=dict)  # which were where, to see overlaps

    @property
    def ragged(self) -> bool:
        """Whether the rows have different lengths, or begin at different positions."""
        uneven = isinstance(self.start, Tensor) and int(self.start.min()) != int(self.start.max())
        return uneven or (self.padding is not None and int(self.padding.lengths.min()) < self.length)

    def columns(self, index: int | slice, name: str) -> tuple[Any, Any] | None:
        """The columns that ``index`` means and the absolute positions there; None if not in this piece."""
        if self.absolute:
            return self._absolute(index, name)
        if self.padding is None:
            where = resolve(index, self.length, name, "the text")
            return where, _positions(where, self.start)
        rows = [resolve(index, int(n), name, f"row {b}") for b, n in enumerate(self.padding.lengths.tolist())]
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

    def mask(self, index: "int | slice | PerRow | Sequence[int]", name: str) -> Tensor:
        """Which columns a set of positions means, ``1 L`` or ``B L`` bool on the CPU; in a growing text maybe none."""
        if isinstance(index, Sequence):
            return torch.stack([self.mask(t, name) for t in index]).any(0)
        left = torch.zeros(1, 1, dtype=torch.long) if self.padding is None else self.padding.left.cpu()[:, None]
        tokens = torch.arange(self.length)[None] - left  # 1|B L
        if isinstance(index, PerRow):
            hits, mask = self.per_row(index, name), torch.zeros(self.batch, self.length, dtype=torch.bool)
            if hits is not None:
                b, k = hits.on.nonzero(as_tuple=True)
                mask[b, hits.columns[b, k]] = True
            return mask
        lengths = torch.tensor([[self.length]]) if self.padding is None else self.padding.lengths.cpu()[:, None]
        real = (tokens >= 0) & (tokens < lengths)
        if self.absolute:
            edges = [index] if isinstance(index, int) else [index.start or 0, index.stop or 0]
            if any(edge < 0 for edge in edges):
                raise HookError(f"{name}: negative positions have no meaning here, where the text still grows")
            start = self.start.cpu()[:, None] if isinstance(self.start, Tensor) else self.start
            ranges = (
                [(index, index + 1, 1)] if isinstance(index, int) else [(index.start or 0, index.stop, index.step or 1)]
            )
            tokens = tokens + start
        elif isinstance(index, int):
            found = [resolve(index, int(n), name, f"row {b}") for b, n in enumerate(lengths[:, 0])]
            ranges = [(t, t + 1, 1) for t in found]
        else:
            cut = [resolve(index, int(n), name, f"row {b}") for b, n in enumerate(lengths[:, 0])]
            ranges = [(c.start, c.stop, c.step) for c in cut]
        begin = torch.tensor([[a] for a, _, _ in ranges])
        stop = torch.tensor([[int(tokens.max()) + 1 if b is None else b] for _, b, _ in ranges])
        every = torch.tensor([[c] for _, _, c in ranges])
        return real & (tokens >= begin) & (tokens < stop) & ((tokens - begin) % every == 0)

    @property
    def scattered(self) -> bool:
        """Whether absolute positions stand in different columns of the rows: a growing text of unequal prompts."""
        start = self.start
        return self.absolute and (
            self.padding is not None or (isinstance(start, Tensor) and int(start.min()) != int(start.max()))
        )

    def rowwise(self, index: int | slice, name: str) -> Hits | None:
        """The places of one index for all rows where it means another column in each; None if none is in this call."""
        mask = self.mask(index, name).expand(self.batch, self.length)
        most = int(mask.sum(1).max())
        if not most:
            return None
        columns = mask.int().argsort(dim=1, descending=True, stable=True)[:, :most]  # B k, in order
        on = mask.gather(1, columns)
        left = 0 if self.padding is None else self.padding.left.cpu()[:, None]
        start = self.start.cpu()[:, None] if isinstance(self.start, Tensor) else self.start
        columns = torch.where(on, columns, left)
        return Hits(columns - left, columns, columns - left + start, on)

    def per_row(self, index: PerRow, name: str) -> Hits | None:
        """The places that a per-row index means in this call; None if all lie outside of a running generation."""
        where = index.positions[:, None] if index.one_each else index.positions  # B k
        if where.shape[0] != self.batch:
            raise HookError(f"{name}: positions were given for {where.shape[0]} rows, the batch has {self.batch}")
        on = torch.ones_like(where, dtype=torch.bool) if index.rows is None else index.rows.view_as(where)
        if self.padding is None:
            lengths, left = torch.full_like(where[:, :1], self.length), torch.zeros_like(where[:, :1])
        else:
            lengths, left = self.padding.lengths.cpu()[:, None], self.padding.left.cpu()[:, None]  # B 1
        start = self.start.cpu()[:, None] if isinstance(self.start, Tensor) else self.start
        if self.absolute:
            if bool(((where < 0) & on).any()):
                raise HookError(f"{name}: negative positions have no meaning here, where the text still grows")
            tokens = where - start
            on = on & (tokens >= 0) & (tokens < lengths)
        else:
            outside = on & ((where < -lengths) | (where >= lengths))
            if bool(outside.any()):
                b, k = outside.nonzero()[0].tolist()
                n, t = int(lengths[b]), int(where[b, k])
                raise HookError(f"{name}: position {t} of row {b}, which has only {n} tokens (positions {-n}…{n - 1})")
            tokens = torch.where(where < 0, where + lengths, where)
        tokens = tokens.masked_fill(~on, 0)
        ordered = tokens.masked_fill(~on, -1).sort(1).values
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).nonzero()
        if len(twice):
            b, k = twice[0].tolist()
            raise HookError(f"{name}: row {b} is given position {int(ordered[b, k])} twice")
        return Hits(tokens, tokens + left, tokens + start, on) if bool(on.any()) else None

    def _absolute(self, index: int | slice, name: str) -> tuple[Any, Any] | None:
        edges = (index,) if isinstance(index, int) else (index.start, index.stop)
        if any(edge is not None and edge < 0 for edge in edges):
            raise HookError(f"{name}: negative positions have no meaning here, where the text still grows")
        if self.scattered:
            raise HookError(f"{name}: rows of different lengths have this position in different columns (see rowwise)")
        start = int(self.start[0]) if isinstance(self.start, Tensor) else self.start
        if isinstance(index, int):
            column = index - start
            return (column, index) if 0 <= column < self.length else None
        every = range(index.start or 0, start + self.length if index.stop is None else index.stop, index.step or 1)
        inside = [p - start for p in every if 0 <= p - start < self.length]
        if not inside:
            return None
        where = slice(inside[0], inside[-1] + 1, index.step or 1)
        return where, _positions(where, start)


def resolve(index: int | slice, length: int, name: str, whose: str) -> Any:
    """An index among ``length`` tokens without negative numbers; HookError if it addresses none of them."""
    if isinstance(index, int):
        if not -length <= index < length:
            raise HookError(f"{name}[{index}]: {whose} has only {length} tokens (positions {-length}…{length - 1})")
        return index % length
    where = slice(*index.indices(length))
    if not range(length)[where]:
        raise HookError(f"{name}{index_text(index)} addresses no token: {whose} has {length}")
    return where


def _positions(where: int | slice, start: int | Tensor) -> Any:
    if isinstance(where, int):
        return where + start
    steps = torch.arange(where.start, where.stop, where.step)
    if isinstance(start, Tensor):
        return start[:, None] + steps.to(start.device)
    return steps + start

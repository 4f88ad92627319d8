"""What a block of an nnsight trace asked for: a hook point, positions, and the rows of its prompt."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mambascope.errors import HookError
from mambascope.hooks.positions import Clock, Index, PerRow, index_text, resolve
from mambascope.hooks.sites import SitePoint
from mambascope.hooks.state_point import StatePoint

__all__ = ["Request", "index_key"]


@dataclass
class Request:
    """A site that some block of the running trace asked for: for its rows, under a location of nnsight's."""

    location: str
    name: str
    point: SitePoint
    index: Index
    group: tuple[int, int] | None  # first row and number of rows, None for all
    base: int  # visits that nnsight had counted before this run

    def rows(self, batch: int) -> range:
        return range(batch) if self.group is None else range(self.group[0], sum(self.group))

    def placed(self, clock: Clock) -> Index:
        """The index for the whole batch: other rows may be shorter, so in a ragged one every row gets its own."""
        index, batch = self.index, clock.batch
        if isinstance(index, PerRow):
            return self._spread(index.positions, index.rows, batch)
        if index is None or self.group is None or not clock.ragged:
            return index
        if isinstance(index, int):
            return self._spread(torch.full((self.group[1],), index), None, batch)
        if clock.absolute:
            return index  # refused there: rows of different lengths
        found = [range(n)[resolve(index, n, self.name, f"row {b}")] for b, n in self._lengths(clock)]
        if len({len(r) for r in found}) > 1:
            counts = ", ".join(f"row {b}: {len(r)}" for (b, _), r in zip(self._lengths(clock), found, strict=True))
            raise HookError(f"{self.name}: the slice covers different numbers of tokens in the rows ({counts})")
        return self._spread(torch.tensor([list(r) for r in found]), None, batch)

    def _spread(self, positions: Tensor, on: Tensor | None, batch: int) -> PerRow:
        rows = self.rows(batch)
        if len(positions) != len(rows):
            raise HookError(f"{self.name}: positions were given for {len(positions)} rows, the prompt has {len(rows)}")
        whole = torch.zeros(batch, *positions.shape[1:], dtype=torch.long)
        mask = torch.zeros(whole.shape, dtype=torch.bool)
        whole[rows.start : rows.stop] = positions
        mask[rows.start : rows.stop] = True if on is None else on
        return PerRow(whole, mask)

    def _lengths(self, clock: Clock) -> list[tuple[int, int]]:
        lengths = [clock.length] * clock.batch if clock.padding is None else clock.padding.lengths.tolist()
        return [(b, int(lengths[b])) for b in self.rows(clock.batch)]

    def turn(self, clock: Clock, step: int | None) -> list[int]:
        """For ``hook_h``: the step of every row that is meant, -1 where none; ``step`` if there is no index."""
        out = [-1] * clock.batch
        starts = clock.start.tolist() if isinstance(clock.start, Tensor) else [clock.start] * clock.batch
        first = self.rows(clock.batch).start
        for b, n in self._lengths(clock):
            index = self.index
            if isinstance(index, PerRow):
                if len(index.positions) != len(self.rows(clock.batch)):
                    self._spread(index.positions, index.rows, clock.batch)  # says what is wrong
                off = index.rows is not None and not bool(index.rows[b - first])
                index = None if off else int(index.positions[b - first])
            elif index is None:
                out[b] = step if step is not None and 0 <= step < n else -1
                continue
            if index is None:
                continue
            if not clock.absolute:
                out[b] = resolve(cast(int, index), n, self.name, f"row {b}" if clock.ragged else "the text")
            elif cast(int, index) < 0:
                raise HookError(f"{self.name}: negative positions have no meaning here, where the text still grows")
            elif 0 <= cast(int, index) - starts[b] < n:
                out[b] = cast(int, index) - starts[b]
        return out

    def visits(self, forwards: list[Clock]) -> int:
        """How often these forward passes came by here."""
        total = 0
        for clock in forwards:
            if isinstance(self.point, StatePoint):
                steps = clock.length if clock.padding is None else int(clock.padding.lengths.max())
                total += steps if self.index is None else max(self.turn(clock, None)) >= 0
            elif self.index is None:
                total += 1
            elif isinstance(placed := self.placed(clock), PerRow):
                total += clock.per_row(placed, self.name) is not None
            else:
                total += clock.columns(cast(Any, placed), self.name) is not None
        return total


def index_key(index: Index) -> str:
    """An index as part of a location: one that tells per-row positions apart."""
    return f"[{index!r}]" if isinstance(index, PerRow) else index_text(index)

"""The hook point of the recurrent state: called step by step, inside the recurrence."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambascope.hooks.sites import Index, SitePoint, Witness, _resolve

__all__ = ["StatePoint"]


class StatePoint(SitePoint):
    """``hook_h``: a hook is called once for every addressed step, in order, with h ``B D N``.

    While a hook runs, ``pos`` is the absolute position of the step, and ``rows`` (None, or ``B`` bool) tells
    which rows of a ragged batch it concerns: an edit reaches those rows only.
    """

    def __init__(self) -> None:
        super().__init__(lazy=True)
        self.rows: Tensor | None = None
        self._step = 0
        self._steps: dict[str, list[set[int]] | None] = {}

    def begin(self) -> list[int]:
        """Resolve every hook's positions for the running call; the addressed steps in order."""
        length, padding = self.clock.length, self.clock.padding
        lengths = [length] if padding is None else [int(n) for n in padding.lengths.tolist()]
        wanted: set[int] = set()
        self._steps = {}
        for _, index in self.indices:
            if index is None:
                self._steps[repr(index)] = None
                wanted |= set(range(max(lengths)))
                continue
            rows = [self._row_steps(index, n, b) for b, n in enumerate(lengths)]
            self._steps[repr(index)] = rows
            wanted |= set().union(*rows)
        foreign = len(self._forward_hooks) + len(self._backward_hooks) - len(self.indices)
        if foreign > 0:  # another library's hook: it cannot name positions, so it sees every step
            wanted |= set(range(max(lengths)))
        return sorted(wanted)

    def _row_steps(self, index: int | slice, length: int, row: int) -> set[int]:
        if self.clock.absolute:
            found = self.clock.columns(index, str(self.name))
            if found is None:
                return set()
            where = found[0]
            return {where} if isinstance(where, int) else set(range(where.start, where.stop, where.step or 1))
        whose = "the text" if self.clock.padding is None else f"row {row}"
        where = _resolve(index, length, str(self.name), whose)
        return {where} if isinstance(where, int) else set(range(length)[where])

    def at(self, step: int, h: Tensor) -> tuple[Tensor, bool]:
        """Call the hooks of one step on h ``B D N``; the state to go on with, and whether it was edited."""
        self._step = step
        witness, before = Witness(h), h.clone() if self.clock.padding is not None else h
        out = self(h)
        edited = out is not h or witness.changed(h)
        if edited and self.clock.padding is not None:
            alive = step < self.clock.padding.lengths  # a row that has ended keeps its state
            out = torch.where(alive[:, None, None], out, before)
        return out, edited

    def _call(self, fn: Callable[..., Any], value: Any, point: Any, index: Index) -> Any:
        start = self.clock.start
        self.pos = self._step + start
        rows = self._steps.get(repr(index))
        if rows is None:  # no index: every step, every row
            self.rows = None
            return self._checked(fn(value, hook=point), value)
        hit = [self._step in steps for steps in rows]
        if not any(hit):
            return None
        if all(hit):
            self.rows = None
            return self._checked(fn(value, hook=point), value)
        self.rows = torch.tensor(hit, device=value.device)
        before = value.clone()  # rows that the site does not address must keep their state
        answer = self._checked(fn(value, hook=point), value)
        if answer is None:
            answer = value
        return torch.where(self.rows[:, None, None], answer, before)

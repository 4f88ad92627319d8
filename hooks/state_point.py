"""The hook point of the recurrent state: called step by step, inside the recurrence."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambascope.hooks.sites import Clock, Index, SitePoint, Witness, _resolve

__all__ = ["Plan", "StatePoint"]


@dataclass(frozen=True)
class Plan:
    """One call's addressed steps: in order, and for each index the steps that it means in each row (None: all)."""

    clock: Clock
    steps: list[int]
    rows: dict[str, list[set[int]] | None]
    step: int = -1  # where the recurrence stands


class StatePoint(SitePoint):
    """``hook_h``: a hook is called once for every addressed step, in order, with h ``B D N``.

    While a hook runs, ``pos`` is the absolute position of the step, and ``rows`` (None, or ``B`` bool) tells
    which rows of a ragged batch it concerns: an edit reaches those rows only.
    """

    def __init__(self) -> None:
        super().__init__(lazy=True)
        self.rows: Tensor | None = None
        self._plan: Plan | None = None

    def begin(self) -> Plan:
        """Resolve every hook's positions for the running call."""
        length, padding = self.clock.length, self.clock.padding
        lengths = [length] if padding is None else [int(n) for n in padding.lengths.tolist()]
        wanted: set[int] = set()
        steps: dict[str, list[set[int]] | None] = {}
        ours = self.here()
        for index in (p.index for p in ours):
            if index is None:
                steps[repr(index)] = None
                wanted |= set(range(max(lengths)))
                continue
            rows = [self._row_steps(index, n, b) for b, n in enumerate(lengths)]
            steps[repr(index)] = rows
            wanted |= set().union(*rows)
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        if sum(map(len, hooks)) > sum(p.dir == "fwd" for p in ours):
            wanted |= set(range(max(lengths)))  # another library's hook cannot name positions: it sees every step
        return Plan(dataclasses.replace(self.clock), sorted(wanted), steps)

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

    def at(self, step: int, h: Tensor, plan: Plan) -> tuple[Tensor, bool]:
        """Call the hooks of one step on h ``B D N``; the state to go on with, and whether it was edited."""
        before, self._plan = self._plan, dataclasses.replace(plan, step=step)
        given = h.clone() if h.requires_grad and torch.is_grad_enabled() else h
        witness, kept = Witness(given), h.clone() if plan.clock.padding is not None else h
        try:
            out = self.attach(self.checked(self(given), given))
        finally:
            self._plan = before  # a hook may run the model again, and with it this point
        edited = out is not given or witness.changed(given)
        if edited and plan.clock.padding is not None:
            alive = step < plan.clock.padding.lengths  # a row that has ended keeps its state
            out = torch.where(alive[:, None, None], out, kept)
        return out, edited

    def _moment(self) -> Plan:
        assert self._plan is not None
        return self._plan

    def _find(self, index: int | slice, moment: Plan) -> None:
        """Nothing to find: begin() resolved the positions of this call."""

    def _call(self, fn: Callable[..., Any], value: Any, point: Any, index: Index, moment: Plan) -> Any:
        pos, steps = moment.step + moment.clock.start, moment.rows.get(repr(index))
        if steps is None:  # no index: every step, every row
            return self._told_rows(None, pos, fn, value, point)
        hit = [moment.step in rows for rows in steps]
        if not any(hit):
            return None
        if all(hit):
            return self._told_rows(None, pos, fn, value, point)
        rows = torch.tensor(hit, device=value.device)
        before = value.clone()  # rows that the site does not address must keep their state
        answer = self._told_rows(rows, pos, fn, value, point)
        return torch.where(rows[:, None, None], value if answer is None else answer, before)

    def _told_rows(self, rows: Tensor | None, pos: Any, fn: Callable[..., Any], value: Any, point: Any) -> Any:
        before, self.rows = self.rows, rows
        try:
            return self._told(pos, fn, value, point)
        finally:
            self.rows = before

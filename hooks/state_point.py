"""The hook points inside a recurrence (its state, the gates of an LSTM): called step by step."""

import bisect
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mambascope.errors import HookError
from mambascope.hooks.positions import Clock, Index, PerRow, resolve
from mambascope.hooks.sites import Placed, SitePoint, Witness

__all__ = ["Demand", "Plan", "StatePoint"]


class Demand(Protocol):
    """Somebody who asks for states while the recurrence runs, not before it: the next one after seeing the last."""

    def turns(self) -> list[list[int]]:
        """What is asked for now: of each request the step in every row, -1 where it concerns none."""
        ...

    def serve(self, step: int | Tensor, h: Tensor) -> Tensor:
        """Show h ``B D N`` after a step (``B``: in each row its own, or -1) to who asks for it; what to go on with."""
        ...


@dataclass(frozen=True)
class Plan:
    """One call's addressed steps.

    ``steps``: all of them, in order; ``rows``: for each index the steps that it means in each row (None: all);
    ``sure``: the steps at which some hook is known to edit. ``turns``, if only per-row indices are in force: column
    r holds every row's r-th step, or -1 (``B R``). ``step``: where the recurrence stands, in a turn each row's own.
    ``demand`` may add steps while the recurrence runs; in rows of different lengths it goes by turns.
    """

    clock: Clock
    steps: list[int]
    rows: dict[str, list[set[int]] | None]
    sure: frozenset[int] = frozenset()
    turns: Tensor | None = None
    step: int | Tensor = -1
    demand: Demand | None = None

    @property
    def by_turns(self) -> bool:
        return self.turns is not None or (self.demand is not None and self.clock.ragged)

    def later(self, t: int) -> Iterator[int]:
        """The steps after t in order, those among them that are asked for meanwhile."""
        while True:
            self._ask()
            i = bisect.bisect_right(self.steps, t)
            if i == len(self.steps):
                return
            t = self.steps[i]
            yield t

    def wants(self, t: int) -> bool:
        """Whether step t is addressed, or asked for by now."""
        self._ask()
        i = bisect.bisect_left(self.steps, t)
        return i < len(self.steps) and self.steps[i] == t

    def _ask(self) -> None:
        for turn in self.demand.turns() if self.demand is not None else ():
            t = max(turn)
            i = bisect.bisect_left(self.steps, t)
            if t >= 0 and (i == len(self.steps) or self.steps[i] != t):
                self.steps.insert(i, t)

    def each_turn(self) -> Iterator[Tensor]:
        """The turns ``B``, one after the other; what is asked for meanwhile follows, requests of other rows at once."""
        if self.turns is not None:
            yield from self.turns.unbind(1)
            return
        assert self.demand is not None
        last, done = [-1] * self.clock.batch, set()
        while True:
            turn = [-1] * self.clock.batch
            asked = sorted(self.demand.turns(), key=lambda steps: min(t for t in steps if t >= 0))
            for steps in asked:
                rows = [b for b, t in enumerate(steps) if t >= 0]
                if tuple(steps) not in done and all(turn[b] < 0 and steps[b] >= last[b] for b in rows):
                    turn = [max(old, new) for old, new in zip(turn, steps, strict=True)]
                    done.add(tuple(steps))  # shown once: who did not want it then waits for another pass
            if max(turn) < 0:
                return
            last = [max(old, new) for old, new in zip(last, turn, strict=True)]
            yield torch.tensor(turn)


class StatePoint(SitePoint):
    """``hook_h``: a hook is called once for every addressed step, in order, with h ``B D N`` (in an LSTM ``B D``).

    While a hook runs, ``pos`` is the absolute position of the step, and ``rows`` (None, or ``B`` bool) tells
    which rows of a batch it concerns: an edit reaches those rows only. Of a site whose positions differ between
    rows, ``pos`` is ``B`` and h each row's own state there (see :func:`~mambascope.hooks.positions.at`).
    """

    calling = "hooks are called as hook(h, hook=point) at every step, h B D N; put positions into the site: 'h3[5]'"

    def __init__(self) -> None:
        super().__init__(lazy=True)
        self._plan: Plan | None = None

    def begin(self) -> Plan:
        """Resolve every hook's positions for the running call."""
        length, padding = self.clock.length, self.clock.padding
        lengths = [length] if padding is None else [int(n) for n in padding.lengths.tolist()]
        wanted: set[int] = set()
        sure: set[int] = set()
        steps: dict[str, list[set[int]] | None] = {}
        ours = self.here()
        for p in ours:
            rows = None if p.index is None else self._steps_of(p.index, lengths)
            steps[_key(p.index)] = rows
            here = set(range(max(lengths))) if rows is None else set().union(*rows)
            wanted |= here
            sure |= here if p.edits else set()
        hooks = (self._forward_hooks, self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        foreign = sum(map(len, hooks)) > sum(p.dir == "fwd" for p in ours)
        if foreign:
            wanted |= set(range(max(lengths)))  # another library's hook cannot name positions: it sees every step
        clock, ordered = dataclasses.replace(self.clock), sorted(wanted)
        turns = None if foreign else _turns(ours, steps, ordered)
        if self.demand is not None and clock.ragged and (foreign or ours):
            raise HookError(
                f"{self.name}: in a batch of different lengths a trace and other hooks cannot share it; give the rows "
                "one length, or use either"
            )
        plan = Plan(clock, ordered, steps, frozenset(sure), turns, demand=self.demand)
        plan.wants(-1)  # what is asked for already
        return plan

    def _steps_of(self, index: int | slice | PerRow, lengths: list[int]) -> list[set[int]]:
        if isinstance(index, PerRow) or self.clock.scattered:
            hits = self.clock.per_row(index, str(self.name)) if isinstance(index, PerRow) else None
            hits = self.clock.rowwise(index, str(self.name)) if isinstance(index, (int, slice)) else hits
            if hits is None:
                return [set()] * self.clock.batch
            rows = zip(hits.tokens.tolist(), hits.on.tolist(), strict=True)
            return [{t for t, on in zip(*row, strict=True) if on} for row in rows]
        return [self._row_steps(index, n, b) for b, n in enumerate(lengths)]

    def _row_steps(self, index: int | slice, length: int, row: int) -> set[int]:
        if self.clock.absolute:
            found = self.clock.columns(index, str(self.name))
            if found is None:
                return set()
            where = found[0]
            return {where} if isinstance(where, int) else set(range(where.start, where.stop, where.step or 1))
        whose = "the text" if self.clock.padding is None else f"row {row}"
        where = resolve(index, length, str(self.name), whose)
        return {where} if isinstance(where, int) else set(range(length)[where])

    def at(self, step: int | Tensor, h: Tensor, plan: Plan) -> tuple[Tensor, bool]:
        """Call the hooks of one step (``B``: in each row its own, or -1) on h ``B D N``.

        Gives the state to go on with, and whether it was edited.
        """
        before, self._plan = self._plan, dataclasses.replace(plan, step=step)
        given = h.clone() if h.requires_grad and torch.is_grad_enabled() else h
        witness, kept = Witness(given), h.clone() if plan.clock.padding is not None else h
        try:
            out = self.checked(self(given), given)
            if plan.demand is not None:
                out = self.checked(plan.demand.serve(step, out), given)
            out = self.attach(out)
        finally:
            self._plan = before  # a hook may run the model again, and with it this point
        edited = out is not given or witness.changed(given)
        if edited and plan.clock.padding is not None and isinstance(step, int):
            alive = step < plan.clock.padding.lengths  # a row that has ended keeps its state
            out = torch.where(alive.view(-1, *[1] * (out.ndim - 1)), out, kept)
        return out, edited

    @property
    def now(self) -> Any:
        step = self._moment().step
        return tuple(step.tolist()) if isinstance(step, Tensor) else step

    def _moment(self) -> Plan:
        assert self._plan is not None
        return self._plan

    def _find(self, index: int | slice | PerRow, moment: Plan) -> None:
        """Nothing to find: begin() resolved the positions of this call."""

    def _call(self, fn: Callable[..., Any], value: Any, point: Any, index: Index, moment: Plan) -> Any:
        step, steps = moment.step, moment.rows.get(_key(index))
        if isinstance(step, Tensor) and steps is not None:
            hit, step = [t in rows for t, rows in zip(step.tolist(), steps, strict=True)], step.to(value.device)
        else:
            hit = [step in rows for rows in steps or ()]
        pos: Any = step + moment.clock.start
        if steps is None:  # no index: every step, every row
            return self._told(pos, fn, value, point)
        if not any(hit):
            return None
        if isinstance(index, PerRow):
            pos = torch.as_tensor(pos, device=value.device).expand(value.shape[0])  # B
        if all(hit):
            return self._told(pos, fn, value, point)
        rows = torch.tensor(hit, device=value.device)
        before = value.clone()  # rows that the site does not address must keep their state
        answer = self._told(pos, fn, value, point, rows)
        return torch.where(rows.view(-1, *[1] * (before.ndim - 1)), value if answer is None else answer, before)


def _key(index: Index) -> str:
    return repr(index)  # a PerRow's names it alone


def _turns(ours: list[Placed], steps: dict[str, list[set[int]] | None], wanted: list[int]) -> Tensor | None:
    """Every row's steps side by side, ``B R``, filled with -1; None where it saves nothing or is not possible.

    A turn costs a scan, a step costs a cut of one: turns pay where rows differ in many positions.
    """
    if not ours or any(p.dir == "bwd" or not isinstance(p.index, PerRow) for p in ours):
        return None
    batch = max(len(rows) for rows in steps.values() if rows is not None)
    rows = [
        sorted(set().union(*(s[b] for s in steps.values() if s is not None and len(s) == batch))) for b in range(batch)
    ]
    most = max(map(len, rows))
    if len(wanted) <= 2 * (most + 1):
        return None
    return torch.tensor([row + [-1] * (most - len(row)) for row in rows])

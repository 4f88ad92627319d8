"""Hooks inside a recurrence that has a fast form for whole stretches: who is to be shown which step.

Nobody looking: the fast form. A step that is only read is computed beside it, so that reading changes no bit. A step
that is edited ends a stretch: what follows starts from the edited state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mambascope.hooks.run import Run
from mambascope.hooks.state_point import Plan, StatePoint

__all__ = ["Steps", "left_in"]


class Steps:
    """The steps of one call that are hooked or recorded at some points of a recurrence over ``length`` columns.

    Rows are aligned: column t is each row's token t (see Padding.align). Falsy: nobody looks at any step.
    """

    def __init__(self, points: Sequence[StatePoint], run: Run, length: int) -> None:
        self._run, self._length = run, length
        self._plans: dict[StatePoint, Plan] = {p: p.begin() for p in points if run.hooks and p.live}
        recorder = run.recorder
        wanted = [] if recorder is None else [p for p in points if recorder.wants(str(p.name))]
        self._kept: dict[StatePoint, list[Tensor]] = {p: [] for p in wanted}

    def __bool__(self) -> bool:
        return bool(self._plans or self._kept)

    def after(self, t: int) -> int | None:
        """The next step after t that somebody looks at; asked anew each time, since a trace may ask for more."""
        if self._kept:
            return t + 1 if t + 1 < self._length else None
        found = [step for plan in self._plans.values() if (step := next(plan.later(t), None)) is not None]
        return min(found, default=None)

    def show(self, point: StatePoint, t: int, value: Tensor) -> tuple[Tensor, bool]:
        """The value ``B …`` of step t as its hooks leave it, and whether they edited it."""
        plan, edited = self._plans.get(point), False
        if plan is not None and plan.wants(t):
            value, edited = point.at(t, value, plan)
        if point in self._kept:
            self._kept[point].append(value.detach())
        return value, edited

    def offer(self) -> None:
        """Give the recorder what it wanted, whole: ``B L …``."""
        padding, recorder = self._run.padding, self._run.recorder
        for point, values in self._kept.items():
            whole = torch.stack(values, 1)
            if padding is not None and padding.any_left:
                whole = padding.unalign(whole)
            if recorder is not None:
                recorder.take(str(point.name), whole)


def left_in(counts: Tensor | None, begin: int, stop: int) -> Tensor | None:
    """How many of the columns [begin, stop) are real in each row of ``counts`` real tokens; None: all, in all rows."""
    return None if counts is None else (counts - begin).clamp(0, stop - begin)

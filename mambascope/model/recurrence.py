"""The recurrence with hooks inside it.

    h[t] = A_bar[t] h[t-1] + B_bar[t] u[t],    y[t] = sum_n C[t, n] h[t, :, n]

Nobody looking: one scan. ``hook_h`` read: one scan, and windows of h recomputed from its boundary states, so
that reading changes no bit. ``hook_h`` edited at a step: everything after that step is scanned again from the
edited state, in pieces between the addressed steps; where the rows of a batch are edited at many different steps, all
rows at once, one scan for each edit that a row has. ``A_bar``, ``B_bar`` or ``write`` edited: the recurrence
runs on those tensors, for this layer only.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambascope import ops
from mambascope.errors import InputError
from mambascope.hooks.recorder import BOUNDARY
from mambascope.hooks.run import Anchors, Run
from mambascope.hooks.sites import SitePoint
from mambascope.hooks.state_point import Plan, StatePoint
from mambascope.memory import require_bytes

__all__ = ["Ends", "Inputs", "Points", "anchors_of", "read_out", "run_recurrence"]


@dataclass
class Ends:
    """What the scan does at its two ends where nobody sees it: skip and gate, and softplus while ``raw``."""

    D: Tensor
    z: Tensor  # B L D
    raw: bool = True


@dataclass
class Inputs:
    """What the recurrence reads: u, delta ``B L D`` (delta after softplus), A ``D N``, B, C ``B L N``, h0.

    With ``ends`` its y is what leaves the gate, and delta is ``delta_raw`` while these say so.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    h0: Tensor  # B D N
    ends: Ends | None = None

    def cut(self, start: int, stop: int, h0: Tensor) -> "Inputs":
        ends = self.ends
        if ends is not None:
            ends = dataclasses.replace(ends, z=ends.z[:, start:stop])
        at = slice(start, stop)
        return Inputs(self.u[:, at], self.delta[:, at], self.A, self.B[:, at], self.C[:, at], h0, ends)

    def with_steps(self, backend: ops.Backend) -> "Inputs":
        """With delta after softplus."""
        if self.ends is None or not self.ends.raw:
            return self
        delta = ops.softplus(self.delta, backend=backend)
        return dataclasses.replace(self, delta=delta, ends=dataclasses.replace(self.ends, raw=False))

    def read_out(self, h: Tensor, t: int | tuple[Tensor, Tensor], backend: ops.Backend) -> Tensor:
        """What the scan gives at step t (or in rows at steps of their own) where the state is h: ``B D``."""
        at: Any = (slice(None), t) if isinstance(t, int) else t
        y = read_out(h, self.C[at])
        if self.ends is None:
            return y
        skip = torch.mul(self.u[at].to(y.dtype), self.ends.D.to(y.dtype))
        return ops.gate((y + skip)[:, None], self.ends.z[at][:, None], backend=backend)[:, 0]

    def scan(self, backend: ops.Backend, boundaries: int | None, lengths: Tensor | None = None) -> ops.ScanOutput:
        return ops.selective_scan(
            self.u,
            self.delta,
            self.A,
            self.B,
            self.C,
            D=None if self.ends is None else self.ends.D,
            z=None if self.ends is None else self.ends.z,
            dt_softplus=self.ends is not None and self.ends.raw,
            h0=self.h0,
            lengths=lengths,
            boundaries=boundaries,
            backend=backend,
        )


@dataclass
class Points:
    """The hook points inside the recurrence of one mixer."""

    A_bar: SitePoint
    B_bar: SitePoint
    write: SitePoint
    h: StatePoint
    y: SitePoint


@dataclass
class Beneath:
    """What y was computed from, for a hook on y that computes it otherwise (a knockout)."""

    inputs: Inputs
    h_last: Tensor
    form: str
    backend: ops.Backend


def run_recurrence(inputs: Inputs, points: Points, run: Run) -> tuple[Tensor, Tensor, str]:
    """y ``B L D`` (before skip and gate, unless the inputs have ends), the last state ``B D N``, and the form taken."""
    y, h_last, form = _recurrence(inputs, points, run)
    if run.hooks and points.y.wants_beneath:
        points.y.beneath = Beneath(inputs, h_last, form, run.backend)
    return y, h_last, form


def _recurrence(inputs: Inputs, points: Points, run: Run) -> tuple[Tensor, Tensor, str]:
    if run.hooks and (points.A_bar.live or points.B_bar.live or points.write.live):
        exposed = _exposed(inputs, points, run)
        if exposed is not None:
            return (*exposed, "exposed")
    if run.hooks and points.h.live:
        padding = run.padding
        aligned = padding is not None and padding.any_left
        plan = points.h.begin()
        if plan.steps:
            split = _turn_by_turn if plan.by_turns and run.boundaries is None else _split
            y, h_last, anchors, edited = split(_align(inputs, run) if aligned else inputs, points.h, plan, run)
            if aligned and padding is not None:
                y = padding.unalign(y)
            if edited or not aligned:  # aligned rows may round differently, which reading must not show
                if run.recorder is not None and anchors is not None:
                    anchors.aligned = aligned
                    run.recorder.take_anchors(str(points.h.name), anchors)
                return y, h_last, "split" if edited else "open"
    out = inputs.scan(run.backend, run.boundaries)
    if run.recorder is not None and out.h_boundary is not None and run.boundaries is not None:
        run.recorder.take_anchors(str(points.h.name), anchors_of(out, run.boundaries, inputs.u.shape[1]))
    return out.y, out.h_last, "open"


def anchors_of(out: ops.ScanOutput, interval: int, length: int) -> Anchors:
    """The states that a scan left behind: at entry, at every boundary, and at the end."""
    assert out.h_boundary is not None
    columns = [c * interval - 1 for c in range(out.h_boundary.shape[1])]
    if columns[-1] == length - 1:
        return Anchors(columns, out.h_boundary)
    return Anchors([*columns, length - 1], torch.cat([out.h_boundary, out.h_last[:, None]], 1))


def _align(inputs: Inputs, run: Run) -> Inputs:
    padding = run.padding
    assert padding is not None
    real = torch.arange(inputs.u.shape[1], device=inputs.u.device) < padding.lengths[:, None]
    delta = padding.align(inputs.delta) * real[..., None]
    return Inputs(padding.align(inputs.u), delta, inputs.A, padding.align(inputs.B), padding.align(inputs.C), inputs.h0)


def read_out(h: Tensor, C: Tensor) -> Tensor:
    """y = sum_n C[n] h[:, n] of one step: h ``B D N``, C ``B N`` -> ``B D``."""
    return (h * C[:, None, :].to(h.dtype)).sum(-1)


def _split(inputs: Inputs, point: StatePoint, plan: Plan, run: Run) -> tuple[Tensor, Tensor, Anchors | None, bool]:
    length, interval = inputs.u.shape[1], run.boundaries or BOUNDARY
    # A backward hook needs h inside the graph, so its steps are split even if nobody edits.
    first, edited_h, out, done = plan.steps[0], None, None, -1
    if not point.live_backward and first not in plan.sure:
        out = inputs.scan(run.backend, interval)
        assert out.h_boundary is not None
        first, edited_h = _read(inputs, out.h_boundary, interval, point, plan, run)
        if edited_h is None:
            return out.y, out.h_last, anchors_of(out, interval, length), False
    pieces = _Pieces(inputs, run)
    if out is not None and edited_h is not None:
        pieces.adopt(out, first)
        pieces.put(first, edited_h)
        done = first
    for t in plan.later(done):
        h = pieces.scan_to(t)
        h, _ = point.at(t, h, plan)
        pieces.put(t, h)
    pieces.finish(length)
    return torch.cat(pieces.y, 1), pieces.h, pieces.anchors(), True


def _read(
    inputs: Inputs, h_boundary: Tensor, interval: int, point: StatePoint, plan: Plan, run: Run
) -> tuple[int, Tensor | None]:
    """Show the hooks h at their steps; stop at the first edit and return its step and state."""
    window, begin, stop = None, -1, -1
    # The kernels' windows carry no gradient; an edit that depends on h must pass one on.
    graph = torch.is_grad_enabled() and any(v.requires_grad for v in (inputs.u, inputs.delta, inputs.B, inputs.h0))
    backend = "torch" if graph and run.backend != "reference" else run.backend
    for t in plan.later(-1):
        chunk = t // interval
        if window is None or t >= stop or chunk * interval != begin:
            begin = chunk * interval
            stop = 1 + max(s for s in plan.steps if s // interval == chunk)
            part = inputs.cut(begin, stop, h_boundary[:, chunk]).with_steps(run.backend)
            window = ops.state_window(part.u, part.delta, part.A, part.B, part.h0, backend=backend)
        h, edited = point.at(t, window[:, t - begin].contiguous(), plan)
        if edited:
            return t, h
    return -1, None


def _turn_by_turn(inputs: Inputs, point: StatePoint, plan: Plan, run: Run) -> tuple[Tensor, Tensor, None, bool]:
    """Edits at other positions in every row: one scan, and one for each turn, where row b is edited at its r-th step.

    The scan after a turn keeps each row still (delta = 0) up to its edited step, and starts from its edited state.
    """
    interval, edited, inputs = BOUNDARY, False, inputs.with_steps(run.backend)
    columns = torch.arange(inputs.u.shape[1], device=inputs.u.device)
    out = inputs.scan(run.backend, interval)
    y, h_last, now = out.y, out.h_last, inputs
    for turn in plan.each_turn():
        at = turn.to(inputs.u.device)[:, None]  # B 1
        assert out.h_boundary is not None
        h, changed = point.at(turn, _states_at(now, out.h_boundary, at[:, 0].clamp_min(0), interval, run), plan)
        if not changed:
            continue
        edited, here, on = True, columns == at, (at >= 0)[..., None]  # B L, B 1 1
        later = (columns > at) & on[..., 0]  # B L
        h = torch.where(on, h, h_last)
        now = dataclasses.replace(inputs, delta=inputs.delta.masked_fill(~later[..., None], 0.0), h0=h)
        out = now.scan(run.backend, interval)
        read = inputs.read_out(
            h, (torch.arange(len(turn), device=at.device), at[:, 0].clamp_min(0)), run.backend
        )  # B D
        y = torch.where(later[..., None], out.y, torch.where(here[..., None], read[:, None], y))
        h_last = out.h_last
    return y, h_last, None, edited


def _states_at(now: Inputs, h_boundary: Tensor, step: Tensor, interval: int, run: Run) -> Tensor:
    """h after step[b] in row b, ``B D N``: one scan of at most ``interval`` steps from the boundary before it."""
    chunk, rows = step // interval, torch.arange(len(step), device=step.device)
    last = now.u.shape[1] - 1
    columns = (chunk[:, None] * interval + torch.arange(min(interval, last + 1), device=step.device)).clamp_max(last)
    pick = (rows[:, None], columns)
    part = Inputs(now.u[pick], now.delta[pick], now.A, now.B[pick], now.C[pick], h_boundary[rows, chunk])
    lengths = step - chunk * interval + 1
    return part.scan(run.backend, None, lengths).h_last


class _Pieces:
    """The scan taken apart: pieces of y so far, the state after them, and the states that a recorder wants."""

    def __init__(self, inputs: Inputs, run: Run) -> None:
        self.inputs, self.run, self.interval = inputs, run, run.boundaries
        self.y: list[Tensor] = []
        self.h = inputs.h0
        self.done = 0  # columns computed
        self._columns: list[int] = [-1]
        self._states: list[Tensor] = [inputs.h0]

    def adopt(self, out: ops.ScanOutput, stop: int) -> None:
        """Take over columns [0, stop) of a scan that has run."""
        self._keep_chunks(out, stop)
        self.y.append(out.y[:, :stop])
        self.done = stop

    def _keep(self, column: int, h: Tensor) -> None:
        if self.interval is not None:
            self._columns.append(column)
            self._states.append(h.detach())

    def _keep_chunks(self, out: ops.ScanOutput, stop: int) -> None:
        """The states that a scan from ``done`` on left at its boundaries, before column ``stop``."""
        if self.interval is None or out.h_boundary is None:
            return
        for chunk in range(1, out.h_boundary.shape[1]):
            column = self.done + chunk * self.interval - 1
            if column < stop:
                self._keep(column, out.h_boundary[:, chunk])

    def scan_to(self, t: int) -> Tensor:
        """Scan up to and including column t; its y is left to :meth:`put`, its state is returned."""
        part = self.inputs.cut(self.done, t + 1, self.h)
        out = part.scan(self.run.backend, self.interval)
        self._take(out, t)
        return out.h_last

    def _take(self, out: ops.ScanOutput, stop: int) -> None:
        self._keep_chunks(out, stop)
        self.y.append(out.y[:, : stop - self.done])
        self.done = stop

    def put(self, t: int, h: Tensor) -> None:
        """The state after column t is h, whatever was computed."""
        self.y.append(self.inputs.read_out(h, t, self.run.backend)[:, None])
        self.h, self.done = h, t + 1
        self._keep(t, h)

    def finish(self, length: int) -> None:
        if self.done < length:
            out = self.inputs.cut(self.done, length, self.h).scan(self.run.backend, self.interval)
            self._take(out, length)
            self.h = out.h_last
            self._keep(length - 1, out.h_last)

    def anchors(self) -> Anchors | None:
        if self.interval is None:
            return None
        return Anchors(self._columns, torch.stack([s.detach() for s in self._states], 1))


def _exposed(inputs: Inputs, points: Points, run: Run) -> tuple[Tensor, Tensor] | None:
    """Show A_bar, B_bar and write to their hooks; run on them if one was edited, else None."""
    batch, length, width = inputs.u.shape
    need = 5 * batch * length * width * inputs.A.shape[1] * inputs.delta.element_size()
    way_out = "hook fewer positions of hook_h instead, or a shorter text"
    require_bytes(need, inputs.u.device, f"exposing {points.A_bar.name}, B_bar and write", way_out, InputError)
    real = None if run.padding is None else run.padding.mask[..., None, None]  # B L 1 1
    A_bar = torch.exp(inputs.delta[..., None] * inputs.A)  # B L D N
    A_bar, edited_A = run.emit_checked(points.A_bar, A_bar)
    if edited_A and real is not None:  # whatever a hook wrote at padding: such a step neither decays nor writes
        A_bar = torch.where(real, A_bar, 1.0)
    B_bar = inputs.delta[..., None] * inputs.B[:, :, None, :].to(inputs.delta.dtype)  # B L D N
    B_bar, edited_B = run.emit_checked(points.B_bar, B_bar)
    write = B_bar * inputs.u[..., None].to(B_bar.dtype)  # B L D N
    write, edited_write = run.emit_checked(points.write, write)
    if (edited_B or edited_write) and real is not None:
        B_bar, write = B_bar.masked_fill(~real, 0.0), write.masked_fill(~real, 0.0)
    if not (edited_A or edited_B or edited_write):
        return None
    if run.recorder is not None:
        for point, value in ((points.A_bar, A_bar), (points.B_bar, B_bar), (points.write, write)):
            run.recorder.take_anchors(str(point.name), Anchors([], value))
    plan = points.h.begin() if points.h.live else None
    if plan is None or not plan.steps:
        y, h_last, h = ops.linear_scan(A_bar, write, inputs.C, inputs.h0)
    else:
        y, h_last, h = _exposed_steps(A_bar, write, inputs, points.h, plan, run)
    if run.recorder is not None:
        run.recorder.take_anchors(
            str(points.h.name), Anchors([-1, *range(length)], torch.cat([inputs.h0[:, None], h], 1))
        )
    return y, h_last


def _exposed_steps(
    A_bar: Tensor, write: Tensor, inputs: Inputs, point: StatePoint, plan: Plan, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    if run.padding is not None and run.padding.any_left:
        raise InputError(
            f"{point.name}: hooks on h together with edits of A_bar, B_bar or write need unpadded or right-padded "
            "text; pad on the right"
        )
    h, states, ys = inputs.h0, [], []
    for t in range(A_bar.shape[1]):
        h = A_bar[:, t] * h + write[:, t]  # B D N
        if plan.wants(t):
            h, _ = point.at(t, h, plan)
        states.append(h)
        ys.append(read_out(h, inputs.C[:, t]))
    return torch.stack(ys, 1), h, torch.stack(states, 1)

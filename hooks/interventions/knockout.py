"""Knockout: targets T of a layer stop reading what sources S wrote; everything else stays.

    y[t] = Σ_s alpha[t, s] u[s] + alpha0[t] h0          alpha[t, s] := 0 for t in T, s in S

alpha is never formed. The run's own scan gives y. A second scan, in which S writes nothing (B[s] = 0), gives what T
reads without S; its y is put in for t in T. The state that goes on is the first scan's, so tokens outside T, and those
after the text, read S as before. Time and memory of one more scan in each layer.

Through the scan alone, s still reaches t in the u of the K-1 tokens after s. Through the conv as well, the source is
x[s], the conv's input: with SiLU's factor g frozen, u[τ] = g[τ] (Σ_k w[k] x[τ-K+1+k] + bias), and what x[S]
contributes to u is left out of both the scan and the skip D·u. delta, B and C stay those of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mambascope import ops
from mambascope.config import MIXERS
from mambascope.errors import HookError
from mambascope.hooks.effective_path import activation_factor
from mambascope.hooks.interventions.base import Edit, Intervention, Target, kind
from mambascope.hooks.interventions.base import index_from_json as from_json
from mambascope.hooks.interventions.base import index_to_json as to_json
from mambascope.hooks.interventions.given import layers_of
from mambascope.hooks.points import scan_layers
from mambascope.hooks.positions import PerRow, Site

__all__ = ["knockout"]

Tokens = int | slice | range | Sequence[int] | Sequence[Sequence[int]] | Tensor
_THROUGH = ("scan", "conv")


def _tokens(name: str, chosen: Any) -> Any:
    """Positions as int, slice, list of ints (for all rows) or PerRow (``B k``); HookError if there are none."""
    if isinstance(chosen, bool) or chosen is None:
        raise HookError(f"knockout: {name} must be positions, got {chosen!r}")
    if isinstance(chosen, (int, slice, PerRow)):
        empty = isinstance(chosen, slice) and None not in (chosen.start, chosen.stop) and chosen.start == chosen.stop
        if empty:
            raise HookError(f"knockout: {name} is empty; name at least one token")
        return chosen
    try:
        where = chosen if isinstance(chosen, Tensor) else torch.as_tensor(list(chosen))
    except (TypeError, ValueError, RuntimeError):
        raise HookError(f"knockout: {name} must be positions, got {chosen!r}") from None
    if where.numel() == 0:
        raise HookError(f"knockout: {name} is empty; name at least one token")
    if where.is_floating_point() or where.dtype == torch.bool or where.ndim not in (1, 2):
        raise HookError(f"knockout: {name} must be integers, one list for all rows or one for each row")
    return PerRow(where.long().cpu()) if where.ndim == 2 else [int(t) for t in where.tolist()]


def knockout(
    layers: int | Sequence[int] | None,
    sources: Tokens,
    targets: Tokens,
    *,
    through: str = "scan",
    initial_state: bool = False,
    channels: Any = None,
    dims: Any = None,
) -> Intervention:
    """Cut the flow from source tokens to target tokens in some layers: alpha[t, s] = 0 for t in T, s in S.

    ``layers``: numbers; None: all Mamba layers. ``sources``, ``targets``: a position, a slice, a list (for all rows),
    or ``B k`` numbers for each row. ``through``: "scan" (what s writes into the state) or "conv" (what s's x writes,
    by way of the conv, into the states and skips of s and the K-1 tokens after it). ``initial_state``: T loses the
    state before the text as well. ``channels``, ``dims``: only these channels and state dimensions.
    In ``generate`` positions are absolute, and the prompt must be part of the call.

    Several knockouts in one layer add up; a pair (t, s) may be cut only once.

    Raises
    ------
    HookError: empty sources or targets; targets that all lie before the sources; positions beyond the text; a layer
        whose states (hook_h, A_bar, B_bar, write) are edited: there alpha is not what happened.
    """
    if through not in _THROUGH:
        raise HookError(f"knockout through {through!r}: it is 'scan' or 'conv'")
    s, t = _tokens("sources", sources), _tokens("targets", targets)
    ends = [list(v) if isinstance(v, list) else [v] if isinstance(v, int) else None for v in (s, t)]
    if ends[0] and ends[1] and min(*ends[0], *ends[1]) >= 0 and max(ends[1]) < min(ends[0]) and not initial_state:
        raise HookError(f"knockout: all targets ({t}) lie before the sources ({s}), so nothing flows there")
    options = {"sources": to_json(s), "targets": to_json(t), "through": through, "initial_state": bool(initial_state)}
    if layers is None:
        return Intervention("knockout", (Site("blocks.0.mixer.hook_y"),), {**options, "all": True}, {}, channels, dims)
    sites = tuple(Site(f"blocks.{i}.mixer.hook_y") for i in layers_of("knockout (None means all)", layers))
    return Intervention("knockout", sites, options, {}, channels, dims)


@kind("knockout", overwrites=False, own_dims=True)
def _place_knockout(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    names = [s.name for s in iv.sites]
    if iv.options.get("all"):
        names = [f"blocks.{i}.mixer.hook_y" for i in scan_layers(model.cfg, "knockout")]
    return [pair for name in names for pair in _Cut(iv, name, model).edits()]


@dataclass
class _Carried:
    """What goes on from one call to the next while a text grows."""

    h_last: Tensor  # the run's state, by which the next call is recognised
    h: Tensor  # the second scan's
    x: Tensor | None  # what the conv still holds of the sources, B D K-1
    begun: bool  # whether a source was read


class _Cut:
    """A knockout in one layer of one model."""

    def __init__(self, iv: Intervention, name: str, model: Target) -> None:
        self.iv, self.name, self.model = iv, name, model
        self.layer = int(name.split(".")[1])
        if self.layer not in scan_layers(model.cfg, "knockout"):
            kind = MIXERS[model.cfg.layers[self.layer]]
            raise HookError(f"knockout: layer {self.layer} is {kind}, which has no selective scan to cut flows in")
        self.sources, self.targets = from_json(iv.options["sources"]), from_json(iv.options["targets"])
        self.initial, self.conv = iv.options["initial_state"], iv.options["through"] == "conv"
        self.carried: _Carried | None = None
        self.x: Tensor | None = None  # x of this call
        self.written: Tensor | None = None  # what x[S] contributes to u, B L D
        self.conv_state: Tensor | None = None  # what the conv holds of the sources afterwards

    def edits(self) -> list[tuple[Site, Edit]]:
        mixer = self.name.removesuffix("hook_y")
        if not self.conv:
            return [(Site(self.name), _Y(self))]
        conv = [(Site(f"{mixer}hook_x"), _Note(self.note_x)), (Site(f"{mixer}hook_conv"), _Note(self.note_conv))]
        skip = [] if self.iv.dims is not None else [(Site(f"{mixer}hook_u_skip"), self.edit_skip)]  # no dims there
        return [*conv, *skip, (Site(self.name), _Y(self))]

    def masks(self, clock: Any) -> tuple[Tensor, Tensor]:
        """S and T as columns, ``1|B L`` bool; HookError where they cannot be cut."""
        name = f"knockout in blocks.{self.layer}"
        S, T = clock.mask(self.sources, f"{name}: sources"), clock.mask(self.targets, f"{name}: target ")
        if not clock.absolute and not self.initial:
            flows = ((S.int().cumsum(1) > 0) & T).any(1)
            if not bool(flows.all()):
                row = "" if len(flows) == 1 else f" in row {int((~flows).nonzero()[0])}"
                raise HookError(f"{name}: all targets lie before the sources{row}, so nothing flows there")
        return S, T

    def continues(self, clock: Any) -> bool:
        """Whether this call goes on with a text whose beginning this knockout has seen."""
        return bool(clock.absolute and self.carried is not None and _begun(clock))

    # ---- through the conv: what x[S] contributes to u

    def note_x(self, value: Tensor, hook: Any) -> None:
        self.x = value

    def note_conv(self, value: Tensor, hook: Any) -> None:
        assert self.x is not None
        if not self.continues(hook.clock):
            self.carried = None
        clock, conv = hook.clock, self.model.blocks[self.layer].mixer.conv1d
        S, _ = self.masks(clock)
        before = self.carried.x if self.carried is not None and self.continues(clock) else None
        part, self.conv_state = self._filter(self.x.masked_fill(~S[..., None].to(value.device), 0.0), before, clock)
        if self.initial and _begun(clock) and not clock.absolute:  # and all that the conv held before the text
            bias = 0 if conv.bias is None else conv.bias
            part = part + (value - bias - self._filter(self.x, None, clock)[0])
        self.written = activation_factor(value, self.model.cfg.activation) * part
        self.x = None

    def _filter(self, x: Tensor, state: Tensor | None, clock: Any) -> tuple[Tensor, Tensor]:
        """The layer's convolution without bias, and its state afterwards."""
        padding, weight = clock.padding, self.model.blocks[self.layer].mixer.conv1d.weight
        if padding is None:
            return tuple(ops.causal_conv(x, weight, None, state=state))  # type: ignore[return-value]
        out = ops.causal_conv(padding.align(x), weight, None, state=state, lengths=padding.lengths)
        return padding.unalign(out.y), out.state

    def edit_skip(self, value: Tensor, hook: Any) -> Tensor | None:
        assert self.written is not None
        S, T = self.masks(hook.clock)
        if not self._cuts(S, T):
            return None
        return torch.where(T[..., None].to(value.device), value - self.written.to(value.dtype), value)

    # ---- the second scan

    def _cuts(self, S: Tensor, T: Tensor) -> bool:
        """Whether something is cut in this call: a growing text may not have come to the sources or targets yet."""
        seen = self.initial or (self.carried is not None and self.carried.begun)
        return bool(T.any()) and (seen or bool(S.any()))

    def cut(self, value: Tensor, hook: Any, alone: bool) -> Tensor | None:
        """y with T's part exchanged, or None where nothing is cut.

        ``alone``: nobody changed y before, so that it may be overwritten at T.
        """
        below, clock = hook.beneath, hook.clock
        if below.form in ("split", "exposed"):
            raise HookError(
                f"knockout in blocks.{self.layer}: hook_h, A_bar, B_bar or write is edited in this layer as well, so "
                "alpha does not say what flows; put the two into runs of their own"
            )
        masks = self.masks(clock)
        if not self.continues(clock):
            self.carried = None
        cuts, begun = self._cuts(*masks), bool(masks[0].any()) or (self.carried is not None and self.carried.begun)
        S, T = (mask.to(value.device, non_blocking=True) for mask in masks)
        if clock.absolute and _begun(clock) and not (self.continues(clock) and self._same(below.inputs.h0)):
            raise HookError(
                f"knockout in blocks.{self.layer}: the text began before this knockout was there, so what the sources "
                "wrote is not known apart; begin with the prompt inside model.intervene(…)"
            )
        inputs, chosen = self._second(below.inputs, S, clock, only=not alone or self.iv.dims is not None)
        out = inputs.scan(below.backend, None)
        subtract = not alone or self.iv.dims is not None
        other = value.index_select(-1, chosen) if chosen is not None else value
        new = torch.where(T[..., None], other - out.y if subtract else out.y, other)
        self.carried = _Carried(below.h_last, out.h_last, self.conv_state, begun)
        self.written = self.conv_state = None
        if not cuts:
            return None
        return new if chosen is None else value.index_copy(-1, chosen, new.to(value.dtype))

    def _same(self, h0: Tensor) -> bool:
        return self.carried is not None and h0 is self.carried.h_last

    def _second(self, inputs: Any, S: Tensor, clock: Any, only: bool) -> tuple[Any, Tensor | None]:
        """The inputs of the second scan (without what S writes, or with ``only`` that), and the channels it runs on."""
        dims = None  # all
        if self.iv.dims is not None:
            dims = torch.zeros(inputs.A.shape[1], dtype=torch.bool)
            dims[list(self.iv.dims)] = True
            dims = dims.to(S.device, non_blocking=True)
        if self.continues(clock):
            assert self.carried is not None
            h0 = self.carried.h
        elif not self.initial:
            h0 = torch.zeros_like(inputs.h0) if only else inputs.h0
        elif dims is None:
            h0 = inputs.h0 if only else torch.zeros_like(inputs.h0)
        else:
            h0 = inputs.h0 * dims if only else inputs.h0.masked_fill(dims, 0.0)
        u, B = inputs.u, inputs.B
        if self.conv:
            assert self.written is not None
            u = self.written.to(u.dtype) if only else u - self.written.to(u.dtype)
            B = B.masked_fill(~dims, 0.0) if only and dims is not None else B
        else:
            theirs = S[..., None] if dims is None else S[..., None] & dims
            B = B.masked_fill(~theirs if only else theirs, 0.0)
        out = replace(inputs, u=u, B=B, h0=h0)
        if self.iv.channels is None:
            return out, None
        chosen = torch.tensor(self.iv.channels, device=u.device)
        h0 = h0 if self.continues(clock) else h0.index_select(1, chosen)
        u, delta = u.index_select(-1, chosen), inputs.delta.index_select(-1, chosen)
        return replace(out, u=u, delta=delta, A=inputs.A.index_select(0, chosen), h0=h0), chosen


class _Note:
    """An edit that only reads, for another of its intervention's hooks."""

    reads = True

    def __init__(self, fn: Any) -> None:
        self._fn = fn

    def __call__(self, value: Tensor, hook: Any) -> None:
        self._fn(value, hook)


class _Y:
    """A knockout's edit of y, which needs the scan's inputs."""

    beneath = True

    def __init__(self, cut: _Cut) -> None:
        self._cut = cut

    def __call__(self, value: Tensor, hook: Any) -> Tensor | None:
        first = next(p.handle.user_hook for p in hook.here() if p.dir == "fwd")
        self._refuse_twice(hook)
        return self._cut.cut(value, hook, alone=getattr(first, "edit", None) is self)

    def places(self, hook: Any) -> set[tuple[int, int]]:
        """Where y is changed: the targets."""
        mask = self._cut.masks(hook.clock)[1]
        return {(b if len(mask) > 1 else -1, t) for b, t in mask.nonzero().tolist()}

    def _refuse_twice(self, hook: Any) -> None:
        """HookError if an earlier knockout of this layer has cut one of these pairs of tokens already."""
        edits = [getattr(p.handle.user_hook, "edit", None) for p in hook.here() if p.dir == "fwd"]
        earlier = [other for other in edits[: edits.index(self)] if isinstance(other, _Y)]
        if not earlier:
            return
        S, T = self._cut.masks(hook.clock)
        for other in earlier:
            S2, T2 = other._cut.masks(hook.clock)
            mine, theirs = self._cut.iv, other._cut.iv
            apart = any(
                a is not None and b is not None and not set(a) & set(b)
                for a, b in ((mine.channels, theirs.channels), (mine.dims, theirs.dims))
            )
            if not apart and bool((S & S2).any()) and bool((T & T2).any()):
                raise HookError(f"{mine} and another knockout of this layer cut the same flow; leave one of them out")


def _begun(clock: Any) -> bool:
    start = clock.start
    return bool((start > 0).any()) if isinstance(start, Tensor) else start > 0

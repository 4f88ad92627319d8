"""Hook points inside an nnsight trace: who asks for which site, and serving it when the forward pass gets there.

nnsight runs a block of interventions beside the forward pass: the block waits wherever it asks for a value, the pass
goes on until it has that value and hands it over. A hook point is served by a hook of ours, put there when the
block asks, so what nobody asks for is computed as in a plain run.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

from greenlet import getcurrent
from nnsight.intervention.batching import Batcher
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.interleaver import Interleaver, Mediator
from nnsight.intervention.source import STATE
from torch import Tensor

from mambascope.errors import HookError
from mambascope.hooks.nnsight_request import Request, index_key
from mambascope.hooks.points import resolve_name
from mambascope.hooks.positions import Clock, Index, PerRow, Site, index_text, parse_site
from mambascope.hooks.sites import SitePoint
from mambascope.hooks.state_point import StatePoint

__all__ = ["ConvEnvoy", "Desk", "LeafEnvoy", "PointEnvoy", "RowBatcher", "TraceInterleaver", "TracedSite"]

_LEVEL = -1_000_001
"""The context level of the hooks that serve a trace: nobody else's, so that they can be taken away together."""


class TracedSite:
    """A hook point, whole or at positions, inside a trace: read ``.output``, assign to it, or edit it in place.

    At ``hook_h`` it is the state after one step, ``B D N``; without a position every step is an occurrence of its
    own (``tracer.iter``). In an invoke of a batch it has that invoke's rows.
    """

    def __init__(self, desk: "Desk", name: str, index: Index) -> None:
        self._desk, self.name, self.index = desk, name, index

    @property
    def output(self) -> Any:
        """The value here; HookError or nnsight's OutOfOrderError if the run does not come by any more."""
        return Mediator.value(self._desk.ask(self))

    @output.setter
    def output(self, value: Any) -> None:
        Mediator.swap(self._desk.ask(self), value)

    def __repr__(self) -> str:
        return f"TracedSite({self.name}{index_text(self.index)})"


class PointEnvoy(Envoy):
    """nnsight's view of a hook point: ``.output`` is the value that passes it."""

    @property
    def output(self) -> Any:  # type: ignore[override]
        return self._site().output

    @output.setter
    def output(self, value: Any) -> None:
        self._site().output = value

    def _site(self) -> TracedSite:
        desk = cast(TraceInterleaver, self.interleaver).desk
        return TracedSite(desk, str(self._module.name), None)

    def _refuse(self, *_: Any) -> Any:
        raise HookError(f"{self._module.name} is a hook point, which hands its value on: read or set .output")

    input = property(_refuse, _refuse)  # type: ignore[assignment]
    inputs = property(_refuse, _refuse)  # type: ignore[assignment]
    source = property(_refuse, _refuse)  # type: ignore[assignment]
    skip = _refuse  # type: ignore[assignment]


class ConvEnvoy(Envoy):
    """The convolution's parameters; it is computed by an operator of ours and never called as a module."""

    def _refuse(self, *_: Any) -> Any:
        raise HookError(
            f"{self.path} is never called: hook_x is the convolution's input, hook_conv its output before SiLU"
        )

    output = property(_refuse, _refuse)  # type: ignore[assignment]
    input = property(_refuse, _refuse)  # type: ignore[assignment]
    inputs = property(_refuse, _refuse)  # type: ignore[assignment]
    source = property(_refuse, _refuse)  # type: ignore[assignment]
    skip = _refuse  # type: ignore[assignment]


def _asked_for(name: str) -> Any:
    view = getattr(Envoy, name)

    def read(self: "LeafEnvoy") -> Any:
        self.arm()
        return view.__get__(self, type(self))

    def write(self: "LeafEnvoy", value: Any) -> None:
        self.arm()
        view.__set__(self, value)

    return property(read, write, doc=view.__doc__)


class LeafEnvoy(Envoy):
    """A projection, watched only when somebody asks for it: as long as nobody does it is computed without a call."""

    output = _asked_for("output")  # type: ignore[override]
    input = _asked_for("input")  # type: ignore[override]
    inputs = _asked_for("inputs")  # type: ignore[override]

    def skip(self, replacement: Any) -> None:
        self.arm()
        super().skip(replacement)

    def arm(self) -> None:
        desk = cast(TraceInterleaver, self.interleaver).desk
        if desk.running:
            desk.watch(self)


class RowBatcher(Batcher):
    """nnsight's batcher, which also knows states, and lists with one entry a row (``generate`` of ragged rows)."""

    def narrow(self, value: Any, group: Any) -> Any:
        if group is None or not self.batching:
            return value
        rows = slice(group[0], group[0] + group[1])
        if isinstance(value, list) and len(value) == self.total:
            return value[rows]
        if isinstance(value, tuple):
            parts = [self.narrow(v, group) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        rows_of = getattr(value, "rows", None)  # a State has this
        if callable(rows_of) and not isinstance(value, Tensor):
            return rows_of(rows)
        return super().narrow(value, group)


class TraceInterleaver(Interleaver):
    """nnsight's interleaver, whose controllers sit in the model only while a trace runs.

    A controller replaces a module's ``forward``, which the model takes for a hook. Hook points need none, and
    projections only where they are asked for: without one they keep their bits.
    """

    desk: "Desk"

    def instrument(self, envoy: Envoy) -> None:
        if self.desk.running and not isinstance(envoy, (PointEnvoy, LeafEnvoy)):
            super().instrument(envoy)

    def arrive(self) -> None:
        for envoy in list(self.envoys.values()):
            self.instrument(envoy)

    def watch(self, leaf: "LeafEnvoy") -> None:
        super().instrument(leaf)

    def leave(self) -> None:
        """Take the controllers away, unless somebody else's wrapper uses them too."""
        for envoy in list(self.envoys.values()):
            space = envoy._module.__dict__
            state = space.get(STATE)
            if state is not None and all(ref() in (None, self) for ref, *_ in state.routes):
                space.pop(STATE)
                space.pop("forward", None)

    def reindex(self) -> None:
        super().reindex()
        self.desk.observe(self.observers)

    def handle(self, provider: str, value: Any) -> Any:
        out = super().handle(provider, value)
        if provider == "model.output":
            self.desk.end_forward()
        return out


class Desk:
    """Serves the hook points of one model to the blocks of the running trace."""

    def __init__(self, model: Any, interleaver: TraceInterleaver) -> None:
        self.model, self.interleaver = model, interleaver
        self.running = False
        self._requests: dict[str, Request] = {}
        self._served: list[SitePoint] = []
        self._forwards: list[Clock] = []
        self._clock = Clock()
        self._alone = ExitStack()
        self._leaves: dict[str, int] = {}  # locations of watched projections, and nnsight's counts before this run

    # ---- the life of a run

    def open(self) -> None:
        if self.running:
            raise HookError("this model is being traced already: end that trace first")
        self._alone.enter_context(self.model.occupancy.hooking())
        self.running, self._forwards = True, []
        # A hook that only reads: it notes what the pass covers, and keeps a long text from being cut into pieces.
        self.model.hook_embed.add_hook(self._begin_forward, is_permanent=True, level=_LEVEL)
        self._served = [self.model.hook_embed]
        self.interleaver.arrive()

    def close(self) -> None:
        for point in self._served:
            point.remove_hooks("fwd", including_permanent=True, level=_LEVEL)
            point.demand = None
        self.interleaver.leave()
        self._alone.close()
        self.running, self._requests, self._served, self._leaves = False, {}, [], {}

    def _begin_forward(self, value: Tensor, hook: SitePoint) -> None:
        if not self._aside():
            self._clock = dataclasses.replace(hook.clock)

    def _aside(self) -> bool:
        """Whether the model runs inside a block, ``lm(text)`` or ``model(text)``: that is not the traced pass."""
        mediator = getattr(getcurrent(), "mediator", None)
        inside = mediator is not None and mediator() in self.interleaver.mediators
        return inside or not self.interleaver.interleaving

    def end_forward(self) -> None:
        """One pass is over: what it did not come by for anybody counts as visited all the same."""
        if self._aside():
            return
        self._forwards.append(self._clock)
        for request in self._requests.values():
            if self._clock.absolute or request.index is None:
                self._count(request)
        self._count_leaves()

    def watch(self, leaf: LeafEnvoy) -> None:
        """Have nnsight serve a projection for the rest of the run."""
        locations = [f"{leaf.path}.{part}" for part in ("input", "skip", "output")]
        if locations[0] not in self._leaves:
            self._leaves |= {at: self.interleaver.counts.get(at, 0) for at in locations}
            self.interleaver.watch(leaf)
            self._count_leaves()

    def _count_leaves(self) -> None:
        for location, base in self._leaves.items():
            self.interleaver.counts[location] = base + len(self._forwards)

    def _count(self, request: Request, more: int = 0) -> None:
        self.interleaver.counts[request.location] = request.base + request.visits(self._forwards) + more

    # ---- what is asked for

    def site(self, site: str | Site) -> TracedSite:
        name, index = parse_site(site) if isinstance(site, str) else (site.name, site.index)
        full = resolve_name(name, self.model.hook_dict)
        one = index is None or isinstance(index, int) or (isinstance(index, PerRow) and index.one_each)
        if isinstance(self.model.hook_dict[full], StatePoint) and not one:
            raise HookError(
                f"{full}{index_text(index)}: states come one after the other; ask for each, as in\n"
                f'    for t in range(a, b): lm.site(f"{full}[{{t}}]").output'
            )
        return TracedSite(self, full, index)

    def ask(self, site: TracedSite) -> str:
        """Note that the running block asks for this site, and see that it will be served; its location."""
        name = f"model.{site.name}{index_key(site.index)}.output"
        mediator = Mediator.current(name)
        group = None
        if site.index is not None and self.interleaver.batcher is not None and self.interleaver.batcher.batching:
            group = None if mediator.batch_group is None else (mediator.batch_group[0], mediator.batch_group[1])
        if group is not None:
            name = f"model.{site.name}{index_key(site.index)} of rows {group[0]}:{sum(group)}.output"
        self._request(name, site.name, site.index, group)
        return name

    def _request(self, location: str, name: str, index: Index, group: tuple[int, int] | None) -> None:
        if location in self._requests:
            return
        point = self.model.hook_dict[name]
        request = Request(location, name, point, index, group, self.interleaver.counts.get(location, 0))
        self._requests[location] = request
        self._count(request)
        if point in self._served and (point is not self.model.hook_embed or self._has_server(point)):
            return
        self._served.append(point)
        if isinstance(point, StatePoint):
            point.demand = _StateDemand(self, point)
        else:
            point.add_hook(self._serve, is_permanent=True, level=_LEVEL)

    def _has_server(self, point: SitePoint) -> bool:
        return any(handle.user_hook == self._serve for handle in point.fwd_hooks)

    def observe(self, observers: Any) -> None:
        """Serve what a ``tracer.cache()`` records; of the points the ``B L D N`` ones only where it names them."""
        for location, watching in observers.items():
            name = location.removeprefix("model.").removesuffix(".output")
            point = self.model.hook_dict.get(name)
            if point is not None and (not point.lazy or any(cache.targets is not None for _, cache, _ in watching)):
                self._request(location, name, None, None)
        watched = {location.rsplit(".", 1)[0] for location in observers}
        for envoy in list(self.interleaver.envoys.values()):
            if isinstance(envoy, LeafEnvoy) and envoy.path in watched:
                self.watch(envoy)

    # ---- serving

    def waiting(self, point: SitePoint, tried: set[str]) -> list[Request]:
        """The requests at this point that somebody waits for, in the order in which they were made."""
        if self._aside():
            return []
        wanted = (self.interleaver.parked, self.interleaver.observers)
        return [
            r
            for r in self._requests.values()
            if r.point is point and r.location not in tried and any(r.location in w for w in wanted)
        ]

    def _serve(self, value: Tensor, hook: SitePoint) -> Tensor | None:
        """A point's hook: hand the value to who waits for it, and to who comes to wait meanwhile."""
        given, tried = value, set()
        while todo := self.waiting(hook, tried):
            request = todo[0]
            tried.add(request.location)
            answer = hook._call(self._hand(request), value, hook, request.placed(hook.clock), hook._moment())
            value = value if answer is None else answer
        return None if value is given else value

    def _hand(self, request: Request) -> Callable[..., Any]:
        def hand(piece: Tensor, hook: Any) -> Any:
            return self.hand_over(request, piece)

        return hand

    def hand_over(self, request: Request, piece: Tensor) -> Any:
        """What the blocks make of a value; it is part of the graph, so that they can ask for its gradient."""
        if piece.requires_grad:
            piece.register_hook(_nothing)
        answer = self.interleaver.handle(request.location, piece)
        if answer is None:  # a hook that returns None leaves the value alone: here somebody asked for another one
            raise HookError(f"{request.point.name}: .output was set to None; set a tensor, or leave it as it is")
        return answer

    def step_wanted(self, request: Request) -> list[int]:
        """The steps that blocks wait for at a ``hook_h`` without index, in this pass."""
        before = request.visits(self._forwards)
        if request.location in self.interleaver.observers:
            return list(range(request.point.clock.length))
        pending = [m.pending for m in self.interleaver.mediators if m.pending is not None]
        return [cast(int, p.iteration) - before for p in pending if p.provider == request.location]

    def count_step(self, request: Request, step: int) -> None:
        self._count(request, step)


class _StateDemand:
    """``hook_h`` of one block: see mambascope.hooks.state_point.Demand."""

    def __init__(self, desk: Desk, point: StatePoint) -> None:
        self._desk, self._point = desk, point

    def _turns_of(self, request: Request) -> list[list[int]]:
        steps = self._desk.step_wanted(request) if request.index is None else [None]
        turns = [request.turn(self._point.clock, step) for step in steps]
        return [turn for turn in turns if max(turn) >= 0]

    def turns(self) -> list[list[int]]:
        return [turn for request in self._desk.waiting(self._point, set()) for turn in self._turns_of(request)]

    def serve(self, step: int | Tensor, h: Tensor) -> Tensor:
        here = [step] * h.shape[0] if isinstance(step, int) else step.tolist()
        tried: set[str] = set()
        while True:
            todo = [
                (request, turn)
                for request in self._desk.waiting(self._point, tried)
                for turn in self._turns_of(request)
                if all(t in (-1, now) for t, now in zip(turn, here, strict=True))
            ]
            if not todo:
                return h
            request, turn = todo[0]
            tried.add(request.location)
            if request.index is None:
                self._desk.count_step(request, max(turn))
            h = self._desk.hand_over(request, h)


def _nothing(grad: Tensor) -> None:
    """Keeps a value in the graph by being there."""

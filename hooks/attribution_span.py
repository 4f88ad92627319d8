"""Attribution over a span of blocks: their graph, the metric's derivative at all sites at once, and its products.

Work on tensors alone, so that a model may record it and replay it on the next pair of texts.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mambascope import ops
from mambascope.errors import HookError
from mambascope.hooks.lazy import states_between
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.run import Anchors
from mambascope.hooks.sweeps.over import STATE, Grid
from mambascope.hooks.sweeps.starts import Indices
from mambascope.hooks.sweeps.watch import WINDOW, Watch

__all__ = ["INTERVAL", "Course", "Entering", "Spans"]

INTERVAL = 64
"""Tokens between the states that were kept of both runs."""

_READ = (*WINDOW, "mixer.hook_C", "mixer.hook_y")  # what the derivative by h needs of its block
_FORKS = (
    *("hook_mixer_in", "norm.hook_scale", "norm.hook_normalized"),
    *("mixer.hook_u_select", "mixer.hook_u_write", "mixer.hook_u_skip"),
)
"""Sites whose value is seen beside what goes on, unless a hook asks for a gradient there."""

Course = dict[int, Anchors]
"""A run's states every `INTERVAL` tokens, by layer."""


@dataclass
class Entering:
    """What a span starts from: the streams entering it, at the points where the derivative is taken (``stream``
    ``steps·B L M``), of the clean and of the corrupted text ``B L M``; ``g`` like stream, the metric's derivative by
    what leaves the span; both texts' states."""

    stream: Tensor
    g: Tensor
    clean: Tensor
    base: Tensor
    clean_states: Course = field(default_factory=dict)
    base_states: Course = field(default_factory=dict)
    backend: str = "auto"

    def tensors(self) -> list[Tensor]:
        states = [a.states for course in (self.clean_states, self.base_states) for a in course.values()]
        return [self.stream, self.g, self.clean, self.base, *states]

    def over(self, tensors: list[Tensor]) -> "Entering":
        """The same with other tensors, in the order of `tensors`."""
        stream, g, clean, base, *states = tensors
        rest = iter(states)
        there, here = (
            {i: dataclasses.replace(a, states=next(rest)) for i, a in course.items()}
            for course in (self.clean_states, self.base_states)
        )
        return Entering(stream, g, clean, base, there, here, self.backend)

    def bare(self) -> "Entering":
        """The same without any of its tensors' values."""
        return self.over([x.new_empty(0) for x in self.tensors()])


class _Graph(Watch):
    """Keeps values as they stand in the graph, which they do only where the pass walks past every point."""

    def only_inputs(self) -> bool:
        return False

    def check_room(self) -> None:
        """Part of the Recorder protocol; what a span keeps was chosen to fit."""

    def take(self, name: str, value: Tensor) -> None:
        if self.wants(name):
            self.values[name] = value


class Spans:
    """How one attribution walks back; it holds nothing of its texts."""

    def __init__(self, model: Runnable, grid: Grid, align: str, steps: int) -> None:
        self.model, self.grid, self.align, self.steps = model, grid, align, steps
        self._indices, self._where = Indices(model.device), dict[tuple[int, int], Any]()
        self._masks = {site: grid.masks(site, model) for site in grid.sites}
        self._tails, self._others = (
            list(dict.fromkeys(t for site in grid.sites for t in (window if site == STATE else (site,))))
            for window in (_READ, WINDOW)
        )

    def layers(self, first: int, last: int) -> list[int]:
        """Those of a span that are asked for."""
        return [i for i in range(first, last) if i in self.grid.layers]

    def run(self, given: Entering, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Walk back over blocks [first, last): the metric's derivative by what enters them, and the products.

        Those are summed over pairs, ``sites layers positions groups``; None where no layer is asked for.
        """
        # what does not depend on the values of the tensors tells one such work from another
        bare, lengths = given.bare(), (given.clean.shape[1], self.align, self.steps)
        columns = [tuple(a.columns) for course in (bare.clean_states, bare.base_states) for a in course.values()]
        key = ("attribution", first, last, self.grid, lengths, tuple(columns))
        with torch.no_grad():
            g, *found = self.model.again(
                key, given.tensors(), lambda tensors: self._work(bare.over(tensors), first, last)
            )
        return g, found[0] if found else None

    def _work(self, given: Entering, first: int, last: int) -> list[Tensor]:
        layers = self.layers(first, last)
        names = [f"blocks.{i}.{tail}" for i in layers for tail in self._tails]
        span = {"start_at_layer": first, "stop_at_layer": last}
        with torch.enable_grad():
            leaf = given.stream.detach().requires_grad_()
            watch = _Graph(set(names), None, resid=False)
            hooks = [(f"blocks.{i}.{site}", _own) for i in layers for site in self.grid.sites if site in _FORKS]
            out = self.model.run_with_hooks(leaf, recorder=watch, fwd_hooks=hooks, **span)
            sites = [watch.values[n] for n in names]
            g, *grads = torch.autograd.grad(out, [leaf, *sites], given.g, allow_unused=True)
        del out, leaf, sites
        if not layers:
            return [g]
        by_name = dict(zip(names, grads, strict=True))
        del grads
        here = watch.values = {n: v.detach() for n, v in watch.values.items()}
        clean = self._values(given.clean, layers, span)
        base = here if self.steps == 1 else self._values(given.base, layers, span)
        found: dict[tuple[str, int], Tensor] = {}
        for layer in reversed(layers):
            block = f"blocks.{layer}."
            mine = [
                {tail: x[block + tail] for tail in self._tails if block + tail in x}
                for x in (by_name, here, base, clean)
            ]
            for site in self.grid.sites:
                if site == STATE:
                    product = self._states(given, layer, *mine)
                else:
                    grads_here, _, base_here, clean_here = (x[site] for x in mine)
                    lengths = given.stream.shape[1], given.clean.shape[1]
                    product = self._product(lengths, _reached(block + site, grads_here), base_here, clean_here)
                found[site, layer] = self._summed(site, product)
        parts = [found[site, layer] for site in self.grid.sites for layer in layers]
        wide = torch.float64 if any(x.dtype == torch.float64 for x in parts) else torch.float32
        return [g, torch.stack([x.to(wide) for x in parts]).unflatten(0, (len(self.grid.sites), len(layers)))]

    def _values(self, stream: Tensor, layers: list[int], span: dict[str, int]) -> dict[str, Tensor]:
        """What a run has at the sites, and what its states follow from."""
        watch = Watch({f"blocks.{i}.{tail}" for i in layers for tail in self._others}, None, resid=False)
        self.model(stream, recorder=watch, **span)
        return watch.values

    def _columns(self, lengths: tuple[int, int]) -> tuple[Any, Any]:
        """Columns of a corrupted and of a clean text of these lengths, a position each."""
        if lengths not in self._where:
            self._where[lengths] = tuple(self._cut([p % n for p in self.grid.positions]) for n in lengths)
        return self._where[lengths]

    def _cut(self, columns: list[int]) -> Any:
        """As a slice, if they follow one another."""
        if columns == list(range(columns[0], columns[0] + len(columns))):
            return slice(columns[0], columns[-1] + 1)
        return self._indices(columns)

    def _product(self, lengths: tuple[int, int], grad: Tensor, base: Tensor, clean: Tensor) -> Tensor:
        """Gradient × difference at the positions, summed over pairs: ``positions width``."""
        here, there = self._columns(lengths)
        wide = torch.promote_types(base.dtype, torch.float32)
        apart = clean[:, there].to(wide) - base[:, here].to(wide)  # B P F
        g = grad if self.steps == 1 else grad.unflatten(0, (self.steps, -1)).mean(0)
        return (g[:, here].to(wide) * apart).sum(0)

    def _summed(self, site: str, product: Tensor) -> Tensor:
        """``positions width`` -> ``positions groups``."""
        masks = self._masks[site]
        if product.ndim > 2:  # heads: channels are those within each
            product = product.flatten(1).sum(-1, keepdim=True) if masks is None else product.sum(1)
        return product.sum(-1, keepdim=True) if masks is None else product @ masks.to(product.dtype).T

    # ---- states

    def _states(self, given: Entering, layer: int, grads: Any, values: Any, base: Any, clean: Any) -> Tensor:
        """At h: ``positions D``, from one reverse scan a step, of the derivatives and three runs' values by site."""
        dy = _reached(f"blocks.{layer}.mixer.hook_y", grads["mixer.hook_y"])
        lengths = given.stream.shape[1], given.clean.shape[1]
        here, _ = self._columns(lengths)
        A, way = self.model.decay(layer), given.backend
        delta, C = values["mixer.hook_delta"], values["mixer.hook_C"]
        a = _course(base, given.base_states[layer], A, way)
        b = self._shifted(lengths, _course(clean, given.clean_states[layer], A, way), A, way)
        batch = given.base.shape[0]
        total = torch.zeros((), device=A.device)
        backend: Any = way
        for step in range(self.steps):
            cut = slice(step * batch, (step + 1) * batch)
            options: Any = {"boundaries": INTERVAL, "backend": backend}
            found = ops.state_contraction(dy[cut], delta[cut], C[cut], A, a, b, **options)  # B L D
            total = total + found[:, here].sum(0) / self.steps
        return total

    def _shifted(self, lengths: tuple[int, int], run: ops.Course, A: Tensor, backend: str) -> ops.Course:
        """The clean run laid beside the corrupted one, token for token; where it has none, it stands still."""
        length, other = lengths
        if length == other:
            return run
        offset = other - length if self.align == "end" else 0
        way: Any = backend
        h0 = run.h_boundary[:, 0]
        if offset > 0:
            u, delta, B = (x[:, :offset] for x in run[:3])
            h0 = ops.selective_scan(u, delta, A, B, B, h0=h0, backend=way).h_last
        cut = [x[:, max(0, offset) : max(0, offset) + length] for x in run[:3]]
        left = max(0, -offset)
        right = length - left - cut[0].shape[1]
        u, delta, B = [torch.nn.functional.pad(x, (0, 0, left, right)) for x in cut]
        out = ops.selective_scan(u, delta, A, B, B, h0=h0, boundaries=INTERVAL, backend=way)
        assert out.h_boundary is not None
        return ops.Course(u, delta, B, out.h_boundary)


def _course(values: dict[str, Tensor], anchors: Anchors, A: Tensor, backend: str) -> ops.Course:
    """A run's course through a block, its states from when the text was read."""
    u, delta, B = (values[tail] for tail in WINDOW)
    wanted = [c * INTERVAL - 1 for c in range(-(-u.shape[1] // INTERVAL))]
    if anchors.columns[: len(wanted)] == wanted:
        return ops.Course(u, delta, B, anchors.states[:, : len(wanted)])
    # hooks cut the scan elsewhere; the states there are still the run's own
    way: Any = backend
    states = [
        anchors.states[:, anchors.columns.index(c)]
        if c in anchors.columns
        else states_between((u, delta, A, B), anchors, 0, c, c + 1, way)[:, 0]
        for c in wanted
    ]
    return ops.Course(u, delta, B, torch.stack(states, 1))


def _own(value: Tensor, hook: Any) -> None:
    """A hook that lets the block go on with this very value."""
    value.retain_grad()


def _reached(name: str, grad: Tensor | None) -> Tensor:
    if grad is None:
        raise HookError(f"no gradient arrives at {name}: a module or hook of its block cuts it (detach, no_grad)")
    return grad

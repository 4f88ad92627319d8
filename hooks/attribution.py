"""Attribution patching: what every patch of a sweep would do, to first order, from one walk back through the layers.

Gradient × difference (Nanda, "Attribution patching", 2023; Syed et al., 2310.10348):

    predicted change at (layer, position) = ⟨dm/da of the corrupted run, a of the clean run − a of the corrupted run⟩

1. Run both texts, keeping the residual stream that enters every block and the states every 64 tokens.
2. From the last blocks to the first, a span of them at a time: run it again on the corrupted stream, with a graph, and
   on the clean stream without one; take the metric's derivative by all sites at once; add up its product with the
   difference.
3. At ``h`` the derivative by h[t] and the difference of the two runs' states meet inside one reverse scan
   (`mambascope.ops.state_contraction`), so that no state is ever stored.

As many blocks make a span as fit a gigabyte of graph, half of all at most. With ``steps`` the derivative is the mean
over points between the two texts' embeddings (integrated gradients, Sundararajan et al., 1703.01365, as in EAP-IG,
Hanna et al., 2403.17806).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mambascope import ops
from mambascope.errors import HookError, InputError
from mambascope.hooks.lazy import states_between
from mambascope.hooks.metrics import Bound, Given, Metric, bind
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.sweeps import warn_if_tiny
from mambascope.hooks.sweeps.over import STATE, Grid, grid_of
from mambascope.hooks.sweeps.result import Sweep
from mambascope.hooks.sweeps.starts import Indices
from mambascope.hooks.sweeps.texts import Align, Group, Pairs, pairs_of
from mambascope.hooks.sweeps.watch import WINDOW, Watch
from mambascope.memory import available_bytes

__all__ = ["attribute"]

_INTERVAL = 64
_GRAPH = 1 << 30  # bytes of graph, derivatives and clean values in memory at a time
_READ = (*WINDOW, "mixer.hook_C", "mixer.hook_y")  # what the derivative by h needs of its block
_FORKS = (
    *("hook_mixer_in", "norm.hook_scale", "norm.hook_normalized"),
    *("mixer.hook_u_select", "mixer.hook_u_write", "mixer.hook_u_skip"),
)
"""Sites whose value is seen beside what goes on, unless a hook asks for a gradient there."""


def attribute(
    model: Runnable,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Any], Any],
    over: Any = "resid_pre",
    *,
    steps: int = 1,
    align: Align | None = None,
    keep: int | None = 1,
    prepend_bos: bool | None = None,
) -> Sweep:
    """What :func:`~mambascope.hooks.sweeps.sweep` would find, to first order, for all places at once.

    Arguments as there. ``steps``: 1, the derivative at the corrupted text; m > 1, the mean derivative at m points
    between the embeddings of the two texts (midpoints), which at ``"resid_pre"`` of layer 0 adds up over positions to
    the difference of the metric.

    Returns:
        `Sweep` whose values are predictions. Time: about five forward passes and the input half of a backward one (m of
        each with steps). Memory: the residual stream of every layer, and the graph of some blocks, a gigabyte at most
        or one block's: O(L (layers M + D)), at ``"h"`` too.

    Raises:
        InputError: as a sweep; also a metric without a gradient (`Rank`, or a function that detaches).
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a positive number of points, got {steps!r}")
    pairs = pairs_of(model, clean, corrupted, align, prepend_bos)
    grid = grid_of(model, pairs, over)
    if steps > 1 and any(g.clean.shape != g.corrupted.shape for g in pairs.groups):
        raise InputError("steps > 1 goes along a line between the two texts, so they need as many tokens each")
    return _Attribution(model, pairs, grid, metric, keep, steps).run()


@dataclass
class _Ready:
    """A group of pairs, read once. ``streams``: what enters each block at the points where the derivative is taken,
    ``steps·B L M``; ``clean`` and ``base``: of the two texts, as their runs were watched."""

    group: Group
    clean: dict[int, Tensor]
    base: dict[int, Tensor]
    streams: dict[int, Tensor]
    clean_run: Watch
    base_run: Watch
    final: Tensor  # steps·B L M
    clean_logits: Tensor
    base_logits: Tensor
    g: Tensor | None = None  # the metric's derivative by the stream at hand


class _Graph(Watch):
    """Keeps values as they stand in the graph."""

    def take(self, name: str, value: Tensor) -> None:
        if self.wants(name):
            self.values[name] = value


class _Attribution:
    def __init__(self, model: Runnable, pairs: Pairs, grid: Grid, metric: Any, keep: int | None, steps: int) -> None:
        self.model, self.pairs, self.grid, self.steps = model, pairs, grid, steps
        self.indices, self._where = Indices(model.device), dict[tuple[int, int], Any]()
        self.masks = {site: grid.masks(site, model) for site in grid.sites}
        self.keep = metric.keep if isinstance(metric, Metric) else keep
        if self.keep is not None and self.keep > pairs.shortest:
            raise InputError(f"the metric reads the last {self.keep} positions, the shortest text has {pairs.shortest}")
        if self.keep is None and not pairs.same_length:
            raise InputError(
                "a metric of all positions needs texts of one length; give keep=, how many last ones count"
            )
        with torch.no_grad():
            self.ready = [self._read(group) for group in pairs.groups]
        self._order = sorted(range(pairs.count), key=[i for g in pairs.groups for i in g.rows].__getitem__)
        logits = torch.cat([r.clean_logits for r in self.ready])[self._order]
        tokens = [t for r in self.ready for t in r.group.corrupted]
        self.bound: Bound = bind(metric, Given(model, list(logits), [tokens[i] for i in self._order]), self.keep)
        if not self.bound.differentiable:
            raise InputError(f"{self.bound.spec['metric']} has no gradient; take LogitDifference, Loss or KL instead")
        self.spread = float(logits[:, -1, : model.cfg.n_tokens].float().std(-1).mean())

    def run(self) -> Sweep:
        clean, corrupted = (self._judged(which) for which in ("clean", "corrupted"))
        warn_if_tiny(clean, corrupted, self.bound.spec, self.spread, level=4)
        depth = self._depth()
        self._start()
        grid, top = self.grid, self.model.cfg.n_layers
        found: dict[tuple[int, int], Tensor] = {}  # by site and layer: positions groups, summed over pairs
        while top > min(grid.layers):
            bottom = max(min(grid.layers), top - depth)
            for ready in self.ready:
                for place, product in self._span(ready, bottom, top).items():
                    found[place] = found[place] + product if place in found else product
            top = bottom
        places = [(s, layer) for s in range(len(grid.sites)) for layer in grid.layers]
        change = torch.stack([found[place] for place in places]).double().cpu().view(grid.shape) / self.pairs.count
        tokens = self.pairs.labels(self.model, grid.positions)
        done = torch.ones(grid.shape, dtype=torch.bool)
        return Sweep(change + corrupted, done, clean, corrupted, grid, tokens, self.bound.spec, change.numel())

    # ---- forward

    def _read(self, group: Group) -> _Ready:
        clean, clean_logits, _ = self._forward(group.clean)
        base, base_logits, final = self._forward(group.corrupted)
        streams = base.resid
        if self.steps > 1:
            at = (torch.arange(self.steps, device=final.device, dtype=torch.float64) + 0.5) / self.steps
            apart = clean.resid[0] - base.resid[0]
            line = base.resid[0][None] + at.to(apart.dtype)[:, None, None, None] * apart  # steps B L M
            points, _, final = self._forward(line.flatten(0, 1), start_at_layer=0)
            streams = points.resid
        return _Ready(group, clean.resid, base.resid, streams, clean, base, final, clean_logits, base_logits)

    def _forward(self, entry: Tensor, **options: Any) -> tuple[Watch, Tensor, Tensor]:
        """The run as it was watched, the last logits, and what leaves the last block."""
        last = f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"
        watch = Watch(set(), _INTERVAL, end=last)
        logits = self.model(entry, recorder=watch, logits_to_keep=self.keep, **options)
        return watch, logits, watch.values[last]

    def _judged(self, which: str) -> float:
        logits = [r.clean_logits if which == "clean" else r.base_logits for r in self.ready]
        value = float(self.bound.judge(torch.cat(logits)[self._order][None]))
        if not torch.isfinite(torch.tensor(value)):
            raise InputError(f"the metric is {value} on the {which} text; it must give a finite number")
        return value

    # ---- backward

    def _start(self) -> None:
        """The metric's derivative by what leaves the last block."""
        n = self.keep
        leaves, logits = [], []
        with torch.enable_grad():
            for ready in self.ready:
                leaf = (
                    (ready.final if n is None else ready.final[:, -n:])
                    .detach()
                    .clone(memory_format=torch.contiguous_format)
                    .requires_grad_()
                )
                leaves.append(leaf)
                normed = self.model.ln_final(leaf)
                out = self.model.unembed(normed.reshape(-1, normed.shape[-1])).view(*normed.shape[:-1], -1)
                logits.append(out.unflatten(0, (self.steps, -1)))
            value = self.bound.judge(torch.cat(logits, 1)[:, self._order]).sum()
        name = self.bound.spec["metric"]
        grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        if any(g is None for g in grads):
            raise InputError(
                f"metric {name} has no gradient: what it returned does not depend on the logits through differentiable "
                "operations (argmax, .item(), .detach(), comparisons cut it)"
            )
        for ready, grad in zip(self.ready, cast(list[Tensor], grads), strict=True):
            if not bool(torch.isfinite(grad).all()):
                raise InputError(f"the gradient of metric {name} is NaN or infinite")
            whole = torch.zeros_like(ready.final)
            whole[:, whole.shape[1] - grad.shape[1] :] = grad
            ready.g = whole * self.pairs.count  # a metric is a mean over pairs; each pair's own share is wanted
            ready.final = whole[:0]

    def _depth(self) -> int:
        """Blocks whose graph is in memory at a time: as many as fit, half of them at most, one at least."""
        cfg, n = self.model.cfg, self.model.cfg.n_layers
        rows = max(r.final.shape[0] * r.final.shape[1] for r in self.ready)
        size = rows * (8 * cfg.d_model + 18 * cfg.d_inner) * self.ready[0].final.element_size()
        at_hand = available_bytes(self.model.device)
        most = _GRAPH if at_hand is None else min(_GRAPH, at_hand // 4)
        return max(1, min(most // max(1, size), -(-n // 2)))

    def _span(self, ready: _Ready, first: int, last: int) -> dict[tuple[int, int], Tensor]:
        """Walk back over blocks [first, last); by site and layer the sums over pairs, ``positions groups``."""
        layers = [i for i in range(first, last) if i in self.grid.layers]
        tails = dict.fromkeys(t for site in self.grid.sites for t in (_READ if site == STATE else (site,)))
        names = [f"blocks.{i}.{tail}" for i in layers for tail in tails]
        with torch.enable_grad():
            leaf = ready.streams[first].detach().requires_grad_()
            watch = _Graph(set(names), None, resid=False)
            hooks = [(f"blocks.{i}.{site}", _own) for i in layers for site in self.grid.sites if site in _FORKS]
            span = {"start_at_layer": first, "stop_at_layer": last}
            out = self.model.run_with_hooks(leaf, recorder=watch, fwd_hooks=hooks, **span)
            sites = [watch.values[n] for n in names]
            grads = torch.autograd.grad(out, [leaf, *sites], ready.g, allow_unused=True)
        del out, leaf, sites
        ready.g = grads[0]
        if not names:
            return {}
        found = {}
        by_name = dict(zip(names, grads[1:], strict=True))
        del grads
        with torch.no_grad():
            here = watch.values = {n: v.detach() for n, v in watch.values.items()}
            clean = self._again(ready.clean[first], names, span)
            base = here if self.steps == 1 else self._again(ready.base[first], names, span)
            for layer in reversed(layers):
                block = f"blocks.{layer}."
                mine = [{tail: x[block + tail] for tail in tails} for x in (by_name, here, base, clean)]
                for s, site in enumerate(self.grid.sites):
                    if site == STATE:
                        product = self._states(ready, layer, *mine)
                    else:
                        grad = _reached(block + site, mine[0][site])
                        product = self._product(ready, grad, mine[2][site], mine[3][site])
                    found[s, layer] = self._summed(site, product)
        return found

    def _again(self, stream: Tensor, names: list[str], span: dict[str, int]) -> dict[str, Tensor]:
        watch = Watch(set(names), None, resid=False)
        self.model(stream, recorder=watch, **span)
        return watch.values

    def _columns(self, group: Group) -> tuple[Any, Any]:
        """Columns of the corrupted and of the clean text, a position each."""
        lengths = group.corrupted.shape[1], group.clean.shape[1]
        if lengths not in self._where:
            self._where[lengths] = tuple(self._cut([p % n for p in self.grid.positions]) for n in lengths)
        return self._where[lengths]

    def _cut(self, columns: list[int]) -> Any:
        """As a slice, if they follow one another."""
        if columns == list(range(columns[0], columns[0] + len(columns))):
            return slice(columns[0], columns[-1] + 1)
        return self.indices(columns)

    def _product(self, ready: _Ready, grad: Tensor, base: Tensor, clean: Tensor) -> Tensor:
        """Gradient × difference at the positions, summed over pairs: ``positions width``."""
        here, there = self._columns(ready.group)
        wide = torch.promote_types(base.dtype, torch.float32)
        apart = clean[:, there].to(wide) - base[:, here].to(wide)  # B P F
        g = grad if self.steps == 1 else grad.unflatten(0, (self.steps, -1)).mean(0)
        return (g[:, here].to(wide) * apart).sum(0)

    def _summed(self, site: str, product: Tensor) -> Tensor:
        """``positions width`` -> ``positions groups``."""
        masks = self.masks[site]
        if product.ndim > 2:  # heads: channels are those within each
            product = product.flatten(1).sum(-1, keepdim=True) if masks is None else product.sum(1)
        return product.sum(-1, keepdim=True) if masks is None else product @ masks.to(product.dtype).T

    def _states(self, ready: _Ready, layer: int, grads: Any, values: Any, base: Any, clean: Any) -> Tensor:
        """At h: ``positions D``, from one reverse scan a step, of the derivatives and three runs' values by site."""
        dy = _reached(f"blocks.{layer}.mixer.hook_y", grads["mixer.hook_y"])
        here, _ = self._columns(ready.group)
        A = self.model.decay(layer)
        delta, C = values["mixer.hook_delta"], values["mixer.hook_C"]
        a = self._course(base, ready.base_run, layer, A)
        b = self._shifted(ready.group, self._course(clean, ready.clean_run, layer, A), A, ready.base_run.backend)
        batch = len(ready.group.rows)
        total = torch.zeros((), device=A.device)
        way: Any = ready.base_run.backend
        for step in range(self.steps):
            cut = slice(step * batch, (step + 1) * batch)
            found = ops.state_contraction(
                dy[cut], delta[cut], C[cut], A, a, b, boundaries=_INTERVAL, backend=way
            )  # B L D
            total = total + found[:, here].sum(0) / self.steps
        return total

    def _course(self, values: dict[str, Tensor], run: Watch, layer: int, A: Tensor) -> ops.Course:
        """A run's course through a block, its states from when the text was read."""
        u, delta, B = (values[tail] for tail in WINDOW)
        anchors = run.anchors[f"blocks.{layer}.{STATE}"]
        wanted = [c * _INTERVAL - 1 for c in range(-(-u.shape[1] // _INTERVAL))]
        if anchors.columns[: len(wanted)] == wanted:
            return ops.Course(u, delta, B, anchors.states[:, : len(wanted)])
        # hooks cut the scan elsewhere; the states there are still the run's own
        way: Any = run.backend
        states = [
            anchors.states[:, anchors.columns.index(c)]
            if c in anchors.columns
            else states_between((u, delta, A, B), anchors, 0, c, c + 1, way)[:, 0]
            for c in wanted
        ]
        return ops.Course(u, delta, B, torch.stack(states, 1))

    def _shifted(self, group: Group, run: ops.Course, A: Tensor, backend: str) -> ops.Course:
        """The clean run laid beside the corrupted one, token for token; where it has none, it stands still."""
        length, other = group.corrupted.shape[1], group.clean.shape[1]
        if length == other:
            return run
        offset = other - length if self.pairs.align == "end" else 0
        way: Any = backend
        h0 = run.h_boundary[:, 0]
        if offset > 0:
            u, delta, B = (x[:, :offset] for x in run[:3])
            h0 = ops.selective_scan(u, delta, A, B, B, h0=h0, backend=way).h_last
        cut = [x[:, max(0, offset) : max(0, offset) + length] for x in run[:3]]
        left = max(0, -offset)
        right = length - left - cut[0].shape[1]
        u, delta, B = [torch.nn.functional.pad(x, (0, 0, left, right)) for x in cut]
        out = ops.selective_scan(u, delta, A, B, B, h0=h0, boundaries=_INTERVAL, backend=way)
        assert out.h_boundary is not None
        return ops.Course(u, delta, B, out.h_boundary)


def _own(value: Tensor, hook: Any) -> None:
    """A hook that lets the block go on with this very value."""
    value.retain_grad()


def _reached(name: str, grad: Tensor | None) -> Tensor:
    if grad is None:
        raise HookError(f"no gradient arrives at {name}: a module or hook of its block cuts it (detach, no_grad)")
    return grad

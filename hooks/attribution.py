"""Attribution patching: what every patch of a sweep would do, to first order, from one walk back through the layers.

Gradient × difference (Nanda, "Attribution patching", 2023; Syed et al., 2310.10348):

    predicted change at (layer, position) = ⟨dm/da of the corrupted run, a of the clean run − a of the corrupted run⟩

1. Run both texts, keeping the residual stream that enters every block and the states every 64 tokens.
2. From the last blocks to the first, a span of them at a time: run it again on the corrupted stream, with a graph, and
   on the clean stream without one; take the metric's derivative by all sites at once; add up its product with the
   difference.
3. At ``h`` the derivative by h[t] and the difference of the two runs' states meet inside one reverse scan
   (`mambascope.ops.state_contraction`), so that no state is ever stored.

As many blocks make a span as fit a gigabyte of graph (on a CPU an eighth: nothing is gained there by more), half of all
at most. With ``steps`` the derivative is the mean over points between the two texts' embeddings (integrated gradients,
Sundararajan et al., 1703.01365, as in EAP-IG, Hanna et al., 2403.17806).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.hooks.attribution_span import INTERVAL, Entering, Spans
from mambascope.hooks.metrics import Bound, Given, Metric, bind
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.points import spec_of
from mambascope.hooks.sweeps import warn_if_tiny
from mambascope.hooks.sweeps.over import STATE, Grid, grid_of
from mambascope.hooks.sweeps.result import Sweep
from mambascope.hooks.sweeps.texts import Align, Group, Pairs, pairs_of
from mambascope.hooks.sweeps.watch import Watch
from mambascope.memory import available_bytes

__all__ = ["attribute"]

_TOGETHER = {"cpu": 0, "cuda": 1 << 13}  # tokens of one text up to which both are read in one pass: fewer launches
_GRAPH = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes of graph, derivatives and clean values in memory at a time


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
        InputError: as a sweep; a point inside another recurrence than Mamba's; a metric without a gradient (`Rank`, or
            a function that detaches).
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a positive number of points, got {steps!r}")
    pairs = pairs_of(model, clean, corrupted, align, prepend_bos)
    grid = grid_of(model, pairs, over)
    inside = next((site for site in grid.sites if site != STATE and spec_of(f"blocks.0.{site}").stepwise), None)
    if inside is not None:
        raise InputError(
            f"{inside} lies inside its layer's recurrence and has no gradient as a whole to attribute with: patch it "
            f"(ms.sweep over {inside!r}), or read its gradient step by step (bwd_hooks)"
        )
    if steps > 1 and any(g.clean.shape != g.corrupted.shape for g in pairs.groups):
        raise InputError("steps > 1 goes along a line between the two texts, so they need as many tokens each")
    return _Attribution(model, pairs, grid, metric, keep, steps).run()


@dataclass
class _Ready:
    """A group of pairs, read once. ``streams``: what enters each block at the points where the derivative is taken,
    ``steps·B L M``; ``clean`` and ``base``: of the two texts, as their runs were watched."""

    group: Group
    clean: Watch
    base: Watch
    streams: dict[int, Tensor]
    final: Tensor  # steps·B L M
    clean_logits: Tensor
    base_logits: Tensor
    g: Tensor | None = None  # the metric's derivative by the stream at hand


class _Attribution:
    def __init__(self, model: Runnable, pairs: Pairs, grid: Grid, metric: Any, keep: int | None, steps: int) -> None:
        if torch.is_inference_mode_enabled():
            raise InputError("attribution takes gradients, which torch.inference_mode() rules out: leave it first")
        self.model, self.pairs, self.grid, self.steps = model, pairs, grid, steps
        self.spans = Spans(model, grid, pairs.align, steps)
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
        found: list[Tensor] = []  # sites layers positions groups, summed over pairs
        while top > min(grid.layers):
            bottom = max(min(grid.layers), top - depth)
            each = [self._span(ready, bottom, top) for ready in self.ready]
            some = [x for x in each if x is not None]
            if some:
                found.append(torch.stack(some).sum(0))
            top = bottom
        change = torch.cat(found[::-1], 1).double().cpu() / self.pairs.count
        tokens = self.pairs.labels(self.model, grid.positions)
        done = torch.ones(grid.shape, dtype=torch.bool)
        return Sweep(change + corrupted, done, clean, corrupted, grid, tokens, self.bound.spec, change.numel())

    # ---- forward

    def _read(self, group: Group) -> _Ready:
        (clean, clean_logits, _), (base, base_logits, final) = self._both(group)
        streams = base.resid
        if self.steps > 1:
            at = (torch.arange(self.steps, device=final.device, dtype=torch.float64) + 0.5) / self.steps
            apart = clean.resid[0] - base.resid[0]
            line = base.resid[0][None] + at.to(apart.dtype)[:, None, None, None] * apart  # steps B L M
            points, _, final = self._forward(line.flatten(0, 1), start_at_layer=0)
            streams = points.resid
        return _Ready(group, clean, base, streams, final, clean_logits, base_logits)

    def _both(self, group: Group) -> list[tuple[Watch, Tensor, Tensor]]:
        """The clean and the corrupted run, in one pass where that is faster and nobody's hook counts rows."""
        texts = [group.clean, group.corrupted]
        short = group.clean.numel() <= _TOGETHER.get(self.model.device.type, _TOGETHER["cuda"])
        alike = group.clean.shape == group.corrupted.shape
        if not (short and alike) or any(p.live for p in self.model.hook_dict.values()):
            return [self._forward(text) for text in texts]
        n = len(group.clean)
        watch, *rest = self._forward(torch.cat(texts))
        halves = (slice(0, n), slice(n, 2 * n))
        return [(watch.rows(rows), *(x[rows] for x in rest)) for rows in halves]  # type: ignore[misc]

    def _forward(self, entry: Tensor, **options: Any) -> tuple[Watch, Tensor, Tensor]:
        """The run as it was watched, the last logits, and what leaves the last block."""
        last = f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"
        watch = Watch(set(), INTERVAL, end=last)
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
        most = _GRAPH.get(self.model.device.type, _GRAPH["cuda"])
        most = most if at_hand is None else min(most, at_hand // 4)
        return max(1, min(most // max(1, size), -(-n // 2)))

    def _span(self, ready: _Ready, first: int, last: int) -> Tensor | None:
        """Walk back over blocks [first, last) of a group's pairs; see `Spans.run`."""
        states = self.spans.layers(first, last) if STATE in self.grid.sites else []
        clean, base = ({i: run.anchors[f"blocks.{i}.{STATE}"] for i in states} for run in (ready.clean, ready.base))
        streams = ready.streams[first], cast(Tensor, ready.g), ready.clean.resid[first], ready.base.resid[first]
        ready.g, found = self.spans.run(Entering(*streams, clean, base, ready.base.backend), first, last)
        return found

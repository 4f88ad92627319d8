"""Attribution patching: what every patch of a sweep would do, to first order, from one walk back through the layers.

Gradient × difference (Nanda, "Attribution patching", 2023; Syed et al., 2310.10348):

    predicted change at (layer, position) = ⟨dm/da of the corrupted run, a of the clean run − a of the corrupted run⟩

1. Run both texts, keeping the residual stream that enters every block.
2. From the last block to the first: run that block again on the corrupted stream, with a graph of this block alone, and
   on the clean stream without one; take the metric's derivative by each site; add up its product with the difference.
3. At ``h`` the derivative by h[t] and the difference of the two runs' states meet inside one reverse scan
   (`mambascope.ops.state_contraction`), so that no state is ever stored.

One block's graph is in memory at a time. With ``steps`` the derivative is the mean over points between the two texts'
embeddings (integrated gradients, Sundararajan et al., 1703.01365, as in EAP-IG, Hanna et al., 2403.17806).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mambascope import ops
from mambascope.errors import HookError, InputError
from mambascope.hooks.metrics import Bound, Given, Metric, bind
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.sweeps import warn_if_tiny
from mambascope.hooks.sweeps.over import STATE, Grid, grid_of
from mambascope.hooks.sweeps.result import Sweep
from mambascope.hooks.sweeps.texts import Align, Group, Pairs, pairs_of
from mambascope.hooks.sweeps.watch import WINDOW, Watch

__all__ = ["attribute"]

_INTERVAL = 64
_READ = (*WINDOW, "mixer.hook_C", "mixer.hook_y")  # what the derivative by h needs of its block


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
        each with steps). Memory: the residual stream of every layer, and one block's graph: O(L (layers M + D)), at
        ``"h"`` too.

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
    ``steps·B L M``; ``clean`` and ``base``: of the two texts."""

    group: Group
    clean: dict[int, Tensor]
    base: dict[int, Tensor]
    streams: dict[int, Tensor]
    final: Tensor  # steps·B L M
    clean_logits: Tensor
    base_logits: Tensor
    g: Tensor | None = None  # the metric's derivative by the stream at hand


class _Attribution:
    def __init__(self, model: Runnable, pairs: Pairs, grid: Grid, metric: Any, keep: int | None, steps: int) -> None:
        self.model, self.pairs, self.grid, self.steps = model, pairs, grid, steps
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
        self._start()
        grid = self.grid
        found = torch.zeros(grid.shape, dtype=torch.float64)
        for layer in reversed(range(min(grid.layers), self.model.cfg.n_layers)):
            for ready in self.ready:
                products = self._block(ready, layer)
                if layer in grid.layers:
                    i = grid.layers.index(layer)
                    for s, product in enumerate(products):
                        found[s, i] += product.double().cpu() / self.pairs.count
        tokens = self.pairs.labels(self.model, grid.positions)
        done = torch.ones(grid.shape, dtype=torch.bool)
        return Sweep(found + corrupted, done, clean, corrupted, grid, tokens, self.bound.spec, found.numel())

    # ---- forward

    def _read(self, group: Group) -> _Ready:
        clean, clean_logits, _ = self._forward(group.clean)
        base, base_logits, final = self._forward(group.corrupted)
        streams = base
        if self.steps > 1:
            at = (torch.arange(self.steps, device=final.device, dtype=torch.float64) + 0.5) / self.steps
            apart = clean[0] - base[0]
            line = base[0][None] + at.to(apart.dtype)[:, None, None, None] * apart  # steps B L M
            streams, _, final = self._forward(line.flatten(0, 1), start_at_layer=0)
        return _Ready(group, clean, base, streams, final, clean_logits, base_logits)

    def _forward(self, entry: Tensor, **options: Any) -> tuple[dict[int, Tensor], Tensor, Tensor]:
        """What enters each block, the last logits, and what leaves the last block."""
        last = f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"
        watch = Watch(set(), None, end=last)
        logits = self.model(entry, recorder=watch, logits_to_keep=self.keep, **options)
        return watch.resid, logits, watch.values[last]

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

    def _block(self, ready: _Ready, layer: int) -> list[Tensor]:
        """Walk back over one block; for each site the products summed over pairs, ``positions groups``."""
        wanted = self.grid.sites if layer in self.grid.layers else ()
        tails = dict.fromkeys(t for site in wanted for t in (_READ if site == STATE else (site,)))
        names = [f"blocks.{layer}.{tail}" for tail in tails]
        interval = _INTERVAL if STATE in wanted else None
        seen: dict[str, Tensor] = {}
        watch = Watch(set(), interval, resid=False)

        def keep(value: Tensor, hook: Any) -> None:
            seen[hook.name] = value
            value.retain_grad()  # so the block goes on with this very value, in its graph

        options = {"start_at_layer": layer, "stop_at_layer": layer + 1}
        with torch.enable_grad():
            leaf = ready.streams[layer].detach().requires_grad_()
            out = self.model.run_with_hooks(leaf, recorder=watch, fwd_hooks=[(n, keep) for n in names], **options)
            sites = [seen[n] for n in names]
            grads = torch.autograd.grad(out, [leaf, *sites], ready.g, allow_unused=True)
        del out
        ready.g = grads[0]
        if not wanted:
            return []
        by_name = {n: _reached(n, grad) for n, grad in zip(names, grads[1:], strict=True)}
        with torch.no_grad():
            values = {n: v.detach() for n, v in seen.items()}
            seen.clear()
            clean = self._again(ready.clean[layer], layer, set(names), interval)
            base = watch
            base.values = values
            if self.steps > 1:
                base = self._again(ready.base[layer], layer, set(names), interval)
            products = []
            for site in wanted:
                if site == STATE:
                    product = self._states(ready, layer, by_name, values, base, clean)
                else:
                    name = f"blocks.{layer}.{site}"
                    product = self._product(ready, by_name[name], base.values[name], clean.values[name])
                products.append(self._summed(site, product))
        return products

    def _again(self, stream: Tensor, layer: int, names: set[str], interval: int | None) -> Watch:
        watch = Watch(names, interval, resid=False)
        self.model(stream, start_at_layer=layer, stop_at_layer=layer + 1, recorder=watch)
        return watch

    def _columns(self, group: Group) -> tuple[list[int], list[int]]:
        """Columns of the corrupted and of the clean text, a position each."""
        length, other = group.corrupted.shape[1], group.clean.shape[1]
        return [p % length for p in self.grid.positions], [p % other for p in self.grid.positions]

    def _product(self, ready: _Ready, grad: Tensor, base: Tensor, clean: Tensor) -> Tensor:
        """Gradient × difference at the positions, summed over pairs: ``positions width``."""
        here, there = self._columns(ready.group)
        wide = torch.promote_types(base.dtype, torch.float32)
        apart = clean[:, there].to(wide) - base[:, here].to(wide)  # B P F
        g = grad.unflatten(0, (self.steps, -1)).mean(0)[:, here]
        return (g.to(wide) * apart).sum(0)

    def _summed(self, site: str, product: Tensor) -> Tensor:
        """``positions width`` -> ``positions groups``."""
        masks = self.grid.masks(site, self.model)
        if product.ndim > 2:  # heads: channels are those within each
            product = product.flatten(1).sum(-1, keepdim=True) if masks is None else product.sum(1)
        return product.sum(-1, keepdim=True) if masks is None else product @ masks.to(product.dtype).T

    def _states(
        self,
        ready: _Ready,
        layer: int,
        grads: dict[str, Tensor],
        values: dict[str, Tensor],
        base: Watch,
        clean: Watch,
    ) -> Tensor:
        """At h: ``positions D``, from one reverse scan a step."""
        dy = grads[f"blocks.{layer}.mixer.hook_y"]
        here, _ = self._columns(ready.group)
        A = self.model.decay(layer)
        delta, C = values[f"blocks.{layer}.mixer.hook_delta"], values[f"blocks.{layer}.mixer.hook_C"]
        a = self._course(base, layer, A)
        b = self._shifted(ready.group, self._course(clean, layer, A), A, base.backend)
        batch = len(ready.group.rows)
        total = torch.zeros((), device=A.device)
        way: Any = base.backend
        for step in range(self.steps):
            cut = slice(step * batch, (step + 1) * batch)
            found = ops.state_contraction(
                dy[cut], delta[cut], C[cut], A, a, b, boundaries=_INTERVAL, backend=way
            )  # B L D
            total = total + found[:, here].sum(0) / self.steps
        return total

    def _course(self, watch: Watch, layer: int, A: Tensor) -> ops.Course:
        u, delta, B = (watch.values[f"blocks.{layer}.{tail}"] for tail in WINDOW)
        anchors = watch.anchors[f"blocks.{layer}.{STATE}"]
        count = -(-u.shape[1] // _INTERVAL)
        wanted = [c * _INTERVAL - 1 for c in range(count)]
        if anchors.columns[:count] == wanted:
            return ops.Course(u, delta, B, anchors.states[:, :count])
        # hooks cut the scan elsewhere; the states there are still the run's own
        return ops.Course(u, delta, B, watch.entering(self.model, layer, wanted))

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


def _reached(name: str, grad: Tensor | None) -> Tensor:
    if grad is None:
        raise HookError(f"no gradient arrives at {name}: a module or hook of its block cuts it (detach, no_grad)")
    return grad

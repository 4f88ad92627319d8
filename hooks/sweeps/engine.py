"""Many patched runs at the price of their suffixes: which edits run together, and what the metric says of each.

See ``walk`` for how they run. With hooks of the user's in force, every edit instead runs the whole text from its layer
on, so that those hooks see the positions they were given. Where a layer is no Mamba, suffixes start with the text.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.hooks.metrics import Bound, Given, Metric, bind
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.sweeps.over import STATE, Edit, Grid
from mambascope.hooks.sweeps.patches import Patches
from mambascope.hooks.sweeps.starts import AFTER, BEFORE, Indices, Ready, read
from mambascope.hooks.sweeps.texts import Group, Pairs
from mambascope.hooks.sweeps.walk import Walk

__all__ = ["Engine"]

_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 16}  # rows × length that one block is given at a time
_PIECE = {"cpu": 1 << 14, "cuda": 1 << 18}  # the same, of a piece of the sweep at its last block
_LANE = {"cpu": 1e-4, "cuda": 5e-5}  # seconds that conv and scan of a lane take, however little they are given
_SPEED = {"cpu": 5e10, "cuda": 2e13}  # multiplications and additions a second
_COPY = {"cpu": 2e9, "cuda": 5e11}  # bytes of kept states a second
_STATES = 1 << 29  # bytes of kept states, at most
_LOGITS = 1 << 26  # logits held at a time


class Engine:
    """Runs and judges the edits of a sweep."""

    def __init__(self, model: Runnable, pairs: Pairs, grid: Grid, metric: Any, keep: int | None) -> None:
        self.model, self.pairs, self.grid = model, pairs, grid
        self._device = model.device.type
        self.hooked = any(point.live for point in model.hook_dict.values())
        self.patches, self._indices = Patches(model, grid), Indices(model.device)
        reads = metric.keep if isinstance(metric, Metric) else keep
        if reads is not None and (isinstance(reads, bool) or not isinstance(reads, int) or reads < 1):
            raise InputError(f"keep must be a positive number of last positions, or None for all, got {reads!r}")
        if reads is not None and reads > pairs.shortest:
            raise InputError(f"the metric reads the last {reads} positions, the shortest text has {pairs.shortest}")
        if reads is None and not pairs.same_length:
            raise InputError(
                "a metric of all positions needs texts of one length; give keep=, how many last ones count"
            )
        self._keep = reads
        intervals = [self._interval(group) for group in pairs.groups]
        self.ready = [
            read(model, g, grid, t, reads, self.hooked, self._indices)
            for g, t in zip(pairs.groups, intervals, strict=True)
        ]
        rows = [(b, r) for r in self.ready for b in range(len(r.group.rows))]
        rows = [rows[i] for i in _inverse([i for g in pairs.groups for i in g.rows])]
        tokens = [r.group.corrupted[b] for b, r in rows]
        self.bound: Bound = bind(metric, Given(model, [r.clean_logits[b] for b, r in rows], tokens), reads)
        last = torch.stack([r.clean_logits[b, -1] for b, r in rows])
        texts = [[r.clean_logits for r in self.ready], [r.base_logits for r in self.ready]]
        numbers = [self._judge([p[None] for p in parts]).double().flatten() for parts in texts]
        spread = last[..., : model.cfg.n_tokens].float().std(-1).mean().double()[None]
        self.clean, self.corrupted, self.spread = torch.cat([*numbers, spread]).tolist()
        for what, value in (("the clean text", self.clean), ("the corrupted text", self.corrupted)):
            if not math.isfinite(value):
                raise InputError(f"the metric is {value} on {what}; it must give a finite number")

    # ---- the plan

    def _interval(self, group: Group) -> int:
        """Tokens between kept states: many make a suffix start close to its edit, few make larger batches."""
        length, cfg, n = group.corrupted.shape[1], self.model.cfg, self.model.cfg.n_layers
        if self.hooked or cfg.pattern:  # only Mamba's states are kept: other mixers start with the text
            return length
        columns = [p % length for p in self.grid.positions]
        depth = sum(n - i for i in self.grid.layers)
        sites, _, _, groups = self.grid.shape
        rows = len(group.rows) * sites * groups * depth
        token = 3 * cfg.d_model * cfg.d_inner / _of(_SPEED, self._device)
        lane = n * _of(_LANE, self._device)
        best, least = length, float("inf")
        interval = 1
        while interval < length:
            starts: dict[int, int] = {}
            for c in columns:
                starts[c - c % interval] = starts.get(c - c % interval, 0) + 1
            kept = 4 * n * len(group.rows) * cfg.d_inner * cfg.d_state * -(-length // interval)
            cost = kept / _of(_COPY, self._device) + sum(
                lane + k * rows * (length - s) * token for s, k in starts.items()
            )
            if kept <= _STATES and cost < least:
                best, least = interval, cost
            interval *= 2
        return best

    def pieces(self) -> list[list[int]]:
        """The numbers of the edits that are computed and written together, in order of their columns."""
        first, most, tokens = self.ready[0], _of(_PIECE, self._device), 0
        length = first.group.corrupted.shape[1]
        costs = {p: self.pairs.count * (length - first.start(p)) for p in self.grid.positions}
        found: list[list[int]] = [[]]
        for i in self.grid.in_order():
            mine = costs[self.grid.position(i)]
            if found[-1] and tokens + mine > most:
                found.append([])
                tokens = 0
            found[-1].append(i)
            tokens += mine
        return found

    def run(self, numbers: Sequence[int]) -> Tensor:
        """The metric of these edits, float64."""
        runs = self._logits_hooked(numbers) if self.hooked else self._logits(numbers)
        judged = [(which, self._judge(logits).double()) for which, logits in runs]
        out = torch.empty(len(numbers), dtype=torch.float64)
        for which, values in judged:  # read only now: reading waits for all work that was given to the device
            out[which] = values.cpu()
        bad = (~torch.isfinite(out)).nonzero()
        if len(bad):
            e = self.grid.edit(numbers[int(bad[0])])
            raise InputError(
                f"the metric is {float(out[bad[0]])} with {e.site} of layer {e.layer} patched at position "
                f"{e.position}; a metric must give a finite number on every run"
            )
        return out

    def _judge(self, parts: list[Tensor]) -> Tensor:
        """The metric of ``E B k V`` logits, the groups' pairs put back in order."""
        if len(parts) == 1 and self.pairs.groups[0].rows == tuple(range(self.pairs.count)):
            return self.bound.judge(parts[0])
        order = _inverse([i for g in self.pairs.groups for i in g.rows])
        return self.bound.judge(torch.cat(parts, 1)[:, order])

    # ---- the patched runs

    def _logits(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """``(places of edits in the piece, logits E B k V of each group)``, some edits at a time."""
        depth = self._keep or max(r.group.corrupted.shape[1] for r in self.ready)
        lasts = [self._walk(numbers, ready, depth) for ready in self.ready]
        size = max(1, _LOGITS // (self.pairs.count * depth * self.model.cfg.d_vocab))
        for a in range(0, len(numbers), size):
            which = list(range(a, min(a + size, len(numbers))))
            yield which, [self._unembedded(*x, a, which[-1] + 1) for x in zip(self.ready, lasts, strict=True)]

    def _walk(self, numbers: Sequence[int], ready: Ready, depth: int) -> list[Tensor]:
        """Of each lane of edits, in order, the final streams at the last positions, ``E B S M``."""
        grid, tokens, model, patches = self.grid, _of(_TOKENS, self._device), self.model, self.patches

        def walk(ready: Ready) -> list[Tensor]:
            return Walk(model, [grid.edit(i) for i in numbers], ready, patches, tokens).run(depth)

        if not all(site in (BEFORE, STATE, *AFTER) for site in grid.sites):  # hooks are called on the way
            return walk(ready)
        bare = ready.bare()  # a recording must not hold what it was made with
        key = (grid, tuple(numbers), ready.interval, ready.pairs, ready.group.clean.shape, depth, tokens)
        return model.again(key, ready.tensors(), lambda tensors: walk(bare.over(tensors)))

    def _unembedded(self, ready: Ready, lasts: list[Tensor], a: int, b: int) -> Tensor:
        """Logits ``E B k V`` of the edits [a, b), which follow one another in the lanes."""
        depth, some, first = self._keep or ready.group.corrupted.shape[1], [], 0
        for last in lasts:
            low, high = max(a - first, 0), min(b - first, len(last))
            first += len(last)
            if low < high:
                some.append(last[low:high])  # E B S M
        if all(x.shape[2] == depth for x in some):
            some = [torch.cat(some)]
        parts = []
        for x in some:
            normed = self.model.ln_final(x.contiguous())
            logits = self.model.unembed(normed.reshape(-1, normed.shape[-1])).view(*normed.shape[:-1], -1)
            missing = depth - logits.shape[2]
            if missing:  # positions before the suffix are those of the corrupted run
                kept = ready.base_logits[None, :, :missing].expand(len(x), -1, -1, -1)
                logits = torch.cat([kept, logits], 2)
            parts.append(logits)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _logits_hooked(self, numbers: Sequence[int]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """With the user's hooks in force: whole texts, from each edit's layer on."""
        edits = [self.grid.edit(i) for i in numbers]
        for layer in sorted({e.layer for e in edits}):
            places = [i for i, e in enumerate(edits) if e.layer == layer]
            tokens = self.pairs.count * max(r.group.corrupted.shape[1] for r in self.ready)
            size = max(1, _of(_TOKENS, self._device) // tokens)
            for a in range(0, len(places), size):
                which = places[a : a + size]
                some = [edits[i] for i in which]
                yield which, [self._run_hooked(layer, some, ready) for ready in self.ready]

    def _run_hooked(self, layer: int, edits: Sequence[Edit], ready: Ready) -> Tensor:
        logits = self.model.run_with_hooks(
            ready.base.resid[layer].repeat(len(edits), 1, 1),
            start_at_layer=layer,
            logits_to_keep=self._keep,
            fwd_hooks=self.patches.hooks(layer, edits, ready, 0),
        )
        return logits.unflatten(0, (len(edits), -1))


def _of(table: dict[str, Any], device: str) -> Any:
    return table.get(device, table["cuda"])


def _inverse(order: Sequence[int]) -> list[int]:
    """Where each number stands in a permutation."""
    where = [0] * len(order)
    for place, i in enumerate(order):
        where[i] = place
    return where

"""Many patched runs at the price of their suffixes.

An edit at layer i and position p leaves every earlier layer and every earlier token as they were. So, of one run of the
corrupted text, the residual stream entering every block is kept, and every ``interval`` tokens the states of all
layers. Then, for all edits whose positions lie in the same interval:

1. walk up the blocks; before block i the edits of layer i join as new rows, made from the kept stream;
2. run the block on all rows at once, from the interval's start and the states kept there;
3. at the end judge the last positions.

So a row is computed through the layers from its own on, over the tokens from its interval on. Edits of the stream
itself (resid_pre, mixer_out, resid_post) are written into it; others run their own block with a hook that has a
different position in every row. With hooks of the user's in force, every edit instead runs the whole text from its
layer on, so that those hooks see the positions they were given. Where a layer is no Mamba, the interval is the text.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.hooks.metrics import Bound, Given, Metric, bind
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.positions import at
from mambascope.hooks.sweeps.over import STATE, Edit, Grid
from mambascope.hooks.sweeps.texts import Group, Pairs
from mambascope.hooks.sweeps.watch import WINDOW, Watch
from mambascope.memory import require_bytes

__all__ = ["Engine"]

_BEFORE, _AFTER = "hook_resid_pre", ("hook_mixer_out", "hook_resid_post")
_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 16}  # rows × length that one block is given at a time
_PIECE = {"cpu": 1 << 14, "cuda": 1 << 18}  # the same, of a piece of the sweep at its last block
_CALL = {"cpu": 1e-4, "cuda": 2e-4}  # seconds that a block takes however little it is given
_SPEED = {"cpu": 5e10, "cuda": 2e13}  # multiplications and additions a second
_READ = {"cpu": 1e10, "cuda": 2e12}  # bytes of weights a second: what a block costs that is given few tokens
_COPY = 2e9  # bytes of kept states a second
_STATES = 1 << 29  # bytes of kept states, at most
_LOGITS = 1 << 26  # logits held at a time


@dataclass
class Ready:
    """A group of pairs, read once: what the patched runs start from and what is put into them."""

    group: Group
    interval: int
    base: Watch
    clean: Watch
    base_logits: Tensor  # B k V
    clean_logits: Tensor

    def column(self, position: int) -> int:
        """The corrupted text's column of a position (negative ones count from the end)."""
        return position % self.group.corrupted.shape[1]

    def clean_column(self, position: int) -> int:
        return position % self.group.clean.shape[1]


class Engine:
    """Runs and judges the edits of a sweep."""

    def __init__(self, model: Runnable, pairs: Pairs, grid: Grid, metric: Any, keep: int | None) -> None:
        self.model, self.pairs, self.grid = model, pairs, grid
        self._device = model.device.type
        self.hooked = any(point.live for point in model.hook_dict.values())
        self._masks = {site: grid.masks(site, model) for site in grid.sites}
        self._blank = model.initial_state(1)
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
        self.ready = [self._read(g, t) for g, t in zip(pairs.groups, intervals, strict=True)]
        rows = [(b, r) for r in self.ready for b in range(len(r.group.rows))]
        rows = [rows[i] for i in _inverse([i for g in pairs.groups for i in g.rows])]
        tokens = [r.group.corrupted[b] for b, r in rows]
        self.bound: Bound = bind(metric, Given(model, [r.clean_logits[b] for b, r in rows], tokens), reads)
        self.clean = self._judged("the clean text", [r.clean_logits for r in self.ready])
        self.corrupted = self._judged("the corrupted text", [r.base_logits for r in self.ready])
        last = torch.stack([r.clean_logits[b, -1] for b, r in rows])
        self.spread = float(last[..., : model.cfg.n_tokens].float().std(-1).mean())

    # ---- reading the two texts

    def _read(self, group: Group, interval: int) -> Ready:
        n, length = self.model.cfg.n_layers, group.corrupted.shape[1]
        layers = range(min(self.grid.layers), n)
        names = {f"blocks.{i}.mixer.hook_x" for i in layers} if interval < length else set()
        tails = {tail for site in self.grid.sites for tail in (WINDOW if site == STATE else (site,))}
        wanted = {f"blocks.{i}.{tail}" for i in self.grid.layers for tail in tails}
        self._check_memory(group, interval, len(tails))
        base = Watch(names, interval if interval < length else None, end=f"blocks.{n - 1}.hook_resid_post")
        clean = Watch(wanted, min(max(interval, 16), 64) if STATE in self.grid.sites else None, resid=False)
        options = {"logits_to_keep": self._keep}
        base_logits = self.model(group.corrupted, recorder=base, **options)
        clean_logits = self.model(group.clean, recorder=clean, **options)
        return Ready(group, interval, base, clean, base_logits, clean_logits)

    def _check_memory(self, group: Group, interval: int, sites: int) -> None:
        cfg, (batch, length) = self.model.cfg, group.corrupted.shape
        values = length * (cfg.d_model + cfg.d_inner * (1 + sites))
        states = (-(-length // interval)) * cfg.d_inner * cfg.d_state
        need = 4 * batch * cfg.n_layers * (values + states)
        way_out = "sweep fewer sites at a time, fewer pairs, or a shorter text"
        require_bytes(need, self.model.device, "what a sweep starts from", way_out, InputError)

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
        best, least = length, float("inf")
        interval = 1
        while interval < length:
            starts: dict[int, int] = {}
            for c in columns:
                starts[c - c % interval] = starts.get(c - c % interval, 0) + 1
            kept = 4 * n * len(group.rows) * cfg.d_inner * cfg.d_state * -(-length // interval)
            weights = 4 * 3 * cfg.d_model * cfg.d_inner
            call = n * (_of(_CALL, self._device) + weights / _of(_READ, self._device))
            cost = kept / _COPY + sum(call + k * rows * (length - s) * token for s, k in starts.items())
            if kept <= _STATES and cost < least:
                best, least = interval, cost
            interval *= 2
        return best

    # ---- the plan

    def pieces(self) -> list[list[int]]:
        """The numbers of the edits that are computed and written together, in order."""
        first = self.ready[0]
        length = first.group.corrupted.shape[1]
        size = max(1, _of(_PIECE, self._device) // (self.pairs.count * length))
        edits = [(first.column(e.position), e.layer, i) for i in range(self.grid.size) for e in (self.grid.edit(i),)]
        by_segment: dict[int, list[int]] = {}
        for column, _, i in sorted(edits):
            by_segment.setdefault(column // first.interval, []).append(i)
        return [
            segment[a : a + size] for _, segment in sorted(by_segment.items()) for a in range(0, len(segment), size)
        ]

    def run(self, numbers: Sequence[int]) -> Tensor:
        """The metric of these edits, float64."""
        edits = [self.grid.edit(i) for i in numbers]
        out = torch.empty(len(edits), dtype=torch.float64)
        for which, logits in self._logits_hooked(edits) if self.hooked else self._logits(edits):
            values = self._judge(logits).double().cpu()
            bad = (~torch.isfinite(values)).nonzero()
            if len(bad):
                e = edits[which[int(bad[0])]]
                raise InputError(
                    f"the metric is {float(values[bad[0]])} with {e.site} of layer {e.layer} patched at position "
                    f"{e.position}; a metric must give a finite number on every run"
                )
            out[which] = values
        return out

    def _judge(self, parts: list[Tensor]) -> Tensor:
        """The metric of ``E B k V`` logits, the groups' pairs put back in order."""
        if len(parts) == 1 and self.pairs.groups[0].rows == tuple(range(self.pairs.count)):
            return self.bound.judge(parts[0])
        order = _inverse([i for g in self.pairs.groups for i in g.rows])
        return self.bound.judge(torch.cat(parts, 1)[:, order])

    def _judged(self, what: str, parts: list[Tensor]) -> float:
        value = float(self._judge([p[None] for p in parts]))
        if value != value or value in (float("inf"), float("-inf")):
            raise InputError(f"the metric is {value} on {what}; it must give a finite number")
        return value

    # ---- the patched runs

    def _logits(self, edits: Sequence[Edit]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """``(numbers of edits, logits E B k V of each group)``, some edits at a time."""
        walked = [self._walk(edits, ready) for ready in self.ready]
        depth = self._keep or max(r.group.corrupted.shape[1] for r in self.ready)
        size = max(1, _LOGITS // (self.pairs.count * depth * self.model.cfg.d_vocab))
        for a in range(0, len(edits), size):
            which = list(range(a, min(a + size, len(edits))))
            parts = []
            for ready, rows in zip(self.ready, walked, strict=True):
                final = rows[a : a + size]  # E B S M
                keep = self._keep if self._keep is not None else final.shape[2]
                short = final[:, :, -keep:].contiguous()
                normed = self.model.ln_final(short)
                logits = self.model.unembed(normed.reshape(-1, normed.shape[-1])).view(*normed.shape[:-1], -1)
                missing = (self._keep or ready.group.corrupted.shape[1]) - logits.shape[2]
                if missing > 0:  # positions before the suffix are those of the corrupted run
                    kept = ready.base_logits[None, :, :missing].expand(len(which), -1, -1, -1)
                    logits = torch.cat([kept, logits], 2)
                parts.append(logits)
            yield which, parts

    def _walk(self, edits: Sequence[Edit], ready: Ready) -> Tensor:
        """The final residual stream ``E B S M`` of every edit, over the last S columns."""
        start = min(ready.column(e.position) for e in edits) // ready.interval * ready.interval
        n, batch = self.model.cfg.n_layers, len(ready.group.rows)
        order: list[int] = []
        rows: Tensor | None = None
        for layer in range(min(e.layer for e in edits), n):
            new = [i for i, e in enumerate(edits) if e.layer == layer]
            before = [i for i in new if edits[i].site == _BEFORE]
            after = [i for i in new if edits[i].site in _AFTER]
            inside = [i for i in new if edits[i].site != _BEFORE and edits[i].site not in _AFTER]
            entering = [] if rows is None else [rows]
            if before:
                stream = ready.base.resid[layer][:, start:]
                entering.append(self._written(stream, [edits[i] for i in before], ready, start))
            leaving = [self._block(layer, torch.cat(entering), ready, start)] if entering else []
            if inside:
                leaving.append(self._hooked_block(layer, [edits[i] for i in inside], ready, start))
            if after:
                stream = self._after(layer, ready)[:, start:]
                leaving.append(self._written(stream, [edits[i] for i in after], ready, start))
            order += before + inside + after
            rows = torch.cat(leaving) if leaving else None
        assert rows is not None
        rows = rows.unflatten(0, (len(edits), batch))
        return rows[_inverse(order)]

    def _after(self, layer: int, ready: Ready) -> Tensor:
        last = layer == self.model.cfg.n_layers - 1
        return ready.base.values[f"blocks.{layer}.hook_resid_post"] if last else ready.base.resid[layer + 1]

    def _written(self, stream: Tensor, edits: Sequence[Edit], ready: Ready, start: int) -> Tensor:
        """The stream ``B S M`` with each edit's value written into it: ``E·B S M``."""
        rows = stream[None].repeat(len(edits), 1, 1, 1)  # E B S M
        each = torch.arange(len(edits), device=rows.device)
        places = torch.tensor([ready.column(e.position) - start for e in edits], device=rows.device)
        for site in dict.fromkeys(e.site for e in edits):
            some = torch.tensor([i for i, e in enumerate(edits) if e.site == site], device=rows.device)
            mine = [e for e in edits if e.site == site]
            value = self._values(site, mine, ready)  # E B M
            if site == "hook_mixer_out":  # it is added to the stream that entered the block
                layer = mine[0].layer
                value = ready.base.resid[layer][:, start + places[some]].transpose(0, 1) + value
            old = rows[each[some], :, places[some]]
            rows[each[some], :, places[some]] = self._masked(site, mine, value.to(rows.dtype), old)
        return rows.flatten(0, 1)

    def _values(self, site: str, edits: Sequence[Edit], ready: Ready) -> Tensor:
        """The clean run's values ``E B …`` for edits of one site and layer."""
        columns = [ready.clean_column(e.position) for e in edits]
        layer = edits[0].layer
        if site == STATE:
            low, high = min(columns), max(columns) + 1
            found = ready.clean.states(self.model, layer, low, high)
            columns = [c - low for c in columns]
        else:
            found = ready.clean.values[f"blocks.{layer}.{site}"]
        return found[:, torch.tensor(columns, device=found.device)].transpose(0, 1)

    def _masked(self, site: str, edits: Sequence[Edit], new: Tensor, old: Tensor) -> Tensor:
        """``new`` in each edit's channels, ``old`` in the others; ``E B …`` both."""
        masks = self._masks[site]
        if masks is None:
            return new
        mine = masks[torch.tensor([e.group for e in edits], device=masks.device)][:, None]  # E 1 width
        return torch.where(mine[..., None] if site == STATE else mine, new, old)

    def _state(self, layer: int, rows: int, ready: Ready, start: int) -> Any:
        """The corrupted run's state of a layer before column ``start``, for so many edits; None at the start."""
        if start == 0:
            return None
        ssm = ready.base.state(layer, start)  # B D N
        width = self.model.cfg.d_conv - 1
        x = ready.base.values[f"blocks.{layer}.mixer.hook_x"][:, max(0, start - width) : start]
        conv = torch.nn.functional.pad(x, (0, 0, width - x.shape[1], 0)).transpose(1, 2)  # B D K-1
        tensors = {"ssm": ssm, "conv": conv}
        return self.model.state_from_tensors({k: v.repeat(rows, 1, 1) for k, v in tensors.items()})

    def _block(self, layer: int, rows: Tensor, ready: Ready, start: int) -> Tensor:
        batch = len(ready.group.rows)
        size = max(1, _of(_TOKENS, self._device) // (rows.shape[1] * batch)) * batch
        out = []
        for part in rows.split(size):
            state = self._state(layer, part.shape[0] // batch, ready, start)
            out.append(self.model.replay(layer, part, state, None, ready.base.backend, None))
        return torch.cat(out) if len(out) > 1 else out[0]

    def _hooked_block(self, layer: int, edits: Sequence[Edit], ready: Ready, start: int) -> Tensor:
        """The stream leaving a block in which each edit is made: ``E·B S M``."""
        batch, n = len(ready.group.rows), self.model.cfg.n_layers
        stream = ready.base.resid[layer][:, start:]
        size = max(1, _of(_TOKENS, self._device) // (stream.shape[1] * batch))
        out = []
        for a in range(0, len(edits), size):
            some = edits[a : a + size]
            state = self._state(layer, len(some), ready, start)
            whole = None if state is None else dataclasses.replace(self._blank, layers=[state] * n, position=start)
            out.append(
                self.model.run_with_hooks(
                    stream.repeat(len(some), 1, 1),
                    start_at_layer=layer,
                    stop_at_layer=layer + 1,
                    state=whole,
                    fwd_hooks=self._hooks(layer, some, ready, start),
                )
            )
        return torch.cat(out) if len(out) > 1 else out[0]

    def _hooks(self, layer: int, edits: Sequence[Edit], ready: Ready, start: int) -> list[Any]:
        """One hook a site, with each row's own position."""
        batch = len(ready.group.rows)
        hooks = []
        for site in dict.fromkeys(e.site for e in edits):
            on = [e.site == site for e in edits for _ in range(batch)]
            places = [ready.column(e.position) - start if e.site == site else 0 for e in edits for _ in range(batch)]
            mine = [e for e in edits if e.site == site]
            value = self._values(site, mine, ready)  # E B …
            rows = torch.tensor(on, device=value.device)

            def put(
                old: Tensor, hook: Any, site: str = site, mine: Any = mine, value: Tensor = value, rows: Tensor = rows
            ) -> Tensor:
                kept = old[rows].unflatten(0, (len(mine), batch))
                new = self._masked(site, mine, value.to(old.dtype), kept)
                if len(mine) == len(edits):
                    return new.flatten(0, 1)
                out = old.clone()
                out[rows] = new.flatten(0, 1)
                return out

            put.edits = True  # type: ignore[attr-defined]
            where = at(f"blocks.{layer}.{site}", places, None if all(on) else on)
            hooks.append((where, put))
        return hooks

    def _logits_hooked(self, edits: Sequence[Edit]) -> Iterator[tuple[list[int], list[Tensor]]]:
        """With the user's hooks in force: whole texts, from each edit's layer on."""
        for layer in sorted({e.layer for e in edits}):
            numbers = [i for i, e in enumerate(edits) if e.layer == layer]
            tokens = self.pairs.count * max(r.group.corrupted.shape[1] for r in self.ready)
            size = max(1, _of(_TOKENS, self._device) // tokens)
            for a in range(0, len(numbers), size):
                which = numbers[a : a + size]
                some = [edits[i] for i in which]
                yield which, [self._run_hooked(layer, some, ready) for ready in self.ready]

    def _run_hooked(self, layer: int, edits: Sequence[Edit], ready: Ready) -> Tensor:
        logits = self.model.run_with_hooks(
            ready.base.resid[layer].repeat(len(edits), 1, 1),
            start_at_layer=layer,
            logits_to_keep=self._keep,
            fwd_hooks=self._hooks(layer, edits, ready, 0),
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

"""One walk up the layers in which the batch grows: every layer is run once for all edits, those below it and its own.

An edit at layer i and position p leaves every earlier layer and every earlier token as they were. So an edit's row
joins at layer i, made from the corrupted run's stream there, and holds the tokens from its start on, the nearest column
before p at which the corrupted run's states were kept. Rows with the same start stand in one lane: a batch of their own
for conv and scan, while all lanes' tokens share norm and projections.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.sweeps.over import STATE, Edit
from mambascope.hooks.sweeps.patches import Patches
from mambascope.hooks.sweeps.starts import AFTER, BEFORE, Ready

__all__ = ["Walk"]


@dataclass
class Lane:
    """Edits whose rows start at one column: their numbers, in the order in which they join, and their tokens."""

    start: int
    length: int
    numbers: list[int] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)  # tokens M
    joined: int = 0  # edits

    def join(self, tokens: Tensor, edits: int) -> None:
        self.parts.append(tokens)
        self.joined += edits


def _turn(edit: Edit) -> int:
    """When an edit joins at its layer: 0 before the block, 1 (states) or 2 (others) with it, 3 after it."""
    if edit.site == BEFORE:
        return 0
    return 3 if edit.site in AFTER else 1 if edit.site == STATE else 2


class Walk:
    """Edits on their way. ``tokens``: rows × length that a block is given at a time."""

    def __init__(self, model: Runnable, edits: Sequence[Edit], ready: Ready, patches: Patches, tokens: int) -> None:
        self.model, self.edits, self.ready, self.patches, self.tokens = model, edits, ready, patches, tokens
        length = ready.group.corrupted.shape[1]
        starts = sorted({ready.start(e.position) for e in edits})
        self.lanes = [Lane(start, length - start) for start in starts]
        lane_of = {start: n for n, start in enumerate(starts)}
        self._joining: dict[tuple[int, int], list[tuple[int, int]]] = {}  # by layer and turn: lanes and edits
        lanes = [lane_of[ready.start(e.position)] for e in edits]
        for i in sorted(range(len(edits)), key=lambda i: (lanes[i], edits[i].layer, _turn(edits[i]), i)):
            self.lanes[lanes[i]].numbers.append(i)
            self._joining.setdefault((edits[i].layer, _turn(edits[i])), []).append((lanes[i], i))

    def run(self, keep: int) -> list[Tensor]:
        """Of each lane the final streams of the last ``keep`` positions (as many as there are): ``E B S M``, edits in
        order."""
        n = self.model.cfg.n_layers
        for layer in range(min(e.layer for e in self.edits), n):
            self._write(layer, 0, self.ready.base.resid[layer])
            self._block(layer, keep if layer == n - 1 else None)
            if layer == n - 1:  # nothing reads the other tokens any more
                for lane in self.lanes:
                    lane.length = min(lane.length, keep)
            self._inside(layer, 1)
            self._inside(layer, 2)
            self._write(layer, 3, self.ready.after(layer))
        return [self._last(lane) for lane in self.lanes]

    def _last(self, lane: Lane) -> Tensor:
        rows = torch.cat(lane.parts).view(lane.joined, self.ready.pairs, lane.length, -1)  # E B S M
        order = sorted(range(len(lane.numbers)), key=lane.numbers.__getitem__)
        return rows[self.ready.indices(order)]

    def _write(self, layer: int, turn: int, stream: Tensor) -> None:
        """Edits of the stream itself join: copies of it with their values."""
        some = self._joining.get((layer, turn), [])
        if not some:
            return
        tokens = self.patches.streams(stream, [self.edits[i] for _, i in some], self.ready)
        counts, begin, length = self._counts(some), 0, self.ready.group.corrupted.shape[1]
        for n, k in counts.items():
            lane, rows = self.lanes[n], k * self.ready.pairs
            size = rows * (length - lane.start)
            part, begin = tokens[begin : begin + size], begin + size
            if lane.length < length - lane.start:
                part = part.unflatten(0, (rows, -1))[:, -lane.length :].flatten(0, 1)
            lane.join(part, k)

    def _counts(self, some: list[tuple[int, int]]) -> dict[int, int]:
        counts: dict[int, int] = {}
        for n, _ in some:
            counts[n] = counts.get(n, 0) + 1
        return counts

    def _block(self, layer: int, keep: int | None) -> None:
        """Run a block on the rows that have joined; ``keep``: what is wanted of each."""
        lanes, pairs = [lane for lane in self.lanes if lane.joined], self.ready.pairs
        if not lanes:
            return
        parts = [part for lane in lanes for part in lane.parts]
        stream = torch.cat(parts) if len(parts) > 1 else parts[0]  # T M
        out, begin, batch, filled = [], 0, list[tuple[Lane, int]](), 0

        def run() -> None:
            nonlocal begin
            shapes = [(k * pairs, lane.length) for lane, k in batch]
            states = [self.ready.entering(layer, lane.start, k) for lane, k in batch]
            tokens = stream[begin : begin + filled]
            out.append(self.model.replay_lanes(layer, tokens, shapes, states, self.ready.base.backend, keep))
            begin += filled

        for lane in lanes:
            left, each = lane.joined, pairs * lane.length
            while left:
                if batch and filled + each > self.tokens:
                    run()
                    batch, filled = [], 0
                k = min(left, max(1, (self.tokens - filled) // each))
                batch.append((lane, k))
                filled, left = filled + k * each, left - k
        run()
        after = torch.cat(out) if len(out) > 1 else out[0]
        sizes = [x.joined * pairs * min(x.length, keep or x.length) for x in lanes]
        for lane, part in zip(lanes, after.split(sizes), strict=True):
            lane.parts = [part]

    def _inside(self, layer: int, turn: int) -> None:
        """Edits inside the block join: the streams that leave it with them, of all lanes from the first one's start."""
        places = self._joining.get((layer, turn), [])
        if not places:
            return
        start = self.lanes[places[0][0]].start
        stream = self.ready.base.resid[layer][:, start:]
        size = max(1, self.tokens // (stream.shape[1] * self.ready.pairs))
        for a in range(0, len(places), size):
            some = places[a : a + size]
            run = self._with_states if turn == 1 else self._with_hooks
            counts = self._counts(some)
            out = run(layer, [self.edits[i] for _, i in some], stream, start).split(list(counts.values()))  # E B S M
            for (n, k), rows in zip(counts.items(), out, strict=True):
                self.lanes[n].join(rows[:, :, rows.shape[2] - self.lanes[n].length :].flatten(0, 2), k)

    def _with_states(self, layer: int, edits: list[Edit], stream: Tensor, start: int) -> Tensor:
        """The streams ``E B S M`` leaving a block in which each edit's state is put in."""
        ready = self.ready
        steps = ready.indices([ready.column(e.position) - start for e in edits])
        state, h = ready.entering(layer, start, 1), self.patches.states(edits, ready)
        return self.model.put_states(layer, stream, state, steps, h, ready.base.backend)

    def _with_hooks(self, layer: int, edits: list[Edit], stream: Tensor, start: int) -> Tensor:
        """The same with any other edit inside the block."""
        state = self.ready.entering(layer, start, len(edits))
        layers = [state] * self.model.cfg.n_layers
        blank = self.model.initial_state(1)
        whole = None if state is None else dataclasses.replace(blank, layers=layers, position=start)
        out = self.model.run_with_hooks(
            stream.repeat(len(edits), 1, 1),
            start_at_layer=layer,
            stop_at_layer=layer + 1,
            state=whole,
            fwd_hooks=self.patches.hooks(layer, edits, self.ready, start),
        )
        return out.unflatten(0, (len(edits), -1))

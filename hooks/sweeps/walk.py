"""One walk up the layers in which the batch grows: every layer is run once for all edits, those below it and its own.

An edit at layer i and position p leaves every earlier layer and every earlier token as they were. So an edit's row
joins at layer i, made from the corrupted run's stream there, and holds the tokens from its start on, the nearest column
before p at which the corrupted run's states were kept. Rows with the same start stand in one lane: memory for all of
them, of which a layer runs the part that has joined.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.sweeps.over import STATE, Edit
from mambascope.hooks.sweeps.patches import Patches
from mambascope.hooks.sweeps.starts import AFTER, BEFORE, Indices, Ready

__all__ = ["Lane", "walk"]


@dataclass
class Lane:
    """Edits whose rows start at one column: their numbers, in the order in which they join, and their streams."""

    start: int
    numbers: list[int]
    rows: Tensor  # E B S M
    joined: int = 0

    def last(self, keep: int, indices: Indices) -> Tensor:
        """The streams of the last positions (as many as there are), edits in the order of their numbers."""
        order = sorted(range(len(self.numbers)), key=self.numbers.__getitem__)
        return self.rows[:, :, -keep:][indices(order)]


def walk(model: Runnable, edits: Sequence[Edit], ready: Ready, patches: Patches, tokens: int) -> list[Lane]:
    """The final streams of all edits. ``tokens``: rows × length that a block is given at a time."""
    return _Walk(model, edits, ready, patches, tokens).run()


def _turn(edit: Edit) -> int:
    """When an edit joins at its layer: 0 before the block, 1 (states) or 2 (others) with it, 3 after it."""
    if edit.site == BEFORE:
        return 0
    return 3 if edit.site in AFTER else 1 if edit.site == STATE else 2


class _Walk:
    def __init__(self, model: Runnable, edits: Sequence[Edit], ready: Ready, patches: Patches, tokens: int) -> None:
        self.model, self.edits, self.ready, self.patches, self.tokens = model, edits, ready, patches, tokens
        self._blank = model.initial_state(1)
        starts: dict[int, list[int]] = {}
        for i, e in enumerate(edits):
            starts.setdefault(ready.start(e.position), []).append(i)
        length, stream = ready.group.corrupted.shape[1], ready.base.resid[edits[0].layer]
        self.lanes: list[Lane] = []
        self._joining: dict[tuple[int, int], dict[int, list[int]]] = {}  # by layer and turn: of each lane its edits
        for n, (start, numbers) in enumerate(sorted(starts.items())):
            numbers.sort(key=lambda i: (edits[i].layer, _turn(edits[i]), i))
            rows = stream.new_empty(len(numbers), ready.pairs, length - start, stream.shape[-1])
            self.lanes.append(Lane(start, numbers, rows))
            for i in numbers:
                self._joining.setdefault((edits[i].layer, _turn(edits[i])), {}).setdefault(n, []).append(i)

    def run(self) -> list[Lane]:
        for layer in range(min(e.layer for e in self.edits), self.model.cfg.n_layers):
            self._write(layer, 0, self.ready.base.resid[layer])
            for lane in self.lanes:
                if lane.joined:
                    self._block(layer, lane)
            self._inside(layer, 1)
            self._inside(layer, 2)
            self._write(layer, 3, self.ready.after(layer))
        return self.lanes

    def _write(self, layer: int, turn: int, stream: Tensor) -> None:
        """Edits of the stream itself join: copies of it with their values."""
        for n, some in self._joining.get((layer, turn), {}).items():
            lane = self.lanes[n]
            rows = lane.rows[lane.joined : lane.joined + len(some)]
            rows.copy_(stream[:, lane.start :])
            self.patches.write(rows, [self.edits[i] for i in some], self.ready, lane.start)
            lane.joined += len(some)

    def _block(self, layer: int, lane: Lane) -> None:
        """Run a block on the rows that have joined, in place."""
        size = max(1, self.tokens // (lane.rows.shape[2] * self.ready.pairs))
        for part in lane.rows[: lane.joined].split(size):
            state = self.ready.entering(layer, lane.start, len(part))
            out = self.model.replay(layer, part.flatten(0, 1), state, None, self.ready.base.backend, None)
            part.copy_(out.view(part.shape))

    def _inside(self, layer: int, turn: int) -> None:
        """Edits inside the block join: the streams that leave it with them, of all lanes from the first one's start."""
        joining = self._joining.get((layer, turn), {})
        places = [(n, i) for n, some in joining.items() for i in some]
        if not places:
            return
        start = self.lanes[places[0][0]].start
        stream = self.ready.base.resid[layer][:, start:]
        size = max(1, self.tokens // (stream.shape[1] * self.ready.pairs))
        for a in range(0, len(places), size):
            some = places[a : a + size]
            run = self._with_states if turn == 1 else self._with_hooks
            out = run(layer, [self.edits[i] for _, i in some], stream, start)
            for n in dict.fromkeys(n for n, _ in some):
                lane, mine = self.lanes[n], [k for k, (m, _) in enumerate(some) if m == n]
                rows = lane.rows[lane.joined : lane.joined + len(mine)]
                rows.copy_(out[mine[0] : mine[-1] + 1, :, lane.start - start :])
                lane.joined += len(mine)

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
        whole = None if state is None else dataclasses.replace(self._blank, layers=layers, position=start)
        out = self.model.run_with_hooks(
            stream.repeat(len(edits), 1, 1),
            start_at_layer=layer,
            stop_at_layer=layer + 1,
            state=whole,
            fwd_hooks=self.patches.hooks(layer, edits, self.ready, start),
        )
        return out.unflatten(0, (len(edits), -1))

"""Which tokens a training step sees: a pure function of (seed, step), so that a resumed run needs no generator state.

Each row of a batch comes from one source, drawn with the sources' shares at that step (they may move
linearly over the run). Within a source, rows are windows without replacement: an epoch cuts the text into
windows at a random phase and visits them in a random order.

A share of the rows may be random tokens read twice instead, in segments one after the other: ``N`` tokens, the same
``N`` again, ``N`` log-uniform from 8 to half the row, or to a limit that grows over training. Only what can be recalled
is scored there, the second copies from their second token on. Text alone teaches copying late, if at all; a few such
rows teach it to small models. Log-uniform lengths still put most tokens into long blocks, which a bounded state learns
last; a limit that starts low gives it short ones first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mambascope.errors import InputError
from mambascope.ops.loss import IGNORED
from mambascope.training.recipe import SHORTEST_BLOCK, check_shares

__all__ = ["IGNORED", "Batch", "Batches", "Repeats", "TextStream", "WindowSampler"]


@dataclass(frozen=True)
class Batch:
    """Inputs ``tokens`` B L and the targets of the last positions, B K with K <= L; a target of -100 is not scored."""

    tokens: Int64[Tensor, "B L"]
    targets: Int64[Tensor, "B K"]


class Batches(Protocol):
    """Where the trainer gets its batches: the same step gives the same batch, in any order of asking."""

    def __call__(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class TextStream:
    """One source of text: its token ids and its share of the rows at the start and the end of training."""

    name: str
    ids: np.ndarray
    share: tuple[float, float]


@dataclass(frozen=True)
class Repeats:
    """Rows of random tokens read twice: their share of all rows, the ids to draw from, and the longest block at the
    start and the end of training (it grows by a constant factor a step), half a row where nothing is said."""

    share: float
    ids: np.ndarray
    longest: tuple[int, int] | None = None

    def limit(self, progress: float, length: int) -> float:
        """The longest block after the part ``progress`` (0 … 1) of training."""
        half = max(SHORTEST_BLOCK, length // 2)
        if self.longest is None:
            return half
        first, last = self.longest
        return float(np.clip(first * (last / first) ** progress, SHORTEST_BLOCK, half))

    def row(self, rng: np.random.Generator, length: int, progress: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """``length + 1`` tokens, and which of the ``length`` next tokens are scored."""
        tokens, scored = np.empty(length + 1, np.int64), np.zeros(length + 1, bool)
        limit, at = self.limit(progress, length), 0
        while at <= length:
            n = int(np.exp(rng.uniform(np.log(SHORTEST_BLOCK), np.log(limit))))
            once = rng.choice(self.ids, n)
            twice, recalled = np.concatenate([once, once]), np.arange(2 * n) > n
            end = min(at + 2 * n, length + 1)
            tokens[at:end], scored[at:end] = twice[: end - at], recalled[: end - at]
            at = end
        return tokens, scored[1:]


class WindowSampler:
    """Batches of next-token windows from several sources; see the module's text.

    ``length`` is in tokens, ``steps`` the whole length of training (it fixes how shares move). Shares move
    only over the last ``1 - hold`` part of the steps. Raises InputError where a source is shorter than two windows,
    ConfigError where the shares are not a distribution.
    """

    def __init__(
        self,
        streams: Sequence[TextStream],
        *,
        batch: int,
        length: int,
        steps: int,
        seed: int,
        hold: float = 0.0,
        repeats: Repeats | None = None,
    ) -> None:
        for stream in streams:
            if len(stream.ids) < 2 * length + 1:
                raise InputError(
                    f"source {stream.name!r} has {len(stream.ids):,} tokens, fewer than two windows of {length}; "
                    "give more text or a shorter length"
                )
        ends = np.array([stream.share for stream in streams], np.float64)  # sources, 2
        check_shares([stream.share for stream in streams])
        self.streams, self.batch, self.length, self.seed = list(streams), batch, length, seed
        self._progress = np.arange(steps) / max(steps - 1, 1)
        move = np.clip((self._progress - hold) / max(1 - hold, 1e-9), 0, 1)[:, None]
        shares = (1 - move) * ends[:, 0] + move * ends[:, 1]
        rng = np.random.default_rng([seed, 0])
        self._repeats = repeats
        rows: int | np.ndarray = batch
        if repeats is not None:
            self._repeated = rng.binomial(batch, repeats.share, steps)
            rows = batch - self._repeated
        counts = rng.multinomial(rows, shares / shares.sum(1, keepdims=True))
        self._counts = counts  # steps, sources
        self._before = np.cumsum(counts, 0) - counts
        self._orders: dict[int, tuple[int, int, np.ndarray]] = {}

    def __call__(self, step: int) -> Batch:
        rows = []
        for index, stream in enumerate(self.streams):
            first = int(self._before[step, index])
            for k in range(first, first + int(self._counts[step, index])):
                start = self._start(index, k)
                rows.append(stream.ids[start : start + self.length + 1])
        if self._repeats is None:
            return _batch(rows)
        rng = np.random.default_rng([self.seed, 0, step])
        done = float(self._progress[step])
        made = [self._repeats.row(rng, self.length, done) for _ in range(int(self._repeated[step]))]
        batch = _batch([*rows, *(tokens for tokens, _ in made)])
        for target, (_, scored) in zip(batch.targets[len(rows) :], made, strict=True):
            target[torch.from_numpy(~scored)] = IGNORED
        return batch

    def _start(self, index: int, k: int) -> int:
        """Where the k-th window ever drawn from a source begins."""
        count = (len(self.streams[index].ids) - 1) // self.length - 1  # windows an epoch, at every phase
        epoch, position = divmod(k, count)
        if index not in self._orders or self._orders[index][0] != epoch:
            rng = np.random.default_rng([self.seed, 1 + index, epoch])
            self._orders[index] = (epoch, int(rng.integers(self.length)), rng.permutation(count))
        _, phase, order = self._orders[index]
        return phase + int(order[position]) * self.length

    def repeated(self) -> int:
        """Tokens of the rows that are read twice, over the whole of training."""
        return 0 if self._repeats is None else int(self._repeated.sum()) * self.length

    def epochs(self, steps: int | None = None) -> dict[str, float]:
        """How often each source's text is seen in the first ``steps`` steps (all by default)."""
        seen = self._counts[:steps].sum(0) * self.length
        return {s.name: float(n / len(s.ids)) for s, n in zip(self.streams, seen, strict=True)}


def _batch(rows: list[np.ndarray]) -> Batch:
    window = torch.from_numpy(np.stack(rows).astype(np.int64))  # B L+1
    return Batch(window[:, :-1].contiguous(), window[:, 1:].contiguous())

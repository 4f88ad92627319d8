"""What every generated task has in common: rows of tokens, targets that count, the best possible loss, and a score.

A task is a frozen dataclass. ``sample(seed, batch, length)`` draws ``batch`` rows of ``length`` tokens;
``targets[b, t]`` is what should come after token t, or -100 where nothing is asked. Everything is drawn with torch's
CPU generator from integers and uniform numbers alone (no normal or Bernoulli draws, whose streams differ between vector
units), so the same seed gives the same rows on every machine.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mambascope.errors import InputError

__all__ = ["IGNORED", "Sample", "Score", "Seed", "Task", "check_seed", "distinct", "evaluate", "generator", "wilson"]

IGNORED = -100
"""A target that does not count."""

Seed = int | tuple[int, ...]


def check_seed(seed: Seed) -> None:
    """InputError for what is no whole number from 0 on, or a tuple of such."""
    numbers = seed if isinstance(seed, tuple) else (seed,)
    if not all(isinstance(n, (int, np.integer)) and n >= 0 for n in numbers):
        raise InputError(f"a seed is an integer ≥ 0, or a tuple of such, got {seed!r}")


def generator(seed: Seed) -> torch.Generator:
    """A CPU generator whose stream is a function of a number or a tuple of numbers."""
    check_seed(seed)
    # torch's CPU generator uses 32 bits of its seed: numpy's hash spreads a tuple over them
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def distinct(rng: torch.Generator, pool: int, count: int, rows: int) -> Int64[Tensor, "rows count"]:
    """``count`` different numbers below ``pool`` a row, in random order. Time O(rows · pool)."""
    return torch.rand(rows, pool, generator=rng, dtype=torch.float64).topk(count, 1, largest=False).indices


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % Wilson interval of a share of ``right`` in ``count``."""
    z, n, p = 1.959964, count, right / count
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Sample:
    """Rows of one task: ``tokens`` and, at each position, the ``targets`` that should follow (-100: not asked)."""

    tokens: Int64[Tensor, "B L"]
    targets: Int64[Tensor, "B L"]

    @property
    def mask(self) -> Bool[Tensor, "B L"]:
        """The positions that count."""
        return self.targets != IGNORED


@dataclass(frozen=True)
class Score:
    """How a model did on rows of one task and length; scores of more rows add up.

    ``right`` of ``targets`` predictions had the target as argmax, ``rows_right`` of ``rows`` were right throughout;
    ``nats`` is the summed loss and ``best_nats`` that of the best possible predictor on the same rows.
    ``by_position`` ``2 L``: right and asked at each position.
    """

    task: str
    length: int
    rows: int
    rows_right: int
    targets: int
    right: int
    nats: float
    best_nats: float
    by_position: Int64[Tensor, "2 L"]
    trained_length: int | None = None

    @property
    def accuracy(self) -> float:
        """Share of the targets that were predicted."""
        return self.right / self.targets

    @property
    def exact(self) -> float:
        """Share of the rows without an error."""
        return self.rows_right / self.rows

    @property
    def errors(self) -> int:
        return self.targets - self.right

    @property
    def loss(self) -> float:
        """Nats a target."""
        return self.nats / self.targets

    @property
    def best_loss(self) -> float:
        """Nats a target of the best possible predictor on the same rows."""
        return self.best_nats / self.targets

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy, as if targets were independent."""
        return wilson(self.right, self.targets)

    @property
    def beyond_training(self) -> bool | None:
        """Whether the rows are longer than those trained on; None where that is not known."""
        return None if self.trained_length is None else self.length > self.trained_length

    def accuracy_at(self) -> Float[Tensor, " L"]:
        """Accuracy by position; NaN where nothing is asked."""
        return self.by_position[0].double() / self.by_position[1].double()

    def __add__(self, other: "Score") -> "Score":
        if (self.task, self.length) != (other.task, other.length):
            mine, theirs = f"{self.task} at {self.length}", f"{other.task} at {other.length}"
            raise InputError(f"scores of {mine} and of {theirs} do not add up: same task and length are needed")
        names = ("rows", "rows_right", "targets", "right", "nats", "best_nats", "by_position")
        return dataclasses.replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})


class Task(ABC):
    """A generated task; subclasses are frozen dataclasses whose fields say how it is drawn."""

    name: ClassVar[str]
    steps_at_once: ClassVar[int] = 64
    """Training steps whose rows are drawn in one call."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Every id, of tokens and targets, is below this."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of guessing among the possible answers."""

    @abstractmethod
    def check(self, length: int) -> None:
        """InputError where the task does not exist at this length, naming what does not fit."""

    @abstractmethod
    def scored(self, length: int) -> int:
        """Only the last this many positions of a row are ever asked for."""

    @abstractmethod
    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        """``batch`` rows of ``length`` tokens and their targets; InputError as :meth:`check`."""

    def best_loss(self, sample: Sample) -> float:
        """Nats a target of the best possible predictor on these rows: 0 where the row determines the answers."""
        return 0.0

    def fits(self, n_tokens: int) -> None:
        """InputError where a model of ``n_tokens`` tokens cannot read this task."""
        if self.n_tokens > n_tokens:
            raise InputError(f"task {self.name!r} uses {self.n_tokens} token ids; the model knows only {n_tokens}")

    def score(self, logits: Float[Tensor, "B K V"], sample: Sample, *, trained_length: int | None = None) -> Score:
        """Score logits of the last K positions; K must cover every target. The argmax is over all V ids."""
        batch, length = sample.tokens.shape
        keep = logits.shape[1]
        if logits.ndim != 3 or logits.shape[0] != batch or not self.scored(length) <= keep <= length:
            raise InputError(
                f"task {self.name!r} at length {length} needs logits ({batch}, {self.scored(length)}…{length}, V), "
                f"got {tuple(logits.shape)}"
            )
        self.fits(logits.shape[2])
        targets = sample.targets[:, length - keep :].to(logits.device)  # B K
        asked = targets != IGNORED
        right = (logits.argmax(-1) == targets) & asked
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        by_position = torch.zeros(2, length, dtype=torch.int64)
        by_position[0, length - keep :] = right.sum(0).cpu()
        by_position[1, length - keep :] = asked.sum(0).cpu()
        count = int(asked.sum())
        return Score(
            self.name, length, batch, int((right == asked).all(1).sum()), count, int(right.sum()), float(nats),
            self.best_loss(sample) * count, by_position, trained_length,
        )  # fmt: skip

    def _at_least(self, **limits: tuple[int, int]) -> None:
        """InputError where a whole-number field is below its least value."""
        for field, (value, least) in limits.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"task {self.name!r}: {field} must be an integer ≥ {least}, got {value!r}")


@torch.no_grad()
def evaluate(
    task: Task,
    model: Callable[..., Tensor] | nn.Module,
    length: int,
    count: int,
    *,
    seed: int = 1,
    tokens_at_once: int = 1 << 16,
    trained_length: int | None = None,
    device: torch.device | str | None = None,
) -> Score:
    """Score a model on ``count`` fresh rows of a task, a few at a time.

    A length beyond ``trained_length`` is allowed; the result's ``beyond_training`` says so. Time O(count · length).
    Raises InputError for a length at which the task does not exist, or a model that knows too few tokens.
    """
    if isinstance(length, bool) or not isinstance(length, int):
        raise InputError(f"length must be an integer, got {length!r}")
    task.check(length)
    known = getattr(getattr(model, "cfg", None), "n_tokens", None)
    if known is not None:
        task.fits(known)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"count must be an integer ≥ 1, got {count!r}")
    if device is None:
        device = next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"
    total: Score | None = None
    for part, rows in enumerate(_parts(count, max(1, tokens_at_once // length))):
        sample = task.sample((seed, length, part), rows, length)
        logits = model(sample.tokens.to(device), return_type="logits", logits_to_keep=task.scored(length))
        score = task.score(logits, sample, trained_length=trained_length)
        total = score if total is None else total + score
    assert total is not None
    return total


def _parts(count: int, size: int) -> Iterator[int]:
    while count > 0:
        yield min(size, count)
        count -= size

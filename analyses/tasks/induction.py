"""The induction heads task of the Mamba paper (2312.00752, section 4.1.2 and appendix E.1).

A sequence of L tokens is drawn as follows:

1. every token is uniform over the V - 1 ordinary ones;
2. at one position p, uniform over 0 … L - 3, stands the special token; what follows it, at p + 1, is the target;
3. the last token is the special one again, and the model must now say the target.

The special token occurs nowhere else, so the answer is determined: the best possible loss is 0 nats and the best
accuracy 1; guessing among ordinary tokens gives ln(V - 1) nats and 1 / (V - 1).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from mambascope.errors import InputError

__all__ = ["BEST_LOSS", "InductionResult", "chance_accuracy", "evaluate", "sequences", "special_token"]

BEST_LOSS = 0.0
"""Nats: the answer is a function of the sequence."""


def special_token(vocabulary: int) -> int:
    """The id that triggers recall: the last one."""
    return vocabulary - 1


def chance_accuracy(vocabulary: int) -> float:
    """Accuracy of guessing among the ordinary tokens."""
    return 1 / (vocabulary - 1)


def sequences(
    count: int, length: int, *, vocabulary: int = 16, seed: int | tuple[int, ...] = 0
) -> tuple[Int64[Tensor, "B L"], Int64[Tensor, " B"]]:
    """``count`` sequences of ``length`` tokens and their answers; the same seed gives the same ones.

    Raises InputError for a length below 3 (special, target, special) or a vocabulary below 3.
    """
    if length < 3:
        raise InputError(
            f"an induction sequence needs at least 3 tokens (special, target, special), got length {length}"
        )
    if vocabulary < 3:
        raise InputError(f"the induction task needs a vocabulary of at least 3 (two ordinary tokens), got {vocabulary}")
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocabulary - 1, (count, length))
    position = rng.integers(0, length - 2, count)
    tokens[np.arange(count), position] = special_token(vocabulary)
    tokens[:, -1] = special_token(vocabulary)
    answers = tokens[np.arange(count), position + 1]
    return torch.from_numpy(tokens), torch.from_numpy(answers)


@dataclass(frozen=True)
class InductionResult:
    """Errors among ``sequences`` fresh sequences of one length, and the mean loss of the answer in nats."""

    length: int
    sequences: int
    errors: int
    loss: float

    @property
    def accuracy(self) -> float:
        return 1 - self.errors / self.sequences

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        z, n, p = 1.959964, self.sequences, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def evaluate(
    model: Callable[..., Tensor] | nn.Module,
    length: int,
    count: int,
    *,
    vocabulary: int = 16,
    seed: int = 1,
    tokens_at_once: int = 1 << 16,
    device: torch.device | str | None = None,
) -> InductionResult:
    """Ask a model for the answers of fresh sequences; its prediction is the argmax over all V tokens at the end.

    Time O(count * length); memory bounded by ``tokens_at_once`` tokens a call (one sequence at least).
    """
    if device is None:
        device = next(model.parameters()).device if isinstance(model, nn.Module) else "cpu"
    errors, nats = 0, 0.0
    for part, rows in enumerate(_parts(count, max(1, tokens_at_once // length))):
        tokens, answers = sequences(rows, length, vocabulary=vocabulary, seed=(seed, length, part))
        logits = model(tokens.to(device), return_type="logits", logits_to_keep=1)[:, -1].float().cpu()  # B V
        errors += int((logits.argmax(-1) != answers).sum())
        nats += float(torch.nn.functional.cross_entropy(logits, answers, reduction="sum"))
    return InductionResult(length, count, errors, nats / count)


def _parts(count: int, size: int) -> Iterator[int]:
    while count > 0:
        yield min(size, count)
        count -= size

"""How many tokens can the model repeat? N random tokens twice, accuracy and loss of the second copy against N.

1. For each N draw rows of N random tokens and repeat each once (:mod:`mambascope.analyses.repeats`).
2. Score the second copy from its second token on: loss in nats, and whether the best guess is right.
3. The gain in memory is the first copy's loss minus the second's.
4. The knee is where accuracy falls through half way between chance and its best value, interpolated in log N: the
   last such fall, so that a dip at tiny N is not taken for it.

Jelassi et al. (2402.01032) find that a state-space model's copying fails beyond a length linear in its state. This
measures *copying*: forgetting thresholds and lookups follow other laws in the state's size. Recall in such models
also lives in a narrow window of learning rates, so a low number may be a failure to learn, not a lack of room.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambascope.analyses.repeats import ordinary_tokens, repeated_tokens, scores
from mambascope.brief import Brief
from mambascope.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["Capacity", "copy_capacity"]


@dataclass(frozen=True, repr=False)
class Capacity(Brief):
    """Recall of the second copy against the number N of tokens.

    ``accuracy``, ``accuracy_error`` (standard error over rows), ``first_loss``, ``second_loss`` (nats): one a length.
    ``chance``: accuracy of guessing among the tokens drawn from. ``rows``: rows a length.
    """

    n: tuple[int, ...]
    accuracy: Float[Tensor, " n"]
    accuracy_error: Float[Tensor, " n"]
    first_loss: Float[Tensor, " n"]
    second_loss: Float[Tensor, " n"]
    chance: float
    rows: int

    @property
    def gain(self) -> Float[Tensor, " n"]:
        """First copy's loss minus the second's, nats per token: what memory is worth."""
        return self.first_loss - self.second_loss

    @property
    def recalls(self) -> bool:
        """Whether the best accuracy is above chance by more than four standard errors and by 0.05."""
        best = int(self.accuracy.argmax())
        over = float(self.accuracy[best]) - self.chance
        error = float(self.accuracy_error[best])
        return over > 0.05 and not over < 4 * error

    @property
    def knee(self) -> float | None:
        """N at which accuracy falls through half of its best value above chance; None if it never recalls,
        infinity if it still recalls at the largest N."""
        if not self.recalls:
            return None
        half = (float(self.accuracy.max()) + self.chance) / 2
        above = [i for i, a in enumerate(self.accuracy.tolist()) if a >= half]
        last = above[-1]
        if last == len(self.n) - 1:
            return math.inf
        a, b = float(self.accuracy[last]), float(self.accuracy[last + 1])
        share = (a - half) / (a - b)
        return math.exp(math.log(self.n[last]) + share * math.log(self.n[last + 1] / self.n[last]))

    def table(self) -> "pd.DataFrame":
        """A row a length."""
        import pandas as pd

        return pd.DataFrame(
            {
                "N": self.n,
                "accuracy": self.accuracy.tolist(),
                "error": self.accuracy_error.tolist(),
                "first loss": self.first_loss.tolist(),
                "second loss": self.second_loss.tolist(),
                "gain": self.gain.tolist(),
            }
        )

    def figure(self) -> "go.Figure":
        """Accuracy and losses against N, the knee marked, plotly."""
        from mambascope.analyses.plots import capacity_curves

        return capacity_curves(self)


@torch.no_grad()
def copy_capacity(
    model: "HookedMamba",
    lengths: Sequence[int] = (4, 8, 16, 32, 64, 128, 256),
    *,
    rows: int = 8,
    seed: int = 0,
    pool: Int[Tensor, " P"] | None = None,
) -> Capacity:
    """Accuracy and loss of the second copy of N random tokens, for each N (the module's algorithm).

    Time O(rows · ΣN) tokens; memory some rows and a chunk of logits. Lengths must rise; where N exceeds the
    pool, tokens repeat within a copy and the answer is no longer determined (Olsson's task is so too).

    Raises InputError for lengths that do not rise or are below 2, and as :func:`repeated_tokens` does.
    """
    lengths = tuple(lengths)
    if not lengths or any(b <= a for a, b in itertools.pairwise(lengths)):
        raise InputError(f"lengths must be a rising sequence of integers, got {list(lengths)}")
    columns: list[tuple[float, float, float, float]] = []
    for n in lengths:
        found = scores(model, repeated_tokens(model, n, rows, seed=seed, pool=pool))
        by_row = found.correct[:, -n + 1 :].double().mean(1)
        error = float(by_row.std() / rows**0.5) if rows > 1 else math.nan
        first, second = float(found.loss[:, :-n].mean()), float(found.loss[:, -n + 1 :].mean())
        columns.append((float(by_row.mean()), error, first, second))
    accuracy, errors, first_loss, second_loss = (torch.tensor(c) for c in zip(*columns, strict=True))
    size = len(ordinary_tokens(model)) if pool is None else len(pool)
    return Capacity(lengths, accuracy, errors, first_loss, second_loss, 1 / size, rows)

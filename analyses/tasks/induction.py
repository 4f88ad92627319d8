"""The induction heads task of the Mamba paper (2312.00752, section 4.1.2 and appendix E.1).

A sequence of L tokens is drawn as follows:

1. every token is uniform over the V - 1 ordinary ones;
2. at one position p, uniform over 0 … L - 3, stands the special token; what follows it, at p + 1, is the target;
3. the last token is the special one again, and the model must now say the target.

The special token occurs nowhere else, so the answer is determined: the best possible loss is 0 nats and the best
accuracy 1; guessing among ordinary tokens gives ln(V - 1) nats and 1 / (V - 1).
"""

from dataclasses import dataclass

import numpy as np
import torch

from mambascope.analyses.tasks.task import IGNORED, Sample, Seed, Task, check_seed
from mambascope.errors import InputError

__all__ = ["InductionHeads"]


@dataclass(frozen=True)
class InductionHeads(Task):
    """One special token, the last id, recalls what followed it; see the module.

    Drawn with numpy's generator, a training step at a time, as ``induction-2l`` was trained.
    """

    vocabulary: int = 16

    name = "induction"
    steps_at_once = 1

    @property
    def n_tokens(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 1)

    def check(self, length: int) -> None:
        self._at_least(vocabulary=(self.vocabulary, 3))
        if length < 3:
            raise InputError(f"task {self.name!r} needs a length ≥ 3 (special, target, special), got {length}")

    def scored(self, length: int) -> int:
        return 1

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        check_seed(seed)
        rng, rows = np.random.default_rng(seed), np.arange(batch)
        tokens = rng.integers(0, self.vocabulary - 1, (batch, length))
        position = rng.integers(0, length - 2, batch)
        tokens[rows, position] = tokens[:, -1] = self.vocabulary - 1
        targets = np.full_like(tokens, IGNORED)
        targets[:, -1] = tokens[rows, position + 1]
        return Sample(torch.from_numpy(tokens), torch.from_numpy(targets))

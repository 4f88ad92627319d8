"""Order-k Markov chains in context (Bondaschi et al., 2502.10178): each row has its own chain, to be learnt from it.

1. For each row and each of the S^k contexts draw next-token probabilities uniformly from the simplex: Dirichlet(1, …).
2. The first k tokens are uniform; then x[t] ~ P(· | x[t-k … t-1]).
3. Asked: every token that has k before it.

The best possible predictor is Bayes' for that prior, which is add-one counting:

    p(x | context) = (n[context, x] + 1) / (n[context] + S),   n: counts in the row so far.

Its loss on the same rows is what ``best_loss`` gives, so that a model is compared on what can be known. A layer whose
conv spans j + 1 tokens can condition on j of them: ``counting_loss(sample, j)`` is what that many give.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mambascope.analyses.tasks.task import IGNORED, Sample, Seed, Task, generator
from mambascope.errors import InputError

__all__ = ["MarkovChain"]

_MOST = 1 << 16


@dataclass(frozen=True)
class MarkovChain(Task):
    """Chains of ``order`` k on ``states`` S tokens; see the module."""

    states: int = 2
    order: int = 1

    name = "markov"

    @property
    def n_tokens(self) -> int:
        return self.states

    @property
    def chance(self) -> float:
        return 1 / self.states

    def check(self, length: int) -> None:
        self._at_least(states=(self.states, 2), order=(self.order, 0))
        size = self.states ** (self.order + 1)
        if size > _MOST:
            raise InputError(
                f"task {self.name!r}: order {self.order} on {self.states} states has {size:,} probabilities a row; "
                f"at most {_MOST:,}"
            )
        if length < max(1, self.order):
            raise InputError(f"task {self.name!r} at length {length}: order {self.order} needs a length ≥ {self.order}")

    def scored(self, length: int) -> int:
        return length - max(0, self.order - 1)

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        rng, S, k = generator(seed), self.states, self.order
        contexts = S**k
        # sorted uniforms cut [0, 1] into Dirichlet(1, …, 1) shares: the thresholds of the next token
        cuts = torch.rand(batch, contexts, S - 1, generator=rng, dtype=torch.float64).sort(2).values.numpy()
        u = torch.rand(length + 1, batch, generator=rng, dtype=torch.float64).numpy()
        full = np.empty((length + 1, batch), np.int64)
        full[:k] = (u[:k] * S).astype(np.int64)
        rows = np.arange(batch)
        context = np.zeros(batch, np.int64)
        for x in full[:k]:
            context = context * S + x
        for t in range(k, length + 1):
            full[t] = (u[t][:, None] > cuts[rows, context]).sum(1)
            context = (context * S + full[t]) % contexts
        chain = torch.from_numpy(np.ascontiguousarray(full.T))  # B L+1
        targets = chain[:, 1:].clone()
        targets[:, : max(0, k - 1)] = IGNORED
        return Sample(chain[:, :-1].contiguous(), targets)

    def best_loss(self, sample: Sample) -> float:
        return self.counting_loss(sample, self.order)

    def counting_loss(self, sample: Sample, order: int) -> float:
        """Nats a target of add-one counting with the last ``order`` tokens as context, on the targets asked for.

        Time O(B L S), memory O(B S^(order + 1)).
        """
        if not 0 <= order <= self.order:
            raise InputError(f"counting with {order} tokens of context: give 0 … {self.order}, the chain's order")
        S, contexts = self.states, self.states**order
        tokens = sample.tokens.numpy()
        last = sample.targets.numpy()
        rows = np.arange(len(tokens))
        counts = np.ones((len(tokens), contexts, S))
        if order == 0:
            counts[rows, 0, tokens[:, 0]] += 1  # the first token has no context to lack
        context, nats = np.zeros(len(tokens), np.int64), 0.0
        for t in range(tokens.shape[1]):
            context = (context * S + tokens[:, t]) % contexts
            if t < order - 1:
                continue
            following = last[:, t] if t + 1 == tokens.shape[1] else tokens[:, t + 1]
            here = counts[rows, context]  # B S
            if last[0, t] != IGNORED:
                nats -= float(np.log(here[rows, following] / here.sum(1)).sum())
            counts[rows, context, following] += 1
        return nats / int(sample.mask.sum())

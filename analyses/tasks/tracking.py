"""Tasks of state tracking: what is the product of all that was read? Their serial depth is what a model must have.

Parity is the word problem of the group of two elements, solvable in constant depth with counting but not by positive
decays alone; that of S5 is complete for NC1 (Merrill et al., 2404.08819): linear recurrences and attention of fixed
depth should fail beyond a length, an LSTM need not. Every position is asked; the best possible loss is 0 nats.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from mambascope.analyses.tasks.task import Sample, Seed, Task, generator
from mambascope.errors import InputError

__all__ = ["Parity", "WordProblem"]


@dataclass(frozen=True)
class Parity(Task):
    """Uniform bits; asked at every position: the parity of all bits so far."""

    name = "parity"

    @property
    def n_tokens(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 0.5

    def check(self, length: int) -> None:
        if length < 1:
            raise InputError(f"task {self.name!r} needs a length ≥ 1, got {length}")

    def scored(self, length: int) -> int:
        return length

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        bits = torch.randint(2, (batch, length), generator=generator(seed))
        return Sample(bits, bits.cumsum(1) % 2)


@dataclass(frozen=True)
class WordProblem(Task):
    """Uniform permutations of ``points`` points; asked at every position: the product of all so far.

    ``points`` 5 is S5, 120 elements. Id i is the i-th permutation in lexicographic order (0: the identity); a word
    g_1 g_2 … g_t stands for "first g_1, then g_2, …". ``moves`` "all" draws from the whole group; "swaps" from the
    identity and the exchanges of two neighbours, which generate it: the same automaton, its table shorter to learn.
    """

    points: int = 5
    moves: Literal["all", "swaps"] = "all"

    name = "permutations"

    @property
    def n_tokens(self) -> int:
        return math.factorial(self.points)

    @property
    def chance(self) -> float:
        return 1 / self.n_tokens

    def check(self, length: int) -> None:
        self._at_least(points=(self.points, 2))
        if self.points > 6:
            raise InputError(f"task {self.name!r}: points must be 2 … 6 (720 elements), got {self.points}")
        if self.moves not in ("all", "swaps"):
            raise InputError(f"task {self.name!r}: moves must be 'all' or 'swaps', got {self.moves!r}")
        if length < 1:
            raise InputError(f"task {self.name!r} needs a length ≥ 1, got {length}")

    def scored(self, length: int) -> int:
        return length

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        given = moves(self.points) if self.moves == "swaps" else torch.arange(self.n_tokens)
        word = given[torch.randint(len(given), (batch, length), generator=generator(seed))]
        table = products(self.points)
        answer, shift = word.clone(), 1
        while shift < length:  # after each round answer[t] is the product of the last 2 * shift elements
            answer[:, shift:] = table[answer[:, :-shift], answer[:, shift:]]
            shift *= 2
        return Sample(word, answer)


@lru_cache
def moves(points: int) -> Int64[Tensor, " points"]:
    """Ids of the identity and of the exchanges of neighbours: id k! exchanges the points k + 1 and k places before the
    end."""
    return torch.tensor([0] + [math.factorial(k) for k in range(1, points)])


@lru_cache
def products(points: int) -> Int64[Tensor, "G G"]:
    """``table[a, b]``: the id of "first a, then b"."""
    elements = torch.tensor(list(itertools.permutations(range(points))))  # G points
    count = len(elements)
    both = elements.expand(count, -1, -1).gather(2, elements[:, None].expand(-1, count, -1))  # a, b -> b[a[i]]
    weight = torch.tensor([points**i for i in reversed(range(points))])
    code = torch.zeros(points**points, dtype=torch.int64)
    code[(elements * weight).sum(1)] = torch.arange(len(elements))
    return code[(both * weight).sum(2)]

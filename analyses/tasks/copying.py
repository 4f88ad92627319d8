"""Tasks of repetition: random tokens that come again, and strings to be copied.

In all of them the answers are determined by what was read, so the best possible loss is 0 nats.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambascope.analyses.tasks.task import IGNORED, Sample, Seed, Task, distinct, generator
from mambascope.errors import InputError

__all__ = ["Copying", "RepeatedTokens", "SelectiveCopying", "TwiceRepeated"]


def _next_tokens(full: Tensor, first: Tensor | int) -> Sample:
    """Rows of L + 1 tokens as inputs and next-token targets, asked from position ``first`` (one a row) on."""
    targets = full[:, 1:].clone()
    early = torch.arange(targets.shape[1]) < torch.as_tensor(first).reshape(-1, 1)
    return Sample(full[:, :-1].contiguous(), targets.masked_fill_(early, IGNORED))


@dataclass(frozen=True)
class RepeatedTokens(Task):
    """Repeated random tokens (Olsson et al., 2209.11895): a block of P different tokens, over and over.

    P is uniform in ``shortest`` … ``longest``, one a row; the block is drawn without replacement from ``vocabulary``
    ids. Asked: every token from the second of the second block on. Once the block's first token has come again, P and
    so every answer is determined.
    """

    vocabulary: int = 64
    shortest: int = 8
    longest: int = 32

    name = "repeated"

    @property
    def n_tokens(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    def check(self, length: int) -> None:
        self._at_least(shortest=(self.shortest, 2), longest=(self.longest, self.shortest))
        if self.longest > self.vocabulary:
            raise InputError(
                f"task {self.name!r}: a block of {self.longest} different tokens (longest) exceeds the vocabulary of "
                f"{self.vocabulary}"
            )
        if length < 2 * self.longest - 1:
            raise InputError(
                f"task {self.name!r} at length {length}: two blocks of {self.longest} (longest) need a length ≥ "
                f"{2 * self.longest - 1}"
            )

    def scored(self, length: int) -> int:
        return length - self.shortest

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        rng = generator(seed)
        period = torch.randint(self.shortest, self.longest + 1, (batch, 1), generator=rng)
        block = distinct(rng, self.vocabulary, self.longest, batch)
        full = block.gather(1, torch.arange(length + 1) % period)  # B L+1
        return _next_tokens(full, period)


@dataclass(frozen=True)
class TwiceRepeated(Task):
    """N random tokens, twice: at which N does the second pass degrade?

    A length of L reads N = L // 2 + 1 tokens and what follows of their second copy; asked: the second copy from its
    second token on. The tokens are different where the vocabulary has N of them, else drawn with replacement.
    """

    vocabulary: int = 64

    name = "twice"

    @property
    def n_tokens(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    def check(self, length: int) -> None:
        self._at_least(vocabulary=(self.vocabulary, 2))
        if length < 3:
            raise InputError(f"task {self.name!r}: two tokens twice need a length ≥ 3, got {length}")

    def scored(self, length: int) -> int:
        return length - (length // 2 + 1)

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        rng, n = generator(seed), length // 2 + 1
        if n <= self.vocabulary:
            first = distinct(rng, self.vocabulary, n, batch)
        else:
            first = torch.randint(self.vocabulary, (batch, n), generator=rng)
        return _next_tokens(torch.cat([first, first], 1)[:, : length + 1], n)


@dataclass(frozen=True)
class Copying(Task):
    """Copy a string of N uniform tokens (Jelassi et al., 2402.01032): x_1 … x_N | x_1 … x_N.

    With ``delimiter`` the last id stands between the two and a length of L = 2N is read; without, L = 2N - 1, and
    where the copy begins is told by the position alone. Asked: all N tokens of the copy.
    """

    vocabulary: int = 32
    delimiter: bool = True

    name = "copying"

    @property
    def n_tokens(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.delimiter)

    def check(self, length: int) -> None:
        if not isinstance(self.delimiter, bool):
            raise InputError(f"task {self.name!r}: delimiter must be True or False, got {self.delimiter!r}")
        self._at_least(vocabulary=(self.vocabulary, 2 + self.delimiter))
        if length < 1 or length % 2 == self.delimiter:
            kind = "with a delimiter reads 2N tokens, an even" if self.delimiter else "without one reads 2N - 1, an odd"
            least = 1 + self.delimiter
            near = f"{length - 1} or {length + 1}" if length > least else f"{least}"
            raise InputError(f"task {self.name!r} {kind} length; got {length}, give {near}")

    def scored(self, length: int) -> int:
        return (length + 1) // 2

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        n = self.scored(length)
        string = torch.randint(self.vocabulary - self.delimiter, (batch, n), generator=generator(seed))
        parts = [string, torch.full((batch, int(self.delimiter)), self.vocabulary - 1), string]
        return _next_tokens(torch.cat(parts, 1), length - n)


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Selective copying (2312.00752, section 4.1.1, after Jing et al.): find ``memorize`` tokens in noise, repeat them.

    A length of L has L - M tokens of context, M = ``memorize``: at M uniform places stand uniform ordinary tokens, at
    all others the noise id (V - 2). Then come M marker ids (V - 1); asked: at the i-th marker the i-th ordinary token.
    """

    vocabulary: int = 16
    memorize: int = 16

    name = "selective_copying"

    @property
    def n_tokens(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 2)

    def check(self, length: int) -> None:
        self._at_least(vocabulary=(self.vocabulary, 4), memorize=(self.memorize, 1))
        if length < 2 * self.memorize:
            raise InputError(
                f"task {self.name!r} at length {length}: {self.memorize} tokens to memorize and as many markers need a "
                f"length ≥ {2 * self.memorize}"
            )

    def scored(self, length: int) -> int:
        return self.memorize

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        rng, m = generator(seed), self.memorize
        context = torch.full((batch, length - m), self.vocabulary - 2)
        places = distinct(rng, length - m, m, batch).sort(1).values
        data = torch.randint(self.vocabulary - 2, (batch, m), generator=rng)
        context.scatter_(1, places, data)
        markers = torch.full((batch, m), self.vocabulary - 1)
        targets = torch.cat([torch.full_like(context, IGNORED), data], 1)
        return Sample(torch.cat([context, markers], 1), targets)

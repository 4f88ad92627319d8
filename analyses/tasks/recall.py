"""Tasks of lookup: key-value pairs, a needle in filler, a phone book. The answers are determined: best loss 0 nats."""

import math
from dataclasses import dataclass

import torch

from mambascope.analyses.tasks.task import IGNORED, Sample, Seed, Task, distinct, generator
from mambascope.errors import InputError

__all__ = ["AssociativeRecall", "Needle", "Phonebook"]


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Multi-query associative recall (Arora et al., 2312.04927): k1 v1 … kK vK, then every key once more, apart.

    With H = (V - 1) // 2: keys are ids below H, all different in a row; values are uniform in H … 2H - 1; V - 1 fills
    what is left. After the K = ``pairs`` pairs come slots of two tokens; key i with its value goes to slot s with
    probability ∝ (s + 1)^(``power`` - 1), no slot twice: ``power`` 1 is uniform, near 0 the gaps are those of a text,
    many short and few long. Asked: the value, at the second coming of each key.
    """

    vocabulary: int = 64
    pairs: int = 8
    power: float = 0.01

    name = "recall"

    @property
    def n_tokens(self) -> int:
        return self.vocabulary

    @property
    def _half(self) -> int:
        return (self.vocabulary - 1) // 2

    @property
    def chance(self) -> float:
        return 1 / self._half

    def check(self, length: int) -> None:
        self._at_least(vocabulary=(self.vocabulary, 3), pairs=(self.pairs, 1))
        if not 0 < self.power < math.inf:
            raise InputError(f"task {self.name!r}: power must be a number > 0, got {self.power!r}")
        if self.pairs > self._half:
            raise InputError(
                f"task {self.name!r}: {self.pairs} pairs need as many keys; a vocabulary of {self.vocabulary} has "
                f"{self._half}"
            )
        if length < 4 * self.pairs:
            raise InputError(
                f"task {self.name!r} at length {length}: {self.pairs} pairs and their queries need a length ≥ "
                f"{4 * self.pairs}"
            )

    def scored(self, length: int) -> int:
        return length - 2 * self.pairs

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        rng, k, half = generator(seed), self.pairs, self._half
        keys = distinct(rng, half, k, batch)
        values = torch.randint(half, 2 * half, (batch, k), generator=rng)
        slots = (length - 2 * k) // 2
        weight = torch.arange(1, slots + 1, dtype=torch.float64).pow(self.power - 1)
        # the k smallest of exponential variables with these rates: draws without replacement
        clock = -torch.rand(batch, slots, generator=rng, dtype=torch.float64).log() / weight
        place = 2 * k + 2 * clock.argsort(1)[:, :k]
        tokens = torch.full((batch, length), self.vocabulary - 1)
        tokens[:, : 2 * k] = torch.stack([keys, values], 2).flatten(1)
        tokens.scatter_(1, place, keys).scatter_(1, place + 1, values)
        targets = torch.full_like(tokens, IGNORED).scatter_(1, place, values)
        return Sample(tokens, targets)


@dataclass(frozen=True)
class Needle(Task):
    """Needle lookup: somewhere in filler stands "mark key value"; at the end "ask key" wants the value.

    With H = (V - 2) // 3: keys are ids below H, values H … 2H - 1, filler 2H … V - 3, all uniform; V - 2 asks, V - 1
    marks. ``needles`` needles with different keys; one of them, uniform, is asked for. ``depth`` (0 … 1, for a single
    needle) fixes where it stands, 0 the beginning; None: uniform.
    """

    vocabulary: int = 64
    needles: int = 1
    depth: float | None = None

    name = "needle"

    @property
    def n_tokens(self) -> int:
        return self.vocabulary

    @property
    def _third(self) -> int:
        return (self.vocabulary - 2) // 3

    @property
    def chance(self) -> float:
        return 1 / self._third

    def check(self, length: int) -> None:
        self._at_least(vocabulary=(self.vocabulary, 8), needles=(self.needles, 1))
        if self.depth is not None and (self.needles != 1 or not 0 <= self.depth <= 1):
            raise InputError(
                f"task {self.name!r}: depth is 0 … 1 and belongs to one needle; got depth {self.depth!r}, "
                f"{self.needles} needles"
            )
        if self.needles > self._third:
            raise InputError(
                f"task {self.name!r}: {self.needles} needles need as many keys; a vocabulary of {self.vocabulary} has "
                f"{self._third}"
            )
        if length < 3 * self.needles + 2:
            raise InputError(
                f"task {self.name!r} at length {length}: {self.needles} needles and the question need a length ≥ "
                f"{3 * self.needles + 2}"
            )

    def scored(self, length: int) -> int:
        return 1

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        rng, third, slots = generator(seed), self._third, (length - 2) // 3
        tokens = torch.randint(2 * third, self.vocabulary - 2, (batch, length), generator=rng)
        keys = distinct(rng, third, self.needles, batch)
        values = torch.randint(third, 2 * third, (batch, self.needles), generator=rng)
        slot = distinct(rng, slots, self.needles, batch)
        if self.depth is not None:
            slot = torch.full_like(slot, round(self.depth * (slots - 1)))
        place = 3 * slot
        tokens.scatter_(1, place, self.vocabulary - 1).scatter_(1, place + 1, keys).scatter_(1, place + 2, values)
        tokens[:, -2] = self.vocabulary - 2
        tokens[:, -1] = keys[:, 0]  # needles stand in random order: the first drawn is a uniform one
        targets = torch.full_like(tokens, IGNORED)
        targets[:, -1] = values[:, 0]
        return Sample(tokens, targets)


@dataclass(frozen=True)
class Phonebook(Task):
    """Phone book (Jelassi et al., 2402.01032): "name: number," over and over, then a name whose number is wanted.

    A name is ``name_length`` of ``letters`` letters, all names of a row different; a number ``digits`` uniform digits.
    Ids: 0 … 9 digits, then the letters, colon, comma. A row holds as many entries as fit, after commas that fill the
    front; then one of its names, uniform, and the colon. Asked: the number's digits, each after the true ones before.
    """

    letters: int = 26
    name_length: int = 2
    digits: int = 4

    name = "phonebook"

    @property
    def n_tokens(self) -> int:
        return 10 + self.letters + 2

    @property
    def chance(self) -> float:
        return 0.1

    def entries(self, length: int) -> int:
        """Names in a row of this length."""
        return (length - self.name_length - self.digits) // (self.name_length + self.digits + 2)

    def check(self, length: int) -> None:
        self._at_least(letters=(self.letters, 1), name_length=(self.name_length, 1), digits=(self.digits, 1))
        names, entries = self.letters**self.name_length, self.entries(length)
        if names > 1 << 20:
            raise InputError(
                f"task {self.name!r}: {self.letters} letters in names of {self.name_length} make {names:,} names; "
                f"at most {1 << 20:,} are drawn from"
            )
        if entries < 1:
            need = 2 * (self.name_length + self.digits + 1)
            raise InputError(f"task {self.name!r} at length {length}: one entry and its query need a length ≥ {need}")
        if entries > names:
            raise InputError(
                f"task {self.name!r} at length {length}: {entries} entries exceed the {names} names that "
                f"{self.letters} letters in names of {self.name_length} make"
            )

    def scored(self, length: int) -> int:
        return self.digits

    def sample(self, seed: Seed, batch: int, length: int) -> Sample:
        self.check(length)
        rng, entries = generator(seed), self.entries(length)
        index = distinct(rng, self.letters**self.name_length, entries, batch)
        spelled = [index // self.letters**i % self.letters for i in reversed(range(self.name_length))]
        names = 10 + torch.stack(spelled, 2)  # B entries name
        numbers = torch.randint(10, (batch, entries, self.digits), generator=rng)
        colon, comma = 10 + self.letters, 11 + self.letters
        book = torch.cat([names, torch.full_like(names[..., :1], colon), numbers,
                          torch.full_like(names[..., :1], comma)], 2).flatten(1)  # fmt: skip
        wanted = torch.randint(entries, (batch, 1, 1), generator=rng)
        name = names.gather(1, wanted.expand(-1, -1, self.name_length))[:, 0]
        number = numbers.gather(1, wanted.expand(-1, -1, self.digits))[:, 0]
        query = torch.cat([name, torch.full((batch, 1), colon), number[:, :-1]], 1)
        front = torch.full((batch, length - book.shape[1] - query.shape[1]), comma)
        tokens = torch.cat([front, book, query], 1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, -self.digits :] = number
        return Sample(tokens, targets)

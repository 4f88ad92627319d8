"""How the next token is chosen from its logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambascope.errors import InputError

__all__ = ["Sampler", "check_sound", "draw", "sample"]


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn: ``temperature`` 0 takes the most likely; top_k, top_p cut the tail first."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be a number ≥ 0, got {self.temperature!r}")
        if self.top_k is not None and (
            isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1
        ):
            raise InputError(f"top_k must be a positive integer, got {self.top_k!r}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie in (0, 1], got {self.top_p!r}")


def sample(logits: Tensor, sampler: Sampler, generator: torch.Generator | None = None) -> Tensor:
    """One id per row from logits ``B V``; InputError where they are no distribution (NaN, or infinite everywhere)."""
    ids, sound = draw(logits, sampler, generator)
    check_sound(sound)
    return ids


def draw(logits: Tensor, sampler: Sampler, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The ids, and on the device whether the logits were sound: nothing here waits for it.

    Ids are drawn as torch.multinomial does it (the largest p / e, e exponentially distributed), which looks at its
    probabilities first and so waits.
    """
    if sampler.greedy:
        return logits.argmax(-1), ~logits.amax(-1).isnan().any()
    scores = logits.float() / sampler.temperature
    if sampler.top_k is not None and sampler.top_k < scores.shape[-1]:
        least = scores.topk(sampler.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampler.top_p is not None:
        ordered, order = scores.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the strictly likelier tokens
        ordered = ordered.masked_fill(before >= sampler.top_p, float("-inf"))
        scores = torch.empty_like(scores).scatter_(-1, order, ordered)
    p = scores.softmax(-1)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1), torch.isfinite(p).all()


def check_sound(sound: Tensor | bool) -> None:
    """InputError where the logits were no distribution."""
    if not bool(sound):
        raise InputError("the logits hold NaN or infinities, so no token can be drawn from them")

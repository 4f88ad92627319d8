"""What a patched run is judged by: one number from the logits of clean/corrupted pairs.

A metric is an object of this file, or any function of logits ``B k V`` that returns one number (``B`` pairs, the last
``k`` positions). Objects look at every pair alone and take the mean, so many edits are judged at once.
"""

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mambascope.errors import InputError

if TYPE_CHECKING:
    from mambascope.hooks.model_protocol import Runnable

__all__ = ["KL", "Bound", "LogProbability", "LogitDifference", "Loss", "Metric", "Probability", "Rank", "bind"]

Answer = str | int | Sequence[str | int]
"""A token: a text that is one token, or an id; or one for each pair."""


@dataclass(frozen=True)
class Given:
    """What a metric may look at when it is bound to a model and its pairs."""

    model: "Runnable"
    clean_logits: list[Tensor]  # a pair each: k V
    corrupted_tokens: list[Tensor]  # a pair each: L


@dataclass(frozen=True)
class Bound:
    """A metric ready to judge: ``judge(logits E B k V) -> E`` numbers, float32 or float64.

    ``keep``: how many last positions it reads (None: all). ``spec`` tells it from others in a file.
    """

    judge: Callable[[Tensor], Tensor]
    keep: int | None
    spec: dict[str, Any]
    differentiable: bool
    answers: tuple[tuple[int, ...], ...] = ()


class Metric:
    """The base of the metrics here. ``keep`` last positions are read; None: all of them."""

    keep: int | None = 1
    differentiable: ClassVar[bool] = True

    def bind(self, given: Given) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], tuple[tuple[int, ...], ...]]:
        """``(logits E B k V -> E B, what to write down, answer ids a pair)``."""
        raise TypeError(f"{type(self).__name__} does not say how it judges: override bind()")


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _ids(model: "Runnable", answer: Answer, pairs: int, what: str) -> tuple[int, ...]:
    if isinstance(answer, torch.Tensor):
        answer = answer.tolist()
    each = list(answer) if isinstance(answer, Sequence) and not isinstance(answer, str) else [answer] * pairs
    if len(each) != pairs:
        raise InputError(f"{what}: {len(each)} answers for {pairs} pairs; give one, or one for each pair")
    return tuple(_id(model, a, what) for a in each)


def _id(model: "Runnable", answer: str | int, what: str) -> int:
    if isinstance(answer, str):
        return model.to_single_token(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < model.cfg.n_tokens:
        raise InputError(
            f"{what}: answer {answer!r} is neither a text nor an id of the vocabulary of {model.cfg.n_tokens}"
        )
    return answer


def _pick(logits: Tensor, ids: Tensor) -> Tensor:
    """The answers' entries of ``E B k V`` at the last position: ``E B``."""
    last = logits[:, :, -1]
    return last.gather(-1, ids.to(last.device).expand(last.shape[0], -1)[..., None])[..., 0]


@dataclass(frozen=True)
class LogitDifference(Metric):
    """logit[right] - logit[wrong] at the last token (Wang et al., 2211.00593), in logits."""

    right: Answer
    wrong: Answer

    def bind(self, given: Given) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], tuple[tuple[int, ...], ...]]:
        pairs = len(given.corrupted_tokens)
        right, wrong = (_ids(given.model, a, pairs, "LogitDifference") for a in (self.right, self.wrong))
        for row, (good, bad) in enumerate(zip(right, wrong, strict=True)):
            if good == bad:
                raise InputError(f"LogitDifference: right and wrong answer of pair {row} are one token ({good})")
        a, b = torch.tensor(right), torch.tensor(wrong)
        return (
            lambda logits: _pick(_wide(logits), a) - _pick(_wide(logits), b),
            {"right": right, "wrong": wrong},
            (right, wrong),
        )


@dataclass(frozen=True)
class LogProbability(Metric):
    """log p(answer) at the last token, in nats."""

    answer: Answer

    def bind(self, given: Given) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], tuple[tuple[int, ...], ...]]:
        ids = _ids(given.model, self.answer, len(given.corrupted_tokens), type(self).__name__)
        at = torch.tensor(ids)
        return lambda logits: _pick(_wide(logits[:, :, -1:]).log_softmax(-1), at), {"answer": ids}, (ids,)


@dataclass(frozen=True)
class Probability(LogProbability):
    """p(answer) at the last token."""

    def bind(self, given: Given) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], tuple[tuple[int, ...], ...]]:
        log, spec, answers = super().bind(given)
        return lambda logits: log(logits).exp(), spec, answers


@dataclass(frozen=True)
class Rank(LogProbability):
    """How many tokens are likelier than the answer at the last token (0: it is the best). No gradient."""

    differentiable: ClassVar[bool] = False

    def bind(self, given: Given) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], tuple[tuple[int, ...], ...]]:
        _, spec, answers = super().bind(given)
        at, known = torch.tensor(answers[0]), given.model.cfg.n_tokens

        def rank(logits: Tensor) -> Tensor:
            mine = _pick(logits, at)
            return (logits[:, :, -1, :known] > mine[..., None]).sum(-1).to(torch.float32)

        return rank, spec, answers


@dataclass(frozen=True)
class Loss(Metric):
    """The mean next-token loss of the corrupted text, in nats; of its last ``tokens`` tokens if that is given."""

    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and (isinstance(self.tokens, bool) or self.tokens < 1):
            raise InputError(f"Loss(tokens=) must be a positive number of tokens, got {self.tokens!r}")

    @property
    def keep(self) -> int | None:  # type: ignore[override]
        """The positions that predict those tokens, and the last one, whose prediction is not scored."""
        return None if self.tokens is None else self.tokens + 1

    def bind(self, given: Given) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], tuple[tuple[int, ...], ...]]:
        lengths = {len(t) for t in given.corrupted_tokens}
        n = self.tokens if self.tokens is not None else min(lengths) - 1
        if n < 1 or n >= min(lengths):
            raise InputError(f"Loss: {n} tokens to score in a text of {min(lengths)} (the first is not predicted)")
        if self.tokens is None and len(lengths) > 1:
            raise InputError("Loss over texts of different lengths: say how many last tokens count, Loss(tokens=)")
        goal = torch.stack([t[-n:] for t in given.corrupted_tokens])  # B n

        def loss(logits: Tensor) -> Tensor:
            logp = _wide(logits[:, :, -n - 1 : -1]).log_softmax(-1)  # E B n V
            at = goal.to(logp.device).expand(logp.shape[0], -1, -1)[..., None]
            return -logp.gather(-1, at)[..., 0].mean(-1)

        return loss, {"tokens": n}, ()


@dataclass(frozen=True)
class KL(Metric):
    """KL(clean ‖ run) of the next-token distributions at the last token, in nats: 0 where it is the clean run's."""

    def bind(self, given: Given) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], tuple[tuple[int, ...], ...]]:
        known = given.model.cfg.n_tokens
        want = torch.stack([_wide(x[-1, :known]).log_softmax(-1) for x in given.clean_logits]).detach()  # B V

        def kl(logits: Tensor) -> Tensor:
            got = _wide(logits[:, :, -1, :known]).log_softmax(-1)
            p = want.to(got.device)
            return (p.exp() * (p - got)).sum(-1)

        return kl, {}, ()


def bind(metric: Metric | Callable[[Tensor], Any], given: Given, keep: int | None) -> Bound:
    """A metric of this file, or a function of logits ``B k V``, ready to judge many edits.

    Raises
    ------
    InputError: neither; answers that are not one token (named); what the metric's own arguments do not fit.
    """
    if isinstance(metric, Metric):
        judge, about, answers = metric.bind(given)
        spec = {"metric": type(metric).__name__, **about}
        return Bound(lambda logits: judge(logits).mean(1), metric.keep, spec, type(metric).differentiable, answers)
    if isinstance(metric, type) and issubclass(metric, Metric):
        raise InputError(f"metric is the class {metric.__name__}; give one of its kind: {metric.__name__}(…)")
    if not callable(metric):
        raise InputError(
            f"metric must be one of mambascope.hooks.metrics or a function of logits, got {type(metric).__name__}"
        )
    name = getattr(metric, "__qualname__", type(metric).__name__)

    def each(logits: Tensor) -> Tensor:
        return torch.stack([_number(metric(pairs), name, logits) for pairs in logits])

    return Bound(each, keep, {"metric": name, "code": _fingerprint(metric), "keep": keep}, True)


def _number(value: Any, name: str, like: Tensor) -> Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), device=like.device)
    if not isinstance(value, Tensor):
        raise InputError(f"metric {name} returned {type(value).__name__}; it must return one number")
    if value.numel() != 1:
        raise InputError(
            f"metric {name} returned a tensor of shape {tuple(value.shape)}; it must return one number: take .mean() "
            "or pick what you want (it is given logits B k V: pairs, last positions, vocabulary)"
        )
    if value.is_complex():
        raise InputError(f"metric {name} returned a complex number; it must return a real one")
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))


def _fingerprint(fn: Callable[..., Any]) -> str:
    """A hash of a function's text (of its code where there is no text); what it closes over is not seen."""
    try:
        text = inspect.getsource(fn).encode()
    except (OSError, TypeError):
        code = getattr(fn, "__code__", None)
        text = code.co_code if code is not None else type(fn).__name__.encode()
    return hashlib.sha256(text).hexdigest()[:16]

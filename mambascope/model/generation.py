"""Text generation in constant memory: one state, one token at a time, hooks firing at every step."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.model.inputs import prepare

if TYPE_CHECKING:
    from mambascope.hooks.cache import MambaCache
    from mambascope.model.state import State

__all__ = ["GenerateMethods", "Sampler", "sample"]


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn: ``temperature`` 0 takes the most likely; top_k, top_p cut the tail first."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

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
    """One id per row from logits ``B V``."""
    if sampler.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / sampler.temperature
    if sampler.top_k is not None and sampler.top_k < scores.shape[-1]:
        least = scores.topk(sampler.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampler.top_p is not None:
        ordered, order = scores.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the strictly likelier tokens
        ordered = ordered.masked_fill(before >= sampler.top_p, float("-inf"))
        scores = torch.empty_like(scores).scatter_(-1, order, ordered)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


class GenerateMethods:
    """Mixed into HookedMamba."""

    if TYPE_CHECKING:
        cfg: Any
        device: torch.device

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
        def step(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]: ...
        def to_string(self, tokens: Any) -> Any: ...
        def _absolute(self) -> Any: ...

    @torch.no_grad()
    def stream(
        self,
        prompt: Any,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_tokens: Iterable[int] | None = None,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        state: "State | None" = None,
        watch: "Callable[[MambaCache], None] | None" = None,
        names_filter: Any = None,
    ) -> Iterator[Tensor]:
        """Yield the ids ``B`` of one new token a row at a time; memory does not grow with the text.

        A row that has met a stop token (default: the model's end-of-text) yields that token from then on; the
        iterator ends when every row has. ``watch`` gets the cache of the prompt and of every step.
        """
        sampler = Sampler(temperature, top_k, top_p)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
            raise InputError(f"max_new_tokens must be an integer ≥ 0, got {max_new_tokens!r}")
        stops = self._stops(stop_tokens)
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        entry = prepare(self, prompt, prepend_bos, attention_mask)  # type: ignore[arg-type]
        mask = None if entry.padding is None else entry.padding.mask
        options: dict[str, Any] = {"return_state": True, "logits_to_keep": 1}
        tokens, done = entry.tokens, torch.zeros(entry.tokens.shape[0], dtype=torch.bool, device=self.device)
        ids = torch.zeros(tokens.shape[0], dtype=torch.long, device=self.device)
        for i in range(max_new_tokens):
            with self._absolute():
                if watch is None:
                    logits, state = self(tokens, state=state, attention_mask=mask, **options)
                else:
                    (logits, state), cache = self.run_with_cache(
                        tokens, state=state, attention_mask=mask, names_filter=names_filter, **options
                    )
                    watch(cache)
            mask = None
            new = sample(logits[:, -1], sampler, generator)
            ids = torch.where(done, ids, new)
            done = done | torch.isin(ids, stops)
            yield ids
            if bool(done.all()) or i == max_new_tokens - 1:
                return
            tokens = ids[:, None]

    def _stops(self, stop_tokens: Iterable[int] | None) -> Tensor:
        if stop_tokens is None:
            stop_tokens = [] if self.cfg.eos_token_id is None else [self.cfg.eos_token_id]
        stops = list(stop_tokens)
        for token in stops:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.cfg.n_tokens:
                raise InputError(f"stop token {token!r} is not an id of the vocabulary of {self.cfg.n_tokens}")
        return torch.tensor(stops, dtype=torch.long, device=self.device)

    @torch.no_grad()
    def generate(
        self,
        prompt: Any,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_tokens: Iterable[int] | None = None,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        state: "State | None" = None,
        return_cache: bool = False,
        names_filter: Any = None,
    ) -> Any:
        """Continue a prompt; the default is greedy.

        Text gives text, a list of texts a list, ids ``B L`` give ids ``B L+new`` (prompt included; for a masked
        batch a list of one row each). Rows stop at ``stop_tokens`` (default: end of text). Hooks fire in
        the prompt and at every step, with absolute positions. ``return_cache`` adds the cache of all that was
        read (prompt and new tokens but the last; rows of one length): its memory grows with the text.
        """
        caches: list[MambaCache] = []
        watch = caches.append if return_cache else None
        entry = prepare(self, prompt, prepend_bos, attention_mask)  # type: ignore[arg-type]
        if return_cache and entry.padding is not None:
            raise InputError("return_cache needs rows of one length; generate the rows one at a time")
        mask = None if entry.padding is None else entry.padding.mask
        options: dict[str, Any] = {"stop_tokens": stop_tokens, "attention_mask": mask, "state": state}
        options |= {"watch": watch, "names_filter": names_filter}
        stops = self._stops(stop_tokens).tolist()
        new = list(self.stream(entry.tokens, max_new_tokens, temperature, top_k, top_p, seed, **options))
        columns = torch.stack(new, 1) if new else entry.tokens[:, :0]
        rows = [self._row(entry, b, columns[b].tolist(), stops) for b in range(entry.tokens.shape[0])]
        if isinstance(prompt, str) or (isinstance(prompt, (list, tuple)) and isinstance(prompt[0], str)):
            texts = [self.to_string(row) for row in rows]
            out: Any = texts[0] if isinstance(prompt, str) else texts
        elif entry.padding is not None:
            out = [torch.tensor(row, device=self.device) for row in rows]
        else:
            out = torch.cat([entry.tokens, columns], 1)
        if not return_cache:
            return out
        if not caches:
            raise InputError("return_cache needs max_new_tokens ≥ 1")
        return out, caches[0].followed_by(caches[1:])

    def _row(self, entry: Any, b: int, new: list[int], stops: list[int]) -> list[int]:
        """A row's real prompt and what was generated, up to and with its first stop token."""
        prompt = entry.tokens[b] if entry.padding is None else entry.tokens[b][entry.padding.mask[b]]
        for i, token in enumerate(new):
            if token in stops:
                new = new[: i + 1]
                break
        return prompt.tolist() + new

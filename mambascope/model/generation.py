"""Text generation in constant memory: one state, one token at a time, hooks firing at every step."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.model.decode import LOOK_AHEAD, Decoder, Generation
from mambascope.model.inputs import prepare
from mambascope.model.sampling import Sampler, check_sound, draw, sample

if TYPE_CHECKING:
    from mambascope.hooks.cache import MambaCache
    from mambascope.model.graphs import Graphs
    from mambascope.model.state import State

__all__ = ["GenerateMethods"]


@dataclass(frozen=True)
class _Plan:
    """A generation's options."""

    most: int
    sampler: Sampler
    generator: torch.Generator | None
    stops: Tensor
    stop_list: list[int]
    watch: "Callable[[MambaCache], None] | None"
    names_filter: Any


class _Block:
    """New ids ``B k`` on the device, and on their way to the host: how many columns count, and whether that was all.

    ``done`` are the rows that were done before it. Columns after the one where the last row is done do not count.
    """

    def __init__(
        self, ids: Tensor, done: Tensor, stops: Tensor, sound: Tensor | None = None, settled: bool = False
    ) -> None:
        self.ids, self.settled = ids, settled
        over = torch.cat([done[:, None], torch.isin(ids, stops)], 1).cummax(1).values.all(0)  # k+1
        good = torch.ones_like(over[-1]) if sound is None else sound
        facts = torch.stack([(~over[:-1]).sum(), over[-1].long(), good.long()])
        self._facts, self._there = facts, None
        if facts.is_cuda:
            self._facts = torch.empty(3, dtype=torch.long, pin_memory=True).copy_(facts, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(facts.device))

    def look(self) -> tuple[Tensor, bool]:
        """The columns that count, and whether every row is done with them."""
        if self._there is not None:
            self._there.synchronize()
        count, over, sound = self._facts.tolist()
        check_sound(bool(sound))
        return self.ids[:, :count], bool(over)


class GenerateMethods:
    """Mixed into HookedMamba."""

    if TYPE_CHECKING:
        cfg: Any
        device: torch.device
        graphs: Graphs

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
        def step(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]: ...
        def to_string(self, tokens: Any) -> Any: ...
        def _absolute(self, grows: bool = False) -> Any: ...

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
        plan = self._plan(max_new_tokens, Sampler(temperature, top_k, top_p), seed, stop_tokens, watch, names_filter)
        for block in self._generated(plan, prompt, prepend_bos, attention_mask, state, 1):
            yield block[:, 0]

    def _plan(
        self, most: int, sampler: Sampler, seed: int | None, stop_tokens: Any, watch: Any, names_filter: Any
    ) -> "_Plan":
        if isinstance(most, bool) or not isinstance(most, int) or most < 0:
            raise InputError(f"max_new_tokens must be an integer ≥ 0, got {most!r}")
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        stops = self._stops(stop_tokens)
        return _Plan(most, sampler, generator, stops, stops.tolist(), watch, names_filter)

    @torch.no_grad()
    def _generated(
        self, plan: "_Plan", prompt: Any, prepend_bos: bool | None, mask: Tensor | None, state: Any, ahead: int
    ) -> Iterator[Tensor]:
        """New ids ``B k``, at most ``ahead`` columns at a time, until every row is done."""
        entry = prepare(self, prompt, prepend_bos, mask)  # type: ignore[arg-type]
        if plan.most == 0:
            return
        logits, state = self._read(entry.tokens, state, None if entry.padding is None else entry.padding.mask, plan)
        ids = sample(logits[:, -1], plan.sampler, plan.generator)
        yield ids[:, None]
        going, left = Generation(state, ids, torch.isin(ids, plan.stops), plan.stop_list), plan.most - 1
        waiting: _Block | None = None  # launched, not looked at yet: so the device need not wait for the host
        while left:
            block = self._next_block(going, plan, min(left, ahead))
            left -= block.ids.shape[1]
            for ready in (waiting, block if block.settled or ahead == 1 else None):
                if ready is not None:
                    columns, over = ready.look()
                    if columns.shape[1]:
                        yield columns
                    if over:
                        return
            waiting = None if block.settled or ahead == 1 else block
        if waiting is not None and (columns := waiting.look()[0]).shape[1]:
            yield columns

    def _read(self, tokens: Tensor, state: Any, mask: Tensor | None, plan: "_Plan") -> Any:
        options: dict[str, Any] = {"return_state": True, "logits_to_keep": 1, "state": state, "attention_mask": mask}
        with self._absolute(grows=True):
            if plan.watch is None:
                return self(tokens, **options)
            out, cache = self.run_with_cache(tokens, names_filter=plan.names_filter, **options)
        plan.watch(cache)
        return out

    def _next_block(self, going: Generation, plan: "_Plan", tokens: int) -> "_Block":
        """Up to ``tokens`` new ids ``B k``: by the step kernels where they can run, else one by an ordinary pass."""
        if plan.watch is None:
            sampler = plan.sampler if len(plan.stop_list) <= Generation.MOST_STOPS else None
            with self.graphs.decoding(self, going.ids.shape[0], sampler) as decoder:  # type: ignore[arg-type]
                if decoder is not None:
                    return self._decoded(going, decoder, plan, tokens)
        if bool(going.done.all()):  # hooks must not see a step that nobody takes
            return _Block(going.ids[:, None][:, :0], going.done, plan.stops, settled=True)
        logits, state = self._read(going.ids[:, None], self.graphs.settled(going), None, plan)
        ids = torch.where(going.done, going.ids, sample(logits[:, -1], plan.sampler, plan.generator))
        before = going.done
        going.read(state, ids, before | torch.isin(ids, plan.stops))
        return _Block(ids[:, None], before, plan.stops, settled=True)

    def _decoded(self, going: Generation, decoder: Decoder, plan: "_Plan", tokens: int) -> "_Block":
        model: Any = self
        done = going.done
        if len(plan.stop_list) <= Generation.MOST_STOPS and decoder.chooses(plan.sampler):
            told, sound = going.ahead(model, decoder, tokens, plan.sampler, plan.generator)
            return _Block(told, done, plan.stops, sound)
        columns, all_sound = [], []
        for _ in range(tokens):
            new, sound = draw(going.logits(model, decoder), plan.sampler, plan.generator)
            ids = torch.where(going.done, going.ids, new)
            going.chosen(model, decoder, ids, going.done | torch.isin(ids, plan.stops))
            columns.append(ids)
            all_sound.append(sound)
        return _Block(torch.stack(columns, 1), done, plan.stops, torch.stack(all_sound).all())

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

        def keep(cache: "MambaCache") -> None:
            if caches:  # every step would hold a key-value cache of its own
                cache.recording.forget_states()
            caches.append(cache)

        watch = keep if return_cache else None
        entry = prepare(self, prompt, prepend_bos, attention_mask)  # type: ignore[arg-type]
        if return_cache and entry.padding is not None:
            raise InputError("return_cache needs rows of one length; generate the rows one at a time")
        mask = None if entry.padding is None else entry.padding.mask
        plan = self._plan(max_new_tokens, Sampler(temperature, top_k, top_p), seed, stop_tokens, watch, names_filter)
        ahead = LOOK_AHEAD if watch is None else 1
        new = list(self._generated(plan, entry.tokens, None, mask, state, ahead))
        columns = torch.cat(new, 1) if new else entry.tokens[:, :0]
        rows = [self._row(entry, b, columns[b].tolist(), plan.stop_list) for b in range(entry.tokens.shape[0])]
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

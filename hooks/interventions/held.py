"""Activations that interventions hold: taken from a cache by token, and found again in the run by token.

Everything is kept by a row's real tokens, so that padding may lie elsewhere in the run than in the cache.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import CacheError, HookError
from mambascope.hooks.cache import MambaCache
from mambascope.hooks.interventions.origin import Origin
from mambascope.hooks.points import LAZY, hook_names, resolve_name, spec_of, tail_of
from mambascope.hooks.positions import Clock, Index, Padding, PerRow
from mambascope.hooks.recorder import BOUNDARY

__all__ = ["cached", "cached_mean", "check_cache", "lengths_of", "match", "origin_of"]


def check_cache(cache: Any) -> MambaCache:
    """The cache, if it is one with its batch axis; HookError if not."""
    if not isinstance(cache, MambaCache):
        raise HookError(f"give the cache of a run (model.run_with_cache(x)[1]), got {type(cache).__name__}")
    if not cache.has_batch_dim:
        raise HookError("the cache has no batch axis; give it as run_with_cache made it, before remove_batch_dim()")
    return cache


def origin_of(cache: MambaCache, who: str) -> Origin:
    """Whose activations ``who`` holds now; HookError if its weights have changed since the cache was recorded."""
    return Origin(cache.model, cache.recording.weights, who)


def lengths_of(cache: MambaCache) -> list[int]:
    """Real tokens of each row."""
    batch, length = cache.recording.shape
    padding = cache.recording.padding
    return [length] * batch if padding is None else [int(n) for n in padding.lengths.tolist()]


def full_name(cache: MambaCache, name: str) -> str:
    """A point's full name; errors as reading it would give."""
    full = resolve_name(name, hook_names(cache.model.cfg.layers))
    if full not in cache:
        raise CacheError(f"{full} was not cached; name it in names_filter")
    layer = tail_of(full)[0]
    if layer is not None:  # an intervention belongs to the weights that it will run with
        cache.check_fresh(layer)
    return full


def cached(cache: MambaCache, name: str, index: Index, rows: Sequence[int] | None = None) -> Tensor:
    """The values of a point at an index's tokens, ``B …`` for one position a row, else ``B k …``; a copy.

    With ``index`` None every real token, rows of different lengths filled up with zeros. ``rows``: which cached row
    each one is; by default all in order, and for positions by row a cache of one row serves every row.
    """
    name = full_name(cache, name)
    axis = spec_of(name).axis
    one = isinstance(index, int) or (isinstance(index, PerRow) and index.one_each)
    out = _cached(cache, name, index, rows)
    return out if one or axis == 1 else out.movedim(1, axis)


def _cached(cache: MambaCache, name: str, index: Index, rows: Sequence[int] | None) -> Tensor:
    """As `cached`, positions on the second axis."""
    lengths, (batch, length) = lengths_of(cache), cache.recording.shape
    clock = Clock(length, batch, 0, cache.recording.padding)
    if isinstance(index, PerRow):
        return _by_row(cache, name, index, clock, rows)
    if rows is not None:
        return _cached(cache, name, index, None)[list(rows)]
    if index is None:
        left = [0] * batch if clock.padding is None else clock.padding.left.tolist()
        if len(set(lengths)) == 1 and not any(left):
            return _whole(cache, name)[:, : lengths[0]].clone()
        whole = _whole(cache, name)
        rows = [whole[b, a : a + n] for b, (a, n) in enumerate(zip(left, lengths, strict=True))]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    found = clock.columns(index, f"the cached {name}")
    assert found is not None
    where, _ = found
    if not isinstance(where, Tensor):
        return _whole(cache, name)[:, where].clone()
    out = _gather(cache, name, range(batch), where[:, None] if where.ndim == 1 else where)
    return out[:, 0] if where.ndim == 1 else out


def _whole(cache: MambaCache, name: str) -> Any:
    """A cached activation, positions on the second axis."""
    axis = spec_of(name).axis
    return cache[name] if axis == 1 else cache[name].movedim(axis, 1)


def _by_row(cache: MambaCache, name: str, index: PerRow, clock: Clock, rows: Sequence[int] | None) -> Tensor:
    """Values at positions of their own in every row."""
    count = index.positions.shape[0]
    chosen = list(rows) if rows is not None else [0] * count if clock.batch == 1 else list(range(clock.batch))
    padding = clock.padding
    if padding is not None:
        padding = Padding(padding.mask[chosen], padding.left[chosen], padding.lengths[chosen])
    hits = Clock(clock.length, len(chosen), 0, padding).per_row(index, f"the cached {name}")
    if hits is None:
        raise HookError(f"{name}: rows= leaves every place out, so there is nothing to read from the cache")
    out = _gather(cache, name, chosen, hits.columns)  # what is off is read at the row's first token, and not used
    return out[:, 0] if index.one_each else out


def _gather(cache: MambaCache, name: str, rows: Sequence[int], columns: Tensor) -> Tensor:
    """Values at columns ``B k`` of some rows; for the lazy points one short window a place."""
    value = _whole(cache, name)
    if tail_of(name)[1] in LAZY:
        places = zip(rows, columns.tolist(), strict=True)
        return torch.stack([torch.stack([value[b, t] for t in row]) for b, row in places])
    return value[torch.tensor(list(rows), device=value.device)[:, None], columns.to(value.device)]


def cached_mean(cache: MambaCache, name: str) -> Tensor:
    """The mean over all real tokens of all rows, in float64, then in the point's dtype; states in windows."""
    name, lengths = full_name(cache, name), lengths_of(cache)
    if spec_of(name).axis != 1:
        raise HookError(f"{name}: a mean over positions, each with keys of its own, means nothing")
    padding = cache.recording.padding
    left = [0] * len(lengths) if padding is None else padding.left.tolist()
    total: Any = 0
    value = cache[name]
    for b, (begin, n) in enumerate(zip(left, lengths, strict=True)):
        for start in range(begin, begin + n, BOUNDARY):
            total = total + value[b, start : min(start + BOUNDARY, begin + n)].double().sum(0)
    return (total / sum(lengths)).to(value.dtype)


def match(held: Tensor, value: Tensor, hook: Any, index: Index, length: int | None, who: str) -> Tensor:
    """The part of ``held`` that belongs to this call of a hook, shaped and typed as ``value``.

    ``held``: what :func:`cached` gave for the site's positions. ``length``: the tokens of the cached rows where
    positions were not chosen by hand, so that another length is an error.
    """
    held = held.to(value.device)
    batch = value.shape[0]
    if held.shape[0] not in (1, batch):
        raise HookError(
            f"{who} holds {held.shape[0]} rows, the run has {batch}; give it the cache of one row, or of all"
        )
    clock: Clock = hook.clock
    if length is not None and not clock.absolute:
        lengths = [clock.length] if clock.padding is None else clock.padding.lengths.tolist()
        other = [b for b, n in enumerate(lengths) if n != length]
        if other:
            rows = "the run" if clock.padding is None else f"row {other[0]} of the run"
            raise HookError(
                f"{who} holds values of {length} tokens, {rows} has {lengths[other[0]]}; "
                "give tokens of one length, or say which cached positions go where (source=)"
            )
    one = isinstance(index, int) or (isinstance(index, PerRow) and index.one_each)
    if not one and hook.axis != 1 and held.ndim == value.ndim:
        held, value = held.movedim(hook.axis, 1), value.movedim(hook.axis, 1)
        return _matched(held, value, hook, index, who, one).movedim(1, hook.axis)
    return _matched(held, value, hook, index, who, one)


def _matched(held: Tensor, value: Tensor, hook: Any, index: Index, who: str, one: bool) -> Tensor:
    """As `match`, positions on the second axis."""
    if not one:
        held = _at_step(held, hook, index, who) if hook.now is not None else _over_piece(held, value, hook, index, who)
    if held.shape[1:] != value.shape[1:]:
        raise HookError(f"{who} holds values of shape {tuple(held.shape)}, the run has {tuple(value.shape)} there")
    return held.to(value.dtype).expand(value.shape)


def _at_step(held: Tensor, hook: Any, index: Index, who: str) -> Tensor:
    """Of ``B k D N`` the entry that this step of the recurrence is, in each row."""
    clock: Clock = hook.clock
    batch = max(clock.batch, held.shape[0])
    step = torch.as_tensor(hook.now).expand(batch)  # tokens since the start of this call
    if index is None or isinstance(index, slice):
        begin = torch.as_tensor(clock.start).cpu() if clock.absolute else 0
        if index is None:
            order = step + begin
        elif clock.absolute:
            order = (step + begin - (index.start or 0)) // (index.step or 1)
        else:
            lengths = torch.tensor([clock.length]) if clock.padding is None else clock.padding.lengths.cpu()
            ranges = [index.indices(int(n)) for n in lengths.expand(batch).tolist()]
            order = torch.tensor([(int(t) - a) // c for t, (a, _, c) in zip(step, ranges, strict=True)])
    else:
        assert isinstance(index, PerRow)
        hits = clock.per_row(index, str(hook.name))
        assert hits is not None
        order = ((hits.tokens == step[:, None]) & hits.on).int().argmax(1)
    on = torch.ones(batch, dtype=torch.bool) if hook.rows is None else hook.rows.cpu()
    return _pick(held, order.masked_fill(~on, 0)[:, None], who)[:, 0]


def _over_piece(held: Tensor, value: Tensor, hook: Any, index: Index, who: str) -> Tensor:
    """Of ``B k …`` the entries that this call shows: all, or in a growing text those of its positions."""
    clock: Clock = hook.clock
    if isinstance(index, PerRow):
        return held
    padding = clock.padding
    if clock.absolute:
        if index is None:
            left = 0 if padding is None else padding.left.cpu()[:, None]
            start = torch.as_tensor(clock.start).cpu().reshape(-1, 1)
            order = (start - left + torch.arange(value.shape[1])).clamp_min(0)  # 1|B L; padding gets a real value
            last = held.shape[1] - 1
            order = order if padding is None else torch.where(padding.mask.cpu(), order, order.clamp_max(last))
            return _pick(held, order, who)
        assert isinstance(index, slice)
        pos = torch.as_tensor(hook.pos).cpu()
        order = ((pos if pos.ndim == 2 else pos[None]) - (index.start or 0)) // (index.step or 1)
        if hook.rows is not None:
            order = order.masked_fill(~hook.rows.cpu(), 0)
        return _pick(held, order, who)
    if index is None and padding is not None:
        missing = value.shape[1] - held.shape[1]
        if missing < 0:
            raise HookError(f"{who} holds values of {held.shape[1]} tokens, the run has {value.shape[1]} columns")
        filled = torch.cat([held, held[:, -1:].expand(-1, missing, *held.shape[2:])], 1)
        return padding.unalign(filled.expand(clock.batch, *filled.shape[1:]))
    return held


def _pick(held: Tensor, order: Tensor, who: str) -> Tensor:
    """Entries ``order`` (``1|B k``) of ``held`` (``1|B K …``); HookError past its end."""
    last = int(order.max())
    if last >= held.shape[1]:
        raise HookError(
            f"{who} holds {held.shape[1]} positions and is asked for number {last}: the text goes on past them"
        )
    rows = max(held.shape[0], order.shape[0])
    held, order = held.expand(rows, *held.shape[1:]), order.expand(rows, -1).to(held.device)
    return held[torch.arange(rows, device=held.device)[:, None], order]

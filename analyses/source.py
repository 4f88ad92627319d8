"""What an analysis looks at: one text, read once, with everything inside it at hand.

Every analysis takes a model and a *source*: a text, token ids, a cache of one row, or a :class:`Reading`, which is
what the others become. Analyses that share a Reading share its forward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambascope.analyses.labels import token_labels
from mambascope.errors import CacheError, InputError
from mambascope.hooks import effective_path
from mambascope.hooks.cache import MambaCache

if TYPE_CHECKING:
    from mambascope.model import HookedMamba

__all__ = ["Reading", "Source", "every_layer", "layer_index", "position_index", "read", "scan_layer", "scan_layers"]

Source = Any
"""A text, a list of ids, a LongTensor ``L`` or ``1 L``, a MambaCache of one unpadded row, or a Reading."""


@dataclass(frozen=True)
class Reading:
    """One text as a model read it.

    ``tokens`` ``L`` are the ones that the cache shows. ``start`` tokens were read before them (see ``max_tokens`` of
    :func:`read`): the state carries them, the cache does not, and ``before`` holds the logits ``V`` after the last.
    """

    model: "HookedMamba"
    cache: MambaCache
    tokens: Int[Tensor, " L"]
    start: int = 0
    before: Float[Tensor, " V"] | None = None

    @property
    def length(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_layers(self) -> int:
        return self.model.cfg.n_layers

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """One text a token."""
        return token_labels(self.model, self.tokens)

    def value(self, name: str, layer: int | None = None) -> Tensor:
        """An activation without its batch axis, ``L …``; short names as in TransformerLens (``"delta"``)."""
        found = self.cache[name] if layer is None else self.cache[name, layer]
        return found[0] if self.cache.has_batch_dim else found

    def window(self, name: str, layer: int, start: int, stop: int) -> Float[Tensor, "W D N"]:
        """Steps [start, stop) of a lazy activation (``"h"``, ``"A_bar"``, ``"B_bar"``, ``"write"``)."""
        lazy = self.cache[name, layer]
        return lazy[0, start:stop] if self.cache.has_batch_dim else lazy[start:stop]

    def entry_state(self, layer: int) -> Float[Tensor, "D N"]:
        """h0: the state of a layer before the first token shown."""
        return effective_path.entry_state(self.cache, layer)[0]

    def unedited_recurrence(self, layer: int, stop: int) -> None:
        """CacheError if a hook edited A_bar, B_bar, write, h or y of this layer before position ``stop``.

        There y is not what delta, B, C and u_write give. Only blocks that carried hooks are computed again to see.
        """
        effective_path.unedited(self.cache, layer, "scan", stop)


def read(model: "HookedMamba", source: Source, *, max_tokens: int | None = None) -> Reading:
    """Run the model on a source once and keep everything readable.

    A text longer than ``max_tokens`` is read to its end all the same: the tokens before the last ``max_tokens``
    go through in constant memory, and the rest starts from their state, which changes no number. Cost: one forward
    pass; memory as ``run_with_cache`` (each block's input, and its state every 64 tokens).

    Raises
    ------
    InputError: more than one row, padding, empty text, ids outside the vocabulary.
    CacheError: the cache belongs to another model object, or holds no tokens.
    """
    if isinstance(source, Reading):
        if source.model is not model:
            raise CacheError("this Reading was made by another model than the one given")
        return source
    if isinstance(source, MambaCache):
        return _of_cache(model, source)
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1):
        raise InputError(f"max_tokens must be a positive integer, got {max_tokens!r}")
    if isinstance(source, str):
        ids = torch.tensor(model.encode_texts([source])[0][0])
    else:
        ids = source
    tokens = _one_row(ids, "the source")
    with torch.no_grad():
        if max_tokens is None or tokens.shape[1] <= max_tokens:
            _, cache = model.run_with_cache(tokens, return_type=None)
            return _of_cache(model, cache)
        start = tokens.shape[1] - max_tokens
        logits, state = model(tokens[:, :start], return_state=True, logits_to_keep=1)
        _, cache = model.run_with_cache(tokens[:, start:], return_type=None, state=state)
    return replace(_of_cache(model, cache), start=start, before=logits[0, -1])


def _one_row(ids: Any, what: str) -> Tensor:
    if isinstance(ids, (list, tuple)) and ids and isinstance(ids[0], str):
        raise InputError(f"{what} is a list of {len(ids)} texts; an analysis looks at one text at a time")
    if isinstance(ids, (list, tuple)) and not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{what} must be a text, ids or a cache, got a list that holds other things than integers")
    if not isinstance(ids, (Tensor, list, tuple)):
        raise InputError(f"{what} must be a text, ids or a cache, got {type(ids).__name__}")
    tokens = torch.as_tensor(ids)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise InputError(f"{what} has shape {tuple(tokens.shape)}; an analysis looks at one text: give ids L or 1 L")
    if tokens.shape[1] == 0:
        raise InputError(f"{what} is empty: it has no token")
    return tokens


def _of_cache(model: "HookedMamba", cache: MambaCache) -> Reading:
    if cache.model is not model:
        raise CacheError("this cache was made by another model than the one given")
    rec = cache.recording
    if rec.tokens is None:
        raise CacheError(
            "this cache holds no tokens (its run started from a residual stream), so it cannot be labelled"
        )
    if rec.tokens.shape[0] != 1:
        raise InputError(
            f"this cache holds {rec.tokens.shape[0]} rows; take one: cache.apply_slice_to_batch_dim(slice(b, b + 1))"
        )
    if rec.padding is not None and not bool(rec.padding.mask.all()):
        raise InputError("this cache's row is padded; run its text alone, so that every position is a token")
    return Reading(model, cache, rec.tokens[0])


def layer_index(model: "HookedMamba", layer: int) -> int:
    """A layer in Python's notation, as a number from 0; InputError if the model has no such layer."""
    n = model.cfg.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not -n <= layer < n:
        raise InputError(f"layer {layer!r} is outside the model's {n} layers ({-n}…{n - 1})")
    return layer % n


def scan_layer(model: "HookedMamba", layer: int) -> int:
    """As :func:`layer_index`; InputError also if that layer's mixer has no selective scan to look at."""
    return effective_path.layer_index(model, layer)


def scan_layers(model: "HookedMamba", layers: Iterable[int] | None) -> tuple[int, ...]:
    """Some layers by number, none twice and each with a scan; None: all that have one."""
    if layers is None:
        layers = [i for i in range(model.cfg.n_layers) if effective_path.has_scan(cast(Any, model.blocks[i]).mixer)]
    found = tuple(scan_layer(model, i) for i in layers)
    if not found or len(set(found)) < len(found):
        raise InputError(f"layers must name at least one layer with a scan and none twice, got {list(found)}")
    return found


def every_layer(model: "HookedMamba") -> tuple[int, ...]:
    """All layers, for what goes through the whole model; InputError if one has no scan."""
    return scan_layers(model, range(model.cfg.n_layers))


def position_index(length: int, position: int, what: str = "position") -> int:
    """A position in Python's notation, as a number from 0; InputError if the text has no such token."""
    if isinstance(position, bool) or not isinstance(position, int) or not -length <= position < length:
        raise InputError(f"{what} {position!r} is outside the text of {length} tokens ({-length}…{length - 1})")
    return position % length


def finite(value: Tensor, what: str) -> Tensor:
    """The value itself; InputError naming layer and position of the first NaN or Inf in an ``L …`` tensor."""
    bad = ~torch.isfinite(value).flatten(1).all(1) if value.ndim > 1 else ~torch.isfinite(value)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise InputError(f"{what} is NaN or infinite at position {at}; look for the weight or edit that caused it")
    return cast(Tensor, value)

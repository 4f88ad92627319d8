"""MambaCache: everything a forward pass computed, readable; what was not stored is computed on first read."""

import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from mambascope.errors import CacheError, UnknownNameError
from mambascope.hooks.cache_windows import WindowMethods
from mambascope.hooks.effective import EffectiveMethods
from mambascope.hooks.lazy import LazyActivation
from mambascope.hooks.model_protocol import Scope
from mambascope.hooks.points import LAZY, ON_DEMAND, hook_names, resolve_name, spec_of, tail_of
from mambascope.hooks.recorder import BlockRecord, CacheRecorder, Recording, compact, joined, select_names
from mambascope.hooks.residual import ResidualMethods
from mambascope.hooks.run import compute_dtype
from mambascope.hooks.seals import Seals
from mambascope.hooks.shares import ShareMethods
from mambascope.hooks.transformer_lens_bridge import LensMethods

__all__ = ["CacheRecorder", "MambaCache", "select_names"]


class _Readable(Mapping[str, Any]):
    """The cache as the mapping that TransformerLens' base class expects in ``cache_dict``."""

    def __init__(self, cache: "MambaCache") -> None:
        self._cache = cache

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return self._cache.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._cache.visible or name in self._cache.recording.gradients

    def __iter__(self) -> Iterator[str]:
        yield from self._cache.recording.names
        yield from self._cache.recording.gradients

    def __len__(self) -> int:
        return len(self._cache.recording.names) + len(self._cache.recording.gradients)


class MambaCache(WindowMethods, EffectiveMethods, ShareMethods, ResidualMethods, LensMethods, ActivationCache):
    """What ``run_with_cache`` returns; TransformerLens' ActivationCache for Mamba.

    ``cache["blocks.3.mixer.hook_delta"]``, ``cache["delta", 3]`` and ``cache["delta3"]`` are the same tensor.
    Stored are each block's input and its state every 64 tokens; any other activation of a block is
    recomputed from them on first read, by the same path and to the same bits, without the user's hooks.
    A block that carried hooks stored what it computed. ``hook_h``, ``hook_A_bar``, ``hook_B_bar`` and
    ``hook_write`` come as windows (:class:`~mambascope.hooks.lazy.LazyActivation`). If the weights have
    changed since, a read that needs them is refused.
    """

    model: Any

    def __init__(self, recording: Recording, model: Scope, has_batch_dim: bool = True) -> None:
        self.recording = recording
        self.visible = frozenset(recording.names)
        self._device: torch.device | None = None
        self._replays: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._seals = Seals(recording)
        super().__init__(cast(Any, None), model, has_batch_dim)

    @property
    def cache_dict(self) -> Any:  # type: ignore[override]
        """The cache as a mapping from full names. Made anew each time: kept, it would keep dead caches alive."""
        return _Readable(self)

    @cache_dict.setter
    def cache_dict(self, _: Any) -> None:
        """The base class sets it; what is read comes from the recording."""

    # ---- reading

    def __getitem__(self, key: Any) -> Any:
        return self.cache_dict[self._name(key)]

    def __contains__(self, key: object) -> bool:
        try:
            return self._name(key) in self.cache_dict
        except (UnknownNameError, CacheError):
            return False

    def _name(self, key: Any) -> str:
        if isinstance(key, str):
            name = key
        elif isinstance(key, tuple) and len(key) in (2, 3) and isinstance(key[0], str):
            layer = key[1]
            if layer is None:
                name = f"ln_final.hook_{key[0]}" if key[0] in ("scale", "normalized") else f"hook_{key[0]}"
            else:
                n = self.model.cfg.n_layers
                if isinstance(layer, bool) or not hasattr(layer, "__index__"):
                    raise UnknownNameError(f"a layer is an integer, got {layer!r} in {key!r}")
                layer = operator.index(layer)
                if not -n <= layer < n:
                    raise UnknownNameError(f"layer {layer} is outside the model's {n} blocks")
                level = f"{key[2]}." if len(key) == 3 and key[2] else ""
                name = f"blocks.{layer % n}.{level}hook_{key[0]}"
        else:
            raise UnknownNameError(f"a cache is read by name or by (name, layer), got {key!r}")
        if name in self.cache_dict:
            return name
        grad = name.endswith("_grad")
        full = resolve_name(name.removesuffix("_grad"), hook_names(self.model.cfg.layers))
        full += "_grad" if grad else ""
        if full not in self.cache_dict:
            why = "run with incl_bwd=True to keep gradients" if grad else "name it in names_filter"
            raise CacheError(f"{full} was not cached; {why}")
        return full

    def read(self, name: str) -> Any:
        """The activation of a full name: a tensor, or a LazyActivation for the ``B L D N`` ones."""
        layer, tail = tail_of(name)
        if name in self.recording.gradients:
            value = self.recording.gradients[name]
        elif layer is None:
            value = self.recording.top[name]
        elif tail in LAZY and name not in self.recording.blocks[layer].stored:
            return LazyActivation(self, name)
        else:
            value = self._block_value(layer, name)
        self._seals.check(name, value)
        return self._squeezed(value)

    def _squeezed(self, value: Tensor) -> Tensor:
        return value if self.has_batch_dim else value[0]

    def _block_value(self, layer: int, name: str) -> Tensor:
        record = self.recording.blocks[layer]
        if name in record.stored:
            return record.stored[name]
        if record.x is not None and name == f"blocks.{layer}.hook_resid_pre":
            return record.x
        after = self.recording.blocks.get(layer + 1)
        if name == f"blocks.{layer}.hook_resid_post" and after is not None and after.x is not None:
            return after.x
        if tail_of(name)[1] in ON_DEMAND:  # for this reader alone: kept, it would outweigh all the rest
            return self._replay_again(record, name)[name]
        return self._replay(record)[name]

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.model.dtype)

    # ---- the base class' methods that would touch every tensor

    def __repr__(self) -> str:
        batch, length = self.recording.shape
        held = f"{self.nbytes / 1e6:.1f} MB stored"
        return f"MambaCache({len(self)} readable activations of {batch} x {length} tokens, {held})"

    @property
    def nbytes(self) -> int:
        """Bytes held now, without what reads recompute."""
        total = 0

        def count(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        self.recording.map(count)
        return total

    def _batch_size(self) -> int:
        return self.recording.shape[0]

    def __deepcopy__(self, memo: Any) -> "MambaCache":
        """A copy of what is stored, with the same model: a copied model's weights would not be those recorded."""
        return self._with(torch.clone)

    def __copy__(self) -> "MambaCache":
        return self._with(lambda t: t)

    def __reduce__(self) -> Any:
        raise CacheError(
            "a cache is not pickled, since it reads from its model: cache.save(path), ms.load_cache(path, model)"
        )

    def check_unedited(self) -> None:
        """CacheError if a tensor that is held here was edited in place, so that it is not what the run computed."""
        self._seals.check_all()

    def _with(self, fn: Callable[[Tensor], Tensor], has_batch_dim: bool | None = None) -> "MambaCache":
        self.check_unedited()
        other = MambaCache(
            self.recording.map(fn), self.model, self.has_batch_dim if has_batch_dim is None else has_batch_dim
        )
        other._device = self._device
        return other

    def to(self, device: Any) -> "MambaCache":  # type: ignore[override]
        """Move what is stored; recomputation still runs where the model is, its results move too."""
        if not isinstance(device, (str, int, torch.device)):
            raise CacheError(f"a cache moves to a device, got {device!r}; what it stores keeps its dtype")
        target = torch.empty(0, device=device).device
        self.check_unedited()
        self.recording = self.recording.map(lambda t: t.to(target))
        self._seals = Seals(self.recording)
        self._device = target
        self._replays.clear()
        return self

    def remove_batch_dim(self, batch_size: int | None = None) -> "MambaCache":  # type: ignore[override]
        """Drop the batch axis of a cache of one row."""
        if self.has_batch_dim and self._batch_size() != 1:
            raise CacheError(f"cannot remove the batch dimension of {self._batch_size()} rows")
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "MambaCache":  # type: ignore[override]
        """Some rows of the batch, or one (an int, which drops the batch axis)."""
        index = batch_slice.slice if hasattr(batch_slice, "slice") else batch_slice
        if not self.has_batch_dim:
            if index is None or index == slice(None):
                return self
            raise CacheError("this cache has no batch dimension to slice")
        if index is None:
            return self._with(lambda t: t)
        if isinstance(index, int):
            n = self._batch_size()
            if not -n <= index < n:
                raise CacheError(f"row {index} is outside the batch of {n}")
            return self._with(lambda t: t[index % n : index % n + 1], has_batch_dim=False)
        rows = index if isinstance(index, slice) else torch.as_tensor(index)
        return self._with(lambda t: t[rows])

    def at_positions(self, pos_slice: Any, lazy: bool) -> "MambaCache":
        """Only some positions of every activation (``run_with_cache(pos_slice=)``), ``lazy`` ones or all others.

        As in TransformerLens an integer keeps the position axis, with one entry.
        """
        from transformer_lens.utilities.slice import Slice

        index = Slice.unwrap(pos_slice).slice
        index = index if isinstance(index, slice) else torch.as_tensor(index)

        def cut(name: str, value: Any) -> Tensor:
            axis = spec_of(name.removesuffix("_grad")).axis
            return compact(value[(slice(None),) * axis + (index,)])

        names = [name for name in self.recording.names if lazy or tail_of(name)[1] not in LAZY]
        try:
            kept = {name: cut(name, self.read(name)) for name in names}
            gradients = {name: cut(name, value) for name, value in self.recording.gradients.items()}
        except IndexError as error:
            raise CacheError(f"pos_slice={pos_slice!r} is outside the {self.recording.shape[1]} tokens") from error
        old = self.recording
        blocks = {
            i: BlockRecord(i, edited=True, stored={n: v for n, v in kept.items() if tail_of(n)[0] == i})
            for i in old.blocks
        }
        top = {n: v for n, v in kept.items() if tail_of(n)[0] is None}
        new = Recording(
            names, old.backend, old.tokens, old.padding, old.bos, old.shape, top, blocks, gradients, old.weights
        )
        return MambaCache(new, self.model, self.has_batch_dim)

    def followed_by(self, later: "list[MambaCache]") -> "MambaCache":
        """This cache and those of the texts that continued it, as one along the position axis.

        What is recomputed from it agrees with the pieces within rounding, not to the bit.
        """
        return MambaCache(
            joined([self.recording, *(cache.recording for cache in later)]), self.model, self.has_batch_dim
        )

    def save(self, path: str | Path) -> None:
        """Write what is stored, tokens, model name and weight hash as one safetensors file (atomic)."""
        from mambascope.hooks.cache_file import save_cache

        save_cache(self, path)

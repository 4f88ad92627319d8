"""Windows of the ``B L D N`` activations (h, A_bar, B_bar, write), computed when they are indexed."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambascope import ops
from mambascope.errors import CacheError
from mambascope.hooks.points import tail_of
from mambascope.hooks.run import Anchors, Chunks
from mambascope.memory import require_bytes

if TYPE_CHECKING:
    from mambascope.hooks.cache import MambaCache

__all__ = ["LazyActivation"]


class LazyActivation:
    """Looks like a tensor ``B L D N``; ``lazy[:, 100:110]`` computes that window only.

    A window of h starts from the nearest stored state before it (every 64 tokens), so its cost is
    O((64 + window) * D * N). ``lazy.full()`` and any torch function take all of it, if it fits in memory.
    The values carry no gradient.
    """

    def __init__(self, cache: "MambaCache", name: str) -> None:
        self._cache = cache
        self.name = name
        self._layer, self._tail = tail_of(name)

    @property
    def shape(self) -> torch.Size:
        cfg = self._cache.model.cfg
        batch, length = self._cache.recording.shape
        full = torch.Size((batch, length, cfg.d_inner, cfg.d_state))
        return full if self._cache.has_batch_dim else full[1:]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self._cache.compute_dtype

    @property
    def device(self) -> torch.device:
        return self._cache.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyActivation({self.name}, shape={tuple(self.shape)}; index it to compute a window)"

    def full(self) -> Tensor:
        """All of it, ``B L D N``; CacheError with size, limit and way out if that does not fit."""
        return self[:]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def plain(x: Any) -> Any:
            if isinstance(x, LazyActivation):
                return x.full()
            return type(x)(plain(v) for v in x) if isinstance(x, (list, tuple)) else x

        return func(*plain(args), **{k: plain(v) for k, v in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(Tensor, name):
            raise AttributeError(
                f"{self.name} is computed when it is indexed: lazy[:, a:b].{name}, or lazy.full().{name}"
            )
        raise AttributeError(name)

    def __add__(self, other: Any) -> Tensor:
        return self.full() + other

    def __radd__(self, other: Any) -> Tensor:
        return other + self.full()

    def __sub__(self, other: Any) -> Tensor:
        return self.full() - other

    def __rsub__(self, other: Any) -> Tensor:
        return other - self.full()

    def __mul__(self, other: Any) -> Tensor:
        return self.full() * other

    def __rmul__(self, other: Any) -> Tensor:
        return other * self.full()

    def __truediv__(self, other: Any) -> Tensor:
        return self.full() / other

    def __matmul__(self, other: Any) -> Tensor:
        return self.full() @ other

    def __neg__(self) -> Tensor:
        return -self.full()

    def __eq__(self, other: object) -> Any:  # entry by entry, as a tensor's
        return self.full() == (other.full() if isinstance(other, LazyActivation) else other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return bool(self.full())  # torch's error where there is more than one entry

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.full().cpu().numpy().astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> Tensor:
        """What a tensor would give for integers, slices and integer lists; bool masks and None are refused."""
        keys = list(key) if isinstance(key, tuple) else [key]
        at = next((i for i, k in enumerate(keys) if k is Ellipsis), None)
        if at is not None:
            keys[at : at + 1] = [slice(None)] * (self.ndim - len(keys) + 1)
        if len(keys) > self.ndim:
            raise CacheError(f"{self.name} has {self.ndim} axes, got {len(keys)} indices")
        keys += [slice(None)] * (self.ndim - len(keys))
        if not self._cache.has_batch_dim:
            keys = [0, *keys]
        cfg = self._cache.model.cfg
        full = (*self._cache.recording.shape, cfg.d_inner, cfg.d_state)
        keys = [self._axis(axis, k, size) for axis, (k, size) in enumerate(zip(keys, full, strict=True))]
        start, stop, time = _window(keys[1], full[1])
        rows, keys[0] = _narrow(keys[0], full[0])
        channels, keys[2] = _narrow(keys[2], full[2])
        self._check_memory(rows, stop - start, channels)
        window = self._cache.lazy_window(self.name, rows, start, stop, channels)
        keys = [k.to(window.device) if isinstance(k, Tensor) else k for k in (keys[0], time, keys[2], keys[3])]
        return window[tuple(keys)]

    def _axis(self, axis: int, key: Any, size: int) -> Any:
        """An index of one axis: an int, a slice that runs forward, or a LongTensor, inside the axis and ≥ 0."""
        if isinstance(key, slice):
            if key.step is not None and key.step < 1:
                raise CacheError(
                    f"{self.name}: slices run forward, got step {key.step} on axis {axis}; flip the result"
                )
            return key
        plain = None if isinstance(key, (bool, str, type(None))) else torch.as_tensor(key)
        if plain is not None and plain.numel() == 0:
            plain = plain.long()
        if plain is None or plain.is_floating_point() or plain.is_complex() or plain.dtype == torch.bool:
            raise CacheError(
                f"{self.name}: index with integers, slices or integer tensors, one for each axis; got {key!r}"
            )
        plain = plain.long().cpu()
        bad = plain[(plain < -size) | (plain >= size)].flatten()
        if len(bad):
            raise CacheError(f"{self.name}: index {int(bad[0])} is out of range on axis {axis} of size {size}")
        plain = torch.where(plain < 0, plain + size, plain)
        return int(plain) if plain.ndim == 0 else plain

    def _check_memory(self, rows: slice, steps: int, channels: slice) -> None:
        cfg = self._cache.model.cfg
        n_rows = len(range(self._cache.recording.shape[0])[rows])
        n_channels = len(range(cfg.d_inner)[channels])
        need = 2 * n_rows * steps * n_channels * cfg.d_state * self.dtype.itemsize
        way_out = "index a window of positions, [:, a:b], or some channels, [:, :, c]"
        require_bytes(need, self.device, f"{steps:,} steps of {self.name}", way_out, CacheError)


def _window(key: Any, length: int) -> tuple[int, int, Any]:
    """The steps [start, stop) that a time index touches, and the index inside that window."""
    if isinstance(key, int):
        return key, key + 1, 0
    if isinstance(key, slice):
        hit = range(length)[key]
        return (hit[0], hit[-1] + 1, slice(None, None, hit.step)) if hit else (0, 0, slice(None))
    if key.numel() == 0:
        return 0, 0, key
    low = int(key.min())
    return low, int(key.max()) + 1, key - low


def _narrow(key: Any, size: int) -> tuple[slice, Any]:
    """Cut an axis to one slice before computing, and the index that is left for afterwards."""
    if isinstance(key, int):
        return slice(key, key + 1), 0
    return (key, slice(None)) if isinstance(key, slice) else (slice(0, size), key)


def states_between(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    anchors: Anchors,
    first: int,
    start: int,
    stop: int,
    backend: ops.Backend,
) -> Tensor:
    """h for steps [start, stop), ``B W D N``, from u, delta, A, B whose column 0 is step ``first``.

    Runs from each anchor to the next: a state that a hook edited is itself an anchor, so what is returned is
    what happened.
    """
    u, delta, A, B = inputs
    columns, begin = anchors.columns, anchors.before(start)
    out = torch.empty(u.shape[0], stop - start, *A.shape, dtype=delta.dtype, device=delta.device)
    for i in range(begin, len(columns)):
        c = columns[i]
        if c >= stop:
            break
        if c >= start:
            out[:, c - start] = anchors.states[:, i]
        end = min(columns[i + 1] if i + 1 < len(columns) else stop, stop)  # steps (c, end)
        if end > max(c + 1, start):
            cut = slice(c + 1 - first, end - first)
            h = ops.state_window(u[:, cut], delta[:, cut], A, B[:, cut], anchors.states[:, i], backend=backend)
            low = max(start, c + 1)
            out[:, low - start : end - start] = h[:, low - (c + 1) :]
    return out


def states_of_chunks(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], anchors: Anchors, chunks: Chunks, backend: ops.Backend
) -> Tensor:
    """The same for every step of equally long ``chunks``, all of them at once: ``B count*size D N``."""
    u, delta, A, B = inputs
    batch, begin, count, size = u.shape[0], chunks.begin, chunks.count, chunks.size
    start = anchors.states[:, begin : begin + count].flatten(0, 1)
    u, delta, B = (v.reshape(batch * count, size, v.shape[-1]) for v in (u, delta, B))
    h = ops.state_window(u, delta, A, B, start, backend=backend)
    h[:, -1] = anchors.states[:, begin + 1 : begin + 1 + count].flatten(0, 1)  # what a hook may have edited
    return h.view(batch, count * size, *A.shape)

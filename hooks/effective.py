"""Effective kernels of a cache: which token a layer's output at one token comes from, exactly.

For a given text a Mamba layer is a causal convolution whose kernel changes at each step (Ali et al., 2403.01590):

    y[t, d] = Σ_{s ≤ t} alpha[t, s, d] u[s, d] + what the state before the text adds

:mod:`mambascope.ops.maps` has the equation, :mod:`mambascope.hooks.effective_path` what ``through`` means.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope import ops
from mambascope.brief import Brief
from mambascope.errors import InputError
from mambascope.hooks.effective_path import (
    Layer,
    Through,
    channel_index,
    columns_of,
    entry_state,
    layer_index,
    nothing,
    read_layer,
    tensor_of,
)
from mambascope.hooks.sites import Padding
from mambascope.memory import require_bytes
from mambascope.ops.maps import Reduction, check_reduction, window

if TYPE_CHECKING:
    from mambascope.hooks.cache import MambaCache

__all__ = ["AttentionView", "EffectiveKernel", "EffectiveMethods"]

Channels = Any
"""None (all), a list or LongTensor of channel numbers, or a slice."""

_STRIP = 1 << 28  # bytes of one strip


@dataclass(frozen=True, repr=False)
class EffectiveKernel(Brief):
    """One row of a layer's effective kernel: what one query reads, channel by channel.

    ``weights`` ``B S D`` multiply ``inputs`` ``B S D`` (u_write, or x through the convolution) of every token, 0 after
    the query and at padding. ``before`` ``B D`` is what the state before the text adds (h0's share; through the
    convolution also that of the inputs it still remembers), ``bias`` ``B D`` the share of the convolution's bias.
    Together they give ``total`` ``B D``: y of the query, or y · SiLU(z) · out_proj through the gate.
    Without a batch axis if the cache has none. ``query``: the position asked for, from 0, of each row.
    """

    layer: int
    query: tuple[int, ...]
    through: Through
    weights: Float[Tensor, "*B S D"]
    before: Float[Tensor, "*B D"]
    bias: Float[Tensor, "*B D"]
    inputs: Float[Tensor, "*B S D"]
    total: Float[Tensor, "*B D"]

    @property
    def amounts(self) -> Float[Tensor, "*B S D"]:
        """weights · inputs: what each token adds to ``total``."""
        return self.weights * self.inputs.to(self.weights)

    @property
    def error(self) -> float:
        """How far the parts are from adding up to ``total``: the largest gap over the largest sum of magnitudes."""
        parts = self.amounts
        gap = (parts.sum(-2) + self.before + self.bias - self.total).abs().amax()
        size = (parts.abs().sum(-2) + self.before.abs() + self.bias.abs()).amax()
        return float(gap / size.clamp_min(torch.finfo(size.dtype).tiny))

    def reduced(self, reduce: Reduction = "mean_abs") -> Float[Tensor, "*B S"]:
        """The weights reduced over channels: the query's row of the hidden attention."""
        check_reduction(reduce)
        return ops.over_channels(self.weights, reduce)


class EffectiveMethods:
    """The methods of a MambaCache that read a layer as a convolution. All take

    ``layer``: Python's notation. ``channels``: None (all), a list, a LongTensor or a slice.
    ``through``: ``"scan"`` (from u), ``"conv"`` (from x), ``"gate"`` (from u to the residual stream), ``"conv+gate"``.
    ``direction``: ``M``; through the gate, the component along it instead of the norm.

    and raise InputError (layer, position, channel, reduction or path that does not exist, a layer without a scan, NaN
    in the states) or CacheError (stale cache, activations not kept, an edit that the kernel would hide).
    """

    def effective_kernel(
        self: Any,
        layer: int,
        query: int = -1,
        channels: Channels = None,
        through: Through = "scan",
        direction: Float[Tensor, " M"] | None = None,
    ) -> EffectiveKernel:
        """One row: what the token at ``query`` (of each row's real tokens) reads. Time O(S D N), memory O(S D)."""
        layer = layer_index(self.model, layer)
        at = columns_of(self, query, "query")
        found = self._effective_layer(layer, channels, through, direction, at)
        h0 = _some_states(entry_state(self, layer), channels, found)
        row = ops.kernel_row(
            found.delta, found.A, found.B, found.C, at,
            gain=found.gain, taps=found.taps, read=found.read, h0=h0, backend=self._backend(found.delta),
        )  # fmt: skip
        before, bias = row.carry, torch.zeros_like(row.carry)
        if found.conv_state is not None:
            before = before + (row.early * found.conv_state.to(row.early)).sum(1)
            bias = self._bias_share(found, at)
        total = tensor_of(self, "y", layer)
        left = 0 if found.padding is None else found.padding.left
        total = total[torch.arange(len(at), device=total.device), at + left].to(row.carry)  # B D
        if channels is not None:
            total = total.index_select(-1, _numbers(channels, total))
        if found.read is not None:
            total = total * found.read[torch.arange(len(at), device=total.device), at]
        values = (found.back(row.weights), before, bias, found.back(found.inputs), total)
        found.sure()
        return EffectiveKernel(layer, tuple(at.tolist()), through, *(self._squeezed(v) for v in values))

    def influence(
        self: Any,
        layer: int,
        source: int,
        channels: Channels = None,
        through: Through = "scan",
        direction: Float[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "*B T D"]:
        """One column: the weight of the token at ``source`` in every later token. Time O(T D N), through the
        convolution K times that."""
        layer = layer_index(self.model, layer)
        at = columns_of(self, source, "source")
        found = self._effective_layer(layer, channels, through, direction, None)
        column = ops.kernel_column(
            found.delta, found.A, found.B, found.C, at,
            gain=found.gain, taps=found.taps, read=found.read, backend=self._backend(found.delta),
        )  # fmt: skip
        found.sure()
        return self._squeezed(found.back(column))

    def hidden_attention(
        self: Any,
        layer: int,
        reduce: Reduction = "mean_abs",
        channels: Channels = None,
        through: Through = "scan",
        rows: slice | None = None,
        cols: slice | None = None,
        direction: Float[Tensor, " M"] | None = None,
    ) -> Float[Tensor, "*B T S"]:
        """The map over (query, source), reduced over channels; 0 above the diagonal and at padding.

        ``reduce``: ``"mean_abs"``, ``"rms"``, ``"signed"`` (channels cancel) or ``"max"``. ``rows``, ``cols``: windows
        of the map, slices of the cache's columns; ``hidden_attention(l)[:, rows, cols]`` without computing the rest.
        Time O(T S D N); memory the map, and O(L D). A map that does not fit is an InputError before it starts.
        """
        view = self.attention_view(layer, reduce, channels, through, direction)
        return self._squeezed(view.window(rows, cols))

    def attention_view(
        self: Any,
        layer: int,
        reduce: Reduction = "mean_abs",
        channels: Channels = None,
        through: Through = "scan",
        direction: Float[Tensor, " M"] | None = None,
    ) -> "AttentionView":
        """The same map, computed only where it is indexed: for texts whose map would not fit in memory."""
        check_reduction(reduce)
        layer = layer_index(self.model, layer)
        return AttentionView(self, layer, reduce, channels, through, direction)

    # ---- inside

    def _effective_layer(
        self: Any, layer: int, channels: Channels, through: Through, direction: Any, at: Tensor | None
    ) -> Layer:
        stop = None
        if at is not None:
            padding = self.recording.padding
            stop = int((at if padding is None else at + padding.left).max()) + 1
        return read_layer(self, layer, channels, through, direction, stop)

    def _bias_share(self: Any, found: Layer, at: Tensor) -> Tensor:
        """Σ_s alpha[t, s] · factor[s] · bias, ``B D``."""
        plain = ops.kernel_row(
            found.delta, found.A, found.B, found.C, at,
            gain=found.gain, read=found.read, backend=self._backend(found.delta),
        )  # fmt: skip
        assert found.conv_bias is not None
        return plain.weights.sum(1) * found.conv_bias


def _numbers(channels: Channels, like: Tensor) -> Tensor:
    index = channel_index(channels, like.shape[-1], like.device)
    assert index is not None
    return index


def _some_states(h0: Tensor, channels: Channels, found: Layer) -> Tensor:
    if channels is None:
        return h0
    return h0.index_select(1, _numbers(channels, h0[..., 0]))


class AttentionView:
    """A layer's hidden attention that is computed where it is looked at: ``view[a:b, c:d]``, or strip by strip.

    Looks like ``B T S`` (``T S`` without a batch axis); indices are integers and slices without steps.
    """

    def __init__(
        self, cache: "MambaCache", layer: int, reduce: Reduction, channels: Channels, through: Through, direction: Any
    ) -> None:
        self._cache = cache
        self._reduce: Reduction = reduce
        self._asked = (layer, channels, through, direction)
        self._found: Layer | None = None

    @property
    def shape(self) -> torch.Size:
        batch, length = self._cache.recording.shape
        full = torch.Size((batch, length, length))
        return full if self._cache.has_batch_dim else full[1:]

    def __repr__(self) -> str:
        return f"AttentionView(layer {self._asked[0]}, {self._reduce}, shape={tuple(self.shape)}; index it)"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Tensor:
        """What the whole map would give for integers and slices."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if any(isinstance(k, bool) or not isinstance(k, (int, slice)) for k in keys) or len(keys) > len(self.shape):
            raise InputError(f"index {len(self.shape)} axes of {self!r} with integers and slices, got {key!r}")
        keys += [slice(None)] * (len(self.shape) - len(keys))
        row, places = (keys[0], keys[1:]) if self._cache.has_batch_dim else (slice(None), keys)
        length = self._cache.recording.shape[1]
        windows, after = [], []
        for what, k in zip(("query", "source"), places, strict=True):
            if isinstance(k, int):
                if not -length <= k < length:
                    raise InputError(f"{what} {k} is outside the {length} columns of the map")
                windows.append(slice(k % length, k % length + 1))
                after.append(0)
            else:
                windows.append(k)
                after.append(slice(None))
        value = self.window(*windows)[(row, *after)]
        return value if self._cache.has_batch_dim else value[0]

    def window(self, rows: slice | None, cols: slice | None) -> Float[Tensor, "B T S"]:
        """The map's rows and columns in two slices, with its batch axis."""
        cache = self._cache
        batch, length = cache.recording.shape
        wanted, sources = window(rows, length, "rows"), window(cols, length, "cols")
        values = 2 * len(wanted) * len(sources) + 4 * length * cache.model.cfg.d_inner  # the map twice, sums of delta
        need = batch * values * torch.empty((), dtype=cache.compute_dtype).element_size()
        way_out = (
            "take a window of it, hidden_attention(layer, rows=slice(a, b), cols=slice(c, d)), or go through it with "
            "attention_view(layer).strips()"
        )
        what = f"a map of {len(wanted):,} x {len(sources):,} tokens"
        require_bytes(need, cache.device, what, way_out, InputError)
        found = self._read(wanted.stop)
        padding = found.padding
        if padding is None:
            value = self._map(found, wanted, sources)
        else:
            mask = padding.mask
            real = mask[:, wanted.start : wanted.stop, None] & mask[:, None, sources.start : sources.stop]
            value = self._shifted(found, padding, wanted, sources) * real
        found.sure()
        if self._found is found:
            self._found = replace(found, sure=nothing)  # once is enough
        return value

    def _shifted(self, found: Layer, padding: Padding, rows: range, cols: range) -> Tensor:
        """The window where a row's columns of the cache are its columns of the kernel plus its left padding."""
        left, length = padding.left.tolist(), self._cache.recording.shape[1]

        def reached(asked: range) -> range:
            start = max(0, asked.start - max(left))
            return range(start, max(start + 1, min(length, asked.stop - min(left))))

        tall, wide = reached(rows), reached(cols)
        value = self._map(found, tall, wide)
        for axis, asked, there in ((1, rows, tall), (2, cols, wide)):
            places = torch.arange(asked.start, asked.stop, device=value.device) - padding.left[:, None]  # B T
            places = (places - there.start).clamp(0, len(there) - 1)
            shape = list(value.shape)
            shape[axis] = len(asked)
            places = places[:, :, None] if axis == 1 else places[:, None]
            value = value.gather(axis, places.expand(shape))
        return value

    def _read(self, stop: int) -> Layer:
        if self._found is None:
            layer, channels, through, direction = self._asked
            found = read_layer(self._cache, layer, channels, through, direction, stop)
            record = self._cache.recording.blocks.get(layer)
            if record is not None and record.edited:  # what is right up to here may not be further on
                return found
            self._found = found
        return self._found

    def _map(self, found: Layer, rows: range, cols: range) -> Tensor:
        return ops.kernel_map(
            found.delta, found.A, found.B, found.C, reduce=self._reduce,
            gain=found.gain, taps=found.taps, read=found.read,
            rows=slice(rows.start, rows.stop), cols=slice(cols.start, cols.stop),
            backend=self._cache._backend(found.delta),
        )  # fmt: skip

    def strips(self, height: int | None = None) -> Iterator[tuple[range, Tensor]]:
        """Row strips from the top, each with its positions: ``(range, B T S)``, a strip of 256 MB at a time."""
        batch, length = self._cache.recording.shape
        if height is None:
            height = max(1, _STRIP // (4 * batch * length) // 128 * 128 or 1)
        if isinstance(height, bool) or not isinstance(height, int) or height < 1:
            raise InputError(f"height must be a number of rows ≥ 1, got {height!r}")
        for start in range(0, length, height):
            rows = range(start, min(start + height, length))
            value = self.window(slice(rows.start, rows.stop), None)
            yield rows, value if self._cache.has_batch_dim else value[0]

    def pooled(self, cells: int = 500) -> Float[Tensor, "*B c c"]:
        """The whole map on at most ``cells`` x ``cells``, each the entry of largest magnitude that falls into it."""
        if isinstance(cells, bool) or not isinstance(cells, int) or cells < 1:
            raise InputError(f"cells must be a number ≥ 1, got {cells!r}")
        length = self._cache.recording.shape[1]
        per = -(-length // cells)
        n = -(-length // per)
        most = max(1, _STRIP // (4 * self._cache.recording.shape[0] * length) // per) * per
        parts = [_pool(value, per) for _, value in self.strips(most)]
        out = torch.cat(parts, -2)
        assert out.shape[-1] == n
        return out


def _pool(value: Tensor, per: int) -> Tensor:
    """Cells of ``per x per`` entries, the last ones smaller, by largest magnitude."""
    rows, cols = -(-value.shape[-2] // per), -(-value.shape[-1] // per)
    wide = torch.nn.functional.pad(value, (0, cols * per - value.shape[-1], 0, rows * per - value.shape[-2]))
    cells = wide.unflatten(-1, (cols, per)).unflatten(-3, (rows, per)).transpose(-3, -2).flatten(-2)
    return cells.gather(-1, cells.abs().argmax(-1, keepdim=True))[..., 0]

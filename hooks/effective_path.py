"""What an effective kernel is made from: one layer's tensors out of a cache, checked, with the factors of its path.

``through`` says how far a path goes. Its weights multiply ``inputs``, and with the rest add up to ``total``:

============= ========================= ===========================================================================
``"scan"``    from u_write to y         alpha itself
``"conv"``    from x to y               the convolution's taps before alpha, SiLU's factor u/conv held as it was
``"gate"``    from u_write to the       alpha · SiLU(z) of the query · the norm of the channel's column of out_proj,
              residual stream           or its product with ``direction``
``"conv+gate"`` from x to the stream    both
============= ========================= ===========================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from mambascope import ops
from mambascope.errors import CacheError, InputError, nearest
from mambascope.hooks.sites import Padding

if TYPE_CHECKING:
    from mambascope.hooks.cache import MambaCache

__all__ = [
    "PATHS",
    "Layer",
    "Through",
    "channel_index",
    "columns_of",
    "layer_index",
    "nothing",
    "read_layer",
    "unedited",
]

Through = Literal["scan", "conv", "gate", "conv+gate"]
PATHS: tuple[Through, ...] = get_args(Through)


def nothing() -> None:
    """What is sure already."""


@dataclass(frozen=True)
class Layer:
    """One layer of a cache as :mod:`mambascope.ops.maps` takes it, for some channels.

    Rows are shifted so that real tokens start at column 0; ``padding`` undoes that. ``x``, ``conv_state`` (``B K-1 D``,
    oldest first), ``taps`` and ``conv_bias`` are there where the path goes through the convolution, ``read`` where it
    goes through the gate.
    """

    index: int
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    u: Tensor
    padding: Padding | None = None
    x: Tensor | None = None
    conv_state: Tensor | None = None
    gain: Tensor | None = None
    taps: Tensor | None = None
    conv_bias: Tensor | None = None
    read: Tensor | None = None
    sure: Callable[[], None] = nothing
    """Raises what `read_layer` left open. Its answers wait for a GPU: call it when the work on these is under way."""

    @property
    def inputs(self) -> Tensor:
        """What the weights multiply, ``B L D``: x through the convolution, else u_write."""
        return self.u if self.x is None else self.x

    def back(self, value: Tensor) -> Tensor:
        """A ``B L D`` result at the cache's own columns, 0 at padding."""
        if self.padding is None:
            return value
        return self.padding.unalign(value) * self.padding.mask[..., None]


# ---- what was asked


def has_scan(mixer: Any) -> bool:
    """Whether a mixer is Mamba's, with states, delta, B and C to look at."""
    return getattr(mixer, "letter", "") == "m"


def layer_index(model: Any, layer: int) -> int:
    """A layer in Python's notation, as a number from 0; InputError if there is none, or it has no scan."""
    n = model.cfg.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not -n <= layer < n:
        raise InputError(f"layer {layer!r} is outside the model's {n} layers ({-n}…{n - 1})")
    mixer = model.blocks[layer % n].mixer
    if not has_scan(mixer):
        kind = getattr(mixer, "noun", type(mixer).__name__)
        raise InputError(
            f"layer {layer} has no selective scan (its mixer is {kind}), so it has no effective kernel; take a Mamba "
            "layer"
        )
    return layer % n


def columns_of(cache: "MambaCache", position: int, what: str) -> Tensor:
    """The place among each row's real tokens that a position means, ``B``; InputError if a row has no such token."""
    batch, length = cache.recording.shape
    padding = cache.recording.padding
    if isinstance(position, bool) or not isinstance(position, int):
        raise InputError(f"{what} must be an integer position, got {position!r}")
    lengths = [length] * batch if padding is None else padding.lengths.tolist()
    for row, n in enumerate(lengths):
        if not -n <= position < n:
            where = "the text" if padding is None else f"row {row}"
            raise InputError(f"{what} {position} is outside {where} of {n} tokens ({-n}…{n - 1})")
    return torch.tensor([position % n for n in lengths], device=cache.device)


def channel_index(channels: Any, width: int, device: torch.device) -> Tensor | None:
    """Channel numbers as a LongTensor (None: all); InputError for an empty choice or one outside 0…D-1."""
    if channels is None:
        return None
    if isinstance(channels, slice):
        found = torch.arange(width)[channels]
    else:
        found = torch.as_tensor([channels] if isinstance(channels, int) else channels).cpu()
    if found.numel() == 0:
        raise InputError(f"channels is empty: name at least one of the layer's {width} channels, or None for all")
    if found.ndim != 1 or found.is_floating_point() or found.dtype == torch.bool:
        raise InputError(f"channels must be a list of channel numbers or a slice, got {channels!r}")
    bad = found[(found < -width) | (found >= width)]
    if len(bad):
        raise InputError(f"channel {int(bad[0])} is outside the layer's {width} channels ({-width}…{width - 1})")
    return (found.long() % width).to(device)


# ---- what the cache holds


def read_layer(
    cache: "MambaCache", layer: int, channels: Any, through: Through, direction: Tensor | None, stop: int | None = None
) -> Layer:
    """The layer's tensors with the factors of the path; ``stop``: only the edits before that column matter.

    Raises InputError for an unknown path or a direction without a gate; CacheError if a hook edited what the path
    describes. What is found out on the tensors' device (weights that changed in place, NaN: layer and position named)
    its ``sure`` raises.
    """
    if through not in PATHS:
        raise InputError(f"through={through!r} is unknown{nearest(str(through), PATHS)}; known: {', '.join(PATHS)}")
    gate = through in ("gate", "conv+gate")
    if direction is not None and not gate:
        raise InputError(
            f"direction is a vector of the residual stream, where through={through!r} does not lead; use through='gate'"
        )
    unchanged = cache._asked_fresh(layer)
    found = _scan_tensors(cache, layer)
    finite = _asked_finite(cache, layer, found)

    def sure() -> None:
        unchanged()
        finite()

    record = cache.recording.blocks.get(layer)
    if record is not None and record.edited:
        sure()
        unedited(cache, layer, through, stop)
    else:
        found = replace(found, sure=sure)
    if through in ("conv", "conv+gate"):
        found = _through_conv(cache, found)
    if gate:
        found = _through_gate(cache, found, direction)
    padding = cache.recording.padding
    found = _aligned(found, padding) if padding is not None else found
    index = channel_index(channels, found.delta.shape[-1], found.delta.device)
    return found if index is None else _some(found, index)


def tensor_of(cache: "MambaCache", name: str, layer: int) -> Tensor:
    """An activation of a layer with its batch axis."""
    value = cache[name, layer]
    return value if cache.has_batch_dim else value[None]


def _scan_tensors(cache: "MambaCache", layer: int) -> Layer:
    delta, B, C, u = (tensor_of(cache, name, layer) for name in ("delta", "B", "C", "u_write"))
    return Layer(layer, delta, cache.model.decay(layer).to(delta.device), B, C, u)


def _asked_finite(cache: "MambaCache", layer: int, found: Layer) -> Callable[[], None]:
    """A question for later: InputError naming the first position where the states stop being numbers."""
    values = {"delta": found.delta, "B": found.B, "C": found.C, "u_write": found.u}
    ends = [v for x in values.values() for v in torch.aminmax(x.detach())]
    finite = torch.isfinite(torch.stack([e.float() for e in ends])).all()

    def answer() -> None:
        if not bool(finite):
            _refuse_nan(cache, layer, values)

    return answer


def _refuse_nan(cache: "MambaCache", layer: int, values: dict[str, Tensor]) -> None:
    padding = cache.recording.padding
    first = None
    for name, x in values.items():
        bad = ~torch.isfinite(x).all(-1)  # B L
        if padding is not None:
            bad &= padding.mask
        for row, place in bad.nonzero().tolist():
            if first is None or place < first[2]:
                first = (name, row, place)
    if first is not None:
        name, row, place = first
        where = f"position {place}" if values["delta"].shape[0] == 1 else f"row {row}, position {place}"
        raise InputError(
            f"{name} of layer {layer} is NaN or infinite at {where}, and so are the states from there on; look for the "
            "weight or the edit that caused it"
        )


def entry_state(cache: "MambaCache", layer: int) -> Tensor:
    """h0 ``B D N``: the layer's state before the first token; CacheError if it was not kept, InputError for NaN."""
    record = cache.recording.blocks.get(layer)
    anchors = None if record is None else record.anchors
    if anchors is not None and -1 in anchors.columns:
        h0 = anchors.states[:, anchors.columns.index(-1)]
    elif record is not None and record.x is not None:
        A = cache.model.decay(layer)
        zeros = torch.zeros(cache.recording.shape[0], *A.shape, dtype=A.dtype, device=A.device)
        h0 = zeros if record.state is None else record.state.ssm
    else:
        raise CacheError(
            f"blocks.{layer}.mixer.hook_h was not cached, so the state that layer {layer} started from is unknown; "
            "run with names_filter=None, or name hook_h in it"
        )
    if not bool(torch.isfinite(h0).all()):
        raise InputError(f"the state that layer {layer} started from holds NaN or infinite values; give another state")
    return h0.to(cache.device)


def _conv_state(cache: "MambaCache", layer: int, like: Tensor, width: int) -> Tensor:
    """The K-1 inputs of the convolution before the first token, ``B K-1 D``, oldest first."""
    record = cache.recording.blocks[layer]
    if record.x is None and record.anchors is None:
        raise CacheError(
            f"the inputs before layer {layer}'s first token were not kept; run with names_filter=None, or name hook_h "
            "in it"
        )
    if record.state is None:
        return like.new_zeros(like.shape[0], width - 1, like.shape[2])
    return record.state.conv.transpose(1, 2).to(like)


def _through_conv(cache: "MambaCache", found: Layer) -> Layer:
    layer, dtype = found.index, found.delta.dtype
    mixer = cache.model.blocks[layer].mixer
    weight = mixer.conv1d.weight.detach().to(found.delta)[:, 0]  # D K
    bias = mixer.conv1d.bias
    x = tensor_of(cache, "x", layer)
    factor = activation_factor(tensor_of(cache, "conv", layer).to(dtype), cache.model.cfg.activation)
    return replace(
        found,
        x=x,
        conv_state=_conv_state(cache, layer, x, weight.shape[1]),
        gain=factor,
        taps=weight,
        conv_bias=weight.new_zeros(len(weight)) if bias is None else bias.detach().to(weight),
    )


def _through_gate(cache: "MambaCache", found: Layer, direction: Tensor | None) -> Layer:
    layer, dtype = found.index, found.delta.dtype
    weight = cache.model.blocks[layer].mixer.out_proj.weight.detach().to(found.delta)  # M D
    if direction is None:
        scale = torch.linalg.vector_norm(weight, dim=0)  # D
    else:
        if not isinstance(direction, Tensor) or direction.shape != weight.shape[:1]:
            got = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
            raise InputError(f"direction must be a vector of the residual stream, M = ({len(weight)},), got {got}")
        scale = direction.detach().to(weight) @ weight
    z = tensor_of(cache, "gate_in", layer).to(dtype)
    return replace(found, read=activate(z, cache.model.cfg.activation) * scale)


def activate(x: Tensor, activation: str) -> Tensor:
    """The mixer's activation."""
    named = {"gelu": functional.gelu, "relu": functional.relu, "identity": lambda v: v}
    return ops.silu(x, backend="torch") if activation == "silu" else named[activation](x)


def activation_factor(x: Tensor, activation: str) -> Tensor:
    """activation(x) / x, continued at 0: what the activation multiplies its input by."""
    if activation == "silu":
        return torch.sigmoid(x)
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(x * 0.5**0.5))
    return (x > 0).to(x) if activation == "relu" else torch.ones_like(x)


def _aligned(found: Layer, padding: Padding) -> Layer:
    """Real tokens from column 0 on; what a kernel reads at padding does nothing there (delta is 0)."""
    real = (torch.arange(found.delta.shape[1], device=found.delta.device) < padding.lengths[:, None])[..., None]

    def shift(value: Tensor | None) -> Tensor | None:
        return None if value is None else padding.align(value) * real

    names = ("delta", "B", "C", "u", "x", "gain", "read")
    return replace(found, padding=padding, **{name: shift(getattr(found, name)) for name in names})


def _some(found: Layer, index: Tensor) -> Layer:
    def last(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.index_select(-1, index)

    def first(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.index_select(0, index)

    names = ("delta", "u", "x", "conv_state", "gain", "read", "conv_bias")
    some = {name: last(getattr(found, name)) for name in names}
    return replace(found, **some, A=first(found.A), taps=first(found.taps))


# ---- whether it is what happened


def unedited(cache: "MambaCache", layer: int, through: Through, stop: int | None = None) -> None:
    """CacheError if a hook edited A_bar, B_bar, write, h or y of this layer before column ``stop``, or a step of the
    path: there the values are not what the layer's own equations give. Edits of delta, B, C, x, z and (where the path
    starts at u) u_write are part of the kernel. Only blocks that carried hooks are computed again to see.
    """
    record = cache.recording.blocks.get(layer)
    if record is None or not record.edited:
        return
    if record.exposed:
        names = ", ".join(sorted(name.rsplit("hook_", 1)[1] for name in record.exposed))
        raise CacheError(
            f"layer {layer}: a hook edited the recurrence ({names} were exposed), so alpha means nothing; {_WAY_OUT}"
        )
    stop = cache.recording.shape[1] if stop is None else stop
    u, delta, B, C, y = (tensor_of(cache, name, layer) for name in ("u_write", "delta", "B", "C", "y"))
    A, h0 = cache.model.decay(layer).to(delta.device), entry_state(cache, layer)
    again = ops.selective_scan(u[:, :stop], delta[:, :stop], A, B[:, :stop], C[:, :stop], h0=h0).y
    _same(cache, layer, "hook_h or hook_y", again, y[:, :stop], "alpha·u is not y")
    if through in ("conv", "conv+gate"):
        _unedited_conv(cache, layer, stop)
    if through in ("gate", "conv+gate"):
        _unedited_gate(cache, layer, stop)


def _unedited_conv(cache: "MambaCache", layer: int, stop: int) -> None:
    x, conv, u, delta = (tensor_of(cache, name, layer) for name in ("x", "conv", "u_write", "delta"))
    conv1d, padding = cache.model.blocks[layer].mixer.conv1d, cache.recording.padding
    state = _conv_state(cache, layer, x, conv1d.weight.shape[-1]).transpose(1, 2)
    aligned = x if padding is None else padding.align(x)
    again = ops.causal_conv(aligned, conv1d.weight, conv1d.bias, state=state).y
    again = again if padding is None else padding.unalign(again)
    _same(cache, layer, "hook_conv", again[:, :stop], conv[:, :stop], "x does not lead to u")
    again = activate(conv.to(delta), cache.model.cfg.activation)
    _same(cache, layer, "hook_u or hook_u_write", again[:, :stop], u[:, :stop], "x does not lead to u")


def _unedited_gate(cache: "MambaCache", layer: int, stop: int) -> None:
    y, skip, z, gated, out = (tensor_of(cache, n, layer) for n in ("y", "skip", "gate_in", "gated", "mixer_out"))
    out_proj, reason = cache.model.blocks[layer].mixer.out_proj, "y reaches the residual stream in another way"
    again = (y + skip) * activate(z.to(y), cache.model.cfg.activation)
    _same(cache, layer, "hook_gated", again[:, :stop], gated[:, :stop], reason)
    again = functional.linear(gated, out_proj.weight, out_proj.bias)
    _same(cache, layer, "hook_mixer_out", again[:, :stop], out[:, :stop], reason)


_WAY_OUT = "edit delta, B, C or x instead, or look at the run without that hook"


def _same(cache: "MambaCache", layer: int, hooks: str, again: Tensor, then: Tensor, reason: str) -> None:
    """CacheError, naming hooks and position, where a value is not what it is computed to be."""
    scale = then.abs().amax(1, keepdim=True).clamp_min(1e-30).float()  # each channel's own
    rounding = max(1e-4, 8 * torch.finfo(then.dtype).eps)
    off = ((again.float() - then.float()).abs() > rounding * scale).any(-1)  # B L
    padding = cache.recording.padding
    if padding is not None:
        off &= padding.mask[:, : off.shape[1]]
    if bool(off.any()):
        at = int(off.any(0).nonzero()[0])
        raise CacheError(f"layer {layer}: a hook edited {hooks} at position {at}, so {reason}; {_WAY_OUT}")

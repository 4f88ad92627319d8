"""The forward pass of transformers' Mamba and Falcon-Mamba mixers on our operators.

Equations as in `mambascope.model.mixer`. The cache is transformers': per layer the last K inputs of the convolution,
``B D K``, and the state of the scan, ``B D N``.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mambascope import ops
from mambascope.errors import InputError, StateError
from mambascope.ops import Backend

__all__ = ["mixer_forward"]


class Real(NamedTuple):
    """Where a batch's real tokens are: a mask that hides something, taken apart."""

    mask: Tensor  # B L, bool
    lengths: Tensor  # B: real tokens of each row
    order: Tensor | None  # B L: for each step of the compacted row where it comes from; None: rows start with them
    back: Tensor | None  # B L: the inverse

    def compact(self, x: Tensor) -> Tensor:
        """Each row's real tokens moved to its start, in order (``B L D``)."""
        return x if self.order is None else x.gather(1, self.order[..., None].expand_as(x))

    def spread(self, x: Tensor) -> Tensor:
        """Back to where they were; zero at the others."""
        if self.back is not None:
            x = x.gather(1, self.back[..., None].expand_as(x))
        return torch.where(self.mask[..., None], x, 0)


def _places(mask: Tensor, length: int) -> Real:
    mask = mask[:, -length:] != 0  # a mask of everything so far, in a continuation
    order = torch.sort(~mask, dim=1, stable=True).indices
    return Real(mask, mask.sum(1), order, torch.sort(order, dim=1).indices)


# The last mask, its version, L, and what was found: every layer of a model asks about the same one, and on a GPU each
# look waits for the device.
_last: tuple[weakref.ref[Tensor], int, int, Real | None] | None = None


def real_tokens(mask: Tensor | None, hidden: Tensor, cached: bool) -> Real | None:
    """Where the real tokens of ``hidden`` B L M are, None if all are; `InputError` for a mask that does not say it."""
    global _last
    if mask is None:
        return None
    batch, length, _ = hidden.shape
    if mask.dim() != 2 or mask.shape[0] != batch or (mask.shape[1] < length if cached else mask.shape[1] != length):
        wanted = f"B L = ({batch}, {length})" + (", or of all tokens so far" if cached else "")
        raise InputError(f"attention_mask must be {wanted}, got shape {tuple(mask.shape)}")
    if mask.device != hidden.device:
        raise InputError(f"attention_mask is on {mask.device}, the model on {hidden.device}; move them to one device")
    if torch.compiler.is_compiling() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _places(mask, length)  # a graph cannot look
    version = -1 if mask.is_inference() else mask._version
    if _last is not None and _last[0]() is mask and _last[1:3] == (version, length) and version >= 0:
        return _last[3]
    found = _places(mask, length)
    real = found.mask
    runs = real[:, 0] + (~real[:, :-1] & real[:, 1:]).sum(1)  # B: stretches of real tokens
    starts_real = (real[:, 0] | (runs == 0)).all()
    facts = (real.all(), starts_real, (runs > 1).any(), ((mask != 0) & (mask != 1)).any())
    whole, first, holes, odd = torch.stack(facts).tolist()
    if odd:
        raise InputError("attention_mask must hold 1 for real tokens and 0 for padding, got other values")
    if holes:
        raise InputError("attention_mask has holes: padding may stand before or after a row's tokens, not among them")
    result = None if whole else found._replace(order=None, back=None) if first else found
    _last = (weakref.ref(mask), version, length, result)
    return result


def _state_of(cache: Any, layer: int, batch: int, width: int) -> tuple[Tensor | None, Tensor | None]:
    """The convolution's last K inputs ``B D K`` and the scan's state in a cache, or None before the first token."""
    if cache is None:
        return None, None
    conv, ssm = cache.get_conv_state(layer), cache.get_recurrent_state(layer)
    if conv is None and ssm is None:
        return None, None
    if conv is None or ssm is None:
        raise StateError(f"the cache of layer {layer} holds only one of its two states: make a new cache")
    if ssm.shape[0] != batch:
        raise StateError(f"the cache holds the states of {ssm.shape[0]} rows, the batch has {batch}")
    if torch.is_grad_enabled():  # the cache is overwritten in place below; gradients need what was there
        conv, ssm = conv.clone(), ssm.clone()
    return conv[..., -width:], ssm


def _keep(cache: Any, layer: int, width: int, x: Tensor, before: Tensor | None, h: Tensor, real: Real | None) -> None:
    """Hand the new states to transformers' cache. ``x`` B L D, each row's real tokens first; ``before`` B D K."""
    if real is None:
        recent = x if cache.is_recording_past(layer) else x[:, -width:]
    elif cache.is_recording_past(layer):
        raise StateError("a cache that records its past cannot take a padded batch: rows end at different tokens")
    else:
        start = x.new_zeros(x.shape[0], width, x.shape[2]) if before is None else before.transpose(1, 2)
        steps = real.lengths[:, None] + torch.arange(width, device=x.device)  # B K
        recent = torch.cat((start, x), 1).gather(1, steps[..., None].expand(-1, -1, x.shape[2]))
    cache.update_conv_state(recent.transpose(1, 2), layer, conv_kernel_size=width)
    cache.update_recurrent_state(h, layer)


def _delta_raw(mixer: Any, dt_low: Tensor) -> Tensor:
    """dt_proj without its bias, ``B L D``."""
    if hasattr(mixer.config, "_is_quantized"):  # its weight is not a plain matrix then
        return mixer.dt_proj(dt_low) - mixer.dt_proj.bias
    return functional.linear(dt_low, mixer.dt_proj.weight)


def mixer_forward(backend: Backend) -> Callable[..., Tensor]:
    """``forward`` of a mixer on this backend."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        given = [name for name, value in kwargs.items() if value is not None]
        if given:
            raise InputError(f"an accelerated mixer takes no {', '.join(given)}; undo the acceleration for this call")
        return _forward(self, hidden_states, cache_params, attention_mask, backend)

    return forward


def _forward(mixer: Any, hidden: Tensor, cache: Any, mask: Tensor | None, backend: Backend) -> Tensor:
    layer, dtype, (batch, length, _) = mixer.layer_idx, hidden.dtype, hidden.shape
    width = mixer.conv1d.weight.shape[-1]
    inputs_before, h0 = _state_of(cache, layer, batch, width)
    real = real_tokens(mask, hidden, h0 is not None)
    lengths = None if real is None else real.lengths

    x, z = mixer.in_proj(hidden).chunk(2, dim=-1)  # B L D
    if real is not None:
        x = real.compact(x)
    silu = mixer.config.hidden_act in ("silu", "swish")
    conv = ops.causal_conv(
        x,
        mixer.conv1d.weight,
        mixer.conv1d.bias,
        activation="silu" if silu else None,
        state=None if inputs_before is None else inputs_before[..., 1:],
        lengths=lengths,
        backend=backend,
    )
    u = conv.y if silu else mixer.act(conv.y)
    if real is not None:  # padding selects nothing and writes nothing: B = C = u = 0 there
        begins = torch.arange(length, device=u.device) < real.lengths[:, None]
        u, z = torch.where(begins[..., None], u, 0), real.compact(z)
    R, N = mixer.time_step_rank, mixer.ssm_state_size
    dt_low, B, C = mixer.x_proj(u).split([R, N, N], dim=-1)
    if hasattr(mixer, "dt_layernorm"):  # Falcon-Mamba
        dt_low, B, C = mixer.dt_layernorm(dt_low), mixer.b_layernorm(B), mixer.c_layernorm(C)
    bias = mixer.dt_proj.bias
    y, h, _ = ops.selective_scan(
        u,
        _delta_raw(mixer, dt_low),
        -torch.exp(mixer.A_log.to(ops_dtype(mixer.A_log))),
        B,
        C,
        mixer.D,
        z,
        dt_bias=None if bias is None else bias.to(ops_dtype(bias)),
        dt_softplus=True,
        h0=h0,
        lengths=lengths,
        backend=backend,
    )
    if cache is not None:
        _keep(cache, layer, width, x, inputs_before, h, real)
    return mixer.out_proj((y if real is None else real.spread(y)).to(dtype))


def ops_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 where x is: exponents and biases are never below float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32

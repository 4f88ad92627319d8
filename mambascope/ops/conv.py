"""Causal depthwise convolution with a carried state."""

from typing import NamedTuple

import torch
from torch import Tensor

from mambascope.ops import operators
from mambascope.ops.checks import check_conv, check_lengths, compute_dtype
from mambascope.ops.dispatch import KERNEL_BACKENDS, Backend, choose, kernels
from mambascope.ops.elementwise import silu_formula
from mambascope.ops.lti import fft_convolve
from mambascope.ops.ready import Ready

__all__ = ["ConvOutput", "causal_conv", "long_causal_conv"]

_ready = Ready()


class ConvOutput(NamedTuple):
    """``y`` B L D and ``state`` B D K-1, both in x's dtype."""

    y: Tensor
    state: Tensor


def conv_formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """`causal_conv` in plain torch, differentiable to any order: y ``B L D`` and the last K-1 inputs ``B D K-1``."""
    batch, length, channels = x.shape
    width = weight.shape[1]
    wide = compute_dtype(x, weight, bias, state)
    if state is None:
        before = x.new_zeros(batch, width - 1, channels, dtype=wide)
    else:
        before = state.to(wide).transpose(1, 2)
    taps = torch.cat((before, x.to(wide)), 1)  # B K-1+L D
    w = weight.to(wide)
    y = taps[:, :length] * w[:, 0]
    for k in range(1, width):
        y = y + taps[:, k : k + length] * w[:, k]
    if bias is not None:
        y = y + bias.to(wide)
    y = y.to(x.dtype)
    if silu:
        y = silu_formula(y).to(x.dtype)
    return y, _last_inputs(taps, lengths, width).to(x.dtype)


def _last_inputs(taps: Tensor, lengths: Tensor | None, width: int) -> Tensor:
    """The newest K-1 of the state's and each row's own inputs ``B K-1+L D``: ``B D K-1``."""
    if lengths is None:
        last = taps[:, taps.shape[1] - width + 1 :]
    else:
        rows = lengths.to(torch.int64)[:, None] + torch.arange(width - 1, device=taps.device)
        last = taps.gather(1, rows[:, :, None].expand(-1, -1, taps.shape[2]))
    return last.transpose(1, 2).contiguous()


def long_causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
) -> ConvOutput:
    """`causal_conv` by FFT, for kernels of many taps: time O(D (K + L) log(K + L)) instead of O(D K L).

    Arguments and results are those of `causal_conv` without activation; weight is ``D K`` or ``D 1 K``. One token is
    summed tap by tap. Raises InputError as it does.
    """
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    check_conv(x, weight, bias, None, state, lengths)
    batch, length, channels = x.shape
    width, wide = weight.shape[1], compute_dtype(x, weight, bias, state)
    before = x.new_zeros(batch, width - 1, channels) if state is None else state.transpose(1, 2)
    taps = torch.cat((before.to(wide), x.to(wide)), 1)  # B K-1+L D
    by_lag = weight.to(wide).flip(1).t()  # K D
    if length == 1:
        y = (taps.flip(1) * by_lag).sum(1, keepdim=True)
    elif state is None:
        y = fft_convolve(by_lag, x.to(wide))
    else:
        y = fft_convolve(by_lag, taps)[:, width - 1 :]
    y = y if bias is None else y + bias.to(wide)
    return ConvOutput(y.to(x.dtype), _last_inputs(taps, lengths, width).to(x.dtype))


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: Backend = "auto",
) -> ConvOutput:
    """``y[t] = bias + Σ_k weight[k] · x[t − K + 1 + k]``, each channel by itself (Mamba, section 3.4).

    Args:
        x: ``B L D``; may be a strided view whose last axis is contiguous.
        weight: ``D K`` or ``D 1 K`` (torch's ``Conv1d``), K ≥ 1; the last tap meets the current token.
        bias: ``D``.
        activation: None, or "silu" for ``silu(y)``; the same bits as `silu` applied to the result.
        state: ``B D K-1``, the inputs before the first one, oldest first; zeros if None.
        lengths: ``B``, the number of real tokens at each row's left; the new state holds the last K − 1 real ones, and
            ``y[b, lengths[b]:]`` is computed from padding and means nothing.
        backend: see `resolve_backend`.

    Returns:
        `ConvOutput`: y ``B L D`` in x's dtype (sums in float32, float64 if an input is), and the new state ``B D K-1``.

    Raises:
        InputError: shapes, dtypes, devices or lengths that do not fit; the message names the tensor.
    """
    key, repeat = _ready.find((x, weight, bias, state, lengths), activation, backend)
    if repeat is not None:
        if lengths is not None:
            check_lengths(lengths, x)
        return ConvOutput(*repeat(x, weight, bias, state, lengths))
    given = weight
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    check_conv(x, weight, bias, activation, state, lengths)
    name = choose(backend, x, weight, bias, state, d_conv=weight.shape[1])
    silu = activation == "silu"
    if name not in KERNEL_BACKENDS or x.numel() == 0:
        return ConvOutput(*conv_formula(x, weight, bias, state, lengths, silu))
    if operators.direct(x, weight, bias, state, lengths):
        conv_forward = kernels(name).conv_forward
        inputs = (x, weight if key is None else given, bias, state, lengths)
        output = ConvOutput(*conv_forward(*inputs, silu=silu))
        _ready.learn(key, conv_forward, ("silu", silu))
        return output
    weight = weight if key is None else given
    output = ConvOutput(*operators.call("causal_conv", name, x, weight, bias, state, lengths, silu))
    if key is not None:
        apply = operators.function("causal_conv", name).apply
        again = lambda replay: lambda *inputs: apply(replay, *inputs, silu)  # noqa: E731
        _ready.learn(key, kernels(name).conv_forward, ("silu", silu), wrap=again)
    return output

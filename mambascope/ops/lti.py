"""Time-invariant diagonal state space models: their convolution kernels, and the same thing as a recurrence.

    h[t] = exp(rate) h[t-1] + gain u[t]            D N values a channel, real or complex
    y[t] = Re Σ_n C[n] h[t, n]  =  Σ_{j <= t} k[j] u[t-j],     k[j] = Re Σ_n C[n] gain[n] exp(rate[n] j)

(S4D, 2206.11893, section 3.) A conjugate pair of states is one complex state here, its C doubled.

Powers exp(rate j) come as products of two tables of about √L rows, exp(rate T c) and exp(rate i), j = T c + i: sums
over n become matrix products, and neither table has more than about √L D N entries. Tables are computed in the dtype
of ``rate`` (give float64: phases of j rate are large) and used in the dtype of u. With a real part of at most 0
nothing overflows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.errors import InputError

__all__ = ["Diagonal", "diagonal_kernel", "fft_convolve"]

_BLOCK = 1 << 21  # elements of a block of spectra: 8 MB in float32


def fft_convolve(kernel: Float[Tensor, "... K D"], u: Float[Tensor, "... L D"]) -> Float[Tensor, "... L D"]:
    """y[t, d] = Σ_{j <= t} kernel[j, d] u[t - j, d], each channel by itself: causal, nothing wraps around.

    One kernel ``K D`` for all rows of u, or one each.

    Zero-padded to K + L - 1 or a little more. Time O(D L log L), memory some channels at a time. Taps beyond u's
    length reach nothing and are left out. float32 in gives float32 (error about 1e-6 of the largest value).
    Differentiable in both. Raises InputError for a kernel of other channels than u's, or of none.
    """
    length, width = u.shape[-2:]
    rows_fit = kernel.ndim == 2 or (kernel.ndim == u.ndim and kernel.shape[:-2] == u.shape[:-2])
    if not rows_fit or kernel.shape[-1] != width or kernel.shape[-2] == 0:
        raise InputError(f"the kernel must be K {width} for an input of {width} channels, got {tuple(kernel.shape)}")
    return cast(Tensor, _Convolution.apply(kernel[..., :length, :].to(u.dtype), u))


class _Convolution(torch.autograd.Function):
    """`fft_convolve` with its gradients as real transforms: two correlations (torch would make complex ones)."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(kernel, u)
        return _by_channels(
            lambda k, x, size: _rfft(k, size) * _rfft(x, size), (kernel, u), u.shape[-2], _size(kernel, u)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (kernel, u), (dy,) = ctx.saved_tensors, grads
        size, over = _size(kernel, u), tuple(range(u.ndim - kernel.ndim))

        def for_kernel(x: Tensor, g: Tensor, size: int) -> Tensor:
            product = _rfft(x, size).conj() * _rfft(g, size)
            return product.sum(over) if over else product

        dkernel = du = None
        if ctx.needs_input_grad[0]:
            dkernel = _by_channels(for_kernel, (u, dy), kernel.shape[-2], size)
        if ctx.needs_input_grad[1]:
            du = _by_channels(
                lambda k, g, size: _rfft(k, size).conj() * _rfft(g, size), (kernel, dy), u.shape[-2], size
            )
        return dkernel, du


def _size(kernel: Tensor, u: Tensor) -> int:
    """A size in which neither the convolution nor its gradients wrap around."""
    return _good_size(kernel.shape[-2] + u.shape[-2] - 1)


@lru_cache(256)
def _good_size(least: int) -> int:
    """The smallest product of 2s, 3s and 5s from ``least`` on: what transforms are fast at."""
    best, five = 2 ** (least - 1).bit_length(), 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three * 2 ** max(0, (-(-least // three) - 1).bit_length()))
            three *= 3
        five *= 5
    return best


def _rfft(x: Tensor, size: int) -> Tensor:
    return torch.fft.rfft(x, size, dim=-2)


def _by_channels(
    spectrum: Callable[[Tensor, Tensor, int], Tensor], pair: tuple[Tensor, Tensor], keep: int, size: int
) -> Tensor:
    """The first ``keep`` entries of what has this spectrum, some channels at a time."""
    width, group = pair[0].shape[-1], max(1, _BLOCK // size)
    parts = []
    for first in range(0, width, group):
        one, two = (x[..., first : first + group] for x in pair)
        parts.append(torch.fft.irfft(spectrum(one, two, size), size, dim=-2)[..., :keep, :])
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def diagonal_kernel(rate: Tensor, weight: Tensor, length: int, dtype: torch.dtype | None = None) -> Tensor:
    """k[j, d] = Re Σ_n weight[d, n] exp(rate[d, n] j) for j = 0 … length - 1: ``L D``.

    ``rate``, ``weight``: ``D N``, real or complex, the real part of rate at most 0. ``dtype``: of the result (default:
    of rate's parts). Time O(L D N) in matrix products, O(√L D N) exponentials. Raises InputError for a length below 1.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InputError(f"a kernel's length must be a positive integer, got {length!r}")
    dtype = dtype or _real(rate.dtype)
    coarse, fine = _tables(rate, length, 0)
    coarse, fine = _cast(weight * coarse, dtype), _cast(fine, dtype)  # C D N, T D N
    k = torch.einsum("cdn,tdn->ctd", *_real_pair(coarse, fine))
    return k.flatten(0, 1)[:length]


@dataclass
class Diagonal:
    """One time-invariant diagonal recurrence, discretised: ``rate`` (delta A), ``gain`` (B_bar) and ``C``.

    ``D N`` each, all real or all complex; a state is ``B D N`` of that kind, its parts in the dtype of the inputs.
    """

    rate: Tensor
    gain: Tensor
    C: Tensor

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """k, ``L D``."""
        return diagonal_kernel(self.rate, self.C * self.gain, length, dtype)

    def step(self, h: Tensor, u: Tensor) -> Tensor:
        """The state after one more input u ``B D``.

        exp(rate) - 1 is rounded, not exp(rate): near 1 its rounding would add up over the steps.
        """
        return h + _like(torch.exp(self.rate) - 1, h) * h + _like(self.gain, h) * u[..., None]

    def read(self, h: Tensor) -> Tensor:
        """y ``B D`` of a state."""
        return _part((_like(self.C, h) * h).sum(-1))

    def advance(self, h: Tensor, u: Tensor, counts: Tensor | None = None) -> Tensor:
        """The state after the inputs u ``B W D``; ``counts`` ``B``: after the first so many of each row.

        Time O(B W D N), memory O((B + √W) W D + B √W D N).
        """
        batch, width, _ = u.shape
        if width == 1 and counts is None:
            return self.step(h, u[:, 0])
        if counts is None:
            past = torch.exp(self.rate * width)  # D N
        else:
            past = torch.exp(self.rate * counts[:, None, None])  # B D N
            u = _ending_last(u, counts)
        coarse, fine = _tables(self.rate, width, 0)
        coarse, fine = _like(self.gain * coarse, h), _like(fine, h)  # C D N, T D N
        chunks, size = coarse.shape[0], fine.shape[0]
        # Backwards in time and filled with zeros: entry j is the input j steps before the last.
        back = u.new_zeros(batch, chunks * size, u.shape[2])
        back = torch.cat([u.flip(1), back[:, width:]], 1).unflatten(1, (chunks, size))  # B C T D
        if h.is_complex():
            parts = torch.einsum("bctd,tdn->bcdn", back, torch.view_as_real(fine).flatten(-2))
            inner = torch.view_as_complex(parts.unflatten(-1, (-1, 2)))
        else:
            inner = torch.einsum("bctd,tdn->bcdn", back, fine)
        return _like(past, h) * h + (inner * coarse).sum(1)

    def response(self, h: Tensor, length: int) -> Tensor:
        """What a state adds to the outputs that follow it: Re Σ_n C exp(rate (t + 1)) h, ``B L D``."""
        coarse, fine = _tables(self.rate, length, 1)
        weighted = h[:, None] * _like(self.C * coarse, h)  # B C D N
        y = torch.einsum("bcdn,tdn->bctd", *_real_pair(weighted, _like(fine, h)))
        return y.flatten(1, 2)[:, :length]

    def run(self, h: Tensor | None, u: Tensor, kernel: Tensor | None = None) -> Tensor:
        """y ``B L D`` for the inputs u ``B L D``, by FFT, from a state (None: zeros); ``kernel``: if it is there."""
        y = fft_convolve(self.kernel(u.shape[1], u.dtype) if kernel is None else kernel, u)
        return y if h is None else y + self.response(h, u.shape[1])


def _tables(rate: Tensor, length: int, first: int) -> tuple[Tensor, Tensor]:
    """exp(rate T c) ``C D N`` and exp(rate (first + i)) ``T D N``, C T >= length."""
    size = max(1, math.isqrt(length - 1) + 1)
    chunks = -(-length // size)
    real = _real(rate.dtype)
    c = torch.arange(chunks, device=rate.device, dtype=real) * size
    i = torch.arange(first, first + size, device=rate.device, dtype=real)
    return torch.exp(c[:, None, None] * rate), torch.exp(i[:, None, None] * rate)


def _ending_last(u: Tensor, counts: Tensor) -> Tensor:
    """Every row's first ``counts`` inputs moved to the end, zeros before them."""
    width = u.shape[1]
    source = torch.arange(width, device=u.device) - (width - counts[:, None])  # B W
    moved = u.gather(1, source.clamp_min(0)[..., None].expand_as(u))
    return moved.masked_fill((source < 0)[..., None], 0.0)


def _real(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex128: torch.float64, torch.complex64: torch.float32}.get(dtype, dtype)


def _cast(x: Tensor, real: torch.dtype) -> Tensor:
    """x with parts of this dtype."""
    if not x.is_complex():
        return x.to(real)
    return x.to(torch.complex128 if real == torch.float64 else torch.complex64)


def _like(x: Tensor, h: Tensor) -> Tensor:
    return x.to(h.dtype)


def _real_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Real tensors of twice the last axis whose product, summed over it, is the real part of x times y's.

    Real matrix products of half the work: complex ones are slow on a CPU.
    """
    if not x.is_complex():
        return x, y
    return torch.view_as_real(x.conj().resolve_conj()).flatten(-2), torch.view_as_real(y).flatten(-2)


def _part(x: Tensor) -> Tensor:
    return x.real if x.is_complex() else x

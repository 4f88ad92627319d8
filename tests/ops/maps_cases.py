"""Inputs of the effective kernels, and their formula written out in float64."""

from typing import Any

import torch
from torch import Tensor

OPTIONS = ("gain", "taps", "read")


def maps_inputs(
    length: int, N: int, *, D: int = 6, batch: int = 1, scale: float = 0.3, K: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """All tensors of the functions in ``ops.maps``; ``scale`` moves delta from A_bar = 1 (1e-7) to A_bar = 0 (60)."""
    g = torch.Generator().manual_seed(seed)
    return {
        "delta": scale * torch.rand(batch, length, D, generator=g) ** 3,
        "A": -torch.arange(1, N + 1).float().repeat(D, 1) * (0.5 + torch.rand(D, N, generator=g)),
        "B": torch.randn(batch, length, N, generator=g),
        "C": torch.randn(batch, length, N, generator=g),
        "gain": torch.rand(batch, length, D, generator=g),
        "taps": torch.randn(D, K, generator=g),
        "read": torch.randn(batch, length, D, generator=g),
    }


def without(x: dict[str, Tensor], *names: str) -> dict[str, Any]:
    return {name: None if name in names else value for name, value in x.items()}


def naive(
    delta: Tensor, A: Tensor, B: Tensor, C: Tensor, gain: Any = None, taps: Any = None, read: Any = None
) -> Tensor:
    """alpha ``B L L D`` in float64, each entry from its own sum of delta over the steps between."""
    delta, A, B, C = (x.double() for x in (delta, A, B, C))
    batch, length, width = delta.shape
    alpha = torch.zeros(batch, length, length, width, dtype=torch.float64)
    for t in range(length):
        after = torch.cat([delta[:, 1 : t + 1], delta.new_zeros(batch, 1, width)], 1)
        between = after.flip(1).cumsum(1).flip(1)  # B t+1 D: the steps after s, up to t
        decay = torch.exp(A * between[..., None])  # B t+1 D N
        read_out = C[:, t, None, None] * B[:, : t + 1, None]
        alpha[:, t, : t + 1] = (decay * read_out).sum(-1) * delta[:, : t + 1]
    return spread(alpha, gain, taps, read)


def spread(alpha: Tensor, gain: Any, taps: Any, read: Any) -> Tensor:
    """The bare alpha ``B L L D`` with the factors of a longer path."""
    length = alpha.shape[1]
    if gain is not None:
        alpha = alpha * gain.double()[:, None]
    if taps is not None:
        K, at = taps.shape[1], torch.arange(length)
        wide = torch.zeros_like(alpha)
        for j in range(min(K, length)):
            wide[:, :, : length - j] += taps[:, K - 1 - j].double() * alpha[:, :, j:]
        alpha = wide * (at[:, None] >= at)[None, :, :, None]
    return alpha if read is None else alpha * read.double()[:, :, None]


def reduced(alpha: Tensor, reduce: str) -> Tensor:
    return {
        "mean_abs": alpha.abs().mean(-1),
        "rms": alpha.pow(2).mean(-1).sqrt(),
        "signed": alpha.mean(-1),
        "max": alpha.abs().amax(-1),
    }[reduce]


def close(a: Tensor, b: Tensor, bar: float = 1e-5) -> bool:
    return bool((a.double() - b.double()).abs().max() <= bar * b.double().abs().max())

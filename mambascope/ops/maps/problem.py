"""What every way to compute effective kernels is given: checked tensors in one dtype, and the reductions by name."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mambascope.errors import InputError, nearest
from mambascope.ops.checks import compute_dtype

__all__ = ["REDUCTIONS", "Problem", "Reduction", "check_reduction", "over_channels", "problem", "window"]

Reduction = Literal["mean_abs", "rms", "signed", "max"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
"""Over channels: mean |alpha|; root mean square; plain mean (channels cancel); largest |alpha|."""


@dataclass(frozen=True)
class Problem:
    """The tensors of one layer, in the dtype of the computation.

    ``delta`` ``B L D`` after softplus, 0 at padding; ``A`` ``D N``; ``B``, ``C`` ``B L N``; ``gain`` ``B L D`` weighs
    what a token writes, ``taps`` ``D K`` spreads a source over the K steps from its own on (tap K-1 is its own step),
    ``read`` ``B L D`` weighs what a query reads. None means 1.
    """

    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    gain: Tensor | None = None
    taps: Tensor | None = None
    read: Tensor | None = None

    @property
    def reach(self) -> int:
        """Steps after its own at which a source still writes: K - 1."""
        return 0 if self.taps is None else self.taps.shape[1] - 1

    @property
    def write(self) -> Tensor:
        """delta · gain, ``B L D``."""
        return self.delta if self.gain is None else self.delta * self.gain

    def tap(self, behind: int) -> Tensor | float:
        """The weight, ``D``, of a source ``behind`` steps after its own."""
        return 1.0 if self.taps is None else self.taps[:, self.taps.shape[1] - 1 - behind]


def check_reduction(reduce: str) -> None:
    """InputError, with the nearest names, for a reduction that does not exist."""
    if reduce not in REDUCTIONS:
        raise InputError(
            f"reduction {reduce!r} is unknown{nearest(str(reduce), REDUCTIONS)}; known: {', '.join(REDUCTIONS)}"
        )


def over_channels(x: Tensor, reduce: Reduction) -> Tensor:
    """Reduce the last axis (channels) of a signed tensor."""
    if reduce == "signed":
        return x.mean(-1)
    if reduce == "rms":
        return x.pow(2).mean(-1).sqrt()
    return x.abs().amax(-1) if reduce == "max" else x.abs().mean(-1)


def problem(
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    gain: Tensor | None,
    taps: Tensor | None,
    read: Tensor | None,
) -> Problem:
    """The Problem of these tensors; InputError, naming the tensor, where they do not fit together."""
    if delta.ndim != 3 or A.ndim != 2:
        raise InputError(f"delta must be B L D and A D N, got shapes {tuple(delta.shape)} and {tuple(A.shape)}")
    batch, length, channels = delta.shape
    states = A.shape[1]
    if 0 in delta.shape or states == 0:
        raise InputError(f"delta must have at least one row, token and channel, got shape {tuple(delta.shape)}")
    shapes = {"A": (channels, states), "B": (batch, length, states), "C": (batch, length, states)}
    shapes |= {"gain": delta.shape, "read": delta.shape, "taps": (channels, taps.shape[-1] if taps is not None else 0)}
    given = {"A": A, "B": B, "C": C, "gain": gain, "taps": taps, "read": read}
    for name, x in given.items():
        if x is None:
            continue
        if tuple(x.shape) != tuple(shapes[name]) or 0 in x.shape:
            raise InputError(f"{name} must have shape {tuple(shapes[name])}, got {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise InputError(f"{name} must be floating point, got {x.dtype}")
        if x.device != delta.device:
            raise InputError(f"{name} is on {x.device}, but delta is on {delta.device}; move them to one device")
    dtype = compute_dtype(delta, *given.values())
    cast = {name: None if x is None else x.detach().to(dtype) for name, x in given.items()}
    return Problem(delta.detach().to(dtype), **cast)  # type: ignore[arg-type]


def window(index: slice | None, length: int, what: str) -> range:
    """A window of positions in Python's notation; InputError if it is empty or skips tokens."""
    if index is None:
        return range(length)
    if not isinstance(index, slice):
        raise InputError(f"{what} must be a slice of positions, such as slice(0, 100), got {index!r}")
    try:
        hit = range(length)[index]
    except TypeError:
        raise InputError(f"{what} must be a slice of integers, got {index!r}") from None
    if hit.step != 1:
        raise InputError(f"{what} must run forward without steps, got {index!r}; index the result instead")
    if not hit:
        raise InputError(f"{what}={index!r} holds none of the {length} tokens")
    return hit


def at_columns(value: int | Tensor, batch: int, length: int, like: Tensor, what: str) -> Tensor:
    """A column for every row of the batch, ``B`` int64; InputError outside 0…L-1 (a negative integer counts from L)."""
    if isinstance(value, Tensor):
        if value.shape != (batch,) or value.dtype not in (torch.int64, torch.int32):
            raise InputError(f"{what} must be an integer or {batch} of them, got {value.dtype} {tuple(value.shape)}")
        at = value.to(device=like.device, dtype=torch.int64)
        low, high = (int(v) for v in torch.stack(torch.aminmax(at)).tolist())
        if low < 0 or high >= length:
            raise InputError(f"{what} must lie in 0…{length - 1}, got values from {low} to {high}")
        return at
    if isinstance(value, bool) or not isinstance(value, int) or not -length <= value < length:
        raise InputError(f"{what} {value!r} is outside the text of {length} tokens ({-length}…{length - 1})")
    return torch.full((batch,), value % length, device=like.device)

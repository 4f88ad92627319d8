"""Input checks of the operators: a few microseconds, and a message that names the tensor.

Every message says which tensor, what was expected in the letters of the glossary, and what came.
"""

import weakref

import torch
from torch import Tensor

from mambascope.errors import InputError

__all__ = ["check_conv", "check_lengths", "check_mask", "check_norm", "check_scan", "check_window", "compute_dtype"]


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32: the dtype of all arithmetic and of h."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _wrong(name: str, letters: str, expected: tuple[object, ...], x: Tensor) -> InputError:
    wanted = ", ".join(str(n) for n in expected)
    return InputError(f"{name} must be {letters} = ({wanted}), got shape {tuple(x.shape)}")


def _is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise InputError(f"{name} must be a tensor, got {type(x).__name__}")


def _expect(name: str, x: Tensor, letters: str, expected: tuple[int, ...], like: Tensor) -> None:
    _is_tensor(name, x)
    if x.shape != expected:
        raise _wrong(name, letters, expected, x)
    if not x.dtype.is_floating_point:
        raise _not_floating(name, x)
    if x.device != like.device:
        raise InputError(f"{name} is on {x.device}, but u or x is on {like.device}; move them to one device")


def _not_floating(name: str, x: Tensor) -> InputError:
    if x.dtype.is_complex:
        return InputError(
            f"{name} is complex ({x.dtype}); only real state space models are supported: use its real form"
        )
    return InputError(f"{name} must be floating point, got {x.dtype}")


# The last lengths tensor found in range, its version, and L: 24 layers ask about the same one, and on a GPU each look
# waits for the device. A tensor made in inference mode has no version: on a GPU it is taken to stay as it was.
_known_lengths: tuple[weakref.ref[Tensor], int | None, int] | None = None


def check_lengths(lengths: Tensor, like: Tensor) -> None:
    """Raise `InputError` unless ``lengths`` are numbers of steps of ``like``'s rows."""
    global _known_lengths
    batch, length = like.shape[:2]
    if lengths.shape != (batch,):
        raise _wrong("lengths", "B", (batch,), lengths)
    if lengths.dtype not in (torch.int64, torch.int32):
        raise InputError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if lengths.device != like.device:
        raise InputError(f"lengths is on {lengths.device}, but u or x is on {like.device}; move them to one device")
    if torch.compiler.is_compiling() or type(lengths) is not Tensor or lengths.device.type == "meta" or batch == 0:
        return
    version = None if lengths.is_inference() else lengths._version
    if _known_lengths is not None and (version is not None or lengths.device.type == "cuda"):
        known, at_version, within = _known_lengths
        if known() is lengths and at_version == version and within == length:
            return
    if lengths.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return  # a graph is being recorded: the values do not exist yet
    low, high = (int(n) for n in torch.stack(torch.aminmax(lengths)).tolist())
    if low < 0 or high > length:
        raise InputError(f"lengths must lie in 0…L = 0…{length}, got values from {low} to {high}")
    _known_lengths = (weakref.ref(lengths), version, length)


def check_mask(mask: Tensor, like: Tensor) -> None:
    """Raise `InputError` unless ``mask`` says for each step of ``like``'s rows whether it counts."""
    if mask.shape != like.shape[:2]:
        raise _wrong("mask", "B L", tuple(like.shape[:2]), mask)
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be bool (True where a token counts), got {mask.dtype}")
    if mask.device != like.device:
        raise InputError(f"mask is on {mask.device}, but u or x is on {like.device}; move them to one device")


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    h0: Tensor | None,
    lengths: Tensor | None,
    boundaries: int | None,
) -> None:
    """Raise `InputError` unless the arguments of ``selective_scan`` fit together."""
    _is_tensor("u", u)
    _is_tensor("A", A)
    if u.dim() != 3:
        raise InputError(f"u must be B L D, got shape {tuple(u.shape)}")
    if A.dim() != 2:
        raise InputError(f"A must be D N, got shape {tuple(A.shape)}")
    batch, length, channels = u.shape
    states = A.shape[1]
    if channels == 0 or states == 0:
        raise InputError(f"u must have D ≥ 1 channels and A N ≥ 1 states, got u {tuple(u.shape)}, A {tuple(A.shape)}")
    if not u.dtype.is_floating_point:
        raise _not_floating("u", u)
    bld, bln = (batch, length, channels), (batch, length, states)
    _expect("delta", delta, "B L D", bld, u)
    _expect("A", A, "D N", (channels, states), u)
    _expect("B", B, "B L N", bln, u)
    _expect("C", C, "B L N", bln, u)
    if D is not None:
        _expect("D", D, "D", (channels,), u)
    if z is not None:
        _expect("z", z, "B L D", bld, u)
        if z.dtype != u.dtype:
            raise InputError(f"z must have u's dtype {u.dtype}, got {z.dtype}")
    if dt_bias is not None:
        _expect("dt_bias", dt_bias, "D", (channels,), u)
        if not dt_softplus:
            raise InputError("dt_bias is given but dt_softplus is False: it is added to delta_raw before the softplus")
    if h0 is not None:
        _expect("h0", h0, "B D N", (batch, channels, states), u)
    if lengths is not None:
        check_lengths(lengths, u)
    if boundaries is not None and (isinstance(boundaries, bool) or not isinstance(boundaries, int) or boundaries < 1):
        raise InputError(f"boundaries must be a number of steps ≥ 1 or None, got {boundaries!r}")


def check_window(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor) -> None:
    """Raise `InputError` unless the arguments of ``state_window`` fit together."""
    check_scan(u, delta, A, B, B, None, None, None, False, None, None, None)
    _expect("h_start", h_start, "B D N", (u.shape[0], u.shape[2], A.shape[1]), u)


def check_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None, lengths: Tensor | None
) -> None:
    """Raise `InputError` unless the arguments of ``causal_conv`` fit together (``weight`` already ``D K``)."""
    _is_tensor("x", x)
    if x.dim() != 3:
        raise InputError(f"x must be B L D, got shape {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise _not_floating("x", x)
    batch, _, channels = x.shape
    if weight.dim() != 2 or weight.shape[1] < 1 or channels == 0:
        raise InputError(
            f"weight must be D K or D 1 K with K ≥ 1, D ≥ 1, got {tuple(weight.shape)} for x {tuple(x.shape)}"
        )
    width = weight.shape[1]
    _expect("weight", weight, "D K", (channels, width), x)
    if bias is not None:
        _expect("bias", bias, "D", (channels,), x)
    if state is not None:
        _expect("state", state, "B D K-1", (batch, channels, width - 1), x)
    if lengths is not None:
        check_lengths(lengths, x)
    if activation is not None and activation != "silu":
        raise InputError(f"activation must be None or 'silu', got {activation!r}")


def check_norm(x: Tensor, weight: Tensor | None, eps: float) -> None:
    """Raise `InputError` unless the arguments of ``rms_norm`` fit together."""
    _is_tensor("x", x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise InputError(f"x must have a last axis of at least one entry, got shape {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise _not_floating("x", x)
    if weight is not None:
        _expect("weight", weight, "M", (x.shape[-1],), x)
    if not eps >= 0:
        raise InputError(f"eps must be ≥ 0, got {eps!r}")

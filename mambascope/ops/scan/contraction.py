"""States of a window, contracted as they are walked: what attribution asks of states, without storing them."""

from typing import Any, Literal

import torch
from torch import Tensor

from mambascope.errors import BackendError, InputError
from mambascope.ops import operators
from mambascope.ops.checks import check_window, compute_dtype
from mambascope.ops.dispatch import KERNEL_BACKENDS, Backend, choose, kernels
from mambascope.ops.scan.windows import state_window

__all__ = ["window_dot"]

_MOST = 1 << 22  # numbers of states that are held at a time, where no kernel holds them in registers


def window_dot(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    h_start: Tensor,
    weight: Tensor,
    *,
    over: Literal["N", "D N"] = "N",
    backend: Backend = "auto",
) -> Tensor:
    """``Σ h[t] · weight[t]`` for each of a window's W steps, h replayed from the state before the first of them.

    With a loss's derivative by h as weight this is the first-order attribution to each step's state.

    Args:
        u, delta: ``B W D`` (delta after softplus); A: ``D N``; B: ``B W N``; h_start: ``B D N``.
        weight: ``B W D N``, or what broadcasts to it: an axis of size 1 is the same for all and takes no memory.
        over: the axes that are summed: "N" gives ``B W D``, "D N" gives ``B W``.
        backend: see `resolve_backend`.

    Returns:
        ``B W D`` or ``B W``, float32 or float64. Time O(B W D N); memory beyond the result: none on ``triton``, a few
        megabytes of states elsewhere. With gradients, of all inputs, on ``torch`` and ``reference``: O(B W D N).

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
        BackendError: an explicit kernel backend with tensors that require gradients (``auto`` takes ``torch`` there).
    """
    check_window(u, delta, A, B, h_start)
    weight = _weight(weight, u, A.shape[1])
    if over not in ("N", "D N"):
        raise InputError(f"over must be 'N' (sum over states) or 'D N' (over channels too), got {over!r}")
    inputs = (u, delta, A, B, h_start, weight)
    name = choose(backend, *inputs, d_state=A.shape[1])
    if name in KERNEL_BACKENDS and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        if backend != "auto":
            raise BackendError(f"window_dot has no gradient on backend {name!r}; use backend='torch' or 'auto'")
        name = "torch"
    kernel = getattr(kernels(name), "window_dot", None) if name in KERNEL_BACKENDS and u.numel() else None
    if kernel is not None and operators.direct(*inputs):
        found = kernel(*inputs)
    else:
        found = _in_pieces(name, *inputs)
    return found.sum(-1) if over == "D N" else found


def _weight(weight: Tensor, u: Tensor, states: int) -> Tensor:
    """weight as ``B W D N``."""
    if not weight.dtype.is_floating_point:
        raise InputError(f"weight must be floating point, got {weight.dtype}")
    if weight.device != u.device:
        raise InputError(f"weight is on {weight.device}, but u is on {u.device}; move them to one device")
    try:
        return weight.expand(*u.shape, states)
    except RuntimeError:
        wanted = ", ".join(str(n) for n in (*u.shape, states))
        raise InputError(
            f"weight must be B W D N = ({wanted}) or broadcast to it, got shape {tuple(weight.shape)}"
        ) from None


def _in_pieces(name: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor, weight: Tensor) -> Tensor:
    batch, length, channels = u.shape
    wide = compute_dtype(u, delta, A, B, h_start, weight)
    steps = max(1, _MOST // max(1, batch * channels * A.shape[1]))
    found = [u.new_empty((batch, 0, channels), dtype=wide)]
    for begin in range(0, length, steps):
        cut = slice(begin, begin + steps)
        h = state_window(u[:, cut], delta[:, cut], A, B[:, cut], h_start, backend=name)  # B w D N
        found.append((h * weight[:, cut].to(wide)).sum(-1))
        h_start = h[:, -1]
    return torch.cat(found, 1)

"""Windows of states, replayed from the state before them."""

import torch
from torch import Tensor

from mambascope.errors import BackendError
from mambascope.ops import operators
from mambascope.ops.checks import check_window
from mambascope.ops.dispatch import KERNEL_BACKENDS, Backend, choose, kernels
from mambascope.ops.ready import Ready
from mambascope.ops.scan import recurrence, reference

__all__ = ["state_window"]

_ready = Ready()


def state_window(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """States after each of W steps, replayed from the state before the first of them.

    Args:
        u, delta: ``B W D`` (delta after softplus); A: ``D N``; B: ``B W N``.
        h_start: ``B D N``, the state entering the window.
        backend: see `resolve_backend`.

    Returns:
        ``h``, ``B W D N``, float32 or float64. It is materialised: W·B·D·N·4 bytes.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
        BackendError: an explicit kernel backend with tensors that require gradients (``auto`` takes ``torch`` there).
    """
    inputs = (u, delta, A, B, h_start)
    key, repeat = _ready.find(inputs, backend)
    if repeat is not None:
        return repeat(*inputs)
    check_window(*inputs)
    name = choose(backend, u, delta, A, B, h_start, d_state=A.shape[1])
    if u.numel() == 0:
        name = "reference"
    if name in KERNEL_BACKENDS:
        if operators.direct(*inputs):
            window = kernels(name).state_window
            out = window(*inputs)
            _ready.learn(key, window)
            return out
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs)):
            return operators.call("state_window", name, *inputs)
        if backend != "auto":
            raise BackendError(f"state_window has no gradient on backend {name!r}; use backend='torch' or 'auto'")
        name = "torch"
    return (recurrence if name == "torch" else reference).window(u, delta, A, B, h_start)

"""mamba_ssm's ``selective_scan_fn`` on our kernels: its signature, its layout ``B D L``, its results.

Only this file speaks ``B D L``. In the errors and comments here D is the number of channels and L the last axis.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.ops import layout
from mambascope.ops.checks import compute_dtype
from mambascope.ops.dispatch import Backend
from mambascope.ops.elementwise import gate, softplus
from mambascope.ops.scan import selective_scan

__all__ = ["selective_scan_fn"]


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan with the signature, layout and results of ``mamba_ssm``'s function of this name.

    ``h[t] = exp(delta[t] A) h[t−1] + delta[t] B[t] u[t]``, ``out[t] = (Σ_n C[t,n] h[t,:,n] + D u[t]) · silu(z[t])``
    (Mamba, 2312.00752, algorithm 2), with ``delta + delta_bias``, or its softplus, for delta.

    Args:
        u, delta, z: ``B D L``; z in u's dtype.
        A: ``D N``, real.
        B, C: ``B N L``; or ``B G N L`` with G groups of D / G neighbouring channels; or constant in time, ``D N``.
        D, delta_bias: ``D``.
        delta_softplus: whether delta is ``softplus(delta + delta_bias)``.
        return_last_state: also return the state after the last step.
        backend: the one argument that mamba_ssm's function does not have, see `resolve_backend`.

    Returns:
        ``out B D L`` in u's dtype, in memory as u is; with ``return_last_state`` also ``last_state B D N``, float32.
        Arithmetic is float32, of float64 inputs float64 (the state then too).

        Gradients are those of the formula; unlike in mamba_ssm's CUDA function they also flow from ``last_state``.
        Time O(B D L N). Each of u, delta, z, B, C, out that lies as ``B D L`` in memory is copied once into or out of
        our layout, on a GPU all inputs in one launch; the forward of Hopper-class GPUs takes them as they lie. G groups
        are G scans of their channels. A constant B or C makes N scans of one state, and with gradients keeps B·L·D·N
        numbers.

    Raises:
        InputError: complex A (or anything else), shapes, dtypes, devices that do not fit; the message says which.
        BackendError: an explicit backend that cannot run.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if isinstance(u, Tensor) and u.device.type == "cuda":
        from mambascope.ops import packed

        key, again = packed.ready.find(inputs, bool(delta_softplus), backend)
        if again is not None or packed.takes(backend, inputs):
            scan = partial(packed.scan, delta_softplus=delta_softplus, key=key) if again is None else again
            out, last_state = scan(*inputs)
            return (out, last_state) if return_last_state else out
    groups = _check(*inputs)
    y, last_state = _scan(*inputs, delta_softplus=bool(delta_softplus), groups=groups, backend=backend)
    lies_as_ours = u.stride(1) == 1 and u.stride(2) != 1
    out = y.transpose(1, 2) if lies_as_ours else layout.turned(y)
    return (out, last_state) if return_last_state else out


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
    groups: int,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """y ``B L D`` in u's dtype and the last state, group by group."""
    wide = compute_dtype(u, delta, A, B, C, D, z, delta_bias)
    dtype = u.dtype
    u, delta, z = layout.turned(u), layout.turned(delta), None if z is None else layout.turned(z)
    if delta_bias is not None and not delta_softplus:
        delta, delta_bias = delta.to(wide) + delta_bias.to(wide), None
    one = _scan_of_times
    if B.dim() == 2 or C.dim() == 2:
        one = _scan_of_constants
        # Read by each of its many scans: finished once, and their gradients are added before they are rounded.
        u, delta = u.to(wide), delta.to(wide)
        if delta_softplus:
            delta = softplus(delta if delta_bias is None else delta + delta_bias.to(wide), backend=backend)
            delta_bias, delta_softplus = None, False
    each_B, each_C = _of_group(B, groups, wide), _of_group(C, groups, wide)
    width = u.shape[2] // groups
    ys, states = [], []
    for g in range(groups):
        own = slice(g * width, (g + 1) * width)
        y, h = one(
            u[..., own],
            delta[..., own],
            A[own],
            each_B(g),
            each_C(g),
            None if D is None else D[own],
            None if z is None else z[..., own],
            None if delta_bias is None else delta_bias[own],
            delta_softplus,
            backend,
        )
        ys.append(y.to(dtype))
        states.append(h)
    return (ys[0], states[0]) if groups == 1 else (torch.cat(ys, -1), torch.cat(states, 1))


def _of_group(X: Tensor, groups: int, wide: torch.dtype) -> Callable[[int], Tensor]:
    """Of B or C, what a group's channels read: ``B L N``, or its rows of ``D N``."""
    if X.dim() == 2:
        width = X.shape[0] // groups
        return lambda g: X[g * width : (g + 1) * width]
    own = X[:, None] if X.dim() == 3 else X
    if own.shape[1] < groups:  # several scans read the same
        own = own.to(wide)
    turned = [layout.turned(own[:, i]) for i in range(own.shape[1])]
    return lambda g: turned[g * len(turned) // groups]


def _scan_of_times(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """B and C ``B L N``: our scan as it is."""
    found = selective_scan(u, delta, A, B, C, D, z, dt_bias=delta_bias, dt_softplus=delta_softplus, backend=backend)
    return found.y, found.h_last


def _scan_of_constants(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """B or C or both ``D N``, u and delta wide, delta finished.

    A constant differs from channel to channel, which our kernels' ``B L N`` cannot say. But the recurrence is linear
    and its states do not meet before the sum over n: state n alone is a scan with N = 1, in which the constants stay
    outside as factors of the channels.
    """
    wide = u.dtype
    batch, length, _ = u.shape
    B, C = B.to(wide), C.to(wide)
    ones = u.new_ones(1, 1, 1).expand(batch, length, 1)
    y: Tensor | None = None
    states = []
    for n in range(A.shape[1]):
        at = slice(n, n + 1)
        write, read = (ones if X.dim() == 2 else X[..., at] for X in (B, C))
        found = selective_scan(u, delta, A[:, at], write, read, backend=backend)
        h = found.h_last[..., 0]
        factor = None
        if B.dim() == 2:
            factor = B[:, n]
            h = h * factor
        if C.dim() == 2:
            factor = C[:, n] if factor is None else factor * C[:, n]
        assert factor is not None
        part = found.y * factor
        y = part if y is None else y + part
        states.append(h)
    assert y is not None
    if D is not None:
        y = y + D.to(wide) * u
    return (y if z is None else gate(y, z, backend=backend)), torch.stack(states, -1)


# --- checks: as in `checks`, in this function's own letters ---


def _shape(x: Tensor) -> str:
    return f"({', '.join(str(n) for n in x.shape)})"


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> int:
    """The number of groups of channels that B and C tell apart; `InputError` unless everything fits together."""
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    for name, x in named.items():
        if x is None and name in ("D", "z", "delta_bias"):
            continue
        if not isinstance(x, Tensor):
            raise InputError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype.is_complex:
            raise InputError(
                f"{name} is complex ({x.dtype}): selective_scan_fn computes real state space models only. Use a real A "
                "(Mamba's -exp(A_log)); complex ones need mamba_ssm's own kernel"
            )
        if not x.dtype.is_floating_point:
            raise InputError(f"{name} must be floating point, got {x.dtype}")
        if x.device != u.device:
            raise InputError(f"{name} is on {x.device}, but u is on {u.device}; move them to one device")
    if u.dim() != 3:
        raise InputError(f"u must be B D L, got shape {_shape(u)}")
    if A.dim() != 2:
        raise InputError(f"A must be D N, got shape {_shape(A)}")
    batch, channels, length = u.shape
    states = A.shape[1]
    if channels == 0 or states == 0:
        raise InputError(f"u must have D ≥ 1 channels and A N ≥ 1 states, got u {_shape(u)}, A {_shape(A)}")
    expected = {"delta": u.shape, "A": (channels, states), "D": (channels,), "z": u.shape, "delta_bias": (channels,)}
    letters = {"delta": "B D L", "A": "D N", "D": "D", "z": "B D L", "delta_bias": "D"}
    for name, shape in expected.items():
        x = named[name]
        if x is not None and x.shape != shape:
            wanted = ", ".join(str(n) for n in shape)
            raise InputError(f"{name} must be {letters[name]} = ({wanted}), got shape {_shape(x)}")
    if z is not None and z.dtype != u.dtype:
        raise InputError(f"z must have u's dtype {u.dtype}, got {z.dtype}; convert one of them")
    of_B, of_C = (_groups(name, x, batch, channels, states, length) for name, x in (("B", B), ("C", C)))
    groups = of_B
    while groups % of_C:  # the least common multiple, in terms that a compiler can follow
        groups += of_B
    return groups


def _groups(name: str, X: Tensor, batch: int, channels: int, states: int, length: int) -> int:
    if X.shape in ((channels, states), (batch, states, length)):
        return 1
    if X.dim() == 4 and (X.shape[0], *X.shape[2:]) == (batch, states, length):
        if X.shape[1] and channels % X.shape[1] == 0:
            return X.shape[1]
        raise InputError(f"{name} has G = {X.shape[1]} groups, which do not divide the D = {channels} channels")
    raise InputError(
        f"{name} must be B N L = ({batch}, {states}, {length}), or B G N L with G a divisor of D = {channels}, or "
        f"constant, D N = ({channels}, {states}); got shape {_shape(X)}"
    )

"""The selective scan: public functions, the same on every backend."""

from typing import NamedTuple

from torch import Tensor

from mambascope.errors import InputError
from mambascope.ops.checks import check_scan, check_window, compute_dtype
from mambascope.ops.dispatch import Backend, chosen
from mambascope.ops.elementwise import gate_formula, softplus_formula
from mambascope.ops.scan import reference

__all__ = ["ScanOutput", "linear_scan", "selective_scan", "state_window"]


class ScanOutput(NamedTuple):
    """``y`` B L D; ``h_last`` B D N, the state after the last step; ``h_boundary`` B ceil(L/T) D N, or None."""

    y: Tensor
    h_last: Tensor
    h_boundary: Tensor | None


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    h0: Tensor | None = None,
    lengths: Tensor | None = None,
    boundaries: int | None = None,
    backend: Backend = "auto",
) -> ScanOutput:
    """The selective state space recurrence (Mamba, 2312.00752, algorithm 2 and equation 2).

    ``h[t] = exp(delta[t] A) h[t−1] + delta[t] B[t] u[t]``, ``y[t] = Σ_n C[t,n] h[t,:,n]``, then ``+ D u`` and ``· silu(z)``
    if D and z are given. All arithmetic and h are float32, float64 if an input is.

    Args:
        u: ``B L D``, the scan's input, after conv and SiLU.
        delta: ``B L D``, step sizes; with ``dt_softplus`` the raw values, of which ``softplus(delta + dt_bias)`` is used.
        A: ``D N``, negative decay rates.
        B, C: ``B L N``.
        D: ``D``, skip weights. z: ``B L D``, gate input in u's dtype.
        h0: ``B D N``, the state before the first step; zeros if None.
        lengths: ``B`` int, real tokens at each row's left: beyond them delta is exactly 0, so h stays as it is.
        boundaries: T ≥ 1: also return the states entering steps 0, T, 2T, …
        backend: see `resolve_backend`. Fused and apart (`softplus`, `gate`) give the same bits on each.

    Returns:
        `ScanOutput`; y in u's dtype if z is given, else in the compute dtype.
        Time O(B L D N); memory O(B L D), plus the boundary states.

    Raises:
        InputError: shapes, dtypes, devices or lengths that do not fit; the message names the tensor.
        BackendError: an explicit backend that cannot run.
    """
    check_scan(u, delta, A, B, C, D, z, dt_bias, dt_softplus, h0, lengths, boundaries)
    chosen(backend, u, d_state=A.shape[1])
    if dt_softplus:
        delta = softplus_formula(delta if dt_bias is None else _wide(delta) + _wide(dt_bias))
    y, h_last, h_boundary = reference.scan(u, delta, A, B, C, h0, lengths, boundaries)
    if D is not None:
        y = y + D.to(y.dtype) * u.to(y.dtype)
    if z is not None:
        y = gate_formula(y, z)
    return ScanOutput(y, h_last, h_boundary)


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x))


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
    """
    check_window(u, delta, A, B, h_start)
    chosen(backend, u, d_state=A.shape[1])
    return reference.window(u, delta, A, B, h_start)


def linear_scan(A_bar: Tensor, write: Tensor, C: Tensor, h0: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The exposed recurrence ``h[t] = A_bar[t] · h[t−1] + write[t]``, ``y[t] = Σ_n C[t,n] h[t,:,n]``.

    For edits of A_bar or of the write itself: any real A_bar, differentiable, states returned.

    Args:
        A_bar, write: ``B L D N``; C: ``B L N``; h0: ``B D N`` or None for zeros.

    Returns:
        ``y B L D``, ``h_last B D N``, ``h B L D N``. Memory O(B L D N).

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    if A_bar.dim() != 4:
        raise InputError(f"A_bar must be B L D N, got shape {tuple(A_bar.shape)}")
    batch, length, channels, states = A_bar.shape
    wanted = {"write": (write, A_bar.shape), "C": (C, (batch, length, states)), "h0": (h0, (batch, channels, states))}
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise InputError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x is not None and x.device != A_bar.device:
            raise InputError(f"{name} is on {x.device}, but A_bar is on {A_bar.device}; move them to one device")
    wide = compute_dtype(A_bar, write, C, h0)
    start = A_bar.new_zeros(batch, channels, states, dtype=wide) if h0 is None else h0.to(wide)
    h = reference.recurrence(A_bar.to(wide), write.to(wide), start)
    y = (h * C.to(wide)[:, :, None, :]).sum(-1)
    return y, h[:, -1] if length else start, h

"""The selective scan: public functions, the same on every backend."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.ops import operators
from mambascope.ops.checks import check_lengths, check_mask, check_scan, compute_dtype
from mambascope.ops.dispatch import KERNEL_BACKENDS, Backend, choose, kernels
from mambascope.ops.elementwise import gate_formula, softplus, softplus_formula
from mambascope.ops.ready import Ready
from mambascope.ops.repeated import ScanOfKind
from mambascope.ops.scan import chunked, recurrence, reference
from mambascope.ops.scan.contraction import window_dot
from mambascope.ops.scan.windows import state_window

__all__ = ["ScanOutput", "linear_scan", "selective_scan", "state_window", "window_dot"]

_ready = Ready()


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
    mask: Tensor | None = None,
    boundaries: int | None = None,
    backend: Backend = "auto",
) -> ScanOutput:
    """The selective state space recurrence (Mamba, 2312.00752, algorithm 2 and equation 2).

    ``h[t] = exp(delta[t] A) h[t−1] + delta[t] B[t] u[t]``, ``y[t] = Σ_n C[t,n] h[t,:,n]``, then ``+ D u`` and
    ``· silu(z)`` if D and z are given. All arithmetic and h are float32, float64 if an input is.

    Args:
        u: ``B L D``, the scan's input, after conv and SiLU.
        delta: ``B L D``, step sizes ≥ 0; with ``dt_softplus`` raw values: ``softplus(delta + dt_bias)`` is used.
        A: ``D N``, negative decay rates.
        B, C: ``B L N``.
        D: ``D``, skip weights. z: ``B L D``, gate input in u's dtype.
        h0: ``B D N``, the state before the first step; zeros if None.
        lengths: ``B`` int, real tokens at each row's left: beyond them delta is exactly 0, so h stays as it is.
        mask: ``B L`` bool: where False delta is exactly 0 too, anywhere in a row, so h passes unchanged. It costs a
            pass over delta; ``lengths`` says the same of padding at the right for nothing.
        boundaries: T ≥ 1: also return the states entering steps 0, T, 2T, …
        backend: see `resolve_backend`. Fused and apart (`softplus`, `gate`) give the same bits on each.

    Returns:
        `ScanOutput`; y in u's dtype if z is given, else in the compute dtype.
        Time O(B L D N); memory O(B L D), plus the boundary states.

    Raises:
        InputError: shapes, dtypes, devices or lengths that do not fit; the message names the tensor.
        BackendError: an explicit backend that cannot run.
    """
    if mask is not None:
        check_scan(u, delta, A, B, C, D, z, dt_bias, dt_softplus, h0, lengths, boundaries)
        delta = _masked(delta, dt_bias, dt_softplus, mask, compute_dtype(u, delta, A, B, C, D, z, dt_bias, h0), backend)
        dt_bias, dt_softplus = None, False
    inputs = (u, delta, A, B, C, D, z, dt_bias, h0, lengths)
    key, repeat = _ready.find(inputs, dt_softplus, boundaries, backend)
    if repeat is not None:
        if lengths is not None:
            check_lengths(lengths, u)
        return ScanOutput(*repeat(*inputs))
    check_scan(u, delta, A, B, C, D, z, dt_bias, dt_softplus, h0, lengths, boundaries)
    name = choose(backend, u, delta, A, B, C, D, z, dt_bias, h0, d_state=A.shape[1])
    if u.numel() == 0:
        name = "reference"
    if name in KERNEL_BACKENDS:
        if operators.direct(*inputs):
            scan_forward = kernels(name).scan_forward
            output = ScanOutput(*scan_forward(*inputs, dt_softplus=dt_softplus, boundaries=boundaries))
            _ready.learn(key, scan_forward, ("dt_softplus", dt_softplus), ("boundaries", boundaries))
            return output
        output = ScanOutput(*operators.scan(name, inputs, dt_softplus, boundaries))
        if key is not None:
            interval = operators.kept_interval(name, inputs, boundaries)
            again = partial(ScanOfKind, name, dt_softplus, boundaries, interval)
            options = (("dt_softplus", dt_softplus), ("boundaries", interval))
            _ready.learn(key, kernels(name).scan_forward, *options, wrap=again)
        return output
    return _by_formulas(name, u, delta, A, B, C, D, z, dt_bias, dt_softplus, h0, lengths, boundaries)


def _masked(
    delta: Tensor, bias: Tensor | None, dt_softplus: bool, mask: Tensor, wide: torch.dtype, backend: Backend
) -> Tensor:
    """delta as the recurrence uses it, exactly 0 where ``mask`` says; fused and apart give the same bits."""
    check_mask(mask, delta)
    mask = mask[..., None]
    if dt_softplus:
        delta = torch.where(mask, delta, 0.0).to(wide)  # whatever stands there, NaN too, touches no gradient
        delta = softplus(delta if bias is None else delta + bias.to(wide), backend=backend)
    return torch.where(mask, delta, 0.0)


def _by_formulas(
    name: str,
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
) -> ScanOutput:
    """The recurrence of ``reference`` or ``torch`` between torch formulas for delta and the output."""
    wide = compute_dtype(u, delta, A, B, C, D, z, dt_bias, h0)

    def finish_delta(delta: Tensor) -> Tensor:
        delta = delta.to(wide)
        if dt_bias is not None:
            delta = delta + dt_bias.to(wide)
        return softplus_formula(delta) if dt_softplus else delta

    def finish_y(y: Tensor, u: Tensor, z: Tensor | None) -> Tensor:
        if D is not None:
            y = y + D.to(wide) * u.to(wide)
        return y if z is None else gate_formula(y, z)

    if name == "torch" and torch.compiler.is_compiling():
        inputs = (u, finish_delta(delta), A, B, C, None, None, None, h0, lengths)
        y, h_last, h_boundary = operators.scan(name, inputs, False, boundaries)
        return ScanOutput(finish_y(y, u, z), h_last, h_boundary)
    tensors = (u, delta, A, B, C, D, z, dt_bias, h0)
    if name == "torch" and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        finish = chunked.Finish(finish_delta, finish_y)
        out_dtype = wide if z is None else z.dtype
        return ScanOutput(*chunked.scan(u, delta, A, B, C, z, h0, lengths, boundaries, wide, finish, out_dtype))
    if D is not None:
        u = u.to(wide)  # once for both of its readers: their gradients are added before they are rounded
    scan = chunked.scan_with_grad if name == "torch" else reference.scan
    y, h_last, h_boundary = scan(u, finish_delta(delta), A, B, C, h0, lengths, boundaries)
    return ScanOutput(finish_y(y, u, z), h_last, h_boundary)


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
    scan = reference if choose("auto", A_bar) == "reference" or A_bar.numel() == 0 else recurrence
    h = scan.recurrence(A_bar.to(wide), write.to(wide), start)
    y = (h * C.to(wide)[:, :, None, :]).sum(-1)
    return y, h[:, -1] if length else start, h

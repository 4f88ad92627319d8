"""Softplus, SiLU and the gate: the elementwise pieces that the fused kernels contain.

On a CPU the torch formulas are written with ``exp`` and ``log1p`` rather than with torch's own softplus and SiLU: the
latter round an element differently in the vector body and in the scalar tail of a loop, so a value would depend on
where in the tensor it stands, and a text cut in two would not give the bits of the whole. Each branch of the formulas
is analytic and equals the function, so derivatives of any order are right, also at 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mambascope.errors import InputError
from mambascope.ops import operators
from mambascope.ops.checks import compute_dtype
from mambascope.ops.dispatch import KERNEL_BACKENDS, Backend, choose, kernels
from mambascope.ops.ready import Ready

__all__ = ["gate", "silu", "softplus"]

_softplus_ready, _silu_ready, _gate_ready = Ready(), Ready(), Ready()


def _decay(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whether x ≥ 0, and exp(−|x|), which never overflows."""
    positive = x >= 0
    return positive, torch.exp(torch.where(positive, -x, x))


def softplus_formula(x: Tensor) -> Tensor:
    """log(1 + exp x) in the compute dtype."""
    x = x.to(compute_dtype(x))
    if x.device.type != "cpu":
        return functional.softplus(x)
    positive, e = _decay(x)
    return torch.where(positive, x, 0.0) + torch.log1p(e)


def silu_formula(x: Tensor) -> Tensor:
    """x · sigmoid(x) in the compute dtype."""
    x = x.to(compute_dtype(x))
    if x.device.type != "cpu":
        return functional.silu(x)
    positive, e = _decay(x)
    return x * (torch.where(positive, 1.0, e) / (1.0 + e))


def gate_formula(y: Tensor, z: Tensor) -> Tensor:
    """y · silu(z), rounded to z's dtype."""
    wide = compute_dtype(y, z)
    return (y.to(wide) * silu_formula(z.to(wide))).to(z.dtype)


def softplus(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Step sizes from their raw values: ``log(1 + exp(x))``.

    Args:
        x: delta_raw, any shape, any floating dtype.
        backend: see `resolve_backend`; fused and apart give the same bits on each.

    Returns:
        Same shape; float32, or float64 if x is.
    """
    key, repeat = _softplus_ready.find((x,), backend)
    if repeat is not None:
        return repeat(x)
    _floating("x", x)
    name = choose(backend, x)
    if name not in KERNEL_BACKENDS:
        return softplus_formula(x)
    return _run("softplus", name, _softplus_ready, key, x)


def silu(x: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``x · sigmoid(x)``, computed in float32 (float64 for float64) and rounded to x's dtype; any shape."""
    key, repeat = _silu_ready.find((x,), backend)
    if repeat is not None:
        return repeat(x)
    _floating("x", x)
    name = choose(backend, x)
    if name not in KERNEL_BACKENDS:
        return silu_formula(x).to(x.dtype)
    return _run("silu", name, _silu_ready, key, x)


def gate(y: Tensor, z: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The block's gate ``y · silu(z)`` (Mamba, section 3.4, figure 3).

    Args:
        y: ``B L D``, in the compute dtype (float32 or float64).
        z: ``B L D``, the model's dtype.
        backend: see `resolve_backend`.

    Returns:
        ``B L D`` in z's dtype.

    Raises:
        InputError: shapes or devices differ, or a dtype is not floating.
    """
    key, repeat = _gate_ready.find((y, z), backend)
    if repeat is not None:
        return repeat(y, z)
    _floating("y", y)
    _floating("z", z)
    if y.shape != z.shape or y.device != z.device:
        raise InputError(f"y and z must agree, got y {tuple(y.shape)} on {y.device}, z {tuple(z.shape)} on {z.device}")
    name = choose(backend, z, y)
    if name not in KERNEL_BACKENDS:
        return gate_formula(y, z)
    return _run("gate", name, _gate_ready, key, y, z)


def _run(operator: str, name: str, ready: Ready, key: Any, *tensors: Tensor) -> Tensor:
    if not operators.direct(*tensors):
        return operators.call(operator, name, *tensors)
    kernel = getattr(kernels(name), f"{operator}_forward")
    out = kernel(*tensors)
    ready.learn(key, kernel)
    return out


def _floating(name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise InputError(f"{name} must be floating point, got {x.dtype}")

"""Root-mean-square normalisation, with its scale and normalised value open to hooks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.ops import operators
from mambascope.ops.checks import check_norm, compute_dtype
from mambascope.ops.dispatch import KERNEL_BACKENDS, Backend, choose, kernels
from mambascope.ops.ready import Ready, plain, unwatched

__all__ = ["AddNormOutput", "NormOutput", "add_norm", "rms_norm"]

_ready, _add_ready = Ready(), Ready()


class NormOutput(NamedTuple):
    """``out`` as x; ``normalized`` and ``scale`` (last axis 1) in float32/64, or None unless exposed."""

    out: Tensor
    normalized: Tensor | None
    scale: Tensor | None


def norm_formula(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(compute_dtype(x))
    scale = torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
    normalized = wide / scale
    if weight is None:
        return normalized.to(x.dtype), normalized, scale
    return (normalized * weight.to(wide.dtype)).to(weight.dtype), normalized, scale


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, expose: bool = False, backend: Backend = "auto"
) -> NormOutput:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last axis (Zhang and Sennrich, 1910.07467, equation 4).

    All arithmetic is in float32 (float64 for float64 x), rounded once at the end.

    Args:
        x: ``… M``.
        weight: ``M``, or None for no weight (Falcon-Mamba's norms inside the mixer).
        eps: added to the mean square, ≥ 0.
        expose: also return the intermediate values; ``out`` has the same bits either way.
        backend: see `resolve_backend`.

    Returns:
        `NormOutput`: ``out`` in weight's dtype (x's without weight); ``normalized = x / scale`` and
        ``scale = sqrt(mean(x²) + eps)``, ``… 1``, in the compute dtype.
        ``out = (normalized · weight)`` rounded to its dtype, so an edit of ``normalized`` can be carried on from there.

    Raises:
        InputError: weight does not fit x, a dtype is not floating, or eps is negative.
    """
    key, repeat = _ready.find((x, weight), eps, expose, backend)
    if repeat is not None:
        return NormOutput(*repeat(x, weight))
    check_norm(x, weight, eps)
    name = choose(backend, x, weight)
    if name not in KERNEL_BACKENDS:
        out, normalized, scale = norm_formula(x, weight, eps)
    elif operators.direct(x, weight):
        norm_forward = kernels(name).norm_forward
        output = NormOutput(*norm_forward(x, weight, eps, expose=expose))
        _ready.learn(key, norm_forward, ("expose", expose), rest=(eps,))
        return output
    else:
        out, normalized, scale = operators.call("rms_norm", name, x, weight, eps, expose)
    return NormOutput(out, normalized, scale) if expose else NormOutput(out, None, None)


class AddNormOutput(NamedTuple):
    """``residual`` = x + residual, and the fields of `NormOutput` of it."""

    residual: Tensor
    out: Tensor
    normalized: Tensor | None
    scale: Tensor | None


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, expose: bool = False, backend: Backend = "auto"
) -> AddNormOutput:
    """The residual stream's next value, ``residual + x``, and its norm: between two blocks, in one pass on ``triton``.

    Args:
        x, residual: ``… M``, of one shape; their sum is rounded to the wider of their dtypes.
        weight, eps, expose, backend: as in `rms_norm`.

    Returns:
        `AddNormOutput`, the same bits as ``residual + x`` and `rms_norm` of it.

    Raises:
        InputError: x and residual do not fit each other; else as `rms_norm`.
    """
    key, repeat = _add_ready.find((x, residual, weight), eps, expose, backend)
    if repeat is not None:
        return AddNormOutput(*repeat(x, residual, weight))
    if x.shape != residual.shape or x.device != residual.device:
        raise InputError(
            f"x and residual must agree, got x {tuple(x.shape)} on {x.device}, residual {tuple(residual.shape)} "
            f"on {residual.device}"
        )
    check_norm(x, weight, eps)
    check_norm(residual, weight, eps)
    name = choose(backend, x, residual, weight)
    kernel = getattr(kernels(name), "add_norm_forward", None) if name in KERNEL_BACKENDS else None
    if kernel is not None and weight is not None and not expose and _differentiable(x, residual, weight):
        return AddNormOutput(*_AddNorm.apply(x, residual, weight, eps, name), None, None)  # type: ignore[misc]
    if kernel is None or not operators.direct(x, residual, weight):
        added = residual + x
        return AddNormOutput(added, *rms_norm(added, weight, eps, expose=expose, backend=backend))
    output = AddNormOutput(*kernel(x, residual, weight, eps, expose=expose))
    _add_ready.learn(key, kernel, ("expose", expose), rest=(eps,))
    return output


def _differentiable(*tensors: Tensor) -> bool:
    """Whether a gradient is asked for, in plain eager mode."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors) and unwatched() and plain(tensors)


class _AddNorm(torch.autograd.Function):
    """`add_norm` with its gradient in one pass as well; higher derivatives by torch formulas."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str) -> Any:
        added, out, _, _ = kernels(backend).add_norm_forward(x, residual, weight, eps, expose=False)  # type: ignore[attr-defined]
        ctx.save_for_backward(added, weight)
        ctx.eps, ctx.backend, ctx.dtypes = eps, backend, (x.dtype, residual.dtype)
        ctx.set_materialize_grads(False)
        return added, out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        beside, dout = grads
        added, weight = ctx.saved_tensors
        narrow, wide = ctx.dtypes
        if dout is None:
            none = beside is None
            return None if none else beside.to(narrow), None if none else beside.to(wide), None, None, None
        kernel = operators.norm_kernel(ctx.backend, added, weight, dout)
        if kernel is not None and wide == added.dtype:
            dx, dnarrow, dweight = kernel(added, weight, dout, beside, ctx.eps, None if narrow == wide else narrow)
            return dx if dnarrow is None else dnarrow, dx, dweight, None, None
        dx, dweight = operators.norm_gradients(added, weight, dout, ctx.eps)
        dx = dx if beside is None else dx + beside.to(dx.dtype)
        return dx.to(narrow), dx.to(wide), dweight, None, None

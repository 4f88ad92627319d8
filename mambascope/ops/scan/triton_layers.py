"""Triton kernels of the layers around the scan: softplus, SiLU, gate, RMSNorm. Arithmetic in float32, rounded once."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import check, dense, launch
from mambascope.ops.scan.triton_math import backwards, silu, softplus
from mambascope.ops.scan.triton_replay import replayed

__all__ = [
    "add_norm_forward",
    "gate_forward",
    "norm_forward",
    "silu_forward",
    "softplus_forward",
    "wide_norm_forward",
]

_BLOCK = 512
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
SOFTPLUS, SILU, GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit(do_not_specialize=["rows", "inner"])
def _elementwise_kernel(
    x, z, out, rows, columns, inner, x_b, x_l, z_b, z_l,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One function of x (and z) on rows ``(outer, inner)`` of ``columns`` entries. Grid: rows × column blocks."""
    blocks = tl.cdiv(columns, BLOCK)
    row = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < columns
    outer = (row // inner).to(tl.int64)
    step = (row % inner).to(tl.int64)
    v = tl.load(x + outer * x_b + step * x_l + i, mask=inside, other=0.0).to(tl.float32)
    if KIND == SOFTPLUS:
        v = softplus(v)
    elif KIND == SILU:
        v = silu(v)
    else:
        v = v * silu(tl.load(z + outer * z_b + step * z_l + i, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + row.to(tl.int64) * columns + i, v.to(out.dtype.element_ty), mask=inside)


def _as_rows(x: Tensor) -> tuple[Tensor, int, int, int, int, int]:
    """x with its rows, columns, inner rows and the strides of both row axes; copied only where it has to be."""
    if x.dim() != 3:
        flat = x.contiguous().view(1, -1, x.shape[-1]) if x.dim() and x.numel() else x.contiguous().view(1, 1, -1)
        return _as_rows(flat)
    kept = dense(x)
    assert kept is not None
    return kept, x.shape[0] * x.shape[1], x.shape[2], x.shape[1], kept.stride(0), kept.stride(1)


def _elementwise(kind: int, x: Tensor, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    check(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, rows, columns, inner, x_b, x_l = _as_rows(x)
    z_b = z_l = 0
    if z is not None:
        z, _, _, _, z_b, z_l = _as_rows(z)
    programs = rows * triton.cdiv(columns, _BLOCK)
    arguments = (x, z, out, rows, columns, inner, x_b, x_l, z_b, z_l)
    launch(_elementwise_kernel, programs, x.device, *arguments, KIND=kind, BLOCK=_BLOCK, **_OPTIONS)
    return out


@replayed(tensors=1)
def softplus_forward(x: Tensor) -> Tensor:
    """log(1 + e^x), any shape; float32."""
    return _elementwise(0, x, None, torch.float32)


@replayed(tensors=1)
def silu_forward(x: Tensor) -> Tensor:
    """x · sigmoid(x), any shape; in x's dtype."""
    return _elementwise(1, x, None, x.dtype)


@replayed(tensors=2)
def gate_forward(y: Tensor, z: Tensor) -> Tensor:
    """y · silu(z), equal shapes; in z's dtype."""
    return _elementwise(2, y, z, z.dtype)


@triton.jit(do_not_specialize=["inner"])
def _norm_kernel(
    x, residual, weight, added, out, normalized, scale, columns, inner, x_b, x_l, r_b, r_l, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr, EXPOSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows. Of x, with a residual of their sum, rounded to the dtype of ``added`` if that is there to take it."""
    row = backwards()
    i = tl.arange(0, BLOCK)
    inside = i < columns
    outer = (row // inner).to(tl.int64)
    step = (row % inner).to(tl.int64)
    at = row.to(tl.int64) * columns + i
    v = tl.load(x + outer * x_b + step * x_l + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        v = v + tl.load(residual + outer * r_b + step * r_l + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        v = v.to(added.dtype.element_ty)
        tl.store(added + at, v, mask=inside)
        v = v.to(tl.float32)
    root = tl.sqrt_rn(tl.sum(v * v, axis=0) / columns + eps)
    v = v / root
    if EXPOSE:
        tl.store(normalized + at, v, mask=inside)
        tl.store(scale + row, root)
    if HAS_WEIGHT:
        v = v * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


def _norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    expose: bool,
    dtype: torch.dtype | None,
    wide: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """The sum with the residual, or x in the dtype ``wide`` (None without either), out, normalized, scale."""
    check(x)
    kind = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    added = None if residual is None and wide is None else torch.empty(x.shape, dtype=wide or kind, device=x.device)
    out = torch.empty(x.shape, dtype=dtype or (kind if weight is None else weight.dtype), device=x.device)
    normalized = torch.empty(x.shape, dtype=torch.float32, device=x.device) if expose else None
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if expose else None
    if out.numel() == 0:
        return added, out, normalized, scale
    x, rows, columns, inner, x_b, x_l = _as_rows(x)
    r_b = r_l = 0
    if residual is not None:
        residual, _, _, _, r_b, r_l = _as_rows(residual)
    weight = None if weight is None else weight.contiguous()
    block = triton.next_power_of_2(columns)
    flags = {
        "HAS_RESIDUAL": residual is not None,
        "HAS_ADDED": added is not None,
        "HAS_WEIGHT": weight is not None,
        "EXPOSE": expose,
        "BLOCK": block,
        "num_warps": max(1, min(8, block // 256)),
        "enable_fp_fusion": False,
    }
    pointers = (x, residual, weight, added, out, normalized, scale)
    launch(_norm_kernel, rows, x.device, *pointers, columns, inner, x_b, x_l, r_b, r_l, eps, **flags)
    return added, out, normalized, scale


@replayed(tensors=2)
def norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, *, expose: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``x / sqrt(mean(x²) + eps) · weight`` in ``dtype`` (weight's, or x's, by default); with ``expose`` also
    the two float32 parts."""
    return _norm(x, None, weight, eps, expose, dtype)[1:]  # type: ignore[return-value]


@replayed(tensors=3)
def add_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    expose: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x + residual, and `norm_forward` of it; the same bits as apart."""
    return _norm(x, residual, weight, eps, expose, dtype)  # type: ignore[return-value]


@replayed(tensors=2)
def wide_norm_forward(x: Tensor, weight: Tensor, eps: float, *, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in the dtype ``wide``, and `norm_forward` of that; the same bits as apart."""
    return _norm(x, None, weight, eps, False, None, wide)[:2]  # type: ignore[return-value]

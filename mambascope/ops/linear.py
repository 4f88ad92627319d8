"""The model's matrix products: torch's; for float32 on Hopper GPUs three TF32 terms, faster and nearer."""

import torch
from torch import Tensor

from mambascope.ops.dispatch import Backend, kernels
from mambascope.ops.ready import plain, unwatched

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "torch") -> Tensor:
    """``x W^T + b`` of ``… K`` with any row stride, as one matrix product over all rows.

    Args:
        x: ``… K``. weight: ``N K``. bias: ``N``.
        backend: with ``triton``, products of plain float32 tensors without gradient may run as three TF32 terms each
            (see ops/scan/triton_matmul.py), unless torch is set to a lower precision itself.

    Returns:
        ``… N``.
    """
    rows = x.reshape(-1, x.shape[-1])
    if backend == "triton" and rows.dtype == torch.float32 and rows.is_cuda and _exact(rows, weight, bias):
        module = kernels("triton")
        if module.serves(rows, weight):  # type: ignore[attr-defined]
            return module.linear_forward(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])  # type: ignore[attr-defined]
    out = torch.addmm(bias, rows, weight.t()) if bias is not None else torch.mm(rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


def _exact(*tensors: Tensor | None) -> bool:
    """Whether float32 products mean float32, nobody wants a gradient, and nobody watches."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    if torch.is_autocast_enabled("cuda") or not unwatched() or not plain(tensors):
        return False
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return precision in ("ieee", "none") if precision is not None else not matmul.allow_tf32

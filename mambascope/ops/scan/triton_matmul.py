"""float32 matrix products on tensor cores, as exact as on the others: each factor in three TF32 terms.

a b = (a₁ + a₂)(b₁ + b₂) without a₂ b₂, where a₁ is a rounded to TF32 and a₂ what is left: 22 bits of each factor. On an
H100 that is 1.5 times as fast as cuBLAS' float32 and, summed in blocks, nearer to float64 (2.7e-7 against 1.2e-6 of the
largest entry at K = 768). Single TF32, with its error near 3e-4, is nowhere used.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import launch, processor_count
from mambascope.ops.scan.triton_math import steps

__all__ = ["linear_forward", "serves"]

_ROWS, _DEPTH, _GROUP = 128, 32, 8
_LEAST = 1 << 30  # multiplications: below, a launch of cuBLAS is as good
_capable: dict[torch.device, bool] = {}


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, weight, bias, out, M, N, K, x_m,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of ``out`` (M N), in groups of rows that share the weight's tiles. K is a multiple of BK."""
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid = tl.program_id(0)
    first = pid // (GROUP * across) * GROUP
    high = min(down - first, GROUP)
    m = (first + pid % (GROUP * across) % high) * BM + tl.arange(0, BM)
    n = pid % (GROUP * across) // high * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at_x = x + m.to(tl.int64)[:, None] * x_m + k[None, :]
    at_w = weight + n.to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros([BM, BN], tl.float32)
    for _ in steps(0, K // BK):
        a = tl.load(at_x, mask=(m < M)[:, None], other=0.0)
        b = tl.load(at_w, mask=(n < N)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="tf32x3")
        at_x += BK
        at_w += BK
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])


def serves(rows: Tensor, weight: Tensor) -> bool:
    """Whether the product is worth it here: float32 on a Hopper GPU, large enough, whole tiles of the inner axis."""
    if rows.dtype != torch.float32 or weight.dtype != torch.float32 or not rows.is_cuda or weight.shape[0] < 256:
        return False
    if weight.shape[1] % _DEPTH or rows.shape[0] * weight.numel() < _LEAST or not weight.is_contiguous():
        return False
    device = rows.device
    if device not in _capable:
        _capable[device] = torch.cuda.get_device_capability(device)[0] == 9
    return _capable[device] and rows.stride(1) == 1


def linear_forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows`` (M K) times ``weight`` (N K) transposed, plus ``bias``: M N, float32. K must be a multiple of 32."""
    (count, depth), width = rows.shape, weight.shape[0]
    out = torch.empty((count, width), dtype=torch.float32, device=rows.device)
    down = triton.cdiv(count, _ROWS)
    block = 128 if down * triton.cdiv(width, 128) >= 2 * processor_count(rows.device) else 64
    launch(
        _linear_kernel, down * triton.cdiv(width, block), rows.device,
        rows, weight, bias, out, count, width, depth, rows.stride(0),
        BM=_ROWS, BN=block, BK=_DEPTH, GROUP=_GROUP, HAS_BIAS=bias is not None,
        num_warps=8 if block == 128 else 4, num_stages=3,
    )  # fmt: skip
    return out

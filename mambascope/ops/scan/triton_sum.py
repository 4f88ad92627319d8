"""Sums of the parts that programs of a kernel left, added up in a fixed order by a second launch."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import launch
from mambascope.ops.scan.triton_math import steps

__all__ = ["sum_parts"]

_TILE = 2048  # parts of entries that a program loads at a time


@triton.jit
def _add_up(parts, out, i, size, terms, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = Σ parts[·, i], in a fixed order: TERMS at a time."""
    total = tl.zeros([BLOCK], tl.float32)
    for group in steps(0, tl.cdiv(terms, TERMS)):
        term = group * TERMS + tl.arange(0, TERMS)[:, None]
        inside = (term < terms) & (i < size)[None, :]
        total += tl.sum(tl.load(parts + term.to(tl.int64) * size + i[None, :], mask=inside, other=0.0), axis=0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["terms", "size", "other_size"])
def _sum_kernel(
    parts, other_parts, out, other, terms, size, other_size,
    HAS_OTHER: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of ``size`` entries, then of the other's."""
    many = tl.cdiv(size, BLOCK)
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    if pid < many:
        _add_up(parts, out, pid * BLOCK + i, size, terms, TERMS, BLOCK)
    else:
        if HAS_OTHER:
            _add_up(other_parts, other, (pid - many) * BLOCK + i, other_size, terms, TERMS, BLOCK)


def sum_parts(
    parts: Tensor, out: Tensor, other_parts: Tensor | None = None, other: Tensor | None = None, *, block: int = 32
) -> None:
    """``out`` = Σ of ``parts`` (float32, each as large as out) over their first axis, in out's dtype; of another
    pair as well. ``block``: entries a program, a power of two: few where terms are many."""
    size = out.numel()
    other_size = 0 if other is None else other.numel()
    programs = triton.cdiv(size, block) + triton.cdiv(other_size, block)
    arguments = (parts, other_parts, out, other, parts.shape[0], size, other_size)
    options = {"HAS_OTHER": other is not None, "TERMS": _TILE // block, "BLOCK": block, "num_warps": 4}
    launch(_sum_kernel, programs, out.device, *arguments, **options, enable_fp_fusion=False)

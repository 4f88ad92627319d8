"""Between two blocks, with the residual stream and the states kept where a later reader wants them.

A recorded graph launches with the same arguments at every replay, so what it writes is overwritten by the next. These
kernels read from memory *where* to write: a small tensor holds the address of this replay's destination, and what is
kept lands there at once, without a second copy.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import launch
from mambascope.ops.scan.triton_math import backwards

__all__ = ["Place", "join_kept", "keep_states"]

_BLOCK = 1024
_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Place:
    """``size`` entries of ``dtype`` at ``offset`` behind the address that ``address`` (one int64) holds at run time."""

    def __init__(self, address: Tensor, offset: int, dtype: torch.dtype) -> None:
        self.address, self.offset, self.dtype = address, offset, dtype


@triton.jit
def _join_kernel(
    x, source, source_at, target, target_at, weight, out, columns, eps,
    KIND: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: rows. As the norm kernel with a residual, whose two ends are addresses in memory."""
    row = backwards()
    i = tl.arange(0, BLOCK)
    inside = i < columns
    at = row.to(tl.int64) * columns + i
    after = tl.multiple_of(tl.load(target).to(tl.pointer_type(KIND)), 16)  # on its way with the other loads
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOURCE:
        before = tl.multiple_of(tl.load(source).to(tl.pointer_type(KIND)), 16)
        v = v + tl.load(before + (source_at + at), mask=inside, other=0.0).to(tl.float32)
    v = v.to(KIND)
    tl.store(after + (target_at + at), v, mask=inside)
    if HAS_OUT:
        v = v.to(tl.float32)
        root = tl.sqrt_rn(tl.sum(v * v, axis=0) / columns + eps)
        v = v / root
        v = v * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _keep_kernel(
    bound, last, target, target_at, count, entries,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of entries × count + 1 × rows: ``count`` boundary states and the last one, side by side."""
    blocks = tl.cdiv(entries, BLOCK)
    pid = tl.program_id(0)
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    c = (pid // blocks) % (count + 1)
    row = (pid // (blocks * (count + 1))).to(tl.int64)
    inside = i < entries
    v = tl.load(bound + (row * count + c) * entries + i, mask=inside & (c < count), other=0.0)
    v = tl.where(c < count, v, tl.load(last + row * entries + i, mask=inside & (c == count), other=0.0))
    to = tl.multiple_of(tl.load(target).to(tl.pointer_type(tl.float32)), 16)
    tl.store(to + target_at + (row * (count + 1) + c) * entries + i, v, mask=inside)


def join_kept(x: Tensor, source: Place | None, target: Place, weight: Tensor | None, eps: float) -> Tensor | None:
    """x (``B L M``) plus the residual at ``source`` to ``target``; its norm is returned, None without a weight.

    The same bits as ``ops.add_norm``, or without a source as x in the target's dtype and ``ops.rms_norm`` of that.
    """
    x = x.contiguous()
    columns = x.shape[-1]
    out = None if weight is None else torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    block = triton.next_power_of_2(columns)
    flags = {
        "KIND": _KINDS[target.dtype],
        "HAS_SOURCE": source is not None,
        "HAS_OUT": out is not None,
        "BLOCK": block,
        "num_warps": max(1, min(8, block // 256)),
        "enable_fp_fusion": False,
    }
    origin = target if source is None else source
    pointers = (x, origin.address, origin.offset, target.address, target.offset, weight, out)
    launch(_join_kernel, x.numel() // columns, x.device, *pointers, columns, eps, **flags)
    return out


def keep_states(bound: Tensor, last: Tensor, target: Place) -> None:
    """States at the boundaries ``B C D N`` and the last one ``B D N`` to ``target``, as ``B C+1 D N``."""
    bound, last = bound.contiguous(), last.contiguous()
    batch, count, channels, states = bound.shape
    entries = channels * states
    programs = triton.cdiv(entries, _BLOCK) * (count + 1) * batch
    arguments = (bound, last, target.address, target.offset, count, entries)
    launch(_keep_kernel, programs, bound.device, *arguments, BLOCK=_BLOCK, num_warps=4)

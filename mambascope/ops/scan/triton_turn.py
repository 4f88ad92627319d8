"""Turning tensors from ``B I J`` to ``B J I`` on a GPU, up to six of two widths in one launch.

Reads and writes are whole lines of memory: a tile is turned in registers and shared memory in between. One launch
moves u, delta, z, B and C of a scan and what arrives at y, or the scan's gradients, because at short lengths a launch
costs more than the copy.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_launch import launch
from mambascope.ops.scan.triton_replay import note

__all__ = ["turn", "turn_all"]

_TILE = 64
_WARPS = 4


@triton.jit
def _turn_tile(source, source_row, target, target_row, n_i, n_j, i0, j0, TILE: tl.constexpr):
    """target[j, i] = source[i, j] for one tile."""
    i = i0 + tl.arange(0, TILE)
    j = j0 + tl.arange(0, TILE)
    inside = (i[:, None] < n_i) & (j[None, :] < n_j)
    x = tl.load(source + i[:, None].to(tl.int64) * source_row + j[None, :], mask=inside)
    turned = tl.trans(x.to(target.dtype.element_ty))
    inside = (j[:, None] < n_j) & (i[None, :] < n_i)
    tl.store(target + j[:, None].to(tl.int64) * target_row + i[None, :], turned, mask=inside)


@triton.jit(do_not_specialize=["batch"])
def turn_kernel(
    s0, s1, s2, s3, s4, s5, d0, d1, d2, d3, d4, d5,
    batch0, row0, batch1, row1, batch2, row2, batch3, row3, batch4, row4, batch5, row5,
    wide_batch, wide_row, narrow_batch, narrow_row,
    wide_i, wide_j, narrow_i, narrow_j, batch,
    WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of WIDE tensors (s0…s3), then of two more (s4, s5), one tile a program; strides of sources, then of targets."""
    wide_across = tl.cdiv(wide_j, TILE)
    wide_tiles = tl.cdiv(wide_i, TILE) * wide_across
    across = tl.cdiv(narrow_j, TILE)
    tiles = tl.cdiv(narrow_i, TILE) * across
    pid = tl.program_id(0)
    narrow = pid >= wide_tiles * batch * WIDE
    if narrow:
        pid -= wide_tiles * batch * WIDE
    else:
        across = wide_across
        tiles = wide_tiles
    which = pid // (tiles * batch)
    pid %= tiles * batch
    b = (pid // tiles).to(tl.int64)
    pid %= tiles
    i0 = pid // across * TILE
    j0 = pid % across * TILE
    if narrow:
        if which == 0:
            _turn_tile(s4 + b * batch4, row4, d4 + b * narrow_batch, narrow_row, narrow_i, narrow_j, i0, j0, TILE)
        else:
            _turn_tile(s5 + b * batch5, row5, d5 + b * narrow_batch, narrow_row, narrow_i, narrow_j, i0, j0, TILE)
    elif which == 0:
        _turn_tile(s0 + b * batch0, row0, d0 + b * wide_batch, wide_row, wide_i, wide_j, i0, j0, TILE)
    elif which == 1:
        _turn_tile(s1 + b * batch1, row1, d1 + b * wide_batch, wide_row, wide_i, wide_j, i0, j0, TILE)
    elif which == 2:
        _turn_tile(s2 + b * batch2, row2, d2 + b * wide_batch, wide_row, wide_i, wide_j, i0, j0, TILE)
    else:
        _turn_tile(s3 + b * batch3, row3, d3 + b * wide_batch, wide_row, wide_i, wide_j, i0, j0, TILE)


_compiled: dict[tuple[Any, ...], Any] = {}


def turn_all(sources: Sequence[Tensor], targets: Sequence[Tensor], wide: int) -> None:
    """``targets[k][b, j, i] = sources[k][b, i, j]``, converted to the target's dtype, in one launch.

    The first ``wide`` (1 to 4) are of one shape, the others (none or two) of another; the last axis of each is dense,
    and targets of a shape have the same strides.
    """
    narrow = len(sources) - wide
    first, target, last = sources[0], targets[0], targets[-1]
    batch, wide_i, wide_j = first.shape
    _, narrow_i, narrow_j = sources[-1].shape
    programs = wide * -(-wide_i // _TILE) * -(-wide_j // _TILE)
    programs += narrow * -(-narrow_i // _TILE) * -(-narrow_j // _TILE)
    if wide < 4 or not narrow:  # places that are not used hold anything
        spare, more = 4 - wide, 2 - narrow
        sources = (*sources[:wide], *(first,) * spare, *sources[wide:], *(first,) * more)
        targets = (*targets[:wide], *(target,) * spare, *targets[wide:], *(target,) * more)
    steps = [step for source in sources for step in source.stride()[:2]]
    steps += (*target.stride()[:2], *last.stride()[:2], wide_i, wide_j, narrow_i, narrow_j)
    arguments = (*sources, *targets, *steps)
    flags = {"WIDE": wide, "TILE": _TILE, "num_warps": _WARPS}
    device = target.device
    # Triton compiles for what is divisible by 16, below 2³¹, aligned. Where all is, as nearly always, a short key finds
    # the compiled kernel in a third of the time of `launch`.
    odd = reduce(or_, steps) | reduce(or_, [x.data_ptr() for x in (*sources, *targets)])
    if device.type != "cuda" or odd & 15 or max(steps) > 0x7FFFFFFF or device.index != torch.cuda.current_device():
        launch(turn_kernel, programs * batch, device, *arguments, batch, **flags)
        return
    key = (wide, device.index, *[x.dtype for x in sources], *[x.dtype for x in targets])
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compiled[key] = turn_kernel[(programs * batch,)](*arguments, batch, **flags)
    else:
        compiled[programs * batch, 1, 1](*arguments, batch, wide, _TILE)
    note(compiled, programs * batch, (*arguments, batch), (wide, _TILE))


def turn(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``B I J`` as a contiguous ``B J I``, of another dtype if one is given."""
    batch, rows, columns = x.shape
    out = torch.empty((batch, columns, rows), dtype=dtype or x.dtype, device=x.device)
    turn_all([x if x.stride(2) == 1 else x.contiguous()], [out], 1)
    return out

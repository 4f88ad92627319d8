"""Tiles of rows in the scan's backward on Hopper-class GPUs: into shared memory on their own, and partial sums as rows.

Copies run while a tile is scanned. A load into registers would as well, but it shares one of a warp's six scoreboards
with instructions whose results are wanted at once, and then all wait for memory: once a tile, 7 % of the time.

Threads hold an even group of four steps and the next one, so that sums of even and of odd groups can lie in shared
memory of their own: between two stores to one allocation the compiler puts a barrier.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mambascope.ops.scan.gluon_layouts import linear, own_layout
from mambascope.ops.scan.gluon_math import load_tile, paired, tile_offsets

__all__ = ["copy_tile", "raw_rows", "raw_states", "rows", "source", "staged", "sums_of"]

_LANES = [[1, 0], [1, 1], [2, 0], [2, 1], [2, 2]]  # steps of a group, then pairs of channels


@gluon.constexpr_function
def rows() -> Any:
    """A tile ``[4 groups, 4 steps, 16, 2]``: two neighbouring channels of two groups in a thread."""
    return linear([4, 4, 16, 2], [[3, 0], [0, 0]], _LANES, [[2, 3], [0, 1]])


@gluon.constexpr_function
def _staged_rows() -> Any:
    """``[4, 2, 16, 4]``: `rows` with its axes as `by_channel` leaves them."""
    lanes = [[3, 0], [3, 1], [2, 0], [2, 1], [2, 2]]
    return linear([4, 2, 16, 4], [[1, 0], [0, 0]], lanes, [[2, 3], [0, 1]])


@gluon.constexpr_function
def _part_sums() -> Any:
    """``[2, 4 parts, 2, 16, 4]``: for the threads of `rows` all parts of their sums, of even or of odd groups."""
    lanes = [[4, 0], [4, 1], [3, 0], [3, 1], [3, 2]]
    return linear([2, 4, 2, 16, 4], [[1, 0], [1, 1], [2, 0]], lanes, [[3, 3], [0, 0]])


@gluon.constexpr_function
def raw_rows() -> Any:
    """Shared memory where every thread of `rows` finds its own."""
    return own_layout(rows(), 1)


@gluon.constexpr_function
def raw_states() -> Any:
    """The same for B and C ``[4, 4, 8, 2]``, of the threads of `rows_layout`."""
    return own_layout(linear([4, 4, 8, 2], [[3, 0]], _LANES, [[0, 0], [0, 1]]), 1)


@gluon.constexpr_function
def _raw_pairs(count: int) -> Any:
    """Either, of pairs of neighbours: 16 of channels or 8 of states."""
    if count == 16:
        return own_layout(linear([4, 4, 16], [[0, 0]], _LANES, [[2, 3], [0, 1]]), 0)
    return own_layout(linear([4, 4, 8], [], _LANES, [[0, 0], [0, 1]]), 0)


@gluon.jit
def source(pointer, stride, one, width: gl.constexpr, LAYOUT: gl.constexpr, PAIRED: gl.constexpr):
    """What `copy_tile` needs of a tensor whose first row ``pointer`` is at; PAIRED: 16-bit entries go two at a time.
    ``one``: a 64-bit 1, as a stride may be a plain number."""
    PAIRS: gl.constexpr = PAIRED and pointer.dtype.element_ty.primitive_bitwidth == 16
    at, t, column = tile_offsets(stride, 16, width, LAYOUT, PAIRS)
    return paired(pointer, PAIRS), at, t, column, one * (16 // (2 if PAIRS else 1)) * stride


@gluon.jit
def copy_tile(raw, rows_of, tile, L, begin, ALL: gl.constexpr, EVEN: gl.constexpr, PAIRED: gl.constexpr):
    """Begins to copy a tile, which must then be waited for; ``begin``: its first column, ALL: of so many if not 0."""
    pointer, at, t, column, step = rows_of
    left = L - tile * 16
    pointer += tile.to(gl.int64) * step
    if raw.dtype.primitive_bitwidth == 16 and not PAIRED:  # too narrow to be copied on its own
        raw.store(load_tile(pointer, at, t, column + begin, left, ALL, EVEN))
    else:
        into = raw
        if raw.dtype.primitive_bitwidth == 16:
            into = raw._reinterpret(gl.int32, [4, 4, raw.shape[2]], _raw_pairs(raw.shape[2]))
        if EVEN and ALL == 0:
            async_copy.async_copy_global_to_shared(into, pointer + at)
        else:
            inside = (t < left) & (column >= 0)
            if ALL > 0:
                inside = inside & (column + begin < ALL)
            async_copy.async_copy_global_to_shared(into, pointer + at, mask=inside)


@gluon.jit
def staged(shared):
    """What was stored `by_channel`, in `rows` again."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    found = shared._reinterpret(gl.float32, [1, 4, 2, 16, 4], LAYOUT).index(0).load(_staged_rows())
    return gl.convert_layout(gl.permute(found, (0, 3, 2, 1)), rows())


@gluon.jit
def sums_of(even, odd):
    """Rows from the partial sums of even and of odd groups, in shared memory ``[1, 2, parts, 2, 16, 4]``."""
    first = gl.sum(even.index(0).load(_part_sums()), axis=1)
    both = gl.join(first, gl.sum(odd.index(0).load(_part_sums()), axis=1))  # 2 2 16 4 2
    return gl.convert_layout(gl.permute(both, (0, 4, 3, 2, 1)).reshape([4, 4, 16, 2]), rows())

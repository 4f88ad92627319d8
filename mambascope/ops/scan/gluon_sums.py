"""How the scan's backward on Hopper-class GPUs adds dB and dC up over channels.

``dB[t, n] = Σ_d q[t, d, n] x[t, d]`` and ``dC[t, n] = Σ_d g[t, d] h[t, d, n]``, x = delta u. A warp has eight channels
and takes four steps at a time: eight sums a state. Three shuffles that transpose as they add leave one of them with
each of its channels. Warps are added through shared memory, programs through partial sums.

Tried and slower: matrix units in place of the shuffles, with a sixth fewer instructions (8 × 2048 bf16: 647 µs against
589). They want channels in the lowest bits of the lane, where shared loads take twice the wavefronts (`group_layout`).
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mambascope.ops.scan.gluon_layouts import linear

__all__ = ["fold_group", "sum_places", "sums_read"]


@gluon.jit
def _lane_xor_2(x):
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _lane_xor_8(x):
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 8, 0x1f, 0xffffffff;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _lane_xor_16(x):
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 16, 0x1f, 0xffffffff;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


# Two sums over one lane bit for one shuffle: lanes whose bit is 0 keep the first, the others the second.
@gluon.jit
def _fold_products(second, x, q, g, h):
    """Of x q and g h."""
    x = x[:, None, None]
    g = g[:, None, None]
    other = gl.where(second, x, g) * gl.where(second, q, h)
    return gl.fma(gl.where(second, g, x), gl.where(second, h, q), _lane_xor_2(other))


@gluon.jit
def _fold_8(second, x, y):
    return gl.where(second, y, x) + _lane_xor_8(gl.where(second, x, y))


@gluon.jit
def _fold_16(second, x, y):
    return gl.where(second, y, x) + _lane_xor_16(gl.where(second, x, y))


@gluon.jit
def fold_group(p, x0, x1, x2, x3, q0, q1, q2, q3, g0, g1, g2, g3, h0, h1, h2, h3):
    """Four steps' sums over a warp ``[BD, NS, NL]``: bit 0 of the channel ``p`` says dB or dC, bits 1 and 2 the upper
    and the lower bit of the step."""
    bit0 = ((p & 1) == 1)[:, None, None]
    bit1 = ((p & 2) == 2)[:, None, None]
    bit2 = ((p & 4) == 4)[:, None, None]
    f0 = _fold_products(bit0, x0, q0, g0, h0)
    f1 = _fold_products(bit0, x1, q1, g1, h1)
    f2 = _fold_products(bit0, x2, q2, g2, h2)
    f3 = _fold_products(bit0, x3, q3, g3, h3)
    return _fold_16(bit2, _fold_8(bit1, f0, f2), _fold_8(bit1, f1, f3))


@gluon.constexpr_function
def sums_read() -> Any:
    """Sums of every other group ``[2, 4 warps, 8, 4, 4]``: the warps and two neighbouring states in a thread."""
    lanes = [[4, 1], [3, 0], [3, 1], [2, 0], [2, 1]]
    return linear([2, 4, 8, 4, 4], [[4, 0], [1, 0], [1, 1]], lanes, [[2, 2], [0, 0]])


@gluon.jit
def sum_places(NS: gl.constexpr):
    """Whether it is dC, step and state of what is read in `sums_read` and summed over warps; steps are of even
    groups."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, sums_read())  # 2 8 4 4
    pair = gl.arange(0, 2, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    channel = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT))))
    one = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))))
    step = (pair * 8)[:, None, None, None] + (2 * ((channel >> 1) & 1) + ((channel >> 2) & 1))[None, :, None, None]
    state = (lane * NS)[None, None, :, None] + one[None, None, None, :]
    return (channel & 1)[None, :, None, None], step, state

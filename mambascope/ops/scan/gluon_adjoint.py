"""What a part of time hands to the parts on its left in the scan's backward on Hopper-class GPUs, in Triton's Gluon.

With q as in `gluon_backward`, what arrives from the right of a range of steps is, of what arrives there at its end,
``exp(A Σ delta)`` times as much, and what the range itself adds. Ranges can find out both side by side, and then any of
them can begin: what is carried into it is folded from those of the ranges on its right.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mambascope.ops.scan.gluon_layouts import group_layout, rows_layout, state_layout, transposed_states
from mambascope.ops.scan.gluon_math import (
    LOG2E,
    by_channel,
    by_state,
    columns,
    decay,
    load_tile,
    paired,
    places,
    sigmoid,
    softplus,
    state_places,
    tile_offsets,
    wide_tile,
)

__all__ = ["add_boundary", "adjoint_kernel", "carried"]


@gluon.jit
def _adjoint_step(cy, a, dt, g, c):
    return decay(a, dt) * gl.fma(c[None, :, :], g[:, None, None], cy)


@gluon.jit
def add_boundary(cy, dbound, row, i, interval, n_bound, tile, tile_in, D: gl.constexpr, N: gl.constexpr):
    """What arrives at the state entering tile i, if one was given out there."""
    begins = (i * 16) % interval == 0
    at = (row.to(gl.int64) * n_bound + (i * 16) // interval) * (D * N)
    return cy + gl.load(dbound + at + tile, mask=tile_in & begins, other=0.0)


@gluon.jit
def carried(cy, ends, spans, row, part, parts, a, tile, tile_in, ch, D: gl.constexpr, N: gl.constexpr):
    """What arrives from the right at a part, of the ends and sums of delta that `adjoint_kernel` found."""
    for right in range(0, part):
        at = (row * (parts - 1) + right).to(gl.int64)
        dt = gl.load(spans + at * D + ch, mask=ch < D, other=0.0)
        cy = gl.fma(decay(a, dt), cy, gl.load(ends + at * (D * N) + tile, mask=tile_in, other=0.0))
    return cy


@gluon.jit(do_not_specialize=["L", "interval", "n_bound", "parts"])
def adjoint_kernel(
    delta, A, C, z, bias, lengths, dy, dbound, dh_last, ends, spans,
    delta_b, delta_l, C_b, C_l, z_b, z_l, dy_b, dy_l,
    L, interval, n_bound, parts,
    D: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, BD: gl.constexpr, NL: gl.constexpr, KE: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_Z: gl.constexpr, HAS_LENGTHS: gl.constexpr,
    HAS_DBOUND: gl.constexpr, HAS_DLAST: gl.constexpr, EVEN: gl.constexpr, PACKED: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: channel blocks × (parts − 1) × rows, parts counted from the right; the last needs not be walked here.

    ``ends`` B (parts − 1) D N: what a part adds to what leaves it, the first with what arrives at h_last; ``spans``
    B (parts − 1) D: its Σ delta.
    """
    T: gl.constexpr = 16
    TK: gl.constexpr = 4
    NS: gl.constexpr = NP // NL
    E: gl.constexpr = BD // 2
    D_LEFT: gl.constexpr = 0 if D % BD == 0 else D
    PAIR: gl.constexpr = 2 if PACKED else 1
    COUNTED: gl.constexpr = HAS_LENGTHS or not EVEN
    N_ALL: gl.constexpr = 0 if N == NP else N
    L4: gl.constexpr = group_layout(BD, NS, NL, 4, num_warps)
    LS: gl.constexpr = state_layout(BD, NS, NL, num_warps)
    LD: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L4))  # BD 4
    LK: gl.constexpr = gl.SliceLayout(0, L4)  # NS NL 4
    L1: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LS))  # BD
    LB: gl.constexpr = gl.SliceLayout(0, LS)  # NS NL
    LE: gl.constexpr = rows_layout(BD, KE, num_warps)
    LN: gl.constexpr = rows_layout(NP, 1, num_warps)
    S2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    S3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SB: gl.constexpr = transposed_states([TK], NS, NL, 4)
    sd = gl.allocate_shared_memory(gl.float32, [TK, BD, 4], S3)
    sg = gl.allocate_shared_memory(gl.float32, [TK, BD, 4], S3)
    sc = gl.allocate_shared_memory(gl.float32, [TK, NP, 4], SB)
    dd = sd._reinterpret(gl.float32, [TK, BD, 4], S2)
    dg = sg._reinterpret(gl.float32, [TK, BD, 4], S2)
    dc = sc._reinterpret(gl.float32, [TK, NS, NL, 4], S3)

    BLOCKS: gl.constexpr = (D + BD - 1) // BD
    pid = gl.program_id(0)
    block = pid % BLOCKS
    part = (pid // BLOCKS) % (parts - 1)
    row = pid // (BLOCKS * (parts - 1))
    long_row = row.to(gl.int64)
    tiles = gl.cdiv(L, T)
    first = tiles * part // parts
    end = tiles * (part + 1) // parts
    live = L
    if HAS_LENGTHS:
        live = gl.minimum(gl.load(lengths + row).to(gl.int32), L)

    _ch, tile, tile_in = state_places(block, D, N, BD, NS, NL, LS)
    a = gl.load(A + tile, mask=tile_in, other=0.0).to(gl.float32) * LOG2E
    cy = gl.zeros([BD, NS, NL], gl.float32, LS)
    if HAS_DLAST:
        cy = gl.load(dh_last + long_row * (D * N) + tile, mask=tile_in & (part == 0), other=0.0)

    t, column = places(T, BD, LE)
    b_dt = 0.0
    if HAS_BIAS:
        b_dt = gl.load(bias + block * BD + column, mask=block * BD + column < D, other=0.0).to(gl.float32)
    delta_at, tl_, dl = tile_offsets(delta_l, T, BD, LE, PACKED)
    dy_at, tl_, dl = tile_offsets(dy_l, T, BD, LE, PACKED)
    C_at, tn, nl = tile_offsets(C_l, T, NP, LN, PACKED)
    dl += block * BD
    one_tile = (block * 0 + T // PAIR).to(gl.int64)  # a stride may be a plain 1
    start = (tiles - 1 - first).to(gl.int64)
    delta_step = one_tile * delta_l
    dy_step = one_tile * dy_l
    C_step = one_tile * C_l
    delta = paired(delta + long_row * delta_b + block * BD, PACKED) + start * delta_step
    dy = paired(dy + long_row * dy_b + block * BD, PACKED) + start * dy_step
    C = paired(C + long_row * C_b, PACKED) + start * C_step
    if HAS_Z:
        z_at, tl_, dl = tile_offsets(z_l, T, BD, LE, PACKED)
        dl += block * BD
        z_step = one_tile * z_l
        z = paired(z + long_row * z_b + block * BD, PACKED) + start * z_step
    left = gl.where(first > 0, L, L - (tiles - 1) * T)
    raw_next = load_tile(delta, delta_at, tl_, dl, left, D_LEFT, EVEN)
    g_next = load_tile(dy, dy_at, tl_, dl, left, D_LEFT, EVEN)
    c_next = load_tile(C, C_at, tn, nl, left, N_ALL, EVEN)
    if HAS_Z:
        z_next = load_tile(z, z_at, tl_, dl, left, D_LEFT, EVEN)
    total = gl.zeros([TK, 4, E, 2], gl.float32, LE)
    for back in range(first, end):
        i = tiles - 1 - back
        raw = wide_tile(raw_next, LE, PACKED)
        if SOFTPLUS:
            raw = softplus(raw + b_dt)
        g = wide_tile(g_next, LE, PACKED)
        if HAS_Z:
            gate = wide_tile(z_next, LE, PACKED)
            g = g * (gate * sigmoid(gate))
        if COUNTED:
            raw = gl.where((t < live - i * T) & (column >= 0), raw, 0.0)
        total += raw
        sd.store(by_channel(raw, T, BD))
        sg.store(by_channel(g, T, BD))
        sc.store(by_state(wide_tile(c_next, LN, PACKED), T, NP))
        # There always is a tile to the left: the last part is not walked here.
        delta -= delta_step
        dy -= dy_step
        C -= C_step
        raw_next = load_tile(delta, delta_at, tl_, dl, L, D_LEFT, EVEN)
        g_next = load_tile(dy, dy_at, tl_, dl, L, D_LEFT, EVEN)
        c_next = load_tile(C, C_at, tn, nl, L, N_ALL, EVEN)
        if HAS_Z:
            z -= z_step
            z_next = load_tile(z, z_at, tl_, dl, L, D_LEFT, EVEN)
        for kk in gl.static_range(TK):
            k = TK - 1 - kk
            d0, d1, d2, d3 = columns(dd.index(k).load(LD), [BD], L1)
            g0, g1, g2, g3 = columns(dg.index(k).load(LD), [BD], L1)
            c0, c1, c2, c3 = columns(dc.index(k).load(LK), [NS, NL], LB)
            cy = _adjoint_step(cy, a, d3, g3, c3)
            cy = _adjoint_step(cy, a, d2, g2, c2)
            cy = _adjoint_step(cy, a, d1, g1, c1)
            cy = _adjoint_step(cy, a, d0, g0, c0)
        if HAS_DBOUND:
            cy = add_boundary(cy, dbound, row, i, interval, n_bound, tile, tile_in, D, N)
    at = long_row * (parts - 1) + part
    gl.store(ends + at * (D * N) + tile, cy, mask=tile_in)
    pair = gl.arange(0, E, gl.SliceLayout(1, gl.SliceLayout(0, gl.SliceLayout(0, LE))))
    one = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, LE))))
    own = block * BD + (pair * 2)[:, None] + one[None, :]
    gl.store(spans + at * D + own, gl.sum(gl.sum(total, axis=0), axis=0), mask=own < D)

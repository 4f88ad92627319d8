"""The selective scan's backward on Hopper-class GPUs, in Triton's Gluon: one kernel, time walked in reverse.

With ``q[t]`` the loss's derivative by ``h[t]``, ``g[t]`` by ``y[t]`` and ``e[t] = exp(delta[t] A)``::

    q[t] = C[t] g[t] + e[t+1] q[t+1]                (+ what arrives at h_last or at a boundary state)
    du = delta Σ_n q B + D g                        ddelta = u Σ_n q B + Σ_n A e q h[t-1]
    dB = Σ_d q delta u     dC = Σ_d g h             dA = Σ_t delta e q h[t-1]

A program owns BD channels of one row and walks tiles of 16 steps, whose entering states the forward has saved. In a
tile the state entering every group of four steps is replayed in registers, then each group, from the last, is replayed
and walked in reverse. dB and dC are summed over a warp's channels by shuffles that transpose as they add, over warps
through shared memory, and over programs as partial sums in a fixed order: two runs give the same bits.

A short batch gives too few programs. Then time is cut in parts that run side by side, counted from the right. A launch
before this one (`gluon_adjoint`) has walked the adjoint alone over each, for about a quarter of a full step's cost; a
program folds what the parts to its right have handed on, and begins.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mambascope.ops.scan.gluon_adjoint import add_boundary, carried
from mambascope.ops.scan.gluon_forward import advance
from mambascope.ops.scan.gluon_layouts import (
    group_layout,
    partial_layout,
    rows_layout,
    state_layout,
    sums_layout,
    transposed_states,
)
from mambascope.ops.scan.gluon_math import (
    LOG2E,
    by_channel,
    by_state,
    columns,
    decay,
    group_of,
    load_tile,
    paired,
    places,
    sigmoid,
    sigmoids,
    softplus,
    tile_offsets,
    wide_tile,
)

__all__ = ["backward_kernel"]


@gluon.constexpr_function
def _added_layout(W: int, PL: int, NL: int, warps: int) -> Any:
    """``[4, W, PL, NL, 4]``: the last axis and W in registers, NL then PL over lanes, groups over warps."""

    def unit(axis: int, x: int) -> list[int]:
        return [x if i == axis else 0 for i in range(5)]

    def bits(axis: int, size: int) -> list[list[int]]:
        return [unit(axis, 1 << bit) for bit in range(size.bit_length() - 1)]

    groups = bits(0, 4)
    across = warps.bit_length() - 1
    registers = bits(4, 4) + bits(1, W) + groups[across:]
    spread = groups[:across] + [[0] * 5] * (across - 2)
    return gl.DistributedLinearLayout(registers, bits(3, NL) + bits(2, PL), spread, [], [4, W, PL, NL, 4])


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
def _fold_2(second, x, y):
    return gl.where(second, y, x) + _lane_xor_2(gl.where(second, x, y))


@gluon.jit
def _fold_8(second, x, y):
    return gl.where(second, y, x) + _lane_xor_8(gl.where(second, x, y))


@gluon.jit
def _fold_16(second, x, y):
    return gl.where(second, y, x) + _lane_xor_16(gl.where(second, x, y))


@gluon.jit
def _forward_step(h, a, dt, x, b):
    e = decay(a, dt)
    return e, gl.fma(e, h, x[:, None, None] * b[None, :, :])


@gluon.jit
def _reverse_step(cy, dA, e, h_before, h, rate, dt, x, g, b, c):
    """One step of the adjoint: what goes on to the left, and this step's contributions."""
    q = gl.fma(c[None, :, :], g[:, None, None], cy)
    y = gl.sum(h * c[None, :, :], axis=1)
    through = gl.sum(q * b[None, :, :], axis=1)
    dC = g[:, None, None] * h
    dB = x[:, None, None] * q
    cy = e * q
    r = cy * h_before
    by_rate = gl.sum(r * rate, axis=1)
    dA = gl.fma(r, dt[:, None, None], dA)
    return cy, dA, y, through, by_rate, dB, dC


@gluon.jit(do_not_specialize=["L", "interval", "n_bound", "parts"])
def backward_kernel(
    u, delta, A, B, C, skip, z, bias, lengths, states, dy, dbound, dh_last, ends, spans,
    du, ddelta, dz, partial, dA_part, dskip_part, dbias_part, dh0,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, dy_b, dy_l,
    L, interval, n_bound, parts,
    D: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, BD: gl.constexpr, NL: gl.constexpr, KE: gl.constexpr,
    FOLD: gl.constexpr, DZ: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, HAS_DBOUND: gl.constexpr, HAS_DLAST: gl.constexpr, HAS_H0: gl.constexpr,
    EVEN: gl.constexpr, PACKED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """All gradients. Grid: channel blocks × parts × rows. ``states`` B ceil(L/16) D N; ``ends`` and ``spans`` as
    `adjoint_kernel` leaves them, with FOLD, which says that there are several parts.

    DZ: entries from a step of dz to the next. EVEN: L is a multiple of 16. PACKED: u, delta, B, C, z, dy are bfloat16,
    read two at a time.

    ``partial`` is 2 (dB, dC) × blocks × B × L × N; the other partial sums have B × parts terms.
    """
    T: gl.constexpr = 16
    TK: gl.constexpr = 4
    NS: gl.constexpr = NP // NL
    E: gl.constexpr = BD // 2
    PL: gl.constexpr = 32 // NL  # channels of a warp
    W: gl.constexpr = BD // PL  # warps
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
    LY: gl.constexpr = sums_layout(BD, NL, KE, num_warps)
    S2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    S3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    S4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    S5: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    SB: gl.constexpr = transposed_states([TK], NS, NL, 4)
    SP: gl.constexpr = partial_layout([TK], NL, BD, False)
    SPK: gl.constexpr = partial_layout([], NL, BD, False)
    SPE: gl.constexpr = partial_layout([TK], NL, BD, True)

    sd = gl.allocate_shared_memory(gl.float32, [TK, BD, 4], S3)
    sx = gl.allocate_shared_memory(gl.float32, [TK, BD, 4], S3)
    sg = gl.allocate_shared_memory(gl.float32, [TK, BD, 4], S3)
    sb = gl.allocate_shared_memory(gl.float32, [TK, NP, 4], SB)
    sc = gl.allocate_shared_memory(gl.float32, [TK, NP, 4], SB)
    sv = gl.allocate_shared_memory(gl.float32, [TK, NL, BD, 4], SP)
    sw = gl.allocate_shared_memory(gl.float32, [TK, NL, BD, 4], SP)
    sr = gl.allocate_shared_memory(gl.float32, [TK, BD, NL, 4], S4)
    dd = sd._reinterpret(gl.float32, [TK, BD, 4], S2)
    dx = sx._reinterpret(gl.float32, [TK, BD, 4], S2)
    dg = sg._reinterpret(gl.float32, [TK, BD, 4], S2)
    db = sb._reinterpret(gl.float32, [TK, NS, NL, 4], S3)
    dc = sc._reinterpret(gl.float32, [TK, NS, NL, 4], S3)
    v_in = sv._reinterpret(gl.float32, [TK, NL, BD, 4], SPK)
    v_out = sv._reinterpret(gl.float32, [1, TK, NL, 2, E, 4], SPE)
    w_in = sw._reinterpret(gl.float32, [TK, NL, BD, 4], SPK)
    w_out = sw._reinterpret(gl.float32, [1, TK, NL, 2, E, 4], SPE)
    r_in = sr._reinterpret(gl.float32, [TK, BD, NL, 4], S3)
    r_out = sr._reinterpret(gl.float32, [1, TK, W, PL, NL, 4], S5)
    if HAS_Z:
        sy = gl.allocate_shared_memory(gl.float32, [TK, NL, BD, 4], SP)
        y_in = sy._reinterpret(gl.float32, [TK, NL, BD, 4], SPK)
        y_out = sy._reinterpret(gl.float32, [1, TK, NL, 2, E, 4], SPE)

    BLOCKS: gl.constexpr = (D + BD - 1) // BD
    pid = gl.program_id(0)
    block = pid % BLOCKS
    part = pid * 0
    if FOLD:
        part = (pid // BLOCKS) % parts
    row = pid // (BLOCKS * parts)
    rows = gl.num_programs(0) // (BLOCKS * parts)
    long_row = row.to(gl.int64)
    tiles = gl.cdiv(L, T)
    first = part
    end = tiles
    if FOLD:
        first = tiles * part // parts
        end = tiles * (part + 1) // parts
    live = L
    if HAS_LENGTHS:
        live = gl.minimum(gl.load(lengths + row).to(gl.int32), L)

    p = gl.arange(0, BD, L1)
    ch = block * BD + (p % E) * 2 + p // E
    s = gl.arange(0, NS, gl.SliceLayout(1, LB))
    lane = gl.arange(0, NL, gl.SliceLayout(0, LB))
    n = (lane * NS)[None, :] + s[:, None]
    tile = (ch * N)[:, None, None] + n[None, :, :]
    tile_in = (ch < D)[:, None, None] & (n < N)[None, :, :]
    rate = gl.load(A + tile, mask=tile_in, other=0.0).to(gl.float32)
    a = rate * LOG2E
    cy = gl.zeros([BD, NS, NL], gl.float32, LS)
    if FOLD:
        cy = carried(cy, ends, spans, row, part, parts, a, tile, tile_in, ch, D, N)
    if HAS_DLAST:
        cy += gl.load(dh_last + long_row * (D * N) + tile, mask=tile_in & (part == 0), other=0.0)

    t, column = places(T, BD, LE)
    d = block * BD + column
    b_dt = 0.0
    if HAS_BIAS:
        b_dt = gl.load(bias + d, mask=d < D, other=0.0).to(gl.float32)
    w_skip = 0.0
    if HAS_D:
        w_skip = gl.load(skip + d, mask=d < D, other=0.0).to(gl.float32)
    u_at, tl_, dl = tile_offsets(u_l, T, BD, LE, PACKED)
    delta_at, tl_, dl = tile_offsets(delta_l, T, BD, LE, PACKED)
    dy_at, tl_, dl = tile_offsets(dy_l, T, BD, LE, PACKED)
    B_at, tn, nl = tile_offsets(B_l, T, NP, LN, PACKED)
    C_at, tn, nl = tile_offsets(C_l, T, NP, LN, PACKED)
    dl += block * BD
    one_tile = (block * 0 + T // PAIR).to(gl.int64)  # a stride may be a plain 1
    # Pointers stand at a tile, and go back a tile at a time, not past the first.
    start = (tiles - 1 - first).to(gl.int64)
    u_step = one_tile * u_l
    delta_step = one_tile * delta_l
    dy_step = one_tile * dy_l
    B_step = one_tile * B_l
    C_step = one_tile * C_l
    u = paired(u + long_row * u_b + block * BD, PACKED) + start * u_step
    delta = paired(delta + long_row * delta_b + block * BD, PACKED) + start * delta_step
    dy = paired(dy + long_row * dy_b + block * BD, PACKED) + start * dy_step
    B = paired(B + long_row * B_b, PACKED) + start * B_step
    C = paired(C + long_row * C_b, PACKED) + start * C_step
    if HAS_Z:
        z_at, tl_, dl = tile_offsets(z_l, T, BD, LE, PACKED)
        dl += block * BD
        z_step = one_tile * z_l
        z = paired(z + long_row * z_b + block * BD, PACKED) + start * z_step
    left = gl.where(first > 0, L, L - (tiles - 1) * T)

    du += long_row * L * D
    ddelta += long_row * L * D
    if HAS_Z:
        dz += long_row * L * DZ
    states += long_row * tiles * (D * N)
    RL: gl.constexpr = _added_layout(W, PL, NL, num_warps)
    RO: gl.constexpr = gl.SliceLayout(1, RL)  # TK PL NL 4
    og = gl.arange(0, TK, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, RO))))
    op = gl.arange(0, PL, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, RO))))
    ol = gl.arange(0, NL, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, RO))))
    oj = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, RO))))
    # What a lane holds after the folds: its channel's lowest bit says dB or dC, the next ones which of four steps.
    half = (op & 1)[None, :, None, None].to(gl.int64) * BLOCKS * rows * L * N
    ot = (
        (og * 4)[:, None, None, None]
        + (2 * ((op >> 1) & 1) + ((op >> 2) & 1))[None, :, None, None]
        + (oj * 0)[None, None, None, :]
    )
    on = (ol * NS)[None, None, :, None] + oj[None, None, None, :]
    to = partial + ((block.to(gl.int64) * rows + row) * L * N + half) + (ot * N + on)
    bit0 = ((p & 1) == 1)[:, None, None]
    bit1 = ((p & 2) == 2)[:, None, None]
    bit2 = ((p & 4) == 4)[:, None, None]
    dA = gl.zeros([BD, NS, NL], gl.float32, LS)
    dskip = gl.zeros([TK, 4, E, 2], gl.float32, LE)
    dbias = gl.zeros([TK, 4, E, 2], gl.float32, LE)

    u_next = load_tile(u, u_at, tl_, dl, left, D_LEFT, EVEN)
    raw_next = load_tile(delta, delta_at, tl_, dl, left, D_LEFT, EVEN)
    g_next = load_tile(dy, dy_at, tl_, dl, left, D_LEFT, EVEN)
    b_next = load_tile(B, B_at, tn, nl, left, N_ALL, EVEN)
    c_next = load_tile(C, C_at, tn, nl, left, N_ALL, EVEN)
    if HAS_Z:
        z_next = load_tile(z, z_at, tl_, dl, left, D_LEFT, EVEN)
    h_next = gl.load(states + (tiles - 1 - first).to(gl.int64) * (D * N) + tile, mask=tile_in, other=0.0)
    for back in range(first, end):
        i = tiles - 1 - back
        raw = wide_tile(raw_next, LE, PACKED) + b_dt
        dt = raw
        if SOFTPLUS:
            dt = softplus(raw)
        counted = (t < live - i * T) & (column >= 0)
        if COUNTED:
            dt = gl.where(counted, dt, 0.0)
        u_now = wide_tile(u_next, LE, PACKED)
        dout = wide_tile(g_next, LE, PACKED)
        g = dout
        if HAS_Z:
            gate = wide_tile(z_next, LE, PACKED)
            g = dout * (gate * sigmoid(gate))
        sd.store(by_channel(dt, T, BD))
        sx.store(by_channel(dt * u_now, T, BD))
        sg.store(by_channel(g, T, BD))
        sb.store(by_state(wide_tile(b_next, LN, PACKED), T, NP))
        sc.store(by_state(wide_tile(c_next, LN, PACKED), T, NP))
        h = h_next
        before = gl.maximum(i - 1, 0)
        more = i > 0
        u -= gl.where(more, u_step, 0)
        delta -= gl.where(more, delta_step, 0)
        dy -= gl.where(more, dy_step, 0)
        B -= gl.where(more, B_step, 0)
        C -= gl.where(more, C_step, 0)
        u_next = load_tile(u, u_at, tl_, dl, L, D_LEFT, EVEN)
        raw_next = load_tile(delta, delta_at, tl_, dl, L, D_LEFT, EVEN)
        g_next = load_tile(dy, dy_at, tl_, dl, L, D_LEFT, EVEN)
        b_next = load_tile(B, B_at, tn, nl, L, N_ALL, EVEN)
        c_next = load_tile(C, C_at, tn, nl, L, N_ALL, EVEN)
        if HAS_Z:
            z -= gl.where(more, z_step, 0)
            z_next = load_tile(z, z_at, tl_, dl, L, D_LEFT, EVEN)
        h_next = gl.load(states + before.to(gl.int64) * (D * N) + tile, mask=tile_in, other=0.0)

        heads = (h,)  # states entering the groups
        for k in gl.static_range(TK - 1):
            d0, d1, d2, d3 = columns(dd.index(k).load(LD), [BD], L1)
            x0, x1, x2, x3 = columns(dx.index(k).load(LD), [BD], L1)
            b0, b1, b2, b3 = columns(db.index(k).load(LK), [NS, NL], LB)
            h = advance(h, a, d0, x0, b0)
            h = advance(h, a, d1, x1, b1)
            h = advance(h, a, d2, x2, b2)
            h = advance(h, a, d3, x3, b3)
            heads = heads + (h,)
        tile_dA = gl.zeros([BD, NS, NL], gl.float32, LS)  # summed in two levels: a long sum would lose bits
        for kk in gl.static_range(TK):
            k = TK - 1 - kk
            d0, d1, d2, d3 = columns(dd.index(k).load(LD), [BD], L1)
            x0, x1, x2, x3 = columns(dx.index(k).load(LD), [BD], L1)
            g0, g1, g2, g3 = columns(dg.index(k).load(LD), [BD], L1)
            b0, b1, b2, b3 = columns(db.index(k).load(LK), [NS, NL], LB)
            c0, c1, c2, c3 = columns(dc.index(k).load(LK), [NS, NL], LB)
            head = heads[TK - 1 - kk]
            e0, h0 = _forward_step(head, a, d0, x0, b0)
            e1, h1 = _forward_step(h0, a, d1, x1, b1)
            e2, h2 = _forward_step(h1, a, d2, x2, b2)
            e3, h3 = _forward_step(h2, a, d3, x3, b3)
            cy, tile_dA, y3, v3, w3, B3, C3 = _reverse_step(cy, tile_dA, e3, h2, h3, rate, d3, x3, g3, b3, c3)
            cy, tile_dA, y2, v2, w2, B2, C2 = _reverse_step(cy, tile_dA, e2, h1, h2, rate, d2, x2, g2, b2, c2)
            cy, tile_dA, y1, v1, w1, B1, C1 = _reverse_step(cy, tile_dA, e1, h0, h1, rate, d1, x1, g1, b1, c1)
            cy, tile_dA, y0, v0, w0, B0, C0 = _reverse_step(cy, tile_dA, e0, head, h0, rate, d0, x0, g0, b0, c0)
            if HAS_Z:
                y_in.index(k).store(gl.permute(group_of(y0, y1, y2, y3, [BD, NL]), (1, 0, 2)))
            v_in.index(k).store(gl.permute(group_of(v0, v1, v2, v3, [BD, NL]), (1, 0, 2)))
            w_in.index(k).store(gl.permute(group_of(w0, w1, w2, w3, [BD, NL]), (1, 0, 2)))
            f0 = _fold_2(bit0, B0, C0)
            f1 = _fold_2(bit0, B1, C1)
            f2 = _fold_2(bit0, B2, C2)
            f3 = _fold_2(bit0, B3, C3)
            f = _fold_16(bit2, _fold_8(bit1, f0, f2), _fold_8(bit1, f1, f3))  # BD NS NL
            r_in.index(k).store(gl.permute(f, (0, 2, 1)))
        dA += tile_dA
        if HAS_DBOUND:
            cy = add_boundary(cy, dbound, row, i, interval, n_bound, tile, tile_in, D, N)

        sums = gl.sum(r_out.index(0).load(RL), axis=1)
        gl.store(to + i.to(gl.int64) * (T * N), sums, mask=(ot < L - i * T) & (on < N))
        through = gl.convert_layout(gl.permute(gl.sum(v_out.index(0).load(LY), axis=1), (0, 3, 2, 1)), LE)
        by_rate = gl.convert_layout(gl.permute(gl.sum(w_out.index(0).load(LY), axis=1), (0, 3, 2, 1)), LE)
        d_u = through * dt
        d_dt = gl.fma(through, u_now, by_rate)
        if SOFTPLUS:
            d_dt = d_dt * sigmoid(raw)
        if COUNTED:
            d_dt = gl.where(counted, d_dt, 0.0)
        inside = (t < L - i * T) & (d < D)
        out_at = (i * T).to(gl.int64) * D
        if HAS_Z:
            y = gl.convert_layout(gl.permute(gl.sum(y_out.index(0).load(LY), axis=1), (0, 3, 2, 1)), LE)
            if HAS_D:
                y = gl.fma(w_skip, u_now, y)
            share, rest = sigmoids(gate)
            d_gate = dout * y * share * gl.fma(gate, rest, 1.0)
            gl.store(dz + (i * T).to(gl.int64) * DZ + (t * DZ + d), d_gate.to(dz.dtype.element_ty), mask=inside)
        if HAS_D:
            d_u = gl.fma(w_skip, g, d_u)
            dskip = gl.fma(g, u_now, dskip)
        if HAS_BIAS:
            dbias += d_dt
        gl.store(du + out_at + (t * D + d), d_u.to(du.dtype.element_ty), mask=inside)
        gl.store(ddelta + out_at + (t * D + d), d_dt.to(ddelta.dtype.element_ty), mask=inside)

    own_part = long_row * parts + part
    gl.store(dA_part + own_part * (D * N) + tile, dA, mask=tile_in)
    pair = gl.arange(0, E, gl.SliceLayout(1, gl.SliceLayout(0, gl.SliceLayout(0, LE))))
    one = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, LE))))
    own = block * BD + (pair * 2)[:, None] + one[None, :]
    if HAS_D:
        gl.store(dskip_part + own_part * D + own, gl.sum(gl.sum(dskip, axis=0), axis=0), mask=own < D)
    if HAS_BIAS:
        gl.store(dbias_part + own_part * D + own, gl.sum(gl.sum(dbias, axis=0), axis=0), mask=own < D)
    if HAS_H0:
        gl.store(dh0 + long_row * (D * N) + tile, cy, mask=tile_in & (part == parts - 1))

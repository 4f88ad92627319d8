"""The selective scan's backward on Hopper-class GPUs, in Triton's Gluon: one kernel, time walked in reverse.

With ``q[t]`` the loss's derivative by ``h[t]``, ``g[t]`` by ``y[t]`` and ``e[t] = exp(delta[t] A)``::

    q[t] = C[t] g[t] + e[t+1] q[t+1]                (+ what arrives at h_last or at a boundary state)
    du = delta Σ_n q B + D g                        ddelta = u Σ_n q B + Σ_n A e q h[t-1]
    dB = Σ_d q delta u     dC = Σ_d g h             dA = Σ_t delta e q h[t-1]

A program owns 32 channels of one row and walks tiles of 16 steps, whose entering states the forward has saved. In a
tile the state entering every group of four steps is replayed in registers, then each group, from the last, is replayed
and walked in reverse. The next tile is copied into shared memory meanwhile (`gluon_tiles`). dB and dC are summed over a
warp's channels by shuffles (`gluon_sums`), over warps through shared memory, and over programs as partial sums in a
fixed order: two runs give the same bits.

A short batch gives too few programs. Then time is cut in parts that run side by side, counted from the right. A launch
before this one (`gluon_adjoint`) has walked the adjoint alone over each, for about a quarter of a full step's cost; a
program folds what the parts to its right have handed on, and begins.

Tried and slower: warps of their own for what is needed once per (step, channel), a tile ahead and a tile behind, as in
the forward (8 × 2048 bf16: 707 µs against 589). The scan's are left with 120 registers, and more goes through shared
memory.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mambascope.ops.scan.gluon_adjoint import add_boundary, carried
from mambascope.ops.scan.gluon_forward import advance
from mambascope.ops.scan.gluon_layouts import (
    group_layout,
    own_layout,
    partial_layout,
    rows_layout,
    state_layout,
    transposed_states,
)
from mambascope.ops.scan.gluon_math import (
    LN2,
    LOG2E,
    by_channel,
    by_state,
    columns,
    decay,
    group_of,
    places,
    sigmoid,
    sigmoids,
    softplus,
    state_places,
)
from mambascope.ops.scan.gluon_sums import fold_group, sum_places, sums_read
from mambascope.ops.scan.gluon_tiles import copy_tile, raw_rows, raw_states, rows, source, staged, sums_of

__all__ = ["backward_kernel"]


@gluon.jit
def _forward_step(h, a, dt, x, b):
    e = decay(a, dt)
    return e, gl.fma(e, h, x[:, None, None] * b[None, :, :])


@gluon.jit
def _reverse_step(cy, dA, e, h_before, h, a, dt, g, b, c):
    """One step of the adjoint: q, what goes on to the left, and this step's contributions."""
    q = gl.fma(c[None, :, :], g[:, None, None], cy)
    y = gl.sum(h * c[None, :, :], axis=1)
    through = gl.sum(q * b[None, :, :], axis=1)
    cy = e * q
    r = cy * h_before
    by_rate = gl.sum(r * a, axis=1)
    dA = gl.fma(r, dt[:, None, None], dA)
    return q, cy, dA, y, through, by_rate


@gluon.jit
def _even_and_odd(SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory for groups 0 and 2 and for groups 1 and 3."""
    even = gl.allocate_shared_memory(gl.float32, SHAPE, LAYOUT)
    return even, gl.allocate_shared_memory(gl.float32, SHAPE, LAYOUT)


@gluon.jit
def _views(shared, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    return shared[0]._reinterpret(gl.float32, SHAPE, LAYOUT), shared[1]._reinterpret(gl.float32, SHAPE, LAYOUT)


@gluon.jit(do_not_specialize=["L", "interval", "n_bound", "parts"])
def backward_kernel(
    u, delta, A, B, C, skip, z, bias, lengths, states, dy, dbound, dh_last, ends, spans,
    du, ddelta, dz, partial, dA_part, dskip_part, dbias_part, dh0,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, dy_b, dy_l,
    L, interval, n_bound, parts,
    D: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, BD: gl.constexpr, NL: gl.constexpr, FOLD: gl.constexpr,
    DZ: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, HAS_DBOUND: gl.constexpr, HAS_DLAST: gl.constexpr, HAS_H0: gl.constexpr,
    EVEN: gl.constexpr, PAIRED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """All gradients. Grid: channel blocks × parts × rows. ``states`` B ceil(L/16) D N; ``ends`` and ``spans`` as
    `adjoint_kernel` leaves them, with FOLD, which says that there are several parts.

    DZ: entries from a step of dz to the next. EVEN: L is a multiple of 16. PAIRED: what has 16 bits is copied two
    entries at a time.

    ``partial`` is 2 (dB, dC) × blocks × B × L × N; the other partial sums have B × parts terms.
    """
    T: gl.constexpr = 16
    TK: gl.constexpr = 4
    NS: gl.constexpr = NP // NL
    E: gl.constexpr = BD // 2
    gl.static_assert(BD == 32 and NL == 4 and NP == 16 and num_warps == 4, "the layouts are made for these")
    D_LEFT: gl.constexpr = 0 if D % BD == 0 else D
    COUNTED: gl.constexpr = HAS_LENGTHS or not EVEN
    N_ALL: gl.constexpr = 0 if N == NP else N
    L4: gl.constexpr = group_layout(BD, NS, NL, 4, num_warps)
    LS: gl.constexpr = state_layout(BD, NS, NL, num_warps)
    LD: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L4))  # BD 4
    LK: gl.constexpr = gl.SliceLayout(0, L4)  # NS NL 4
    L1: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LS))  # BD
    LB: gl.constexpr = gl.SliceLayout(0, LS)  # NS NL
    LE: gl.constexpr = rows()
    LN: gl.constexpr = rows_layout(NP, 1, num_warps)
    S2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    S3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    S4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    S5: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    SB: gl.constexpr = transposed_states([TK], NS, NL, 4)
    SP: gl.constexpr = partial_layout([2], NL, BD, False)
    SPK: gl.constexpr = partial_layout([], NL, BD, False)
    SPE: gl.constexpr = partial_layout([2], NL, BD, True)

    # What the scan reads.
    sd = gl.allocate_shared_memory(gl.float32, [TK, BD, 4], S3)
    sx = gl.allocate_shared_memory(gl.float32, [TK, BD, 4], S3)
    sg = gl.allocate_shared_memory(gl.float32, [TK, BD, 4], S3)
    sb = gl.allocate_shared_memory(gl.float32, [TK, NP, 4], SB)
    sc = gl.allocate_shared_memory(gl.float32, [TK, NP, 4], SB)
    dd = sd._reinterpret(gl.float32, [TK, BD, 4], S2)
    dx = sx._reinterpret(gl.float32, [TK, BD, 4], S2)
    dg = sg._reinterpret(gl.float32, [TK, BD, 4], S2)
    db = sb._reinterpret(gl.float32, [TK, NS, NL, 4], S3)
    dc = sc._reinterpret(gl.float32, [TK, NS, NL, 4], S3)
    # What it leaves: by lanes of a channel Σ q B, Σ A e q h and Σ C h, by warps dB and dC.
    sv = _even_and_odd([2, NL, BD, 4], SP)
    sw = _even_and_odd([2, NL, BD, 4], SP)
    sr = _even_and_odd([2, BD, NL, 4], S4)
    v_in = _views(sv, [2, NL, BD, 4], SPK)
    w_in = _views(sw, [2, NL, BD, 4], SPK)
    r_in = _views(sr, [2, BD, NL, 4], S3)
    v_out = _views(sv, [1, 2, NL, 2, E, 4], SPE)
    w_out = _views(sw, [1, 2, NL, 2, E, 4], SPE)
    r_out = _views(sr, [1, 2, num_warps, 32 // NL, NL, 4], S5)
    if HAS_Z:
        sy = _even_and_odd([2, NL, BD, 4], SP)
        y_in = _views(sy, [2, NL, BD, 4], SPK)
        y_out = _views(sy, [1, 2, NL, 2, E, 4], SPE)
    # The next tile as it comes.
    u_raw = gl.allocate_shared_memory(u.dtype.element_ty, [TK, 4, E, 2], raw_rows())
    delta_raw = gl.allocate_shared_memory(delta.dtype.element_ty, [TK, 4, E, 2], raw_rows())
    dy_raw = gl.allocate_shared_memory(dy.dtype.element_ty, [TK, 4, E, 2], raw_rows())
    B_raw = gl.allocate_shared_memory(B.dtype.element_ty, [TK, 4, NP // 2, 2], raw_states())
    C_raw = gl.allocate_shared_memory(C.dtype.element_ty, [TK, 4, NP // 2, 2], raw_states())
    h_raw = gl.allocate_shared_memory(gl.float32, [BD, NS, NL], own_layout(LS, 2))

    BLOCKS: gl.constexpr = (D + BD - 1) // BD
    pid = gl.program_id(0)
    block = pid % BLOCKS
    part = pid * 0
    if FOLD:
        part = (pid // BLOCKS) % parts
    row = pid // (BLOCKS * parts)
    batch = gl.num_programs(0) // (BLOCKS * parts)
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

    ch, tile, tile_in = state_places(block, D, N, BD, NS, NL, LS)
    a = gl.load(A + tile, mask=tile_in, other=0.0).to(gl.float32) * LOG2E
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
    one = (block * 0 + 1).to(gl.int64)
    begin = block * BD
    u_from = source(u + long_row * u_b + begin, u_l, one, BD, LE, PAIRED)
    delta_from = source(delta + long_row * delta_b + begin, delta_l, one, BD, LE, PAIRED)
    dy_from = source(dy + long_row * dy_b + begin, dy_l, one, BD, LE, PAIRED)
    B_from = source(B + long_row * B_b, B_l, one, NP, LN, PAIRED)
    C_from = source(C + long_row * C_b, C_l, one, NP, LN, PAIRED)
    if HAS_Z:
        z_raw = gl.allocate_shared_memory(z.dtype.element_ty, [TK, 4, E, 2], raw_rows())
        z_from = source(z + long_row * z_b + begin, z_l, one, BD, LE, PAIRED)
    du += long_row * L * D
    ddelta += long_row * L * D
    if HAS_Z:
        dz += long_row * L * DZ
    states += long_row * tiles * (D * N)
    of_C, ot, on = sum_places(NS)
    to = partial + ((of_C.to(gl.int64) * BLOCKS + block) * batch + row) * L * N + (ot * N + on)
    p = gl.arange(0, BD, L1)
    dA = gl.zeros([BD, NS, NL], gl.float32, LS)
    dskip = gl.zeros([TK, 4, E, 2], gl.float32, LE)
    dbias = gl.zeros([TK, 4, E, 2], gl.float32, LE)

    next_tile = tiles - 1 - first
    copy_tile(u_raw, u_from, next_tile, L, begin, D_LEFT, EVEN, PAIRED)
    copy_tile(delta_raw, delta_from, next_tile, L, begin, D_LEFT, EVEN, PAIRED)
    copy_tile(dy_raw, dy_from, next_tile, L, begin, D_LEFT, EVEN, PAIRED)
    copy_tile(B_raw, B_from, next_tile, L, 0, N_ALL, EVEN, PAIRED)
    copy_tile(C_raw, C_from, next_tile, L, 0, N_ALL, EVEN, PAIRED)
    if HAS_Z:
        copy_tile(z_raw, z_from, next_tile, L, begin, D_LEFT, EVEN, PAIRED)
    entering = states + next_tile.to(gl.int64) * (D * N) + tile
    async_copy.async_copy_global_to_shared(h_raw, entering, mask=tile_in)
    async_copy.commit_group()
    async_copy.wait_group(0)
    for back in range(first, end):
        i = tiles - 1 - back
        raw = delta_raw.load(LE).to(gl.float32) + b_dt
        dt = raw
        if SOFTPLUS:
            dt = softplus(raw)
            slope = sigmoid(raw)
        counted = (t < live - i * T) & (column >= 0)
        if COUNTED:
            dt = gl.where(counted, dt, 0.0)
        u_now = u_raw.load(LE).to(gl.float32)
        g = dy_raw.load(LE).to(gl.float32)
        if HAS_Z:
            gate = z_raw.load(LE).to(gl.float32)
            share, rest = sigmoids(gate)
            to_gate = g * share * gl.fma(gate, rest, 1.0)
            g = g * (gate * share)
        if HAS_D:
            dskip = gl.fma(g, u_now, dskip)
        sd.store(by_channel(dt, T, BD))
        sx.store(by_channel(dt * u_now, T, BD))
        sg.store(by_channel(g, T, BD))
        sb.store(by_state(B_raw.load(LN).to(gl.float32), T, NP))
        sc.store(by_state(C_raw.load(LN).to(gl.float32), T, NP))
        h = h_raw.load(LS)

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
        next_tile = gl.maximum(i - 1, 0)
        copy_tile(u_raw, u_from, next_tile, L, begin, D_LEFT, EVEN, PAIRED)
        copy_tile(delta_raw, delta_from, next_tile, L, begin, D_LEFT, EVEN, PAIRED)
        copy_tile(dy_raw, dy_from, next_tile, L, begin, D_LEFT, EVEN, PAIRED)
        copy_tile(B_raw, B_from, next_tile, L, 0, N_ALL, EVEN, PAIRED)
        copy_tile(C_raw, C_from, next_tile, L, 0, N_ALL, EVEN, PAIRED)
        if HAS_Z:
            copy_tile(z_raw, z_from, next_tile, L, begin, D_LEFT, EVEN, PAIRED)
        entering = states + next_tile.to(gl.int64) * (D * N) + tile
        async_copy.async_copy_global_to_shared(h_raw, entering, mask=tile_in)
        async_copy.commit_group()
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
            q3, cy, tile_dA, y3, v3, w3 = _reverse_step(cy, tile_dA, e3, h2, h3, a, d3, g3, b3, c3)
            q2, cy, tile_dA, y2, v2, w2 = _reverse_step(cy, tile_dA, e2, h1, h2, a, d2, g2, b2, c2)
            q1, cy, tile_dA, y1, v1, w1 = _reverse_step(cy, tile_dA, e1, h0, h1, a, d1, g1, b1, c1)
            q0, cy, tile_dA, y0, v0, w0 = _reverse_step(cy, tile_dA, e0, head, h0, a, d0, g0, b0, c0)
            if HAS_Z:
                y_in[1 - kk % 2].index(1 - kk // 2).store(gl.permute(group_of(y0, y1, y2, y3, [BD, NL]), (1, 0, 2)))
            v_in[1 - kk % 2].index(1 - kk // 2).store(gl.permute(group_of(v0, v1, v2, v3, [BD, NL]), (1, 0, 2)))
            w_in[1 - kk % 2].index(1 - kk // 2).store(gl.permute(group_of(w0, w1, w2, w3, [BD, NL]), (1, 0, 2)))
            f = fold_group(p, x0, x1, x2, x3, q0, q1, q2, q3, g0, g1, g2, g3, h0, h1, h2, h3)
            r_in[1 - kk % 2].index(1 - kk // 2).store(gl.permute(f, (0, 2, 1)))
        async_copy.wait_group(0)  # a barrier, too
        dA += tile_dA
        if HAS_DBOUND:
            cy = add_boundary(cy, dbound, row, i, interval, n_bound, tile, tile_in, D, N)

        left = L - i * T
        to_tile = to + i.to(gl.int64) * (T * N)
        gl.store(to_tile, gl.sum(r_out[0].index(0).load(sums_read()), axis=1), mask=(ot < left) & (on < N))
        gl.store(to_tile + 4 * N, gl.sum(r_out[1].index(0).load(sums_read()), axis=1), mask=(ot + 4 < left) & (on < N))
        through = sums_of(v_out[0], v_out[1])
        by_rate = sums_of(w_out[0], w_out[1])
        d_u = through * staged(sd)
        d_dt = gl.fma(by_rate, LN2, through * u_now)
        if SOFTPLUS:
            d_dt = d_dt * slope
        if COUNTED:
            d_dt = gl.where(counted, d_dt, 0.0)
        inside = (t < left) & (d < D)
        out_at = (i * T).to(gl.int64) * D
        if HAS_Z:
            y = sums_of(y_out[0], y_out[1])
            if HAS_D:
                y = gl.fma(w_skip, u_now, y)
            d_gate = y * to_gate
            gl.store(dz + (i * T).to(gl.int64) * DZ + (t * DZ + d), d_gate.to(dz.dtype.element_ty), mask=inside)
        if HAS_D:
            d_u = gl.fma(w_skip, staged(sg), d_u)
        if HAS_BIAS:
            dbias += d_dt
        gl.store(du + out_at + (t * D + d), d_u.to(du.dtype.element_ty), mask=inside)
        gl.store(ddelta + out_at + (t * D + d), d_dt.to(ddelta.dtype.element_ty), mask=inside)

    own_part = long_row * parts + part
    gl.store(dA_part + own_part * (D * N) + tile, dA, mask=tile_in)
    pair = gl.arange(0, E, gl.SliceLayout(1, gl.SliceLayout(0, gl.SliceLayout(0, LE))))
    side = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, LE))))
    own = block * BD + (pair * 2)[:, None] + side[None, :]
    if HAS_D:
        gl.store(dskip_part + own_part * D + own, gl.sum(gl.sum(dskip, axis=0), axis=0), mask=own < D)
    if HAS_BIAS:
        gl.store(dbias_part + own_part * D + own, gl.sum(gl.sum(dbias, axis=0), axis=0), mask=own < D)
    if HAS_H0:
        gl.store(dh0 + long_row * (D * N) + tile, cy, mask=tile_in & (part == parts - 1))

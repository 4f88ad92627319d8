"""The selective scan's forward on Hopper-class GPUs, in Triton's Gluon: one kernel, warps with three roles.

What is needed once per (step, channel) is separate from what is needed once per (step, channel, state). In one program,
which owns BD channels of one row and walks all of its time in tiles of T steps:

- producers load u, delta, B, C, take softplus and delta · u, and lay them out in shared memory, a tile ahead;
- the scan's warps hold the states in registers, N spread over NL lanes; each lane adds up its own part of y;
- finishers add the NL parts, the skip and the gate, and store y.

A slot of shared memory holds a tile's inputs and its partial sums. It goes round: staged by the producers, scanned,
summed by the finishers, and only then free again. One barrier for each hand-over keeps the scan's warps, on which all
wait, at one wait and one arrival a tile.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mambascope.ops.scan.gluon_layouts import (
    group_layout,
    partial_layout,
    rows_layout,
    state_layout,
    sums_layout,
    transposed_states,
    turned_rows,
    turned_sums,
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
    pitches_of,
    places,
    prefetch,
    product,
    row_of,
    silu,
    softplus,
    tile_offsets,
    wide_tile,
)

__all__ = ["advance", "forward_kernel"]


@gluon.jit
def advance(h, a, dt, x, b):
    """h after one step; x is delta · u."""
    return gl.fma(decay(a, dt), h, x[:, None, None] * b[None, :, :])


@gluon.jit
def _joined(parts, COUNT: gl.constexpr):
    """COUNT tensors, a power of two, side by side along new last axes, whose order is that of the parts."""
    if COUNT == 1:
        return parts[0]
    else:
        even = ()
        odd = ()
        for i in gl.static_range(COUNT // 2):
            even = even + (parts[2 * i],)
            odd = odd + (parts[2 * i + 1],)
        return gl.join(_joined(even, COUNT // 2), _joined(odd, COUNT // 2))


@gluon.jit
def _scan(
    A, h0, h_last, bound, block, row, tiles, every, n_bound, sd, sx, sb, sc, sy, staged, scanned,
    D: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, BD: gl.constexpr, NL: gl.constexpr, T: gl.constexpr,
    NB: gl.constexpr, KG: gl.constexpr, WARPS: gl.constexpr, HAS_H0: gl.constexpr, BOUNDARIES: gl.constexpr,
):  # fmt: skip
    """The scan's warps: states in registers, four steps at a time, KG groups (4 or 8) between stores."""
    NS: gl.constexpr = NP // NL
    TK: gl.constexpr = T // 4
    L4: gl.constexpr = group_layout(BD, NS, NL, 4, WARPS)
    LS: gl.constexpr = state_layout(BD, NS, NL, WARPS)
    LD: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L4))  # BD 4
    LN: gl.constexpr = gl.SliceLayout(0, L4)  # NS NL 4
    L1: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LS))  # BD
    LB: gl.constexpr = gl.SliceLayout(0, LS)  # NS NL
    S2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    S3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    dd = sd._reinterpret(gl.float32, [NB * TK, BD, 4], S2)
    dx = sx._reinterpret(gl.float32, [NB * TK, BD, 4], S2)
    db = sb._reinterpret(gl.float32, [NB * TK, NS, NL, 4], S3)
    dc = sc._reinterpret(gl.float32, [NB * TK, NS, NL, 4], S3)
    dy = sy._reinterpret(gl.float32, [NB * TK // KG, KG, NL, BD, 4], partial_layout([KG], NL, BD, False))

    p = gl.arange(0, BD, L1)
    d = block * BD + (p % (BD // 2)) * 2 + p // (BD // 2)
    s = gl.arange(0, NS, gl.SliceLayout(1, LB))
    lane = gl.arange(0, NL, gl.SliceLayout(0, LB))
    n = (lane * NS)[None, :] + s[:, None]
    tile = (d * N)[:, None, None] + n[None, :, :]
    tile_in = (d < D)[:, None, None] & (n < N)[None, :, :]
    a = gl.load(A + tile, mask=tile_in, other=0.0).to(gl.float32) * LOG2E
    h = gl.zeros([BD, NS, NL], gl.float32, LS)
    if HAS_H0:
        h = gl.load(h0 + row.to(gl.int64) * (D * N) + tile, mask=tile_in, other=0.0)

    if BOUNDARIES:
        since = 0
        bound += row.to(gl.int64) * n_bound * (D * N)
    for i in range(0, tiles):
        slot = i % NB
        mbarrier.wait(staged.index(slot), (i // NB) & 1)
        for kk in range(0, TK // KG):
            sums = ()
            for m in gl.static_range(KG):
                if BOUNDARIES and m % 4 == 0:
                    begins = (since == 0) & (i * (T // 16) + kk * (KG // 4) + m // 4 < n_bound * every)
                    gl.store(bound + tile, h, mask=tile_in & begins)
                    bound += gl.where(since == 0, D * N, 0)
                    since = gl.where(since == every - 1, 0, since + 1)
                k = slot * TK + kk * KG + m
                d0, d1, d2, d3 = columns(dd.index(k).load(LD), [BD], L1)
                x0, x1, x2, x3 = columns(dx.index(k).load(LD), [BD], L1)
                b0, b1, b2, b3 = columns(db.index(k).load(LN), [NS, NL], LB)
                c0, c1, c2, c3 = columns(dc.index(k).load(LN), [NS, NL], LB)
                h = advance(h, a, d0, x0, b0)
                y0 = gl.sum(h * c0[None, :, :], axis=1)
                h = advance(h, a, d1, x1, b1)
                y1 = gl.sum(h * c1[None, :, :], axis=1)
                h = advance(h, a, d2, x2, b2)
                y2 = gl.sum(h * c2[None, :, :], axis=1)
                h = advance(h, a, d3, x3, b3)
                y3 = gl.sum(h * c3[None, :, :], axis=1)
                sums = sums + (group_of(y0, y1, y2, y3, [BD, NL]),)
            # One store for all groups: between two stores to one buffer the compiler puts a barrier.
            y = _joined(sums, KG).reshape([BD, NL, 4, KG])
            dy.index(slot * (TK // KG) + kk).store(gl.permute(y, (3, 1, 0, 2)))
        mbarrier.arrive(scanned.index(slot), count=1)
    gl.store(h_last + row.to(gl.int64) * (D * N) + tile, h, mask=tile_in)


@gluon.jit
def _produce(
    u, delta, B, C, z, bias, block, L, live, tiles, u_l, delta_l, B_l, C_l, z_l, sd, sx, sb, sc, staged, summed,
    D: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, BD: gl.constexpr, T: gl.constexpr, NB: gl.constexpr,
    WARPS: gl.constexpr, KE: gl.constexpr, EARLY: gl.constexpr, AHEAD: gl.constexpr, SOFTPLUS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_Z: gl.constexpr, EVEN: gl.constexpr, COUNTED: gl.constexpr, PACKED: gl.constexpr,
    TURNED: gl.constexpr,
):  # fmt: skip
    """Producers: loads run EARLY tiles ahead of their use into registers, and AHEAD tiles ahead into the L2 cache."""
    LE: gl.constexpr = turned_rows(T, BD, WARPS) if TURNED else rows_layout(BD, KE, WARPS)
    LN: gl.constexpr = turned_rows(T, NP, WARPS) if TURNED else rows_layout(NP, 2, WARPS)
    D_LEFT: gl.constexpr = 0 if D % BD == 0 else D
    N_ALL: gl.constexpr = 0 if N == NP else N
    t, column = places(T, BD, LE)
    b_dt = 0.0
    if HAS_BIAS:
        b_dt = gl.load(bias + block * BD + column, mask=block * BD + column < D, other=0.0).to(gl.float32)
    if AHEAD > 0:
        LINES: gl.constexpr = BD if TURNED else T  # of one tensor's tile
        ROUNDS: gl.constexpr = ((3 if HAS_Z else 2) * LINES + WARPS * 32 - 1) // (WARPS * 32)
        thread = gl.arange(0, WARPS * 32, gl.BlockedLayout([1], [32], [WARPS], [0]))
        channel = (block * BD + thread * 0).to(gl.int64)
        ahead_t = thread % T
        if TURNED:
            channel = gl.minimum(block * BD + thread % BD, D - 1).to(gl.int64)
            ahead_t = thread * 0
        lines = ()
        pitches = ()
        for r in gl.static_range(ROUNDS):
            which = (thread + r * WARPS * 32) // LINES
            line, pitch = row_of(which, u, delta, z, u_l, delta_l, z_l, channel, HAS_Z, TURNED)
            lines = lines + (line,)
            pitches = pitches + (pitch,)
    K: gl.constexpr = 2 if PACKED else 1
    u_at, tl_, dl = tile_offsets(u_l, T, BD, LE, PACKED, TURNED)
    delta_at, tl_, dl = tile_offsets(delta_l, T, BD, LE, PACKED, TURNED)
    B_at, tn, nl = tile_offsets(B_l, T, NP, LN, PACKED, TURNED)
    C_at, tn, nl = tile_offsets(C_l, T, NP, LN, PACKED, TURNED)
    dl += block * BD
    rows = (block * 0 + T // K).to(gl.int64)  # a stride may be a plain 1
    first = (block * BD).to(gl.int64)
    u_t, u_c = pitches_of(u_l, TURNED)
    delta_t, delta_c = pitches_of(delta_l, TURNED)
    B_t, _ = pitches_of(B_l, TURNED)
    C_t, _ = pitches_of(C_l, TURNED)
    u = paired(u + first * u_c, PACKED)
    delta = paired(delta + first * delta_c, PACKED)
    B = paired(B, PACKED)
    C = paired(C, PACKED)
    u_step = rows * u_t
    delta_step = rows * delta_t
    B_step = rows * B_t
    C_step = rows * C_t
    left = L
    queue = ()
    for k in gl.static_range(EARLY):
        u_tile = load_tile(u, u_at, tl_, dl, left, D_LEFT, EVEN)
        raw_tile = load_tile(delta, delta_at, tl_, dl, left, D_LEFT, EVEN)
        b_tile = load_tile(B, B_at, tn, nl, left, N_ALL, EVEN)
        c_tile = load_tile(C, C_at, tn, nl, left, N_ALL, EVEN)
        queue = queue + (u_tile, raw_tile, b_tile, c_tile)
        more = k + 1 < tiles
        u += gl.where(more, u_step, 0)
        delta += gl.where(more, delta_step, 0)
        B += gl.where(more, B_step, 0)
        C += gl.where(more, C_step, 0)
        left -= gl.where(more, T, 0)
    for i in range(0, tiles):
        slot = i % NB
        u_tile = load_tile(u, u_at, tl_, dl, left, D_LEFT, EVEN)
        raw_tile = load_tile(delta, delta_at, tl_, dl, left, D_LEFT, EVEN)
        b_tile = load_tile(B, B_at, tn, nl, left, N_ALL, EVEN)
        c_tile = load_tile(C, C_at, tn, nl, left, N_ALL, EVEN)
        queue = queue + (u_tile, raw_tile, b_tile, c_tile)
        more = i + EARLY + 1 < tiles
        u += gl.where(more, u_step, 0)
        delta += gl.where(more, delta_step, 0)
        B += gl.where(more, B_step, 0)
        C += gl.where(more, C_step, 0)
        left -= gl.where(more, T, 0)
        raw = wide_tile(queue[1], LE, PACKED)
        if SOFTPLUS:
            raw = softplus(raw + b_dt)
        dt = raw
        if COUNTED:
            dt = gl.where((t < live - i * T) & (column >= 0), raw, 0.0)
        x = dt * wide_tile(queue[0], LE, PACKED)
        b = wide_tile(queue[2], LN, PACKED)
        c = wide_tile(queue[3], LN, PACKED)
        queue = queue[4:]
        if AHEAD > 0:
            ahead = gl.minimum((i + AHEAD) * T + ahead_t, L - 1).to(gl.int64)
            for r in gl.static_range(ROUNDS):
                prefetch(lines[r] + ahead * pitches[r])
        mbarrier.wait(summed.index(slot), ((i // NB) & 1) ^ 1)
        sd.index(slot).store(by_channel(dt, T, BD))
        sx.index(slot).store(by_channel(x, T, BD))
        sb.index(slot).store(by_state(b, T, NP))
        sc.index(slot).store(by_state(c, T, NP))
        mbarrier.arrive(staged.index(slot), count=1)


@gluon.jit
def _finish(
    u, z, skip, y, block, L, tiles, u_l, z_l, y_l, sy, scanned, summed,
    D: gl.constexpr, BD: gl.constexpr, NL: gl.constexpr, T: gl.constexpr, NB: gl.constexpr, WARPS: gl.constexpr,
    KE: gl.constexpr, EARLY: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr, EVEN: gl.constexpr,
    PACKED: gl.constexpr, TURNED: gl.constexpr,
):  # fmt: skip
    """Finishers: y = Σ parts (+ D u) (· silu(z)), rounded once."""
    TK: gl.constexpr = T // 4
    LE: gl.constexpr = turned_rows(T, BD, WARPS) if TURNED else rows_layout(BD, KE, WARPS)
    LY: gl.constexpr = turned_sums(T, BD, NL, WARPS) if TURNED else sums_layout(BD, NL, KE, WARPS)
    D_LEFT: gl.constexpr = 0 if D % BD == 0 else D
    K: gl.constexpr = 2 if PACKED else 1
    parts = sy._reinterpret(gl.float32, [NB, TK, NL, 2, BD // 2, 4], partial_layout([TK], NL, BD, True))
    t, column = places(T, BD, LE)
    d = block * BD + column
    y_t, y_c = pitches_of(y_l if TURNED else D, TURNED)
    y_at = t * y_t + column * y_c
    first = (block * BD).to(gl.int64)
    y += first * y_c
    left = L
    rows = (block * 0 + T // K).to(gl.int64)
    if HAS_D:
        w_skip = gl.load(skip + d, mask=d < D, other=0.0).to(gl.float32)
        u_at, tl_, dl = tile_offsets(u_l, T, BD, LE, PACKED, TURNED)
        dl += block * BD
        u_t, u_c = pitches_of(u_l, TURNED)
        u = paired(u + first * u_c, PACKED)
        u_step = rows * u_t
    if HAS_Z:
        z_at, tl_, dl = tile_offsets(z_l, T, BD, LE, PACKED, TURNED)
        dl += block * BD
        z_t, z_c = pitches_of(z_l, TURNED)
        z = paired(z + first * z_c, PACKED)
        z_step = rows * z_t
    skips = ()
    gates = ()
    for k in gl.static_range(EARLY):
        more = k + 1 < tiles
        if HAS_D:
            skips = skips + (load_tile(u, u_at, tl_, dl, left, D_LEFT, EVEN),)
            u += gl.where(more, u_step, 0)
        if HAS_Z:
            gates = gates + (load_tile(z, z_at, tl_, dl, left, D_LEFT, EVEN),)
            z += gl.where(more, z_step, 0)
        left -= gl.where(more, T, 0)
    for i in range(0, tiles):
        slot = i % NB
        now = L - i * T
        more = i + EARLY + 1 < tiles
        if HAS_D:
            skips = skips + (load_tile(u, u_at, tl_, dl, left, D_LEFT, EVEN),)
            u += gl.where(more, u_step, 0)
            through = product(w_skip, wide_tile(skips[0], LE, PACKED))
            skips = skips[1:]
        if HAS_Z:
            gates = gates + (load_tile(z, z_at, tl_, dl, left, D_LEFT, EVEN),)
            z += gl.where(more, z_step, 0)
            gate = silu(wide_tile(gates[0], LE, PACKED))
            gates = gates[1:]
        left -= gl.where(more, T, 0)
        mbarrier.wait(scanned.index(slot), (i // NB) & 1)
        total = gl.sum(parts.index(slot).load(LY), axis=1)  # T/4 2 BD/2 4
        mbarrier.arrive(summed.index(slot), count=1)
        out = gl.convert_layout(gl.permute(total, (0, 3, 2, 1)), LE)
        if HAS_D:
            out = out + through
        if HAS_Z:
            out = out * gate
        if EVEN and D_LEFT == 0:
            gl.store(y + y_at, out.to(y.dtype.element_ty))
        else:
            gl.store(y + y_at, out.to(y.dtype.element_ty), mask=(t < now) & (d < D))
        y += T * y_t


@gluon.jit(do_not_specialize=["L", "every", "n_bound"])
def forward_kernel(
    u, delta, A, B, C, skip, z, bias, h0, lengths, y, h_last, bound,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
    y_l, L, every, n_bound,
    D: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, BD: gl.constexpr, NL: gl.constexpr, T: gl.constexpr,
    NB: gl.constexpr, KG: gl.constexpr, KE: gl.constexpr,
    PRODUCER_EARLY: gl.constexpr, FINISHER_EARLY: gl.constexpr, AHEAD: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, FINISHER_REGISTERS: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_LENGTHS: gl.constexpr, BOUNDARIES: gl.constexpr, EVEN: gl.constexpr,
    PACKED: gl.constexpr, TURNED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: channel blocks × rows. ``every``: a boundary state every so many 16 steps.
    EVEN: L is a multiple of T. PACKED: u, delta, B, C, z are bfloat16, read two at a time. TURNED: u, delta, z, y lie
    as ``B D L``, B and C as ``B N L``; the strides are then those of channels and states."""
    TK: gl.constexpr = T // 4
    S3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SB: gl.constexpr = transposed_states([TK], NP // NL, NL, 4)
    sd = gl.allocate_shared_memory(gl.float32, [NB, TK, BD, 4], S3)
    sx = gl.allocate_shared_memory(gl.float32, [NB, TK, BD, 4], S3)
    sb = gl.allocate_shared_memory(gl.float32, [NB, TK, NP, 4], SB)
    sc = gl.allocate_shared_memory(gl.float32, [NB, TK, NP, 4], SB)
    sy = gl.allocate_shared_memory(gl.float32, [NB, TK, NL, BD, 4], partial_layout([TK], NL, BD, False))
    staged = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    scanned = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    summed = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(staged.index(i), count=1)
        mbarrier.init(scanned.index(i), count=1)
        mbarrier.init(summed.index(i), count=1)

    BLOCKS: gl.constexpr = (D + BD - 1) // BD
    pid = gl.program_id(0)
    block = pid % BLOCKS
    row = pid // BLOCKS
    long_row = row.to(gl.int64)
    tiles = gl.cdiv(L, T)
    live = L
    if HAS_LENGTHS:
        live = gl.minimum(gl.load(lengths + row).to(gl.int32), L)
    u += long_row * u_b
    delta += long_row * delta_b
    B += long_row * B_b
    C += long_row * C_b
    if HAS_Z:
        z += long_row * z_b
    y += long_row * L * D
    gl.warp_specialize(
        [
            (_scan, (A, h0, h_last, bound, block, row, tiles, every, n_bound, sd, sx, sb, sc, sy, staged, scanned,
                     D, N, NP, BD, NL, T, NB, KG, num_warps, HAS_H0, BOUNDARIES)),
            (_produce, (u, delta, B, C, z, bias, block, L, live, tiles, u_l, delta_l, B_l, C_l, z_l,
                        sd, sx, sb, sc, staged, summed,
                        D, N, NP, BD, T, NB, 4, KE, PRODUCER_EARLY, AHEAD, SOFTPLUS, HAS_BIAS, HAS_Z, EVEN,
                        HAS_LENGTHS or not EVEN, PACKED, TURNED)),
            (_finish, (u, z, skip, y, block, L, tiles, u_l, z_l, y_l, sy, scanned, summed,
                       D, BD, NL, T, NB, 4, KE, FINISHER_EARLY, HAS_D, HAS_Z, EVEN, PACKED, TURNED)),
        ],
        [4, 4],
        [PRODUCER_REGISTERS, FINISHER_REGISTERS],
    )  # fmt: skip

"""The selective scan's forward on Hopper-class GPUs, in Triton's Gluon: one kernel, warps with three roles.

What is needed once per (step, channel) is separate from what is needed once per (step, channel, state). In one program,
which owns BD channels of one row and walks all of its time in tiles of T steps:

- producers load u, delta, B, C, take softplus and delta · u, and lay them out in shared memory, a tile ahead;
- the scan's warps hold the states in registers, N spread over NL lanes; each lane adds up its own part of y;
- finishers add the NL parts, the skip and the gate, and store y.

A short batch gives too few programs. Then time is cut in PARTS ranges of unequal length that run side by side; each
program first walks the steps before its own range without outputs, which costs about 0.6 of a full step, and ranges
are cut so that all end together. Nothing is handed from program to program; h has the same bits however time is cut.
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
)
from mambascope.ops.scan.gluon_math import (
    LOG2E,
    by_channel,
    by_state,
    columns,
    decay,
    group_of,
    load_rows,
    places,
    product,
    silu,
    softplus,
)

__all__ = ["advance", "forward_kernel", "range_of"]


@gluon.jit
def advance(h, a, dt, x, b):
    """h after one step; x is delta · u."""
    return gl.fma(decay(a, dt), h, x[:, None, None] * b[None, :, :])


@gluon.jit
def range_of(part, tiles, cut1, cut2, cut3, PARTS: gl.constexpr):
    """First tile of a part of time, and the one after its last; cuts 1 … PARTS − 1 are between parts."""
    first = part * 0
    end = tiles
    if PARTS > 1:
        first = gl.where(part == 0, 0, gl.where(part == 1, cut1, gl.where(part == 2, cut2, cut3)))
        end = gl.where(part == 0, cut1, gl.where(part == 1, cut2, cut3))
        end = gl.where(part == PARTS - 1, tiles, end)
    return first, end


@gluon.jit
def _prefetch(address):
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _scan(
    A, h0, h_last, bound, block, row, tiles, first, end, every, n_bound, at_end,
    sd, sx, sb, sc, sy, full, done, ydone, yempty,
    D: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, BD: gl.constexpr, NL: gl.constexpr, T: gl.constexpr,
    NB: gl.constexpr, NY: gl.constexpr, KG: gl.constexpr, WARPS: gl.constexpr, HAS_H0: gl.constexpr,
    BOUNDARIES: gl.constexpr,
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
    dy = sy._reinterpret(gl.float32, [NY * TK // KG, KG, NL, BD, 4], partial_layout([KG], NL, BD, False))

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

    for i in range(0, first):
        slot = i % NB
        mbarrier.wait(full.index(slot), (i // NB) & 1)
        for k in range(0, TK):
            d0, d1, d2, d3 = columns(dd.index(slot * TK + k).load(LD), [BD], L1)
            x0, x1, x2, x3 = columns(dx.index(slot * TK + k).load(LD), [BD], L1)
            b0, b1, b2, b3 = columns(db.index(slot * TK + k).load(LN), [NS, NL], LB)
            h = advance(h, a, d0, x0, b0)
            h = advance(h, a, d1, x1, b1)
            h = advance(h, a, d2, x2, b2)
            h = advance(h, a, d3, x3, b3)
        mbarrier.arrive(done.index(slot), count=1)
    if BOUNDARIES:
        since = (first * (T // 16)) % every
        bound += (row.to(gl.int64) * n_bound + (first * (T // 16) + every - 1) // every) * (D * N)
    for i in range(first, end):
        slot = i % NB
        j = i - first
        yslot = j % NY
        mbarrier.wait(full.index(slot), (i // NB) & 1)
        mbarrier.wait(yempty.index(yslot), ((j // NY) & 1) ^ 1)
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
            if KG == 4:
                y = group_of(sums[0], sums[1], sums[2], sums[3], [BD, NL, 4])
            else:
                even = gl.join(gl.join(sums[0], sums[4]), gl.join(sums[2], sums[6]))
                odd = gl.join(gl.join(sums[1], sums[5]), gl.join(sums[3], sums[7]))
                y = gl.join(even, odd).reshape([BD, NL, 4, 8])
            dy.index(yslot * (TK // KG) + kk).store(gl.permute(y, (3, 1, 0, 2)))
        mbarrier.arrive(done.index(slot), count=1)
        mbarrier.arrive(ydone.index(yslot), count=1)
    gl.store(h_last + row.to(gl.int64) * (D * N) + tile, h, mask=tile_in & (at_end == 1))


@gluon.jit
def _produce(
    u, delta, B, C, z, bias, block, L, live, end, u_l, delta_l, B_l, C_l, z_l, sd, sx, sb, sc, full, done,
    D: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, BD: gl.constexpr, T: gl.constexpr, NB: gl.constexpr,
    WARPS: gl.constexpr, KE: gl.constexpr, AHEAD: gl.constexpr, SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_Z: gl.constexpr,
):  # fmt: skip
    """Producers: global loads run a tile ahead of their use in registers, and AHEAD tiles ahead into the L2 cache."""
    LE: gl.constexpr = rows_layout(BD, KE, WARPS)
    LN: gl.constexpr = rows_layout(NP, 2, WARPS)
    D_ALL: gl.constexpr = 0 if D % BD == 0 else D
    N_ALL: gl.constexpr = 0 if N == NP else N
    t, column = places(T, BD, LE)
    tn, n = places(T, NP, LN)
    d = block * BD + column
    b_dt = 0.0
    if HAS_BIAS:
        b_dt = gl.load(bias + d, mask=d < D, other=0.0).to(gl.float32)
    if AHEAD > 0:
        thread = gl.arange(0, WARPS * 32, gl.BlockedLayout([1], [32], [WARPS], [0]))
        ahead_t = thread % T
        which = thread // T
        u_size: gl.constexpr = u.dtype.element_ty.primitive_bitwidth // 8
        d_size: gl.constexpr = delta.dtype.element_ty.primitive_bitwidth // 8
        lines = gl.where(which == 0, (u + block * BD).to(gl.int64), (delta + block * BD).to(gl.int64))
        pitch = gl.where(which == 0, u_l * u_size, delta_l * d_size)
        if HAS_Z:
            z_size: gl.constexpr = z.dtype.element_ty.primitive_bitwidth // 8
            lines = gl.where(which > 1, (z + block * BD).to(gl.int64), lines)
            pitch = gl.where(which > 1, z_l * z_size, pitch)
    at = block * 0
    u_next = load_rows(u, u_l, at, t, d, L, D_ALL)
    raw_next = load_rows(delta, delta_l, at, t, d, L, D_ALL)
    b_next = load_rows(B, B_l, at, tn, n, L, N_ALL)
    c_next = load_rows(C, C_l, at, tn, n, L, N_ALL)
    for i in range(0, end):
        slot = i % NB
        raw = raw_next.to(gl.float32)
        if SOFTPLUS:
            raw = softplus(raw + b_dt)
        dt = gl.where((t < live - i * T) & (column >= 0), raw, 0.0)
        x = dt * u_next.to(gl.float32)
        b = b_next.to(gl.float32)
        c = c_next.to(gl.float32)
        at = (i + 1) * T
        u_next = load_rows(u, u_l, at, t, d, L - at, D_ALL)
        raw_next = load_rows(delta, delta_l, at, t, d, L - at, D_ALL)
        b_next = load_rows(B, B_l, at, tn, n, L - at, N_ALL)
        c_next = load_rows(C, C_l, at, tn, n, L - at, N_ALL)
        if AHEAD > 0:
            _prefetch(lines + gl.minimum((i + AHEAD) * T + ahead_t, L - 1).to(gl.int64) * pitch)
        mbarrier.wait(done.index(slot), ((i // NB) & 1) ^ 1)
        sd.index(slot).store(by_channel(dt, T, BD))
        sx.index(slot).store(by_channel(x, T, BD))
        sb.index(slot).store(by_state(b, T, NP))
        sc.index(slot).store(by_state(c, T, NP))
        mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _finish(
    u, z, skip, y, block, L, first, end, u_l, z_l, sy, ydone, yempty,
    D: gl.constexpr, BD: gl.constexpr, NL: gl.constexpr, T: gl.constexpr, NY: gl.constexpr, WARPS: gl.constexpr,
    KE: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
):  # fmt: skip
    """Finishers: y = Σ parts (+ D u) (· silu(z)), rounded once."""
    TK: gl.constexpr = T // 4
    LE: gl.constexpr = rows_layout(BD, KE, WARPS)
    LY: gl.constexpr = sums_layout(BD, NL, KE, WARPS)
    D_ALL: gl.constexpr = 0 if D % BD == 0 else D
    parts = sy._reinterpret(gl.float32, [NY, TK, NL, 2, BD // 2, 4], partial_layout([TK], NL, BD, True))
    t, column = places(T, BD, LE)
    d = block * BD + column
    at = first * T
    if HAS_D:
        w_skip = gl.load(skip + d, mask=d < D, other=0.0).to(gl.float32)
        u_next = load_rows(u, u_l, at, t, d, L - at, D_ALL)
    if HAS_Z:
        z_next = load_rows(z, z_l, at, t, d, L - at, D_ALL)
    for i in range(first, end):
        slot = (i - first) % NY
        at = (i + 1) * T
        if HAS_D:
            through = product(w_skip, u_next.to(gl.float32))
            u_next = load_rows(u, u_l, at, t, d, L - at, D_ALL)
        if HAS_Z:
            gate = silu(z_next.to(gl.float32))
            z_next = load_rows(z, z_l, at, t, d, L - at, D_ALL)
        mbarrier.wait(ydone.index(slot), ((i - first) // NY) & 1)
        total = gl.sum(parts.index(slot).load(LY), axis=1)  # T/4 2 BD/2 4
        mbarrier.arrive(yempty.index(slot), count=1)
        out = gl.convert_layout(gl.permute(total, (0, 3, 2, 1)), LE)
        if HAS_D:
            out = out + through
        if HAS_Z:
            out = out * gate
        inside = (t < L - i * T) & (d < D)
        gl.store(y + (i * T).to(gl.int64) * D + (t * D + d), out.to(y.dtype.element_ty), mask=inside)


@gluon.jit(do_not_specialize=["L", "every", "n_bound", "cut1", "cut2", "cut3"])
def forward_kernel(
    u, delta, A, B, C, skip, z, bias, h0, lengths, y, h_last, bound,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
    L, every, n_bound, cut1, cut2, cut3,
    D: gl.constexpr, N: gl.constexpr, NP: gl.constexpr, BD: gl.constexpr, NL: gl.constexpr, T: gl.constexpr,
    NB: gl.constexpr, NY: gl.constexpr, KG: gl.constexpr, KE: gl.constexpr, AHEAD: gl.constexpr, PARTS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, FINISHER_REGISTERS: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr,
    HAS_H0: gl.constexpr, HAS_LENGTHS: gl.constexpr, BOUNDARIES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Grid: channel blocks × PARTS × rows. ``every``: a boundary state every so many 16 steps. Cuts are in tiles."""
    TK: gl.constexpr = T // 4
    S3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SB: gl.constexpr = transposed_states([TK], NP // NL, NL, 4)
    sd = gl.allocate_shared_memory(gl.float32, [NB, TK, BD, 4], S3)
    sx = gl.allocate_shared_memory(gl.float32, [NB, TK, BD, 4], S3)
    sb = gl.allocate_shared_memory(gl.float32, [NB, TK, NP, 4], SB)
    sc = gl.allocate_shared_memory(gl.float32, [NB, TK, NP, 4], SB)
    sy = gl.allocate_shared_memory(gl.float32, [NY, TK, NL, BD, 4], partial_layout([TK], NL, BD, False))
    full = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [NB, 1], mbarrier.MBarrierLayout())
    ydone = gl.allocate_shared_memory(gl.int64, [NY, 1], mbarrier.MBarrierLayout())
    yempty = gl.allocate_shared_memory(gl.int64, [NY, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NB):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(done.index(i), count=1)
    for i in gl.static_range(NY):
        mbarrier.init(ydone.index(i), count=1)
        mbarrier.init(yempty.index(i), count=1)

    BLOCKS: gl.constexpr = (D + BD - 1) // BD
    pid = gl.program_id(0)
    block = pid % BLOCKS
    part = (pid // BLOCKS) % PARTS
    row = pid // (BLOCKS * PARTS)
    long_row = row.to(gl.int64)
    tiles = gl.cdiv(L, T)
    first, end = range_of(part, tiles, cut1, cut2, cut3, PARTS)
    at_end = (part == PARTS - 1).to(gl.int32)
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
            (_scan, (A, h0, h_last, bound, block, row, tiles, first, end, every, n_bound, at_end,
                     sd, sx, sb, sc, sy, full, done, ydone, yempty,
                     D, N, NP, BD, NL, T, NB, NY, KG, num_warps, HAS_H0, BOUNDARIES)),
            (_produce, (u, delta, B, C, z, bias, block, L, live, end, u_l, delta_l, B_l, C_l, z_l,
                        sd, sx, sb, sc, full, done,
                        D, N, NP, BD, T, NB, 4, KE, AHEAD, SOFTPLUS, HAS_BIAS, HAS_Z)),
            (_finish, (u, z, skip, y, block, L, first, end, u_l, z_l, sy, ydone, yempty,
                       D, BD, NL, T, NY, 4, KE, HAS_D, HAS_Z)),
        ],
        [4, 4],
        [PRODUCER_REGISTERS, FINISHER_REGISTERS],
    )  # fmt: skip

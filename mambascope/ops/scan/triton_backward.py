"""The selective scan's backward kernels: time walked in reverse, states replayed from saved ones, no atomics.

With ``q[t]`` the loss's derivative by ``h[t]``, ``g[t]`` by ``y[t]`` and ``e[t] = exp(delta[t] A)``::

    q[t] = C[t] g[t] + e[t+1] q[t+1]                (+ what arrives at h_last or at a boundary state)
    du = delta Σ_n q B + D g                        ddelta = u Σ_n q B + Σ_n A e q h[t-1]
    dB = Σ_d q delta u     dC = Σ_d g h             dA = Σ_t delta e q h[t-1]

Time is cut in segments of at most 64 steps, whose entering states are given. In one segment the state entering every
group of four steps is noted first, in a scratch that stays in the caches; then each group, from the last, is replayed
in registers and walked in reverse. Sums over channels (dB, dC) and over rows and chunks (dA, dD, dbias) are partial
sums, added in a fixed order afterwards, so two runs give the same bits. Where rows × channels are too few programs,
chunks of time run side by side as in the forward: the adjoint is affine in what arrives from the right.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: SIM102, RUF005

import triton
import triton.language as tl

from mambascope.ops.scan.triton_forward import advance, columns, entering, group_delta, load_group, pinned, tile_of
from mambascope.ops.scan.triton_math import LOG2E, decay, sigmoid, sigmoids, steps

__all__ = ["adjoint_kernel", "backward_kernel", "sum_kernel"]


@triton.jit
def _segment_begin(segment, interval, seg):
    """First step of a segment: boundaries every ``interval`` steps, each interval cut in segments of ``seg``."""
    per = tl.cdiv(interval, seg)
    return (segment // per) * interval + (segment % per) * seg


@triton.jit
def _segment_end(segment, interval, seg, L):
    begin = _segment_begin(segment, interval, seg)
    return tl.minimum(tl.minimum(begin + seg, (segment // tl.cdiv(interval, seg) + 1) * interval), L)


@triton.jit(do_not_specialize=["L", "D", "chunk", "n_chunks", "interval", "seg", "n_segments", "n_bound"])
def adjoint_kernel(
    delta, A, C, z, bias, lengths, dy, dbound, ends, sums,
    delta_b, delta_l, C_b, C_l, z_b, z_l, dy_b, dy_l,
    L, D, chunk, n_chunks, interval, seg, n_segments, n_bound,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_DBOUND: tl.constexpr,
):  # fmt: skip
    """Adjoint leaving each chunk on the left if nothing arrives on its right; chunks counted from the right.

    Grid: channel blocks × rows × (n_chunks − 1). ``chunk`` is a number of segments.
    """
    blocks = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    rows = tl.num_programs(0) // blocks // (n_chunks - 1)
    block = pid % blocks
    row = (pid // blocks) % rows
    part = pid // (blocks * rows)
    long_row = row.to(tl.int64)

    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    k = tl.arange(0, 4)[None, :]
    tile_in = (n < N)[:, None] & (d < D)[None, :]
    tile = d[None, :] * N + n[:, None]
    a = tl.load(A + tile, mask=tile_in, other=0.0).to(tl.float32) * LOG2E
    d_in = (d < D)[:, None]
    n_in = (n < N)[:, None]
    b_dt = 0.0
    if HAS_BIAS:
        b_dt = tl.load(bias + d[:, None], mask=d_in, other=0.0).to(tl.float32)
    delta_rows = delta + long_row * delta_b + d[:, None] + k * delta_l
    C_rows = C + long_row * C_b + n[:, None] + k * C_l
    dy_rows = dy + long_row * dy_b + d[:, None] + k * dy_l
    z_rows = dy_rows
    if HAS_Z:
        z_rows = z + long_row * z_b + d[:, None] + k * z_l
    real = L
    if HAS_LENGTHS:
        real = tl.minimum(tl.load(lengths + row).to(tl.int32), L)

    cy = tl.zeros([NP, BD], tl.float32)
    total = tl.zeros([BD, 4], tl.float32)
    first = tl.minimum((n_chunks - 1 - part) * chunk, n_segments)
    last = tl.minimum(first + chunk, n_segments)
    for back in steps(0, last - first):
        segment = last - 1 - back
        begin = _segment_begin(segment, interval, seg)
        end = _segment_end(segment, interval, seg, L)
        groups = tl.cdiv(tl.maximum(end - begin, 0), 4)
        t = begin + tl.maximum(groups - 1, 0) * 4
        raw_next = load_group(delta_rows, t, delta_l, d_in, end)
        c_next = load_group(C_rows, t, C_l, n_in, end)
        g_next = load_group(dy_rows, t, dy_l, d_in, end)
        z_next = g_next
        if HAS_Z:
            z_next = load_group(z_rows, t, z_l, d_in, end)
        for _ in steps(0, groups):
            dt = group_delta(raw_next, b_dt, t, tl.minimum(real, end), SOFTPLUS)
            g = g_next.to(tl.float32)
            if HAS_Z:
                gate = z_next.to(tl.float32)
                g = g * (gate * sigmoid(gate))
            c_now = c_next
            t = tl.maximum(t - 4, begin)
            raw_next = load_group(delta_rows, t, delta_l, d_in, end)
            c_next = load_group(C_rows, t, C_l, n_in, end)
            g_next = load_group(dy_rows, t, dy_l, d_in, end)
            z_next = g_next
            if HAS_Z:
                z_next = load_group(z_rows, t, z_l, d_in, end)
            dt = pinned(dt, BD)
            dt0, dt1, dt2, dt3 = columns(dt, BD)
            g0, g1, g2, g3 = columns(pinned(g, BD), BD)
            c0, c1, c2, c3 = columns(c_now.to(tl.float32), NP)
            cy = decay(a, dt3[None, :]) * tl.fma(c3[:, None], g3[None, :], cy)
            cy = decay(a, dt2[None, :]) * tl.fma(c2[:, None], g2[None, :], cy)
            cy = decay(a, dt1[None, :]) * tl.fma(c1[:, None], g1[None, :], cy)
            cy = decay(a, dt0[None, :]) * tl.fma(c0[:, None], g0[None, :], cy)
            total += dt
        if HAS_DBOUND:
            if begin < L and begin % interval == 0:
                at = (long_row * n_bound + begin // interval) * D * N
                cy += tl.load(dbound + at + tile, mask=tile_in, other=0.0).to(tl.float32)
    at = long_row * (n_chunks - 1) + part
    tl.store(ends + at * D * N + tile, cy, mask=tile_in)
    tl.store(sums + at * D + d, tl.sum(total, axis=1), mask=d < D)


@triton.jit
def _reverse(cy, dA, a, rate, h_before, h, dt, x, g, b, c):
    """One step of the adjoint: what goes on to the left, and this step's sums over states and over channels."""
    q = tl.fma(c[:, None], g[None, :], cy)
    y = tl.sum(h * c[:, None], axis=0)
    through = tl.sum(q * b[:, None], axis=0)
    dB = tl.sum(q * x[None, :], axis=1)
    dC = tl.sum(h * g[None, :], axis=1)
    cy = decay(a, dt[None, :]) * q
    r = cy * h_before
    by_rate = tl.sum(r * rate, axis=0)
    dA = tl.fma(r, dt[None, :], dA)
    return cy, dA, y, through, by_rate, dB, dC


@triton.jit(do_not_specialize=["L", "D", "chunk", "n_chunks", "interval", "seg", "n_segments", "n_bound", "batch"])
def backward_kernel(
    u, delta, A, B, C, skip, z, bias, lengths, states, dy, dbound, dh_last, ends, sums,
    du, ddelta, dz, dB_part, dC_part, dA_part, dskip_part, dbias_part, dh0, scratch,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, dy_b, dy_l, dz_b, dz_l,
    L, D, chunk, n_chunks, interval, seg, n_segments, n_bound, batch,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_DBOUND: tl.constexpr, HAS_DLAST: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """All gradients. ``states`` B n_segments D N: state entering each segment; with ``FOLD``, ``ends`` and ``sums`` are
    the adjoint kernel's. Chunks are counted from the right.

    Grid: channel blocks × rows × chunks. ``chunk`` is a number of segments.
    """
    blocks = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    block = pid % blocks
    row = (pid // blocks) % batch
    part = pid // (blocks * batch)
    long_row = row.to(tl.int64)

    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    k = tl.arange(0, 4)[None, :]
    tile_in = (n < N)[:, None] & (d < D)[None, :]
    tile = d[None, :] * N + n[:, None]
    rate = tl.load(A + tile, mask=tile_in, other=0.0).to(tl.float32)
    a = rate * LOG2E
    d_in = (d < D)[:, None]
    n_in = (n < N)[:, None]
    b_dt = 0.0
    if HAS_BIAS:
        b_dt = tl.load(bias + d[:, None], mask=d_in, other=0.0).to(tl.float32)
    w_skip = 0.0
    if HAS_D:
        w_skip = tl.load(skip + d[:, None], mask=d_in, other=0.0).to(tl.float32)

    u_rows = u + long_row * u_b + d[:, None] + k * u_l
    delta_rows = delta + long_row * delta_b + d[:, None] + k * delta_l
    B_rows = B + long_row * B_b + n[:, None] + k * B_l
    C_rows = C + long_row * C_b + n[:, None] + k * C_l
    dy_rows = dy + long_row * dy_b + d[:, None] + k * dy_l
    z_rows = dy_rows
    if HAS_Z:
        z_rows = z + long_row * z_b + d[:, None] + k * z_l
    out_rows = long_row * L * D + d[:, None] + k * D
    dz_rows = dz
    if HAS_Z:
        dz_rows = dz + long_row * dz_b + d[:, None] + k * dz_l
    part_rows = (block.to(tl.int64) * batch + row) * L * N + n[:, None] + k * N
    heads = scratch + pid.to(tl.int64) * tl.cdiv(seg, 4) * NP * BD
    own = tl.arange(0, BD)[None, :] * NP + n[:, None]

    real = L
    if HAS_LENGTHS:
        real = tl.minimum(tl.load(lengths + row).to(tl.int32), L)

    cy = tl.zeros([NP, BD], tl.float32)
    if HAS_DLAST:
        cy = tl.load(dh_last + long_row * D * N + tile, mask=tile_in, other=0.0).to(tl.float32)
    if FOLD:
        cy = entering(cy, a, ends, sums, long_row * (n_chunks - 1), part, tile, tile_in, d, D, N, NP, BD)
    dA = tl.zeros([NP, BD], tl.float32)
    dskip = tl.zeros([BD, 4], tl.float32)
    dbias = tl.zeros([BD, 4], tl.float32)

    first = tl.minimum((n_chunks - 1 - part) * chunk, n_segments)
    last = tl.minimum(first + chunk, n_segments)
    for back in steps(0, last - first):
        segment = last - 1 - back
        begin = _segment_begin(segment, interval, seg)
        end = _segment_end(segment, interval, seg, L)
        live = tl.minimum(real, end)
        groups = tl.cdiv(tl.maximum(end - begin, 0), 4)
        # A segment past the end of the text has no state: the buffer's contents must not come into play.
        at = (long_row * n_segments + segment) * D * N
        h = tl.load(states + at + tile, mask=tile_in & (begin + tl.zeros_like(tile) < L), other=0.0)

        # Forward through the segment: the state entering each group of four goes to this program's own scratch.
        t = begin
        u_next = load_group(u_rows, t, u_l, d_in, end)
        raw_next = load_group(delta_rows, t, delta_l, d_in, end)
        b_next = load_group(B_rows, t, B_l, n_in, end)
        for group in steps(0, groups - 1):
            tl.store(heads + group * NP * BD + own, h)
            dt = group_delta(raw_next, b_dt, t, live, SOFTPLUS)
            x = dt * u_next.to(tl.float32)
            b_now = b_next
            t += 4
            u_next = load_group(u_rows, t, u_l, d_in, end)
            raw_next = load_group(delta_rows, t, delta_l, d_in, end)
            b_next = load_group(B_rows, t, B_l, n_in, end)
            dt0, dt1, dt2, dt3 = columns(pinned(dt, BD), BD)
            x0, x1, x2, x3 = columns(pinned(x, BD), BD)
            b0, b1, b2, b3 = columns(b_now.to(tl.float32), NP)
            h = advance(h, a, dt0, x0, b0)
            h = advance(h, a, dt1, x1, b1)
            h = advance(h, a, dt2, x2, b2)
            h = advance(h, a, dt3, x3, b3)
        tl.debug_barrier()

        # Backward: each group is replayed in registers, then walked in reverse.
        h_next = h
        c_next = load_group(C_rows, t, C_l, n_in, end)
        g_next = load_group(dy_rows, t, dy_l, d_in, end)
        z_next = g_next
        if HAS_Z:
            z_next = load_group(z_rows, t, z_l, d_in, end)
        for group in steps(0, groups):
            now = t
            raw = raw_next.to(tl.float32)
            x_in = u_next.to(tl.float32)
            dout = g_next.to(tl.float32)
            gate = z_next.to(tl.float32)
            b_now = b_next
            c_now = c_next
            h_in = h_next
            t = tl.maximum(t - 4, begin)
            u_next = load_group(u_rows, t, u_l, d_in, end)
            raw_next = load_group(delta_rows, t, delta_l, d_in, end)
            b_next = load_group(B_rows, t, B_l, n_in, end)
            c_next = load_group(C_rows, t, C_l, n_in, end)
            g_next = load_group(dy_rows, t, dy_l, d_in, end)
            z_next = g_next
            if HAS_Z:
                z_next = load_group(z_rows, t, z_l, d_in, end)
            h_next = tl.load(heads + tl.maximum(groups - 2 - group, 0) * NP * BD + own)

            dt = pinned(group_delta(raw, b_dt, now, live, SOFTPLUS), BD)
            g = dout
            if HAS_Z:
                s, rest = sigmoids(gate)
                g = dout * (gate * s)
            g = pinned(g, BD)
            dt0, dt1, dt2, dt3 = columns(dt, BD)
            x0, x1, x2, x3 = columns(pinned(dt * x_in, BD), BD)
            g0, g1, g2, g3 = columns(g, BD)
            b0, b1, b2, b3 = columns(b_now.to(tl.float32), NP)
            c0, c1, c2, c3 = columns(c_now.to(tl.float32), NP)
            h0 = advance(h_in, a, dt0, x0, b0)
            h1 = advance(h0, a, dt1, x1, b1)
            h2 = advance(h1, a, dt2, x2, b2)
            h3 = advance(h2, a, dt3, x3, b3)
            cy, dA, y3, v3, r3, dB3, dC3 = _reverse(cy, dA, a, rate, h2, h3, dt3, x3, g3, b3, c3)
            cy, dA, y2, v2, r2, dB2, dC2 = _reverse(cy, dA, a, rate, h1, h2, dt2, x2, g2, b2, c2)
            cy, dA, y1, v1, r1, dB1, dC1 = _reverse(cy, dA, a, rate, h0, h1, dt1, x1, g1, b1, c1)
            cy, dA, y0, v0, r0, dB0, dC0 = _reverse(cy, dA, a, rate, h_in, h0, dt0, x0, g0, b0, c0)

            in_time = now + k < end
            to = part_rows + now.to(tl.int64) * N
            tl.store(dB_part + to, tile_of(dB0, dB1, dB2, dB3, NP), mask=n_in & in_time)
            tl.store(dC_part + to, tile_of(dC0, dC1, dC2, dC3, NP), mask=n_in & in_time)
            to = out_rows + now.to(tl.int64) * D
            through = pinned(tile_of(v0, v1, v2, v3, BD), BD)
            d_dt = tl.fma(through, x_in, pinned(tile_of(r0, r1, r2, r3, BD), BD))
            d_u = through * dt
            if HAS_Z:
                y = pinned(tile_of(y0, y1, y2, y3, BD), BD)
                if HAS_D:
                    y = tl.fma(w_skip, x_in, y)
                d_gate = dout * y * s * tl.fma(gate, rest, 1.0)
                d_gate = d_gate.to(dz.dtype.element_ty)
                tl.store(dz_rows + now.to(tl.int64) * dz_l, d_gate, mask=d_in & in_time)
            if HAS_D:
                d_u = tl.fma(w_skip, g, d_u)
                dskip = tl.fma(g, x_in, dskip)
            if SOFTPLUS:
                d_dt = d_dt * sigmoid(raw + b_dt)
            d_dt = tl.where(now + k < live, d_dt, 0.0)
            if HAS_BIAS:
                dbias += d_dt
            tl.store(du + to, d_u.to(du.dtype.element_ty), mask=d_in & in_time)
            tl.store(ddelta + to, d_dt.to(ddelta.dtype.element_ty), mask=d_in & in_time)
        tl.debug_barrier()
        if HAS_DBOUND:
            if begin < L and begin % interval == 0:
                at = (long_row * n_bound + begin // interval) * D * N
                cy += tl.load(dbound + at + tile, mask=tile_in, other=0.0).to(tl.float32)

    at = long_row * n_chunks + part
    tl.store(dA_part + at * D * N + tile, dA, mask=tile_in)
    if HAS_D:
        tl.store(dskip_part + at * D + d, tl.sum(dskip, axis=1), mask=d < D)
    if HAS_BIAS:
        tl.store(dbias_part + at * D + d, tl.sum(dbias, axis=1), mask=d < D)
    if part == n_chunks - 1:
        tl.store(dh0 + long_row * D * N + tile, cy, mask=tile_in)


@triton.jit
def _add_up(parts, out, i, size, terms, ADD: tl.constexpr):
    """out[i] = Σ parts[·, i], terms in their order."""
    inside = i < size
    total = tl.zeros(i.shape, tl.float32)
    for group in steps(0, tl.cdiv(terms, 8)):  # eight loads in flight, ahead of their additions
        values = ()
        for j in tl.static_range(8):
            term = group * 8 + j
            values = values + (
                tl.load(parts + term * size + i, mask=inside & (tl.zeros_like(i) + term < terms), other=0.0),
            )
        for j in tl.static_range(8):
            total += values[j]
    if ADD:
        total += tl.load(out + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "blocks", "states", "channels", "parts"])
def sum_kernel(
    dB_part, dC_part, dA_part, dskip_part, dbias_part, dB, dC, dA, dskip, dbias,
    size, blocks, states, channels, parts,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All partial sums in one launch: dB, dC (``blocks`` terms of ``size``), dA (``parts`` of ``states``), dD, dbias.

    Grid: blocks of dB, of dC, of dA, of dD and dbias. ``ADD``: to what earlier slices of rows left in dA, dD, dbias.
    """
    pid = tl.program_id(0)
    many = tl.cdiv(size, BLOCK)
    few = tl.cdiv(states, BLOCK)
    i = tl.arange(0, BLOCK)
    size = tl.cast(size, tl.int64)
    if pid < many:
        _add_up(dB_part, dB, pid.to(tl.int64) * BLOCK + i, size, blocks, False)
    elif pid < 2 * many:
        _add_up(dC_part, dC, (pid - many).to(tl.int64) * BLOCK + i, size, blocks, False)
    elif pid < 2 * many + few:
        _add_up(dA_part, dA, (pid - 2 * many).to(tl.int64) * BLOCK + i, states, parts, ADD)
    else:
        at = (pid - 2 * many - few).to(tl.int64) * BLOCK + i
        if HAS_D:
            _add_up(dskip_part, dskip, at, channels, parts, ADD)
        if HAS_BIAS:
            _add_up(dbias_part, dbias, at, channels, parts, ADD)

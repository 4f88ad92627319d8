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
# ruff: noqa: SIM102

import triton
import triton.language as tl

from mambascope.ops.scan.triton_forward import advance, load_row, steps_delta
from mambascope.ops.scan.triton_math import LOG2E, sigmoid, sigmoids, steps

__all__ = ["adjoint_kernel", "backward_kernel"]


@triton.jit
def _segment_begin(segment, interval, seg):
    """First step of a segment: boundaries every ``interval`` steps, each interval cut in segments of ``seg``."""
    per = tl.cdiv(interval, seg)
    return (segment // per) * interval + (segment % per) * seg


@triton.jit
def _segment_end(segment, interval, seg, L):
    begin = _segment_begin(segment, interval, seg)
    return tl.minimum(tl.minimum(begin + seg, (segment // tl.cdiv(interval, seg) + 1) * interval), L)


@triton.jit
def _ungate(dy, z, HAS_Z: tl.constexpr):
    """g, the derivative by y before the gate."""
    if HAS_Z:
        dy = dy * (z * sigmoid(z))
    return dy


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
    d_in = d < D
    n_in = n < N
    tile_in = n_in[:, None] & d_in[None, :]
    tile = d[None, :] * N + n[:, None]
    a = tl.load(A + tile, mask=tile_in, other=0.0).to(tl.float32) * LOG2E
    b_dt = 0.0
    if HAS_BIAS:
        b_dt = tl.load(bias + d, mask=d_in, other=0.0).to(tl.float32)
    delta_rows = delta + long_row * delta_b + d
    C_rows = C + long_row * C_b + n
    dy_rows = dy + long_row * dy_b + d
    z_rows = dy_rows
    if HAS_Z:
        z_rows = z + long_row * z_b + d
    real = L
    if HAS_LENGTHS:
        real = tl.minimum(tl.load(lengths + row).to(tl.int32), L)

    cy = tl.zeros([NP, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    first = tl.minimum((n_chunks - 1 - part) * chunk, n_segments)
    last = tl.minimum(first + chunk, n_segments)
    for back in steps(0, last - first):
        segment = last - 1 - back
        begin = _segment_begin(segment, interval, seg)
        end = _segment_end(segment, interval, seg, L)
        live = tl.minimum(real, end)
        groups = tl.cdiv(tl.maximum(end - begin, 0), 4)
        for group in steps(0, groups):
            t = begin + (groups - 1 - group) * 4
            r3 = load_row(delta_rows, t + 3, delta_l, d_in, end)
            r2 = load_row(delta_rows, t + 2, delta_l, d_in, end)
            r1 = load_row(delta_rows, t + 1, delta_l, d_in, end)
            r0 = load_row(delta_rows, t, delta_l, d_in, end)
            g3 = load_row(dy_rows, t + 3, dy_l, d_in, end)
            g2 = load_row(dy_rows, t + 2, dy_l, d_in, end)
            g1 = load_row(dy_rows, t + 1, dy_l, d_in, end)
            g0 = load_row(dy_rows, t, dy_l, d_in, end)
            c3 = load_row(C_rows, t + 3, C_l, n_in, end)
            c2 = load_row(C_rows, t + 2, C_l, n_in, end)
            c1 = load_row(C_rows, t + 1, C_l, n_in, end)
            c0 = load_row(C_rows, t, C_l, n_in, end)
            if HAS_Z:
                g3 = _ungate(g3, load_row(z_rows, t + 3, z_l, d_in, end), HAS_Z)
                g2 = _ungate(g2, load_row(z_rows, t + 2, z_l, d_in, end), HAS_Z)
                g1 = _ungate(g1, load_row(z_rows, t + 1, z_l, d_in, end), HAS_Z)
                g0 = _ungate(g0, load_row(z_rows, t, z_l, d_in, end), HAS_Z)
            dt3 = steps_delta(r3, b_dt, t + 3, live, SOFTPLUS)
            dt2 = steps_delta(r2, b_dt, t + 2, live, SOFTPLUS)
            dt1 = steps_delta(r1, b_dt, t + 1, live, SOFTPLUS)
            dt0 = steps_delta(r0, b_dt, t, live, SOFTPLUS)
            cy = tl.exp2(a * dt3[None, :]) * tl.fma(c3[:, None], g3[None, :], cy)
            cy = tl.exp2(a * dt2[None, :]) * tl.fma(c2[:, None], g2[None, :], cy)
            cy = tl.exp2(a * dt1[None, :]) * tl.fma(c1[:, None], g1[None, :], cy)
            cy = tl.exp2(a * dt0[None, :]) * tl.fma(c0[:, None], g0[None, :], cy)
            total += (dt0 + dt1) + (dt2 + dt3)
        if HAS_DBOUND:
            if begin < L and begin % interval == 0:
                at = (long_row * n_bound + begin // interval) * D * N
                cy += tl.load(dbound + at + tile, mask=tile_in, other=0.0).to(tl.float32)
    at = long_row * (n_chunks - 1) + part
    tl.store(ends + at * D * N + tile, cy, mask=tile_in)
    tl.store(sums + at * D + d, total, mask=d_in)


@triton.jit(do_not_specialize=["L", "D", "chunk", "n_chunks", "interval", "seg", "n_segments", "n_bound", "batch"])
def backward_kernel(
    u, delta, A, B, C, skip, z, bias, lengths, states, dy, dbound, starts,
    du, ddelta, dz, dB_part, dC_part, dA_part, dskip_part, dbias_part, dh0, scratch,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, dy_b, dy_l,
    L, D, chunk, n_chunks, interval, seg, n_segments, n_bound, batch,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_DBOUND: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """All gradients. ``states`` B n_segments D N: state entering each segment; ``starts`` B n_chunks D N: adjoint
    arriving at each chunk's right end (chunks counted from the right), zero if there is none.

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
    d_in = d < D
    n_in = n < N
    tile_in = n_in[:, None] & d_in[None, :]
    tile = d[None, :] * N + n[:, None]
    rate = tl.load(A + tile, mask=tile_in, other=0.0).to(tl.float32)
    a = rate * LOG2E
    b_dt = 0.0
    if HAS_BIAS:
        b_dt = tl.load(bias + d, mask=d_in, other=0.0).to(tl.float32)
    w_skip = 0.0
    if HAS_D:
        w_skip = tl.load(skip + d, mask=d_in, other=0.0).to(tl.float32)

    u_rows = u + long_row * u_b + d
    delta_rows = delta + long_row * delta_b + d
    B_rows = B + long_row * B_b + n
    C_rows = C + long_row * C_b + n
    dy_rows = dy + long_row * dy_b + d
    z_rows = dy_rows
    if HAS_Z:
        z_rows = z + long_row * z_b + d
    du_rows = du + long_row * L * D + d
    ddelta_rows = ddelta + long_row * L * D + d
    dz_rows = du_rows
    if HAS_Z:
        dz_rows = dz + long_row * L * D + d
    dB_rows = dB_part + (block.to(tl.int64) * batch + row) * L * N + n
    dC_rows = dC_part + (block.to(tl.int64) * batch + row) * L * N + n
    heads = scratch + pid.to(tl.int64) * tl.cdiv(seg, 4) * NP * BD
    tile_own = tl.arange(0, BD)[None, :] * NP + n[:, None]

    real = L
    if HAS_LENGTHS:
        real = tl.minimum(tl.load(lengths + row).to(tl.int32), L)

    cy = tl.zeros([NP, BD], tl.float32)
    if HAS_STARTS:
        at = (long_row * n_chunks + part) * D * N
        cy = tl.load(starts + at + tile, mask=tile_in, other=0.0).to(tl.float32)
    dA = tl.zeros([NP, BD], tl.float32)
    dskip = tl.zeros([BD], tl.float32)
    dbias = tl.zeros([BD], tl.float32)

    first = tl.minimum((n_chunks - 1 - part) * chunk, n_segments)
    last = tl.minimum(first + chunk, n_segments)
    for back in steps(0, last - first):
        segment = last - 1 - back
        begin = _segment_begin(segment, interval, seg)
        end = _segment_end(segment, interval, seg, L)
        live = tl.minimum(real, end)
        groups = tl.cdiv(tl.maximum(end - begin, 0), 4)
        at = (long_row * n_segments + segment) * D * N
        h = tl.load(states + at + tile, mask=tile_in & (begin < L), other=0.0)
        # Forward through the segment: the state entering each group of four goes to this program's own scratch.
        for group in steps(0, groups - 1):
            tl.store(heads + group * NP * BD + tile_own, h)
            t = begin + group * 4
            r0 = load_row(delta_rows, t, delta_l, d_in, end)
            r1 = load_row(delta_rows, t + 1, delta_l, d_in, end)
            r2 = load_row(delta_rows, t + 2, delta_l, d_in, end)
            r3 = load_row(delta_rows, t + 3, delta_l, d_in, end)
            u0 = load_row(u_rows, t, u_l, d_in, end)
            u1 = load_row(u_rows, t + 1, u_l, d_in, end)
            u2 = load_row(u_rows, t + 2, u_l, d_in, end)
            u3 = load_row(u_rows, t + 3, u_l, d_in, end)
            b0 = load_row(B_rows, t, B_l, n_in, end)
            b1 = load_row(B_rows, t + 1, B_l, n_in, end)
            b2 = load_row(B_rows, t + 2, B_l, n_in, end)
            b3 = load_row(B_rows, t + 3, B_l, n_in, end)
            h = advance(h, a, steps_delta(r0, b_dt, t, live, SOFTPLUS), u0, b0)
            h = advance(h, a, steps_delta(r1, b_dt, t + 1, live, SOFTPLUS), u1, b1)
            h = advance(h, a, steps_delta(r2, b_dt, t + 2, live, SOFTPLUS), u2, b2)
            h = advance(h, a, steps_delta(r3, b_dt, t + 3, live, SOFTPLUS), u3, b3)
        tl.store(heads + tl.maximum(groups - 1, 0) * NP * BD + tile_own, h)
        tl.debug_barrier()
        for group in steps(0, groups):
            own = groups - 1 - group
            t = begin + own * 4
            r0 = load_row(delta_rows, t, delta_l, d_in, end)
            r1 = load_row(delta_rows, t + 1, delta_l, d_in, end)
            r2 = load_row(delta_rows, t + 2, delta_l, d_in, end)
            r3 = load_row(delta_rows, t + 3, delta_l, d_in, end)
            u0 = load_row(u_rows, t, u_l, d_in, end)
            u1 = load_row(u_rows, t + 1, u_l, d_in, end)
            u2 = load_row(u_rows, t + 2, u_l, d_in, end)
            u3 = load_row(u_rows, t + 3, u_l, d_in, end)
            b0 = load_row(B_rows, t, B_l, n_in, end)
            b1 = load_row(B_rows, t + 1, B_l, n_in, end)
            b2 = load_row(B_rows, t + 2, B_l, n_in, end)
            b3 = load_row(B_rows, t + 3, B_l, n_in, end)
            h_in = tl.load(heads + own * NP * BD + tile_own)
            dt0 = steps_delta(r0, b_dt, t, live, SOFTPLUS)
            dt1 = steps_delta(r1, b_dt, t + 1, live, SOFTPLUS)
            dt2 = steps_delta(r2, b_dt, t + 2, live, SOFTPLUS)
            dt3 = steps_delta(r3, b_dt, t + 3, live, SOFTPLUS)
            h0 = advance(h_in, a, dt0, u0, b0)
            h1 = advance(h0, a, dt1, u1, b1)
            h2 = advance(h1, a, dt2, u2, b2)
            h3 = advance(h2, a, dt3, u3, b3)
            for i in tl.static_range(3, -1, -1):
                if i == 3:
                    h, h_before, raw, x, b, dt = h3, h2, r3, u3, b3, dt3
                elif i == 2:
                    h, h_before, raw, x, b, dt = h2, h1, r2, u2, b2, dt2
                elif i == 1:
                    h, h_before, raw, x, b, dt = h1, h0, r1, u1, b1, dt1
                else:
                    h, h_before, raw, x, b, dt = h0, h_in, r0, u0, b0, dt0
                now = t + i
                c = load_row(C_rows, now, C_l, n_in, end)
                g = load_row(dy_rows, now, dy_l, d_in, end)
                d_in_now = d_in & (now < end)
                n_in_now = n_in & (now < end)
                to = now.to(tl.int64) * D
                to_n = now.to(tl.int64) * N
                if HAS_Z:
                    gate = load_row(z_rows, now, z_l, d_in, end)
                    s, rest = sigmoids(gate)
                    y = tl.sum(h * c[:, None], axis=0)
                    if HAS_D:
                        y = y + w_skip * x
                    d_gate = g * y * s * tl.fma(gate, rest, 1.0)
                    tl.store(dz_rows + to, d_gate.to(dz.dtype.element_ty), mask=d_in_now)
                    g = g * (gate * s)
                q = tl.fma(c[:, None], g[None, :], cy)
                tl.store(dC_rows + to_n, tl.sum(h * g[None, :], axis=1), mask=n_in_now)
                tl.store(dB_rows + to_n, tl.sum(q * (dt * x)[None, :], axis=1), mask=n_in_now)
                through = tl.sum(q * b[:, None], axis=0)
                cy = tl.exp2(a * dt[None, :]) * q
                r = cy * h_before
                d_dt = tl.fma(through, x, tl.sum(r * rate, axis=0))
                dA = tl.fma(r, dt[None, :], dA)
                d_u = through * dt
                if HAS_D:
                    d_u = tl.fma(w_skip, g, d_u)
                    dskip = tl.fma(g, x, dskip)
                if SOFTPLUS:
                    d_dt = d_dt * sigmoid(raw + b_dt)
                d_dt = tl.where(now < live, d_dt, 0.0)
                if HAS_BIAS:
                    dbias += d_dt
                tl.store(du_rows + to, d_u.to(du.dtype.element_ty), mask=d_in_now)
                tl.store(ddelta_rows + to, d_dt.to(ddelta.dtype.element_ty), mask=d_in_now)
        tl.debug_barrier()
        if HAS_DBOUND:
            if begin < L and begin % interval == 0:
                at = (long_row * n_bound + begin // interval) * D * N
                cy += tl.load(dbound + at + tile, mask=tile_in, other=0.0).to(tl.float32)

    at = long_row * n_chunks + part
    tl.store(dA_part + at * D * N + tile, dA, mask=tile_in)
    if HAS_D:
        tl.store(dskip_part + at * D + d, dskip, mask=d_in)
    if HAS_BIAS:
        tl.store(dbias_part + at * D + d, dbias, mask=d_in)
    if part == n_chunks - 1:
        tl.store(dh0 + long_row * D * N + tile, cy, mask=tile_in)

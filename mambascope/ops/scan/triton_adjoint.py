"""The adjoint of a run against the difference of two runs' states, on the GPU; see `mambascope.ops.scan.adjoint`.

The walk is the backward pass's: segments between boundary states, the state entering every group of four steps noted
in a scratch, each group replayed in registers from the last to the first. Chunks of time run side by side, joined by
the adjoint kernel.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from mambascope.ops.scan.triton_forward import advance, columns, entering, group_delta, load_group, pinned, tile_of
from mambascope.ops.scan.triton_math import LOG2E, steps

__all__ = ["contraction_kernel"]


@triton.jit
def _tiles(raw, x_in, b, t, live, BD: tl.constexpr, NP: tl.constexpr):
    """delta, delta · u and B of four steps, column by column."""
    dt = group_delta(raw, 0.0, t, live, False)
    x = dt * x_in.to(tl.float32)
    return columns(pinned(dt, BD), BD), columns(pinned(x, BD), BD), columns(b.to(tl.float32), NP)


@triton.jit
def _four(h, a, dt, x, b):
    """The states after each of four steps."""
    h0 = advance(h, a, dt[0], x[0], b[0])
    h1 = advance(h0, a, dt[1], x[1], b[1])
    h2 = advance(h1, a, dt[2], x[2], b[2])
    return h0, h1, h2, advance(h2, a, dt[3], x[3], b[3])


@triton.jit
def _turn(cy, a, dt, g, c, apart):
    """One step of the adjoint against the states' difference: what goes on to the left, and the sum over states."""
    q = tl.fma(c[:, None], g[None, :], cy)
    return tl.exp2(a * dt[None, :]) * q, tl.sum(q * apart, axis=0)


@triton.jit(do_not_specialize=["L", "D", "chunk", "n_chunks", "interval", "n_segments", "batch"])
def contraction_kernel(
    dy, delta, C, A, u1, delta1, B1, states1, u2, delta2, B2, states2, ends, sums, out, scratch,
    dy_b, dy_l, delta_b, delta_l, C_b, C_l, u1_b, u1_l, delta1_b, delta1_l, B1_b, B1_l,
    u2_b, u2_l, delta2_b, delta2_l, B2_b, B2_l,
    L, D, chunk, n_chunks, interval, n_segments, batch,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Grid: channel blocks × rows × chunks, chunks counted from the right. ``chunk`` is a number of segments.

    ``states1``, ``states2`` B n_segments D N: the states entering each segment; with ``FOLD``, ``ends`` and ``sums``
    are the adjoint kernel's.
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
    a = tl.load(A + tile, mask=tile_in, other=0.0).to(tl.float32) * LOG2E
    d_in = (d < D)[:, None]
    n_in = (n < N)[:, None]

    dy_rows = dy + long_row * dy_b + d[:, None] + k * dy_l
    delta_rows = delta + long_row * delta_b + d[:, None] + k * delta_l
    C_rows = C + long_row * C_b + n[:, None] + k * C_l
    u1_rows = u1 + long_row * u1_b + d[:, None] + k * u1_l
    delta1_rows = delta1 + long_row * delta1_b + d[:, None] + k * delta1_l
    B1_rows = B1 + long_row * B1_b + n[:, None] + k * B1_l
    u2_rows = u2 + long_row * u2_b + d[:, None] + k * u2_l
    delta2_rows = delta2 + long_row * delta2_b + d[:, None] + k * delta2_l
    B2_rows = B2 + long_row * B2_b + n[:, None] + k * B2_l
    out_rows = out + long_row * L * D + d[:, None] + k * D
    per = tl.cdiv(interval, 4)
    heads1 = scratch + pid.to(tl.int64) * 2 * per * NP * BD
    heads2 = heads1 + per * NP * BD
    own = tl.arange(0, BD)[None, :] * NP + n[:, None]

    cy = tl.zeros([NP, BD], tl.float32)
    if FOLD:
        cy = entering(cy, a, ends, sums, long_row * (n_chunks - 1), part, tile, tile_in, d, D, N, NP, BD)

    first = tl.minimum((n_chunks - 1 - part) * chunk, n_segments)
    last = tl.minimum(first + chunk, n_segments)
    for back in steps(0, last - first):
        segment = last - 1 - back
        begin = segment * interval
        end = tl.minimum(begin + interval, L)
        groups = tl.cdiv(end - begin, 4)
        at = (long_row * n_segments + segment) * D * N
        h = tl.load(states1 + at + tile, mask=tile_in, other=0.0).to(tl.float32)
        o = tl.load(states2 + at + tile, mask=tile_in, other=0.0).to(tl.float32)
        t = begin
        for group in steps(0, groups - 1):
            tl.store(heads1 + group * NP * BD + own, h)
            tl.store(heads2 + group * NP * BD + own, o)
            raw1 = load_group(delta1_rows, t, delta1_l, d_in, end)
            x1 = load_group(u1_rows, t, u1_l, d_in, end)
            b1 = load_group(B1_rows, t, B1_l, n_in, end)
            raw2 = load_group(delta2_rows, t, delta2_l, d_in, end)
            x2 = load_group(u2_rows, t, u2_l, d_in, end)
            b2 = load_group(B2_rows, t, B2_l, n_in, end)
            dts, xs, bs = _tiles(raw1, x1, b1, t, end, BD, NP)
            _, _, _, h = _four(h, a, dts, xs, bs)
            dts, xs, bs = _tiles(raw2, x2, b2, t, end, BD, NP)
            _, _, _, o = _four(o, a, dts, xs, bs)
            t += 4
        tl.debug_barrier()

        for group in steps(0, groups):
            raw1 = load_group(delta1_rows, t, delta1_l, d_in, end)
            x1 = load_group(u1_rows, t, u1_l, d_in, end)
            b1 = load_group(B1_rows, t, B1_l, n_in, end)
            raw2 = load_group(delta2_rows, t, delta2_l, d_in, end)
            x2 = load_group(u2_rows, t, u2_l, d_in, end)
            b2 = load_group(B2_rows, t, B2_l, n_in, end)
            raw = load_group(delta_rows, t, delta_l, d_in, end)
            g = load_group(dy_rows, t, dy_l, d_in, end)
            c = load_group(C_rows, t, C_l, n_in, end)
            before = tl.maximum(groups - 2 - group, 0) * NP * BD + own
            h_next = tl.load(heads1 + before)
            o_next = tl.load(heads2 + before)
            dts, xs, bs = _tiles(raw1, x1, b1, t, end, BD, NP)
            h0, h1, h2, h3 = _four(h, a, dts, xs, bs)
            dts, xs, bs = _tiles(raw2, x2, b2, t, end, BD, NP)
            o0, o1, o2, o3 = _four(o, a, dts, xs, bs)
            dt0, dt1, dt2, dt3 = columns(pinned(group_delta(raw, 0.0, t, end, False), BD), BD)
            g0, g1, g2, g3 = columns(pinned(g.to(tl.float32), BD), BD)
            c0, c1, c2, c3 = columns(c.to(tl.float32), NP)
            cy, s3 = _turn(cy, a, dt3, g3, c3, o3 - h3)
            cy, s2 = _turn(cy, a, dt2, g2, c2, o2 - h2)
            cy, s1 = _turn(cy, a, dt1, g1, c1, o1 - h1)
            cy, s0 = _turn(cy, a, dt0, g0, c0, o0 - h0)
            tl.store(out_rows + t.to(tl.int64) * D, tile_of(s0, s1, s2, s3, BD), mask=d_in & (t + k < end))
            h = h_next
            o = o_next
            t = tl.maximum(t - 4, begin)
        tl.debug_barrier()

"""The selective scan's forward kernels: state tile ``[N, channels]``, time walked in order, in one pass or in chunks.

One program owns 32 channels (fewer for large N) of one row and holds all N states of a channel in one thread, so that
the sum over N needs no exchange between threads. Where rows × channels are too few programs to fill the GPU, time is
cut in chunks: ends (every chunk from a zero state), carry (start states of the chunks), outputs (every chunk again,
from its start state). h over a chunk is affine in its start: ``h_end = exp(A Σ delta) h_start + end``; exponents are
sums within one chunk and never positive, so nothing is divided and nothing overflows.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: SIM102, RUF005

import triton
import triton.language as tl

from mambascope.ops.scan.triton_math import LOG2E, silu, softplus, steps

__all__ = ["advance", "carry_kernel", "forward_kernel", "load_row", "steps_delta"]

ENDS = tl.constexpr(0)
OUTPUTS = tl.constexpr(1)
STATES = tl.constexpr(2)
WINDOW = tl.constexpr(3)


@triton.jit
def load_row(rows, t, stride, mask, end):
    """Row t of a tensor in float32; zeros where masked and from ``end`` on."""
    return tl.load(rows + t.to(tl.int64) * stride, mask=mask & (t < end), other=0.0).to(tl.float32)


@triton.jit
def steps_delta(raw, bias, t, end, SOFTPLUS: tl.constexpr):
    """Step sizes of row t: exactly 0 from ``end`` on, where the state must stand still."""
    if SOFTPLUS:
        raw = softplus(raw + bias)
    return tl.where(t < end, raw, 0.0)


@triton.jit
def advance(h, a, dt, u, b):
    return tl.fma(tl.exp2(a * dt[None, :]), h, (dt * u)[None, :] * b[:, None])


@triton.jit
def _finish(h, c, u, z, skip, HAS_D: tl.constexpr, HAS_Z: tl.constexpr):
    """y of one step: C·h, then D·u and the gate, each rounded as if it were computed apart."""
    y = tl.sum(h * c[:, None], axis=0)
    if HAS_D:
        y = y + skip * u
    if HAS_Z:
        y = y * silu(z)
    return y


@triton.jit(do_not_specialize=["L", "D", "chunk", "n_chunks", "interval", "n_bound"])
def forward_kernel(
    u, delta, A, B, C, skip, z, bias, h0, lengths,
    y, h_last, bound, starts, ends, sums,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
    L, D, chunk, n_chunks, interval, n_bound,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, MODE: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_H0: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, BOUNDARIES: tl.constexpr,
):  # fmt: skip
    """One walk over every chunk.

    MODE ENDS: chunks 0 … n_chunks − 2 from zero; writes ``ends`` and ``sums``. MODE OUTPUTS: from the start states;
    writes y, the last state and the boundary states. MODE STATES: from the start states; writes boundary states only.
    MODE WINDOW: one chunk; writes the state after every step. Grid: channel blocks × rows × chunks. ``interval`` cuts
    a chunk in segments, and the state entering each of them is a boundary state.
    """
    blocks = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    rows = tl.num_programs(0) // blocks // (n_chunks - 1 if MODE == ENDS else n_chunks)
    block = pid % blocks
    row = (pid // blocks) % rows
    part = pid // (blocks * rows)
    long_row = row.to(tl.int64)

    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    d_in = d < D
    n_in = n < N
    tile_in = n_in[:, None] & d_in[None, :]
    tile = d[None, :] * N + n[:, None]  # place in a D N matrix
    a = tl.load(A + tile, mask=tile_in, other=0.0).to(tl.float32) * LOG2E
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
    z_rows = u_rows
    if HAS_Z:
        z_rows = z + long_row * z_b + d
    y_rows = y + long_row * L * D + d

    real = L
    if HAS_LENGTHS:
        real = tl.minimum(tl.load(lengths + row).to(tl.int32), L)

    h = tl.zeros([NP, BD], tl.float32)
    total = tl.zeros([BD], tl.float32)
    if MODE != ENDS:
        if HAS_STARTS:
            at = (long_row * n_chunks + part) * D * N
            h = tl.load(starts + at + tile, mask=tile_in, other=0.0)
        elif HAS_H0:
            h = tl.load(h0 + long_row * D * N + tile, mask=tile_in, other=0.0).to(tl.float32)

    first = part * chunk
    last = tl.minimum(first + chunk, L)
    for segment in steps(0, tl.cdiv(last - first, interval)):
        begin = first + segment * interval
        end = tl.minimum(begin + interval, last)
        live = tl.minimum(real, end)
        if BOUNDARIES:
            at = (long_row * n_bound + part * tl.cdiv(chunk, interval) + segment) * D * N
            tl.store(bound + at + tile, h, mask=tile_in)
        for group in steps(0, tl.cdiv(end - begin, 4)):
            t0 = begin + group * 4
            t1 = t0 + 1
            t2 = t0 + 2
            t3 = t0 + 3
            # All loads of four steps stand before their arithmetic: a store between loads keeps the compiler from it.
            u0 = load_row(u_rows, t0, u_l, d_in, end)
            u1 = load_row(u_rows, t1, u_l, d_in, end)
            u2 = load_row(u_rows, t2, u_l, d_in, end)
            u3 = load_row(u_rows, t3, u_l, d_in, end)
            r0 = load_row(delta_rows, t0, delta_l, d_in, end)
            r1 = load_row(delta_rows, t1, delta_l, d_in, end)
            r2 = load_row(delta_rows, t2, delta_l, d_in, end)
            r3 = load_row(delta_rows, t3, delta_l, d_in, end)
            b0 = load_row(B_rows, t0, B_l, n_in, end)
            b1 = load_row(B_rows, t1, B_l, n_in, end)
            b2 = load_row(B_rows, t2, B_l, n_in, end)
            b3 = load_row(B_rows, t3, B_l, n_in, end)
            if MODE == OUTPUTS:
                c0 = load_row(C_rows, t0, C_l, n_in, end)
                c1 = load_row(C_rows, t1, C_l, n_in, end)
                c2 = load_row(C_rows, t2, C_l, n_in, end)
                c3 = load_row(C_rows, t3, C_l, n_in, end)
                z0 = u0
                z1 = u1
                z2 = u2
                z3 = u3
                if HAS_Z:
                    z0 = load_row(z_rows, t0, z_l, d_in, end)
                    z1 = load_row(z_rows, t1, z_l, d_in, end)
                    z2 = load_row(z_rows, t2, z_l, d_in, end)
                    z3 = load_row(z_rows, t3, z_l, d_in, end)
            dt0 = steps_delta(r0, b_dt, t0, live, SOFTPLUS)
            dt1 = steps_delta(r1, b_dt, t1, live, SOFTPLUS)
            dt2 = steps_delta(r2, b_dt, t2, live, SOFTPLUS)
            dt3 = steps_delta(r3, b_dt, t3, live, SOFTPLUS)
            if MODE == OUTPUTS:
                h = advance(h, a, dt0, u0, b0)
                y0 = _finish(h, c0, u0, z0, w_skip, HAS_D, HAS_Z)
                h = advance(h, a, dt1, u1, b1)
                y1 = _finish(h, c1, u1, z1, w_skip, HAS_D, HAS_Z)
                h = advance(h, a, dt2, u2, b2)
                y2 = _finish(h, c2, u2, z2, w_skip, HAS_D, HAS_Z)
                h = advance(h, a, dt3, u3, b3)
                y3 = _finish(h, c3, u3, z3, w_skip, HAS_D, HAS_Z)
                kind = y.dtype.element_ty
                tl.store(y_rows + t0.to(tl.int64) * D, y0.to(kind), mask=d_in & (t0 < end))
                tl.store(y_rows + t1.to(tl.int64) * D, y1.to(kind), mask=d_in & (t1 < end))
                tl.store(y_rows + t2.to(tl.int64) * D, y2.to(kind), mask=d_in & (t2 < end))
                tl.store(y_rows + t3.to(tl.int64) * D, y3.to(kind), mask=d_in & (t3 < end))
            elif MODE == WINDOW:
                at = bound + (long_row * L + t0) * D * N + tile
                h = advance(h, a, dt0, u0, b0)
                tl.store(at, h, mask=tile_in)
                h = advance(h, a, dt1, u1, b1)
                tl.store(at + D * N, h, mask=tile_in & (t1 < end))
                h = advance(h, a, dt2, u2, b2)
                tl.store(at + 2 * D * N, h, mask=tile_in & (t2 < end))
                h = advance(h, a, dt3, u3, b3)
                tl.store(at + 3 * D * N, h, mask=tile_in & (t3 < end))
            else:
                h = advance(h, a, dt0, u0, b0)
                h = advance(h, a, dt1, u1, b1)
                h = advance(h, a, dt2, u2, b2)
                h = advance(h, a, dt3, u3, b3)
                if MODE == ENDS:
                    total += (dt0 + dt1) + (dt2 + dt3)

    if MODE == OUTPUTS:
        if part == n_chunks - 1:
            tl.store(h_last + long_row * D * N + tile, h, mask=tile_in)
    if MODE == ENDS:
        at = long_row * (n_chunks - 1) + part
        tl.store(ends + at * D * N + tile, h, mask=tile_in)
        tl.store(sums + at * D + d, total, mask=d_in)


@triton.jit(do_not_specialize=["D", "n_chunks"])
def carry_kernel(
    A, first, starts, ends, sums, D, n_chunks,
    N: tl.constexpr, BLOCK: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """Start states of all chunks: ``starts[0] = first``, ``starts[c+1] = exp(A sums[c]) starts[c] + ends[c]``.

    Grid: blocks of D·N entries × rows. Eight chunks are loaded at a time, ahead of the carry.
    """
    blocks = tl.cdiv(D * N, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < D * N
    a = tl.load(A + i, mask=inside, other=0.0).to(tl.float32) * LOG2E
    h = tl.zeros([BLOCK], tl.float32)
    if HAS_FIRST:
        h = tl.load(first + row * D * N + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(starts + row * n_chunks * D * N + i, h, mask=inside)
    for group in steps(0, tl.cdiv(n_chunks - 1, 8)):
        totals = ()
        locals_ = ()
        for k in tl.static_range(8):
            part = group * 8 + k
            at = row * (n_chunks - 1) + part
            there = inside & (part < n_chunks - 1)
            totals = totals + (tl.load(sums + at * D + i // N, mask=there, other=0.0),)
            locals_ = locals_ + (tl.load(ends + at * D * N + i, mask=there, other=0.0),)
        for k in tl.static_range(8):
            part = group * 8 + k
            h = tl.fma(tl.exp2(a * totals[k]), h, locals_[k])
            there = inside & (part < n_chunks - 1)
            tl.store(starts + (row * n_chunks + part + 1) * D * N + i, h, mask=there)

"""The selective scan's forward kernels: state tile ``[N, channels]``, time walked in order, in one pass or in chunks.

One program owns 32 channels (fewer for large N) of one row and holds all N states of a channel in one thread, so that
the sum over N needs no exchange between threads. Where rows × channels are too few programs to fill the GPU, time is
cut in chunks, in two passes: the end state of every chunk from a zero state, then the outputs of every chunk from its
start state. h over a chunk is affine in its start, ``h_end = exp(A Σ delta) h_start + end``, so a program of the second
pass folds the ends of the chunks before its own. Exponents are sums within one chunk and never positive: nothing is
divided, nothing overflows.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: SIM102, RUF005

import triton
import triton.language as tl

from mambascope.ops.scan.triton_math import LOG2E, decay, product, silu, softplus, steps

__all__ = [
    "advance",
    "columns",
    "entering",
    "forward_kernel",
    "group_delta",
    "load_group",
    "pinned",
    "tile_of",
]

ENDS = tl.constexpr(0)
OUTPUTS = tl.constexpr(1)
STATES = tl.constexpr(2)
WINDOW = tl.constexpr(3)


@triton.jit
def pinned(x, BD: tl.constexpr):
    """x unchanged, in the layout in which it was computed.

    Work once per (step, channel) is spread over all threads and its result then handed to those that hold the states.
    The compiler would rather hand over the inputs and repeat the work in every thread; a scan along an axis of
    length 1 is a place that it does not move layouts across.
    """
    return tl.reshape(tl.cumsum(tl.reshape(x, [BD, 4, 1]), axis=2), [BD, 4])


@triton.jit
def columns(x, ROWS: tl.constexpr):
    """The four columns of a ``ROWS 4`` tile."""
    even, odd = tl.split(tl.reshape(x, [ROWS, 2, 2]))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    return c0, c1, c2, c3


@triton.jit
def tile_of(c0, c1, c2, c3, ROWS: tl.constexpr):
    """The ``ROWS 4`` tile of four columns."""
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), [ROWS, 4])


@triton.jit
def load_group(base, t, stride, rows_in, end):
    """Rows t … t + 3 of a tensor, transposed: ``channels 4``; zeros where masked and from ``end`` on."""
    inside = rows_in & (t + tl.arange(0, 4) < end)[None, :]
    return tl.load(base + t.to(tl.int64) * stride, mask=inside, other=0.0)


@triton.jit
def group_delta(raw, bias, t, live, SOFTPLUS: tl.constexpr):
    """Step sizes of four steps: exactly 0 from ``live`` on, where the state must stand still."""
    raw = raw.to(tl.float32)
    if SOFTPLUS:
        raw = softplus(raw + bias)
    return tl.where((t + tl.arange(0, 4) < live)[None, :], raw, 0.0)


@triton.jit
def advance(h, a, dt, x, b):
    """h after one step; x is delta · u."""
    return tl.fma(decay(a, dt[None, :]), h, x[None, :] * b[:, None])


@triton.jit
def entering(h, a, ends, sums, first, count, tile, tile_in, d, D, N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr):
    """State entering a chunk, from the one that enters the first: ``h = exp(A sums[c]) h + ends[c]`` over ``count``
    chunks whose ends begin at place ``first``. Four chunks are loaded at a time, ahead of the arithmetic."""
    zero = tl.zeros([NP, BD], tl.int32)
    for group in steps(0, tl.cdiv(count, 4)):
        totals = ()
        values = ()
        for j in tl.static_range(4):
            at = first + group * 4 + j
            there = tile_in & (zero + group * 4 + j < count)
            counted = (d < D) & (tl.zeros_like(d) + group * 4 + j < count)
            totals = totals + (tl.load(sums + at * D + d, mask=counted, other=0.0),)
            values = values + (tl.load(ends + at * D * N + tile, mask=there, other=0.0),)
        for j in tl.static_range(4):
            h = tl.fma(decay(a, totals[j][None, :]), h, values[j])
    return h


@triton.jit
def _read(h, c):
    return tl.sum(h * c[:, None], axis=0)


@triton.jit(do_not_specialize=["L", "D", "chunk", "n_chunks", "interval", "n_bound"])
def forward_kernel(
    u, delta, A, B, C, skip, z, bias, h0, lengths,
    y, h_last, bound, starts, ends, sums,
    u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l,
    L, D, chunk, n_chunks, interval, n_bound,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, MODE: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_H0: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, BOUNDARIES: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """One walk over every chunk, in groups of four steps.

    MODE ENDS: chunks 0 … n_chunks − 2 from zero; writes ``ends`` and ``sums``. MODE OUTPUTS: from h0, with ``FOLD`` by
    way of the earlier chunks' ends; writes y, the last state and the boundary states. MODE STATES: every chunk from its
    state in ``starts``; writes boundary states only. MODE WINDOW: one chunk; writes the state after every step.

    Grid: channel blocks × rows × chunks. ``interval`` cuts a chunk in segments, and the state entering each of them is
    a boundary state. A group does not cross a segment.
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
    k = tl.arange(0, 4)[None, :]
    d_in = d < D
    n_in = n < N
    tile_in = n_in[:, None] & d_in[None, :]
    tile = d[None, :] * N + n[:, None]  # place in a D N matrix
    a = tl.load(A + tile, mask=tile_in, other=0.0).to(tl.float32) * LOG2E
    d_in = d_in[:, None]
    n_in = n_in[:, None]
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
    z_rows = u_rows
    if HAS_Z:
        z_rows = z + long_row * z_b + d[:, None] + k * z_l

    real = L
    if HAS_LENGTHS:
        real = tl.minimum(tl.load(lengths + row).to(tl.int32), L)

    h = tl.zeros([NP, BD], tl.float32)
    total = tl.zeros([BD, 4], tl.float32)
    if MODE != ENDS:
        if HAS_STARTS:
            at = (long_row * n_chunks + part) * D * N
            h = tl.load(starts + at + tile, mask=tile_in, other=0.0)
        elif HAS_H0:
            h = tl.load(h0 + long_row * D * N + tile, mask=tile_in, other=0.0).to(tl.float32)
        if FOLD:
            h = entering(h, a, ends, sums, long_row * (n_chunks - 1), part, tile, tile_in, d, D, N, NP, BD)

    t = part * chunk
    last = tl.minimum(t + chunk, L)
    end = tl.minimum(t + interval, last)
    segment = long_row * n_bound + part * tl.cdiv(chunk, interval)
    fresh = True  # whether a segment begins here
    whole = (last - t) // interval
    groups = whole * tl.cdiv(interval, 4) + tl.cdiv(last - t - whole * interval, 4)
    # Loads run one group ahead of the arithmetic.
    u_next = load_group(u_rows, t, u_l, d_in, end)
    raw_next = load_group(delta_rows, t, delta_l, d_in, end)
    b_next = load_group(B_rows, t, B_l, n_in, end)
    c_next = b_next
    z_next = u_next
    if MODE == OUTPUTS:
        c_next = load_group(C_rows, t, C_l, n_in, end)
        if HAS_Z:
            z_next = load_group(z_rows, t, z_l, d_in, end)
    for _ in steps(0, groups):
        now = t
        now_end = end
        u_now = u_next.to(tl.float32)
        z_now = z_next
        if BOUNDARIES:
            if fresh:
                tl.store(bound + segment * D * N + tile, h, mask=tile_in)
                segment += 1
        dt = group_delta(raw_next, b_dt, now, tl.minimum(real, now_end), SOFTPLUS)
        b_now = b_next
        c_now = c_next
        t = tl.minimum(t + 4, end)
        fresh = t == end
        end = tl.where(fresh, tl.minimum(end + interval, last), end)
        u_next = load_group(u_rows, t, u_l, d_in, end)
        raw_next = load_group(delta_rows, t, delta_l, d_in, end)
        b_next = load_group(B_rows, t, B_l, n_in, end)
        c_next = b_next
        z_next = u_next
        if MODE == OUTPUTS:
            c_next = load_group(C_rows, t, C_l, n_in, end)
            if HAS_Z:
                z_next = load_group(z_rows, t, z_l, d_in, end)

        dt = pinned(dt, BD)
        x0, x1, x2, x3 = columns(pinned(dt * u_now, BD), BD)
        dt0, dt1, dt2, dt3 = columns(dt, BD)
        b0, b1, b2, b3 = columns(b_now.to(tl.float32), NP)
        h0_ = advance(h, a, dt0, x0, b0)
        h1_ = advance(h0_, a, dt1, x1, b1)
        h2_ = advance(h1_, a, dt2, x2, b2)
        h = advance(h2_, a, dt3, x3, b3)
        if MODE == OUTPUTS:
            c0, c1, c2, c3 = columns(c_now.to(tl.float32), NP)
            out = tile_of(_read(h0_, c0), _read(h1_, c1), _read(h2_, c2), _read(h, c3), BD)
            if HAS_D:
                out = out + product(w_skip, u_now)
            if HAS_Z:
                out = out * silu(z_now.to(tl.float32))
            to = y + (long_row * L + now) * D + d[:, None] + k * D
            tl.store(to, out.to(y.dtype.element_ty), mask=d_in & (now + k < now_end))
        elif MODE == WINDOW:
            zero = tl.zeros_like(tile)
            to = bound + (long_row * L + now) * D * N + tile
            tl.store(to, h0_, mask=tile_in)
            tl.store(to + D * N, h1_, mask=tile_in & (zero + now + 1 < now_end))
            tl.store(to + 2 * D * N, h2_, mask=tile_in & (zero + now + 2 < now_end))
            tl.store(to + 3 * D * N, h, mask=tile_in & (zero + now + 3 < now_end))
        elif MODE == ENDS:
            total += dt

    if MODE == OUTPUTS:
        if part == n_chunks - 1:
            tl.store(h_last + long_row * D * N + tile, h, mask=tile_in)
    if MODE == ENDS:
        at = long_row * (n_chunks - 1) + part
        tl.store(ends + at * D * N + tile, h, mask=tile_in)
        tl.store(sums + at * D + d, tl.sum(total, axis=1), mask=d < D)

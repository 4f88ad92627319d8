"""Triton kernels of one token: three a layer, each a matrix-vector product with everything around it.

1. ``enter_kernel``   norm, in_proj; for the x half: convolution, SiLU, and this tile's share of x_proj
2. ``state_kernel``   x_proj's shares summed; dt_proj, softplus, one step of the recurrence, skip, gate
3. ``leave_kernel``   out_proj and the residual addition

then ``logits_kernel`` (final norm, unembedding, each tile's best token) and ``pick_kernel`` (the best of all, and its
embedding). Sums run in float32 in a fixed order; values are rounded where the whole-text path rounds them.

With PDL (programmatic dependent launch, Hopper and later) a kernel starts while the one before it ends: it loads its
weights, which depend on nothing, and only then waits. A kernel that waits knows that all before it are complete,
because each of them waited too; so a buffer may be written again two kernels later.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mambascope.ops.scan.triton_math import exp, silu, softplus

__all__ = ["enter_kernel", "leave_kernel", "logits_kernel", "pick_kernel", "state_kernel"]


@triton.jit
def _root(x, M: tl.constexpr, eps, BK: tl.constexpr):
    """sqrt(mean(x²) + eps) of a vector of M."""
    total = 0.0
    for c in tl.static_range((M + BK - 1) // BK):
        k = c * BK + tl.arange(0, BK)
        v = tl.load(x + k, mask=k < M, other=0.0).to(tl.float32)
        total += tl.sum(v * v, axis=0)
    return tl.sqrt_rn(total / M + eps)


@triton.jit
def _normed(x, weight, root, k, M: tl.constexpr):
    """x / root · weight at k, rounded to the weight's dtype, as float32."""
    v = tl.load(x + k, mask=k < M, other=0.0).to(tl.float32) / root
    w = tl.load(weight + k, mask=k < M, other=0.0)
    return (v * w.to(tl.float32)).to(w.dtype).to(tl.float32)


@triton.jit
def _normed_product(
    first, matrix, at_rows, rows_in, x, norm, root, M: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ_k matrix[row, k] · normed x[k]; ``first`` holds the first BK columns."""
    k = tl.arange(0, BK)
    total = tl.sum(first.to(tl.float32) * _normed(x, norm, root, k, M)[None, :], axis=1)
    for c in tl.static_range(1, (M + BK - 1) // BK):
        k = c * BK + tl.arange(0, BK)
        w = tl.load(matrix + at_rows + k[None, :], mask=rows_in & (k < M)[None, :], other=0.0)
        total += tl.sum(w.to(tl.float32) * _normed(x, norm, root, k, M)[None, :], axis=1)
    return total


@triton.jit
def enter_kernel(
    resid, norm, in_proj, in_bias, conv, conv_bias, conv_state, x_proj, z, u, shares, eps,
    BATCH: tl.constexpr, M: tl.constexpr, D: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, K: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, HAS_IN_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BR channels, first of x, then of z."""
    if PDL:
        gdc_launch_dependents()
    tiles: tl.constexpr = (D + BR - 1) // BR
    tile = tl.program_id(0) % tiles
    is_x = tl.program_id(0) < tiles
    d = tile * BR + tl.arange(0, BR)
    inside = d < D
    row = tl.where(is_x, d, d + D)
    k = tl.arange(0, BK)
    at_rows = row.to(tl.int64)[:, None] * M
    rows_in = inside[:, None]
    first = tl.load(in_proj + at_rows + k[None, :], mask=rows_in & (k < M)[None, :], other=0.0)
    j = tl.arange(0, JP)
    at_share = j.to(tl.int64)[:, None] * D + d[None, :]
    own = tl.load(x_proj + at_share, mask=(j < J)[:, None] & inside[None, :] & is_x, other=0.0)
    if PDL:
        gdc_wait()
    kind = z.dtype.element_ty
    for b in tl.static_range(BATCH):
        x = resid + b * M
        v = _normed_product(first, in_proj, at_rows, rows_in, x, norm, _root(x, M, eps, BK), M, BK)
        if HAS_IN_BIAS:
            v += tl.load(in_bias + row, mask=inside, other=0.0).to(tl.float32)
        v = v.to(kind)
        if is_x:
            state = conv_state + (b * D + d).to(tl.int64) * (K - 1)
            y = tl.zeros([BR], tl.float32)
            for i in tl.static_range(K - 1):
                before = tl.load(state + i, mask=inside, other=0.0)
                y = tl.fma(tl.load(conv + d * K + i, mask=inside, other=0.0).to(tl.float32), before.to(tl.float32), y)
                if i > 0:
                    tl.store(state + (i - 1), before, mask=inside)
            w = tl.load(conv + d * K + (K - 1), mask=inside, other=0.0).to(tl.float32)
            y = tl.fma(w, v.to(tl.float32), y)
            if K > 1:
                tl.store(state + (K - 2), v.to(conv_state.dtype.element_ty), mask=inside)
            if HAS_CONV_BIAS:
                y += tl.load(conv_bias + d, mask=inside, other=0.0).to(tl.float32)
            y = silu(y.to(kind).to(tl.float32)).to(kind)
            tl.store(u + b * D + d, y, mask=inside)
            share = tl.sum(own.to(tl.float32) * y.to(tl.float32)[None, :], axis=1)
            tl.store(shares + (tile * BATCH + b) * J + j, share, mask=j < J)
        else:
            tl.store(z + b * D + d, v, mask=inside)


@triton.jit
def _summed(shares, at, j_in, b, TILES: tl.constexpr, TP: tl.constexpr, BATCH: tl.constexpr, J: tl.constexpr):
    """x_proj's outputs at some columns: its shares over all tiles."""
    t = tl.arange(0, TP)
    parts = tl.load(
        shares + (t[:, None] * BATCH + b) * J + at[None, :], mask=(t < TILES)[:, None] & j_in[None, :], other=0.0
    )
    return tl.sum(parts, axis=0)


@triton.jit
def _rounded(v, inside, count: tl.constexpr, eps, kind: tl.constexpr, NORMED: tl.constexpr):
    """v as x_proj gives it, after Falcon-Mamba's weightless norm if there is one; float32 with the dtype's values."""
    v = v.to(kind).to(tl.float32)
    if NORMED:
        v = (v / tl.sqrt_rn(tl.sum(tl.where(inside, v * v, 0.0), axis=0) / count + eps)).to(kind).to(tl.float32)
    return v


@triton.jit
def state_kernel(
    shares, dt_proj, dt_bias, A_log, D_skip, h, u, z, gated, eps,
    BATCH: tl.constexpr, D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    TILES: tl.constexpr, TP: tl.constexpr, BD: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, NORMED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BD channels. ``h`` ``B D N`` is replaced by the state after the step."""
    if PDL:
        gdc_launch_dependents()
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = d < D
    r, n = tl.arange(0, RP), tl.arange(0, NP)
    r_in, n_in = r < R, n < N
    both = inside[:, None] & n_in[None, :]
    J: tl.constexpr = R + 2 * N
    kind: tl.constexpr = gated.dtype.element_ty
    w = tl.load(dt_proj + d.to(tl.int64)[:, None] * R + r[None, :], mask=inside[:, None] & r_in[None, :], other=0.0)
    A = -exp(tl.load(A_log + d.to(tl.int64)[:, None] * N + n[None, :], mask=both, other=0.0).to(tl.float32))
    skip = tl.load(D_skip + d, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    for b in tl.static_range(BATCH):
        at_h = (b * D + d).to(tl.int64)[:, None] * N + n[None, :]
        state = tl.load(h + at_h, mask=both, other=0.0)
        value = tl.load(u + b * D + d, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(z + b * D + d, mask=inside, other=0.0).to(tl.float32)
        low = _rounded(_summed(shares, r, r_in, b, TILES, TP, BATCH, J), r_in, R, eps, kind, NORMED)
        B = _rounded(_summed(shares, R + n, n_in, b, TILES, TP, BATCH, J), n_in, N, eps, kind, NORMED)
        C = _rounded(_summed(shares, R + N + n, n_in, b, TILES, TP, BATCH, J), n_in, N, eps, kind, NORMED)
        raw = tl.sum(w.to(tl.float32) * low[None, :], axis=1)
        if HAS_DT_BIAS:
            raw += tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)
        delta = softplus(raw.to(kind).to(tl.float32))
        state = exp(delta[:, None] * A) * state + (delta * value)[:, None] * B[None, :]
        tl.store(h + at_h, state, mask=both)
        y = tl.sum(tl.where(n_in[None, :], state * C[None, :], 0.0), axis=1) + skip * value
        tl.store(gated + b * D + d, (y * silu(gate)).to(kind), mask=inside)


@triton.jit
def leave_kernel(
    gated, out_proj, out_bias, resid,
    BATCH: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    HAS_OUT_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BR entries of the residual stream, which are added to in place."""
    if PDL:
        gdc_launch_dependents()
    m = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = m < M
    k = tl.arange(0, BK)
    at_rows = m.to(tl.int64)[:, None] * D
    first = tl.load(out_proj + at_rows + k[None, :], mask=inside[:, None] & (k < D)[None, :], other=0.0)
    if PDL:
        gdc_wait()
    kind = gated.dtype.element_ty
    for b in tl.static_range(BATCH):
        before = tl.load(resid + b * M + m, mask=inside, other=0.0)
        x = tl.load(gated + b * D + k, mask=k < D, other=0.0).to(tl.float32)
        total = tl.sum(first.to(tl.float32) * x[None, :], axis=1)
        for c in tl.static_range(1, (D + BK - 1) // BK):
            more = c * BK + tl.arange(0, BK)
            w = tl.load(out_proj + at_rows + more[None, :], mask=inside[:, None] & (more < D)[None, :], other=0.0)
            x = tl.load(gated + b * D + more, mask=more < D, other=0.0).to(tl.float32)
            total += tl.sum(w.to(tl.float32) * x[None, :], axis=1)
        if HAS_OUT_BIAS:
            total += tl.load(out_bias + m, mask=inside, other=0.0).to(tl.float32)
        after = before.to(tl.float32) + total.to(kind).to(tl.float32)
        tl.store(resid + b * M + m, after.to(resid.dtype.element_ty), mask=inside)


@triton.jit
def logits_kernel(
    resid, norm, unembed, logits, best, where, eps,
    BATCH: tl.constexpr, M: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BR tokens. With BEST each tile's largest logit and its token, ``B tiles``; NaN is the largest."""
    if PDL:
        gdc_launch_dependents()
    v = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = v < V
    k = tl.arange(0, BK)
    at_rows = v.to(tl.int64)[:, None] * M
    rows_in = inside[:, None]
    first = tl.load(unembed + at_rows + k[None, :], mask=rows_in & (k < M)[None, :], other=0.0)
    if PDL:
        gdc_wait()
    tiles: tl.constexpr = (V + BR - 1) // BR
    for b in tl.static_range(BATCH):
        x = resid + b * M
        value = _normed_product(first, unembed, at_rows, rows_in, x, norm, _root(x, M, eps, BK), M, BK)
        value = value.to(logits.dtype.element_ty)
        tl.store(logits + b * V + v, value, mask=inside)
        if BEST:
            score = value.to(tl.float32)
            score = tl.where(inside, tl.where(score == score, score, float("inf")), float("-inf"))
            top = tl.max(score, axis=0)
            tl.store(best + b * tiles + tl.program_id(0), top)
            tl.store(where + b * tiles + tl.program_id(0), tl.min(tl.where(score == top, v, V), axis=0))


@triton.jit
def pick_kernel(
    best, where, stops, done, ids, told, count, embed, resid,
    M: tl.constexpr, MP: tl.constexpr, TILES: tl.constexpr, TP: tl.constexpr, V: tl.constexpr, STOPS: tl.constexpr,
    MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: rows. The most likely token (the first of equals), written to ``ids`` and ``told[b, count[b]]``.

    A row that is ``done`` repeats its last token; a row whose token is among ``stops`` is done from now on.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b = tl.program_id(0)
    t = tl.arange(0, TP)
    score = tl.load(best + b * TILES + t, mask=t < TILES, other=float("-inf"))
    token = tl.load(where + b * TILES + t, mask=t < TILES, other=V)
    new = tl.min(tl.where(score == tl.max(score, axis=0), token, V), axis=0).to(tl.int64)
    over = tl.load(done + b)
    new = tl.where(over != 0, tl.load(ids + b), tl.minimum(new, V - 1))
    s = tl.arange(0, STOPS)
    hit = tl.max((tl.load(stops + s) == new).to(tl.int32), axis=0)
    tl.store(done + b, tl.maximum(over, hit))
    tl.store(ids + b, new)
    at = tl.load(count + b)
    tl.store(told + b * MOST + at, new, mask=at < MOST)
    tl.store(count + b, at + 1)
    k = tl.arange(0, MP)
    row = tl.load(embed + new * M + k, mask=k < M, other=0.0)
    tl.store(resid + b * M + k, row.to(resid.dtype.element_ty), mask=k < M)

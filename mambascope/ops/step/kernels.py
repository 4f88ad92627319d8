"""Triton kernels of one token: three a layer, each a matrix-vector product with everything around it.

1. ``enter_kernel``   norm, in_proj; for the x half: convolution, SiLU, and this tile's share of x_proj
2. ``state_kernel``   x_proj's shares summed; dt_proj, softplus, one step of the recurrence, skip, gate
3. ``leave_kernel``   out_proj and the residual addition

then ``logits_kernel`` (final norm, unembedding, each tile's best token) and ``pick_kernel`` (the best of all, and its
embedding). A program serves one row of the batch; a warp owns whole rows of a matrix, so that sums need no other warp.
Sums run in float32 in a fixed order; values are rounded where the whole-text path rounds them, but for the normalised
residual, which is divided by its root after the product.

These kernels run for about as long as a launch takes, so what counts is the chain of waits in each. With PDL
(programmatic dependent launch, Hopper and later) a kernel starts while the one before it ends: it loads its weights and
states, which depend on nothing in this token, and only then waits. A kernel that waits knows that all before it are
complete, because each of them waited too; so a buffer may be written again two kernels later.

State is replaced in place. Several threads may hold the same element, and all of them load it, so a barrier stands
between the loads and the stores.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mambascope.ops.scan.triton_math import exp, silu, softplus

__all__ = ["enter_kernel", "leave_kernel", "logits_kernel", "pick_kernel", "state_kernel"]


@triton.jit
def _tile(matrix, at_rows, rows_in, k, c: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    """Columns [c BK, (c + 1) BK) of some rows; ``k`` are the first BK, once for each row."""
    at = k + c * BK
    return tl.load(matrix + at_rows + at, mask=rows_in & (at < N), other=0.0)


@triton.jit
def _part(vector, k, c: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    """The same columns of a vector, loaded once for each row, so that no warp waits for another."""
    at = k + c * BK
    return tl.load(vector + at, mask=at < N, other=0.0)


@triton.jit
def _ahead(matrix, at_rows, rows_in, k, N: tl.constexpr, BK: tl.constexpr, PRE: tl.constexpr):
    """The first PRE tiles."""
    tiles = ()
    for c in tl.static_range(PRE):
        tiles = tiles + (_tile(matrix, at_rows, rows_in, k, c, N, BK),)  # noqa: RUF005 - what Triton understands
    return tiles


@triton.jit
def _parts_ahead(vector, k, N: tl.constexpr, BK: tl.constexpr, PRE: tl.constexpr):
    parts = ()
    for c in tl.static_range(PRE):
        parts = parts + (_part(vector, k, c, N, BK),)  # noqa: RUF005
    return parts


@triton.jit
def _normed_product(
    tiles, norms, matrix, at_rows, rows_in, k, x, norm, eps, N: tl.constexpr, BK: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """Σ_k matrix[row, k] · x[k] norm[k] / sqrt(mean(x²) + eps); ``tiles`` and ``norms`` hold the first PRE tiles."""
    v = _part(x, k, 0, N, BK).to(tl.float32)
    total = tiles[0].to(tl.float32) * (v * norms[0].to(tl.float32))
    squares = v * v
    for c in tl.static_range(1, (N + BK - 1) // BK):
        v = _part(x, k, c, N, BK).to(tl.float32)
        if c < PRE:
            total += tiles[c].to(tl.float32) * (v * norms[c].to(tl.float32))
        else:
            w = _tile(matrix, at_rows, rows_in, k, c, N, BK).to(tl.float32)
            total += w * (v * _part(norm, k, c, N, BK).to(tl.float32))
        squares += v * v
    return tl.sum(total, axis=1) / tl.sqrt_rn(tl.sum(squares, axis=1) / N + eps)


@triton.jit(do_not_specialize=["batch"])
def enter_kernel(
    resid, norm, in_proj, in_bias, conv, conv_bias, conv_state, x_proj, z, u, shares, eps, batch,
    M: tl.constexpr, D: tl.constexpr, J: tl.constexpr, JP: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PRE: tl.constexpr,
    HAS_IN_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BR channels, first of x, then of z; rows of the batch innermost."""
    if PDL:
        gdc_launch_dependents()
    tiles: tl.constexpr = (D + BR - 1) // BR
    b = tl.program_id(0) % batch
    is_x = tl.program_id(0) < tiles * batch
    tile = (tl.program_id(0) // batch) % tiles
    d = tile * BR + tl.arange(0, BR)
    inside = d < D
    row = tl.where(is_x, d, d + D)
    k = tl.arange(0, BK)[None, :] + (d * 0)[:, None]
    at_rows = row.to(tl.int64)[:, None] * M
    rows_in = inside[:, None]
    tiles_in = _ahead(in_proj, at_rows, rows_in, k, M, BK, PRE)
    norms = _parts_ahead(norm, k, M, BK, PRE)
    kind = z.dtype.element_ty
    x = resid + b * M
    if is_x:
        j = tl.arange(0, JP)
        at_share = j.to(tl.int64)[:, None] * D + d[None, :]
        own = tl.load(x_proj + at_share, mask=(j < J)[:, None] & inside[None, :], other=0.0)
        i = tl.arange(0, KP)[None, :]
        taps = tl.load(conv + d[:, None] * K + i, mask=rows_in & (i < K), other=0.0).to(tl.float32)
        at_state = (b * D + d).to(tl.int64)[:, None] * (K - 1) + i
        held = rows_in & (i < K - 1)
        before = tl.load(conv_state + at_state, mask=held, other=0.0)
        bias = 0.0
        if HAS_CONV_BIAS:
            bias = tl.load(conv_bias + d, mask=inside, other=0.0).to(tl.float32)
        if PDL:
            gdc_wait()
        x_in = _normed_product(tiles_in, norms, in_proj, at_rows, rows_in, k, x, norm, eps, M, BK, PRE)
        if HAS_IN_BIAS:
            x_in += tl.load(in_bias + row, mask=inside, other=0.0).to(tl.float32)
        x_now = x_in.to(kind)
        now = tl.where(i == K - 1, x_now.to(tl.float32)[:, None], before.to(tl.float32))
        y = tl.sum(taps * now, axis=1)
        if HAS_CONV_BIAS:
            y += bias
        y = silu(y.to(kind).to(tl.float32)).to(kind)
        tl.debug_barrier()
        tl.store(conv_state + at_state - 1, before, mask=held & (i > 0))
        if K > 1:
            tl.store(conv_state + (b * D + d).to(tl.int64) * (K - 1) + (K - 2), x_now, mask=inside)
        tl.store(u + b * D + d, y, mask=inside)
        share = tl.sum(own.to(tl.float32) * y.to(tl.float32)[None, :], axis=1)
        tl.store(shares + (b * tiles + tile) * J + j, share, mask=j < J)
    else:
        if PDL:
            gdc_wait()
        z_out = _normed_product(tiles_in, norms, in_proj, at_rows, rows_in, k, x, norm, eps, M, BK, PRE)
        if HAS_IN_BIAS:
            z_out += tl.load(in_bias + row, mask=inside, other=0.0).to(tl.float32)
        tl.store(z + b * D + d, z_out.to(kind), mask=inside)


@triton.jit
def _summed(shares, at, j_in, TILES: tl.constexpr, TP: tl.constexpr, J: tl.constexpr):
    """x_proj's outputs at some columns: its shares over all tiles."""
    t = tl.arange(0, TP)[:, None]
    parts = tl.load(shares + t * J + at[None, :], mask=(t < TILES) & j_in[None, :], other=0.0)
    return tl.sum(parts, axis=0)


@triton.jit
def _rounded(v, inside, count: tl.constexpr, eps, kind: tl.constexpr, NORMED: tl.constexpr):
    """v as x_proj gives it, after Falcon-Mamba's weightless norm if there is one; float32 with the dtype's values."""
    v = v.to(kind).to(tl.float32)
    if NORMED:
        v = (v / tl.sqrt_rn(tl.sum(tl.where(inside, v * v, 0.0), axis=0) / count + eps)).to(kind).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["batch"])
def state_kernel(
    shares, dt_proj, dt_bias, A_log, D_skip, h, u, z, gated, eps, batch,
    D: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    TILES: tl.constexpr, TP: tl.constexpr, BD: tl.constexpr,
    HAS_DT_BIAS: tl.constexpr, NORMED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BD channels, rows of the batch innermost. ``h`` ``B D N`` is replaced by the state after."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(0) % batch
    d = (tl.program_id(0) // batch) * BD + tl.arange(0, BD)
    inside = d < D
    r, n = tl.arange(0, RP), tl.arange(0, NP)
    r_in, n_in = r < R, n < N
    both = inside[:, None] & n_in[None, :]
    J: tl.constexpr = R + 2 * N
    kind: tl.constexpr = gated.dtype.element_ty
    w = tl.load(dt_proj + d.to(tl.int64)[:, None] * R + r[None, :], mask=inside[:, None] & r_in[None, :], other=0.0)
    at_h = (b * D + d).to(tl.int64)[:, None] * N + n[None, :]
    state = tl.load(h + at_h, mask=both, other=0.0)
    A = -exp(tl.load(A_log + d.to(tl.int64)[:, None] * N + n[None, :], mask=both, other=0.0).to(tl.float32))
    skip = tl.load(D_skip + d, mask=inside, other=0.0).to(tl.float32)
    bias = skip
    if HAS_DT_BIAS:
        bias = tl.load(dt_bias + d, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    mine = shares + b * (TILES * J)
    low = _summed(mine, r, r_in, TILES, TP, J)
    B = _summed(mine, R + n, n_in, TILES, TP, J)
    C = _summed(mine, R + N + n, n_in, TILES, TP, J)
    value = tl.load(u + b * D + d, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + b * D + d, mask=inside, other=0.0).to(tl.float32)
    low = _rounded(low, r_in, R, eps, kind, NORMED)
    B = _rounded(B, n_in, N, eps, kind, NORMED)
    C = _rounded(C, n_in, N, eps, kind, NORMED)
    raw = tl.sum(w.to(tl.float32) * low[None, :], axis=1)
    if HAS_DT_BIAS:
        raw += bias
    delta = softplus(raw.to(kind).to(tl.float32))
    state = exp(delta[:, None] * A) * state + (delta * value)[:, None] * B[None, :]
    tl.debug_barrier()
    tl.store(h + at_h, state, mask=both)
    y = tl.sum(tl.where(n_in[None, :], state * C[None, :], 0.0), axis=1) + skip * value
    tl.store(gated + b * D + d, (y * silu(gate)).to(kind), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def leave_kernel(
    gated, out_proj, out_bias, resid, batch,
    M: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    PRE: tl.constexpr, HAS_OUT_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BR entries of the residual stream, which are added to in place; rows of the batch innermost."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(0) % batch
    m = (tl.program_id(0) // batch) * BR + tl.arange(0, BR)
    inside = m < M
    at_rows = m.to(tl.int64)[:, None] * D
    k = tl.arange(0, BK)[None, :] + (m * 0)[:, None]
    rows_in = inside[:, None]
    tiles = _ahead(out_proj, at_rows, rows_in, k, D, BK, PRE)
    if PDL:
        gdc_wait()
    before = tl.load(resid + b * M + m, mask=inside, other=0.0)
    x = gated + b * D
    total = tiles[0].to(tl.float32) * _part(x, k, 0, D, BK).to(tl.float32)
    for c in tl.static_range(1, (D + BK - 1) // BK):
        if c < PRE:
            total += tiles[c].to(tl.float32) * _part(x, k, c, D, BK).to(tl.float32)
        else:
            w = _tile(out_proj, at_rows, rows_in, k, c, D, BK).to(tl.float32)
            total += w * _part(x, k, c, D, BK).to(tl.float32)
    total = tl.sum(total, axis=1)
    if HAS_OUT_BIAS:
        total += tl.load(out_bias + m, mask=inside, other=0.0).to(tl.float32)
    after = before.to(tl.float32) + total.to(gated.dtype.element_ty).to(tl.float32)
    tl.debug_barrier()
    tl.store(resid + b * M + m, after.to(resid.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def logits_kernel(
    resid, norm, unembed, logits, best, where, eps, batch,
    M: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    PRE: tl.constexpr, BEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of BR tokens, rows of the batch innermost. With BEST each tile's largest logit and its token,
    ``B tiles``; NaN is the largest."""
    if PDL:
        gdc_launch_dependents()
    b = tl.program_id(0) % batch
    tile = tl.program_id(0) // batch
    v = tile * BR + tl.arange(0, BR)
    inside = v < V
    k = tl.arange(0, BK)[None, :] + (v * 0)[:, None]
    at_rows = v.to(tl.int64)[:, None] * M
    rows_in = inside[:, None]
    rows_ahead = _ahead(unembed, at_rows, rows_in, k, M, BK, PRE)
    norms = _parts_ahead(norm, k, M, BK, PRE)
    if PDL:
        gdc_wait()
    tiles: tl.constexpr = (V + BR - 1) // BR
    value = _normed_product(rows_ahead, norms, unembed, at_rows, rows_in, k, resid + b * M, norm, eps, M, BK, PRE)
    value = value.to(logits.dtype.element_ty)
    tl.store(logits + b * V + v, value, mask=inside)
    if BEST:
        score = value.to(tl.float32)
        score = tl.where(inside, tl.where(score == score, score, float("inf")), float("-inf"))
        top = tl.max(score, axis=0)
        tl.store(best + b * tiles + tile, top)
        tl.store(where + b * tiles + tile, tl.min(tl.where(score == top, v, V), axis=0))


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
    over, last, at = tl.load(done + b), tl.load(ids + b), tl.load(count + b)
    s = tl.arange(0, STOPS)
    stop = tl.load(stops + s)
    new = tl.min(tl.where(score == tl.max(score, axis=0), token, V), axis=0).to(tl.int64)
    new = tl.where(over != 0, last, tl.minimum(new, V - 1))
    hit = tl.max((stop == new).to(tl.int32), axis=0)
    tl.debug_barrier()
    tl.store(done + b, tl.maximum(over, hit))
    tl.store(ids + b, new)
    tl.store(told + b * MOST + at, new, mask=at < MOST)
    tl.store(count + b, at + 1)
    k = tl.arange(0, MP)
    row = tl.load(embed + new * M + k, mask=k < M, other=0.0)
    tl.store(resid + b * M + k, row.to(resid.dtype.element_ty), mask=k < M)

"""One row or one column of an effective kernel on a GPU, in chunks that know delta summed up to the line's place."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from mambascope.ops.scan.triton_math import steps

__all__ = ["line_kernel", "total_kernel"]


@triton.jit(do_not_specialize=["L", "D", "n_chunks"])
def total_kernel(
    delta, at, sums, delta_b, delta_l, L, D, n_chunks, BACKWARD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """delta of each chunk of BT steps that lie on the line's side of ``at``, ``B D chunks``."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BD)
    block = pid % blocks
    chunk = (pid // blocks) % n_chunks
    row = (pid // (blocks * n_chunks)).to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    t = chunk * BT + tl.arange(0, BT)
    place = tl.load(at + row)
    inside = (t <= place) if BACKWARD else (t > place)
    mask = (inside & (t < L))[:, None] & (d < D)[None, :]
    step = tl.load(delta + row * delta_b + t.to(tl.int64)[:, None] * delta_l + d[None, :], mask=mask, other=0.0)
    tl.store(sums + (row * D + d) * n_chunks + chunk, tl.sum(step, axis=0), mask=d < D)


@triton.jit(do_not_specialize=["L", "D", "n_chunks"])
def line_kernel(
    delta, at, tails, A2, fixed, moving, gain, scale, out, delta_b, delta_l, moving_b, moving_l, gain_b, gain_l,
    L, D, n_chunks,
    N: tl.constexpr, BACKWARD: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_SCALE: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """line[t, d] = Σ_n fixed[n] moving[t, n] exp(A[d, n] R[t, d]) (· delta, going backward) (· gain) (· scale).

    Grid: blocks of channels × chunks × rows. Where everything is forgotten the exponentials are not taken.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(D, BD)
    block = pid % blocks
    chunk = (pid // blocks) % n_chunks
    row = (pid // (blocks * n_chunks)).to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    t = chunk * BT + tl.arange(0, BT)
    d_in = d < D
    place = tl.load(at + row)
    seen = ((t <= place) if BACKWARD else (t >= place)) & (t < L)
    mask = seen[:, None] & d_in[None, :]
    cells = t.to(tl.int64)[:, None]
    step = tl.load(delta + row * delta_b + cells * delta_l + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        k = tl.arange(0, BT)
        later = (k + 1 < BT)[:, None] & (t + 1 <= place)[:, None] & (t + 1 < L)[:, None] & d_in[None, :]
        after = tl.load(delta + row * delta_b + (cells + 1) * delta_l + d[None, :], mask=later, other=0.0)
        R = tl.cumsum(after.to(tl.float32), axis=0, reverse=True)
    else:
        R = tl.cumsum(tl.where((t > place)[:, None], step, 0.0), axis=0)
    tail = tl.load(tails + (row * D + d) * n_chunks + chunk, mask=d_in, other=0.0)
    R = R + tail[None, :]
    acc = tl.zeros([BT, BD], tl.float32)
    for n in steps(0, N):
        a = tl.load(A2 + d * N + n, mask=d_in, other=0.0)
        f = tl.load(fixed + row * N + n).to(tl.float32)
        m = tl.load(moving + row * moving_b + t.to(tl.int64) * moving_l + n, mask=seen, other=0.0).to(tl.float32)
        acc = tl.fma(tl.exp2(a[None, :] * R), (m * f)[:, None], acc)
    if BACKWARD:
        acc = acc * step
    if HAS_GAIN:
        acc = acc * tl.load(gain + row * gain_b + cells * gain_l + d[None, :], mask=mask, other=0.0)
    if HAS_SCALE:
        acc = acc * tl.load(scale + row * D + d, mask=d_in, other=0.0)[None, :]
    kept = (t < L)[:, None] & d_in[None, :]
    tl.store(out + row * L * D + cells * D + d[None, :], tl.where(seen[:, None], acc, 0.0), mask=kept)

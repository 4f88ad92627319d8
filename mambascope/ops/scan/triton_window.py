"""A window of states contracted with a given tensor as it is walked: no state leaves the registers."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambascope.ops.scan.triton_forward import advance, columns, load_group, tile_of
from mambascope.ops.scan.triton_launch import check, dense, launch, strides, whole
from mambascope.ops.scan.triton_math import LOG2E, steps
from mambascope.ops.scan.triton_replay import replayed
from mambascope.ops.scan.triton_table import padded

__all__ = ["window_dot"]

_ENTRIES = 256  # states a program


@triton.jit
def _dot(h, weight, tile_in, counted):
    return tl.sum(h * tl.load(weight, mask=tile_in & counted, other=0.0).to(tl.float32), axis=0)


@triton.jit(do_not_specialize=["L", "D"])
def _window_dot_kernel(
    u, delta, A, B, h_start, weight, out,
    u_b, u_l, delta_b, delta_l, B_b, B_l, w_b, w_l, w_d, w_n, L, D,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Σ_n h[t] weight[t] at every step. Grid: channel blocks × rows."""
    blocks = tl.cdiv(D, BD)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    n = tl.arange(0, NP)
    k = tl.arange(0, 4)[None, :]
    tile_in = (n < N)[:, None] & (d < D)[None, :]
    tile = d[None, :] * N + n[:, None]
    a = tl.load(A + tile, mask=tile_in, other=0.0).to(tl.float32) * LOG2E
    h = tl.load(h_start + row * D * N + tile, mask=tile_in, other=0.0).to(tl.float32)
    d_in = (d < D)[:, None]
    n_in = (n < N)[:, None]
    u_rows = u + row * u_b + d[:, None] + k * u_l
    delta_rows = delta + row * delta_b + d[:, None] + k * delta_l
    B_rows = B + row * B_b + n[:, None] + k * B_l
    w_tile = weight + row * w_b + d[None, :].to(tl.int64) * w_d + n[:, None] * w_n
    for group in steps(0, tl.cdiv(L, 4)):
        t = group * 4
        dt = load_group(delta_rows, t, delta_l, d_in, L).to(tl.float32)
        x = dt * load_group(u_rows, t, u_l, d_in, L).to(tl.float32)
        b0, b1, b2, b3 = columns(load_group(B_rows, t, B_l, n_in, L).to(tl.float32), NP)
        dt0, dt1, dt2, dt3 = columns(dt, BD)
        x0, x1, x2, x3 = columns(x, BD)
        at = w_tile + t.to(tl.int64) * w_l
        h = advance(h, a, dt0, x0, b0)
        y0 = _dot(h, at, tile_in, t < L)
        h = advance(h, a, dt1, x1, b1)
        y1 = _dot(h, at + w_l, tile_in, t + 1 < L)
        h = advance(h, a, dt2, x2, b2)
        y2 = _dot(h, at + 2 * w_l, tile_in, t + 2 < L)
        h = advance(h, a, dt3, x3, b3)
        y3 = _dot(h, at + 3 * w_l, tile_in, t + 3 < L)
        to = out + (row * L + t) * D + d[:, None] + k * D
        tl.store(to, tile_of(y0, y1, y2, y3, BD), mask=d_in & (t + k < L))


@replayed(tensors=6)
def window_dot(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor, weight: Tensor) -> Tensor:
    """``Σ_n h[t] weight[t]``, ``B W D``, for ``weight B W D N`` of any strides. Time O(B W D N), one launch."""
    states = A.shape[1]
    check(u, states)
    batch, length, channels = u.shape
    out = torch.empty((batch, length, channels), dtype=torch.float32, device=u.device)
    u, delta, B = dense(u), dense(delta), dense(B)  # type: ignore[assignment]
    block = max(1, _ENTRIES // max(16, padded(states)))
    pointers = (u, delta, whole(A, torch.float32), B, whole(h_start, torch.float32), weight, out)
    sizes = (*strides(u, delta, B), *weight.stride(), length, channels)
    programs = batch * triton.cdiv(channels, block)
    flags = {"N": states, "NP": padded(states), "BD": block}
    launch(_window_dot_kernel, programs, u.device, *pointers, *sizes, **flags, num_warps=1, enable_fp_fusion=False)
    return out

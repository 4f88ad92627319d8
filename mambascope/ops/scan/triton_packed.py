"""The scan on ``B D L`` tensors: one launch packs u, delta, z, B and C as ``B L W``, one turns the result back.

The packed tensor's columns are u, delta, z, B, C: the scan takes them as strided views. The backward pass turns its
gradient in one launch and all gradients out in another. D is the number of channels, L the last axis.
"""

# pyright: reportMissingImports=false

import torch
from torch import Tensor

from mambascope.ops.scan import triton
from mambascope.ops.scan.triton_replay import replayed
from mambascope.ops.scan.triton_turn import turn, turn_all

__all__ = ["backward", "forward"]

_ALIGN = 8  # columns start at multiples of 16 bytes, for wide loads

Results = tuple[Tensor | None, ...]


def _pack(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> list[Tensor]:
    """u, delta, B, C, z as views of one ``B L W``."""
    batch, channels, length = u.shape
    states = B.shape[1]
    wide = [u, delta] if z is None else [u, delta, z]
    sizes = [channels] * len(wide) + [states, states]
    padded = [-(-size // _ALIGN) * _ALIGN for size in sizes]
    out = torch.empty((batch, length, sum(padded)), dtype=u.dtype, device=u.device).split(padded, -1)
    if padded != sizes:
        out = [x[..., :size] for x, size in zip(out, sizes, strict=True)]
    turn_all([*wide, B, C], out, len(wide))
    return [out[0], out[1], out[-2], out[-1], *out[2:-2]]


@replayed(tensors=8)
def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    *,
    softplus: bool,
    interval: int | None,
) -> Results:
    """out ``B D L``, the last state, states every ``interval`` steps; the packed u, delta, B, C, z; the bias, None if
    delta holds it already."""
    u_, delta_, B_, C_, *z_ = _pack(u, delta, B, C, z)
    if bias is not None and not softplus:  # our kernels add it only before a softplus
        delta_ = delta_.float() + bias.float()
        bias = None
    packed_z = z_[0] if z_ else None
    operands = (u_, delta_, A, B_, C_, D, packed_z, bias, None, None)
    y, h_last, bound = triton.scan_forward(*operands, dt_softplus=softplus, boundaries=interval)
    return turn(y, u.dtype), h_last, bound, u_, delta_, B_, C_, packed_z, bias


@replayed(tensors=11)
def backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    bound: Tensor,
    dout: Tensor | None,
    dh_last: Tensor | None,
    *,
    softplus: bool,
    interval: int,
) -> Results:
    """Gradients of u, delta, A, B, C, D, z, bias, as `forward` packed them: those ``B L *`` turned back. Last that of
    delta as it is."""
    kind = torch.float32 if z is None else u.dtype  # of y
    dy = torch.zeros(u.shape, dtype=kind, device=u.device) if dout is None else turn(dout, kind)
    operands = (u, delta, A, B, C, D, z, bias, None, None)
    found = triton.scan_backward(*operands, bound, dy, dh_last, None, dt_softplus=softplus, boundaries=interval)
    names = ("du", "ddelta", "dB", "dC") if z is None else ("du", "ddelta", "dz", "dB", "dC")
    ours = [found[name] for name in names]
    targets = [torch.empty((x.shape[0], x.shape[2], x.shape[1]), dtype=u.dtype, device=u.device) for x in ours]
    turn_all(ours, targets, len(names) - 2)
    du, ddelta, *dz, dB, dC = targets
    return du, ddelta, found["dA"], dB, dC, found["dD"], dz[0] if dz else None, found["ddt_bias"], found["ddelta"]

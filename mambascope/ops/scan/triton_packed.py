"""The scan on ``B D L`` tensors. D is the number of channels, L the last axis.

The Hopper forward reads and writes them as they are. For the other kernels one launch packs u, delta, z, B and C as
``B L W``, whose columns the scan takes as strided views, and one turns the result back. The backward pass turns what
arrives in one launch, with the inputs if the forward did not pack them, and all gradients out in another.
"""

# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import Tensor

from mambascope.ops.scan import triton
from mambascope.ops.scan.triton_replay import replayed
from mambascope.ops.scan.triton_turn import turn, turn_all

__all__ = ["as_it_lies", "backward", "forward"]

_ALIGN = 8  # columns start at multiples of 16 bytes, for wide loads

Results = tuple[Tensor | None, ...]


def _hopper(u: Tensor, states: int) -> Any:
    return triton.hopper(u.device, u.dtype, states, None)


def as_it_lies(u: Tensor, states: int, *, biased: bool, softplus: bool) -> bool:
    """Whether the forward kernel reads ``B D L`` itself; a bias without a softplus it cannot add."""
    fast = _hopper(u, states)
    batch, channels, length = u.shape
    return fast is not None and not fast.few(batch, length, channels) and (softplus or not biased)


def _pack(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, *more: Tensor | None) -> list[Tensor | None]:
    """u, delta, B, C, and up to two more of u's shape, as views of one ``B L W``."""
    batch, channels, length = u.shape
    states = B.shape[1]
    wide = [u, delta, *(x for x in more if x is not None)]
    sizes = [channels] * len(wide) + [states, states]
    padded = [-(-size // _ALIGN) * _ALIGN for size in sizes]
    out = torch.empty((batch, length, sum(padded)), dtype=u.dtype, device=u.device).split(padded, -1)
    if padded != sizes:
        out = [x[..., :size] for x, size in zip(out, sizes, strict=True)]
    turn_all([*wide, B, C], out, len(wide))
    given = iter(out[2:-2])
    return [out[0], out[1], out[-2], out[-1], *(None if x is None else next(given) for x in more)]


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
    lies: bool = False,
) -> Results:
    """out ``B D L``, the last state, states every ``interval`` steps; u, delta, B, C, z as the backward takes them, as
    given if the kernel reads them as it ``lies``, else packed; the bias, None if delta holds it already."""
    options = {"dt_softplus": softplus, "boundaries": interval}
    if lies:
        found = _hopper(u, A.shape[1]).scan_forward(u, delta, A, B, C, D, z, bias, None, None, **options, turned=True)
        out, h_last, bound = found
        return out, h_last, bound, u, delta, B, C, z, bias
    u_, delta_, B_, C_, z_ = _pack(u, delta, B, C, z)
    assert delta_ is not None
    if bias is not None and not softplus:  # our kernels add it only before a softplus
        delta_ = delta_.float() + bias.float()
        bias = None
    y, h_last, bound = triton.scan_forward(u_, delta_, A, B_, C_, D, z_, bias, None, None, **options)
    return turn(y, u.dtype), h_last, bound, u_, delta_, B_, C_, z_, bias


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
    lies: bool = False,
) -> Results:
    """Gradients of u, delta, A, B, C, D, z, bias, as `forward` gave them: those with a time axis turned back. Last that
    of delta as it is."""
    kind = torch.float32 if z is None else u.dtype  # of y
    dy = None
    if lies:
        if dout is not None and dout.stride(2) != 1:
            dout = dout.contiguous()
        u, delta, B, C, z, dy = _pack(u, delta, B, C, z, dout)  # type: ignore[assignment]
    elif dout is not None:
        dy = turn(dout, kind)
    if dy is None:
        dy = torch.zeros(u.shape, dtype=kind, device=u.device)
    operands = (u, delta, A, B, C, D, z, bias, None, None)
    found = triton.scan_backward(*operands, bound, dy, dh_last, None, dt_softplus=softplus, boundaries=interval)
    names = ("du", "ddelta", "dB", "dC") if z is None else ("du", "ddelta", "dz", "dB", "dC")
    ours = [found[name] for name in names]
    targets = [torch.empty((x.shape[0], x.shape[2], x.shape[1]), dtype=u.dtype, device=u.device) for x in ours]
    turn_all(ours, targets, len(names) - 2)
    du, ddelta, *dz, dB, dC = targets
    return du, ddelta, found["dA"], dB, dC, found["dD"], dz[0] if dz else None, found["ddt_bias"], found["ddelta"]

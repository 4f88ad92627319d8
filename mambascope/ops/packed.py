"""``selective_scan_fn`` on a GPU without a walk through five copies: one launch packs u, delta, z, B and C.

The packed tensor is ``B L W``, its columns u, delta, z, B, C: the scan takes them as strided views. One launch turns
the result back; the backward pass turns its gradient in one and all gradients out in another.
"""

from typing import Any

import torch
from torch import Tensor

from mambascope.errors import BackendError
from mambascope.ops import layout
from mambascope.ops.dispatch import Backend, choose, kernels

__all__ = ["scan", "takes"]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""u, delta, A, B, C, D, z, delta_bias as `selective_scan_fn` takes them, B and C ``B N L``."""

_ALIGN = 8  # columns start at multiples of 16 bytes, for wide loads


def takes(backend: Backend, inputs: Inputs) -> bool:
    """Whether these can go this way: of shapes that fit, plain, ``B D L`` in memory, of one dtype, and Triton runs.

    What it does not take may still be right, or is refused with its reason by `selective_scan_fn`.
    """
    u, delta, A, B, C, D, z, bias = inputs
    if layout.observed(*inputs) or any(not isinstance(x, Tensor) for x in (u, delta, A, B, C)):
        return False
    if u.device.type != "cuda" or u.dim() != 3 or A.dim() != 2 or not u.numel():
        return False
    batch, channels, length = u.shape
    states, shape = A.shape[1], (batch, A.shape[1], length)
    if A.shape[0] != channels or not states or delta.shape != u.shape or B.shape != shape or C.shape != shape:
        return False
    for x in (D, bias):
        if x is not None and (x.shape != (channels,) or not x.dtype.is_floating_point or x.device != u.device):
            return False
    if not A.dtype.is_floating_point or A.device != u.device or (z is not None and z.shape != u.shape) or length == 1:
        return False
    dtype, device = u.dtype, u.device
    for x in (u, delta, B, C) if z is None else (u, delta, B, C, z):
        if x.dtype != dtype or x.device != device or x.stride(2) != 1:
            return False
    return choose(backend, *inputs, d_state=states) == "triton"


def _pack(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> list[Tensor]:
    """u, delta, B, C, z as views of one ``B L W``; one launch."""
    from mambascope.ops.scan.triton_turn import turn_all

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


def _scan(inputs: Inputs, softplus: bool, interval: int | None) -> tuple[list[Tensor], Any, Tensor, Tensor, Any]:
    """The packed u, delta, B, C, z; the bias; out ``B D L``; the last state; states every ``interval`` steps."""
    from mambascope.ops.scan.triton_turn import turn

    u, delta, A, B, C, D, z, bias = inputs
    packed = _pack(u, delta, B, C, z)
    u_, delta_, B_, C_, *z_ = packed
    if bias is not None and not softplus:  # our kernels add it only before a softplus
        delta_ = packed[1] = delta_.float() + bias.float()
        bias = None
    operands = (u_, delta_, A, B_, C_, D, z_[0] if z_ else None, bias, None, None)
    y, h_last, bound = kernels("triton").scan_forward(*operands, dt_softplus=softplus, boundaries=interval)
    return packed, bias, turn(y, u.dtype), h_last, bound


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, softplus: bool, *inputs: Any) -> Any:
        u, _, A, _, _, D, _, bias = inputs
        ctx.interval = kernels("triton").preferred_interval(u.device, u.dtype, A.shape[1])  # type: ignore[attr-defined]
        packed, used_bias, out, h_last, bound = _scan(inputs, softplus, ctx.interval)
        ctx.save_for_backward(A, D, used_bias, bound, *packed)
        ctx.softplus, ctx.bias_dtype = softplus, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return out, h_last

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        if torch.is_grad_enabled():
            raise BackendError(
                "selective_scan_fn on backend 'triton' has no second derivative, and create_graph=True asks for one; "
                "use backend='torch' or 'reference'"
            )
        return None, *_gradients(ctx, *arriving)


def _gradients(ctx: Any, dout: Tensor | None, dh_last: Tensor | None) -> list[Tensor | None]:
    """Of u, delta, A, B, C, D, z, delta_bias; those ``B L *`` turned back in one launch."""
    from mambascope.ops.scan.triton_turn import turn, turn_all

    A, D, bias, bound, u, delta, B, C, *rest = ctx.saved_tensors
    z = rest[0] if rest else None
    kind = torch.float32 if z is None else u.dtype  # of y
    dy = torch.zeros(u.shape, dtype=kind, device=u.device) if dout is None else turn(dout, kind)
    operands = (u, delta, A, B, C, D, z, bias, None, None)
    steps = {"dt_softplus": ctx.softplus, "boundaries": ctx.interval}
    found = kernels("triton").scan_backward(*operands, bound, dy, dh_last, None, **steps)
    names = ("du", "ddelta", "dB", "dC") if z is None else ("du", "ddelta", "dz", "dB", "dC")
    ours = [found[name] for name in names]
    targets = [x.new_empty((x.shape[0], x.shape[2], x.shape[1]), dtype=u.dtype) for x in ours]
    turn_all(ours, targets, len(names) - 2)
    du, ddelta, *dz, dB, dC = targets
    dbias = found["ddt_bias"]
    if dbias is None and ctx.bias_dtype is not None:
        dbias = found["ddelta"].sum((0, 1))
    dA, dD = found["dA"].to(A.dtype), None if D is None else found["dD"].to(D.dtype)
    return [du, ddelta, dA, dB, dC, dD, dz[0] if dz else None, None if dbias is None else dbias.to(ctx.bias_dtype)]


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """``out B D L`` and ``last_state B D N``; what `takes` has accepted."""
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Scan.apply(bool(delta_softplus), *inputs)  # type: ignore[return-value]
    _, _, out, h_last, _ = _scan(inputs, bool(delta_softplus), None)
    return out, h_last

"""``selective_scan_fn`` on a GPU without a walk through five copies: what may go that way, and its gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import BackendError
from mambascope.ops import layout
from mambascope.ops.dispatch import Backend, choose, kernels
from mambascope.ops.ready import Ready, eager_apply

__all__ = ["ready", "scan", "takes"]

ready = Ready()
"""Of `scan`, by kind."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""u, delta, A, B, C, D, z, delta_bias as `selective_scan_fn` takes them, B and C ``B N L``."""


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


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Callable[..., Any] | None, options: dict[str, Any], *inputs: Any) -> Any:
        from mambascope.ops.scan import triton_packed

        _, _, A, _, _, D, _, bias = inputs
        out, h_last, bound, u, delta, B, C, z, used_bias = (own or triton_packed.forward)(*inputs, **options)
        ctx.save_for_backward(u, delta, A, B, C, D, z, used_bias, bound)
        ctx.options, ctx.bias_dtype = options, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return out, h_last

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        if torch.is_grad_enabled():
            raise BackendError(
                "selective_scan_fn on backend 'triton' has no second derivative, and create_graph=True asks for one; "
                "use backend='torch' or 'reference'"
            )
        from mambascope.ops.scan import triton_packed

        tensors = ctx.saved_tensors
        *grads, dbias, ddelta = triton_packed.backward(*tensors, *arriving, **ctx.options)
        if dbias is None and ctx.bias_dtype is not None:
            dbias = ddelta.sum((0, 1))
        grads[2] = grads[2].to(tensors[2].dtype)
        grads[5] = None if grads[5] is None else grads[5].to(tensors[5].dtype)
        return None, None, *grads, None if dbias is None else dbias.to(ctx.bias_dtype)


_apply = eager_apply(_Scan)


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
    key: Any = None,
) -> tuple[Tensor, Tensor]:
    """``out B D L`` and ``last_state B D N``; what `takes` has accepted. ``key``: of `ready`, to be learned."""
    from mambascope.ops.scan import triton_packed

    inputs, softplus = (u, delta, A, B, C, D, z, delta_bias), bool(delta_softplus)
    lies = triton_packed.as_it_lies(u, A.shape[1], biased=delta_bias is not None, softplus=softplus)
    options: dict[str, Any] = {"softplus": softplus, "interval": None, "lies": lies}
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        options["interval"] = kernels("triton").preferred_interval(u.device, u.dtype, A.shape[1])  # type: ignore[attr-defined]
        found: Any = _Scan.apply(None, options, *inputs)

        def wrap(replay: Any) -> Callable[..., Any]:
            return lambda *inputs: _apply(replay, options, *inputs)
    else:
        found = triton_packed.forward(*inputs, **options)[:2]

        def wrap(replay: Any) -> Callable[..., Any]:
            return lambda *inputs: replay(*inputs)[:2]

    ready.learn(key, triton_packed.forward, *options.items(), wrap=wrap)
    return found

"""What the operators of a kernel backend are called with, do, and give: schemas, bodies, and fakes for tracing.

Operators cannot return None, so an output or gradient that is not there is an empty tensor here.
"""

from typing import Any

import torch
from torch import Tensor

from mambascope.ops.checks import compute_dtype
from mambascope.ops.dispatch import scan_module

__all__ = ["CONV_GRADS", "SCAN_GRADS", "SCHEMAS", "Fakes", "Kernels"]

_SCAN = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? h0, "
_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? lengths, "
SCAN_GRADS = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dh0")
CONV_GRADS = ("dx", "dweight", "dbias", "dstate")
SCHEMAS = {
    "selective_scan": f"({_SCAN}Tensor? lengths, bool dt_softplus, int boundaries) -> (Tensor, Tensor, Tensor)",
    "selective_scan_backward": f"({_SCAN}Tensor? lengths, Tensor h_boundary, Tensor dy, Tensor? dh_last, "
    "Tensor? dh_boundary, bool dt_softplus, int boundaries) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "state_window": "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor h_start) -> Tensor",
    "causal_conv": f"({_CONV}bool silu) -> (Tensor, Tensor)",
    "causal_conv_backward": f"({_CONV}Tensor dy, Tensor? dstate, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    "softplus": "(Tensor x) -> Tensor",
    "silu": "(Tensor x) -> Tensor",
    "gate": "(Tensor y, Tensor z) -> Tensor",
    "rms_norm": "(Tensor x, Tensor? weight, float eps, bool expose) -> (Tensor, Tensor, Tensor)",
}


def _filled(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or an empty tensor where there is none."""
    return like.new_empty(0) if x is None else x.contiguous()


def _as(x: Tensor | None, like: Tensor | None, owner: Tensor) -> Tensor:
    """A gradient in the dtype of what it belongs to; empty if that was not given."""
    if like is None or x is None:
        return owner.new_empty(0)
    return x.to(like.dtype).contiguous()


class Kernels:
    """The operators' bodies: calls of one backend's kernels, with their fake twins beside them."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    @property
    def module(self) -> Any:
        return scan_module(self.backend)

    def selective_scan(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, dt_softplus, boundaries = args
        y, h_last, h_boundary = self.module.scan_forward(
            *inputs, dt_softplus=dt_softplus, boundaries=boundaries or None
        )
        return y, h_last.contiguous(), _filled(h_boundary, h_last)

    def selective_scan_backward(self, *args: Any) -> tuple[Tensor, ...]:
        *inputs, h_boundary, dy, dh_last, dh_boundary, dt_softplus, boundaries = args
        u, delta, A, B, C, D, z, dt_bias, h0, _ = inputs
        found = self.module.scan_backward(
            *inputs, h_boundary, dy, dh_last, dh_boundary, dt_softplus=dt_softplus, boundaries=boundaries
        )
        likes = (u, delta, A, B, C, D, z, dt_bias, h0)
        return tuple(_as(found[name], like, u) for name, like in zip(SCAN_GRADS, likes, strict=True))

    def state_window(self, *args: Tensor) -> Tensor:
        return self.module.state_window(*args).contiguous()

    def causal_conv(self, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, silu = args
        y, state = self.module.conv_forward(*inputs, silu=silu)
        return y, state.contiguous()

    def causal_conv_backward(self, *args: Any) -> tuple[Tensor, ...]:
        *inputs, dy, dstate, silu = args
        x, weight, bias, state, _ = inputs
        found = self.module.conv_backward(*inputs, dy, dstate, silu=silu)
        likes = (x, weight, bias, state)
        return tuple(_as(found[name], like, x) for name, like in zip(CONV_GRADS, likes, strict=True))

    def softplus(self, x: Tensor) -> Tensor:
        return self.module.softplus_forward(x)

    def silu(self, x: Tensor) -> Tensor:
        return self.module.silu_forward(x)

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        return self.module.gate_forward(y, z)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, expose: bool) -> tuple[Tensor, Tensor, Tensor]:
        out, normalized, scale = self.module.norm_forward(x, weight, eps, expose=expose)
        return out, _filled(normalized, x), _filled(scale, x)


class Fakes:
    """Shapes and dtypes of the outputs, from those of the inputs alone."""

    @staticmethod
    def selective_scan(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, _, A, _, _, _, z, _, _, _, _, boundaries = args
        batch, length, channels = u.shape
        wide = compute_dtype(*args[:9])
        y = u.new_empty(u.shape, dtype=wide if z is None else u.dtype)
        h_last = u.new_empty((batch, channels, A.shape[1]), dtype=wide)
        if not boundaries:
            return y, h_last, h_last.new_empty(0)
        return y, h_last, h_last.new_empty(batch, (length + boundaries - 1) // boundaries, channels, A.shape[1])

    @staticmethod
    def selective_scan_backward(*args: Any) -> tuple[Tensor, ...]:
        u = args[0]
        return tuple(u.new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:9])

    @staticmethod
    def state_window(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor) -> Tensor:
        return u.new_empty((*u.shape, A.shape[1]), dtype=torch.float32)

    @staticmethod
    def causal_conv(*args: Any) -> tuple[Tensor, Tensor]:
        x, weight = args[:2]
        return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], weight.shape[1] - 1)

    @staticmethod
    def causal_conv_backward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(args[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:4])

    @staticmethod
    def softplus(x: Tensor) -> Tensor:
        return x.new_empty(x.shape, dtype=torch.float32)

    @staticmethod
    def silu(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    @staticmethod
    def gate(y: Tensor, z: Tensor) -> Tensor:
        return z.new_empty(z.shape)

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor | None, eps: float, expose: bool) -> tuple[Tensor, Tensor, Tensor]:
        out = x.new_empty(x.shape, dtype=x.dtype if weight is None else weight.dtype)
        if not expose:
            return out, x.new_empty(0), x.new_empty(0)
        wide = x.new_empty(x.shape, dtype=torch.float32)
        return out, wide, wide.new_empty((*x.shape[:-1], 1))

"""What a kernel backend is: a module with these functions, and nothing else that the operators know of it.

Arguments come checked. They may be strided views (x and z are halves of one ``B L 2D`` tensor, B and C slices of one
product); results are contiguous. All arithmetic is float32 whatever the inputs' dtype; delta after softplus, y before
the gate, and h are float32. Fused and apart (softplus, skip, gate, SiLU after the convolution) give the same bits.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["KernelModule"]


@runtime_checkable
class KernelModule(Protocol):
    """The functions of ``mambascope.ops.cpu`` and ``mambascope.ops.scan.triton``."""

    def supports(self, device: torch.device, dtype: torch.dtype, N: int, K: int, /) -> str:
        """'' if tensors of this device and dtype with N states and conv width K can run, else the reason in words."""
        ...

    def scan_forward(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, h0: Tensor | None, lengths: Tensor | None, /, *,
        dt_softplus: bool, boundaries: int | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """y ``B L D`` (u's dtype with z, else float32), h_last ``B D N``, h_boundary ``B ceil(L/boundaries) D N``."""
        ...

    def scan_backward(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        dt_bias: Tensor | None, h0: Tensor | None, lengths: Tensor | None, h_boundary: Tensor, dy: Tensor,
        dh_last: Tensor | None, dh_boundary: Tensor | None, /, *, dt_softplus: bool, boundaries: int,
    ) -> Any:  # fmt: skip
        """Mapping with du, ddelta, dA, dB, dC, dD, dz, ddt_bias, dh0; None for what was not given, but for dh0, which
        may be there without h0 too."""
        ...

    def state_window(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor, /) -> Tensor:
        """h after each of W steps, ``B W D N``; delta after softplus."""
        ...

    def state_contraction(
        self, dy: Tensor, delta: Tensor, C: Tensor, A: Tensor, u1: Tensor, delta1: Tensor, B1: Tensor, h1: Tensor,
        u2: Tensor, delta2: Tensor, B2: Tensor, h2: Tensor, /, *, boundaries: int,
    ) -> Tensor:  # fmt: skip
        """Σ_n G·(h2 − h1) ``B L D``, float32; h1 and h2 are states every ``boundaries`` ≤ 64 steps."""
        ...

    def conv_forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None, /, *,
        silu: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y ``B L D`` and the new state ``B D K-1``, in x's dtype."""
        ...

    def conv_backward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, lengths: Tensor | None, dy: Tensor,
        dstate: Tensor | None, /, *, silu: bool,
    ) -> Any:  # fmt: skip
        """Mapping with dx, dweight, dbias, dstate."""
        ...

    def softplus_forward(self, x: Tensor, /) -> Tensor:
        """float32, x's shape."""
        ...

    def silu_forward(self, x: Tensor, /) -> Tensor:
        """x's dtype and shape."""
        ...

    def gate_forward(self, y: Tensor, z: Tensor, /) -> Tensor:
        """y · silu(z) in z's dtype."""
        ...

    def norm_forward(
        self, x: Tensor, weight: Tensor | None, eps: float, /, *, expose: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """out, and if exposed x / scale and scale, see `mambascope.ops.rms_norm`."""
        ...

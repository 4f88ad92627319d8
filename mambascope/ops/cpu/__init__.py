"""Fused CPU kernels in numba: the same interface as the Triton ones (see `mambascope.ops`), float32 arithmetic.

Nothing here imports numba or compiles before a kernel is first asked for; `supports` only looks whether numba is there.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mambascope.ops.cpu.adjoint import state_contraction
    from mambascope.ops.cpu.backward import scan_backward
    from mambascope.ops.cpu.conv import conv_backward, conv_forward
    from mambascope.ops.cpu.elementwise import gate_forward, silu_forward, softplus_forward
    from mambascope.ops.cpu.norm import norm_forward
    from mambascope.ops.cpu.scan import scan_forward, state_window

__all__ = [
    "conv_backward",
    "conv_forward",
    "gate_forward",
    "norm_forward",
    "scan_backward",
    "scan_forward",
    "silu_forward",
    "softplus_forward",
    "state_contraction",
    "state_window",
    "supports",
]

_HOME = {
    "conv_backward": "conv",
    "conv_forward": "conv",
    "gate_forward": "elementwise",
    "norm_forward": "norm",
    "scan_backward": "backward",
    "scan_forward": "scan",
    "silu_forward": "elementwise",
    "softplus_forward": "elementwise",
    "state_contraction": "adjoint",
    "state_window": "scan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def supports(device: torch.device, dtype: torch.dtype, N: int, K: int) -> str:
    """'' if the kernels can run tensors of this device and dtype with N states and conv width K, else why not."""
    if torch.device(device).type != "cpu":
        return f"its kernels run on CPU tensors, these are on {device}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels compute in float32, the inputs are {dtype}"
    if N < 1 or K < 1:
        return f"it needs d_state ≥ 1 and a conv width ≥ 1, got {N} and {K}"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    return ""

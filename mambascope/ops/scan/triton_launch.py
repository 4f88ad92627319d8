"""What the Triton kernels need on the host: may they run, on which device, with which strides."""

from typing import Any

import torch
from torch import Tensor

from mambascope.errors import BackendError
from mambascope.ops.scan.triton_math import INTERPRETED
from mambascope.ops.scan.triton_replay import note

__all__ = ["beside_dx", "check", "dense", "launch", "processor_count", "strides", "supports", "whole"]

MAX_STATE = 256
MAX_WIDTH = 32
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_processors: dict[torch.device, int] = {}


def supports(device: torch.device, dtype: torch.dtype, N: int, K: int) -> str:
    """'' if the kernels can take it, else the reason in words."""
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the Triton kernels run on CUDA tensors, these are on {device} (TRITON_INTERPRET is not set)"
    if device.type == "cuda" and INTERPRETED:
        return "TRITON_INTERPRET is set: kernels are interpreted, on CPU tensors"
    if dtype not in _DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, got {dtype}"
    if N > MAX_STATE:
        return f"the Triton kernels hold at most N = {MAX_STATE} states a channel, got {N}"
    if K > MAX_WIDTH:
        return f"the Triton kernels take a conv width of at most K = {MAX_WIDTH}, got {K}"
    return ""


def check(x: Tensor, N: int = 1, K: int = 1) -> None:
    """`BackendError` where `supports` gives a reason."""
    reason = supports(x.device, x.dtype, N, K)
    if reason:
        raise BackendError(f"backend 'triton' cannot run: {reason}; use backend='torch' or 'auto'")


def processor_count(device: torch.device) -> int:
    """Multiprocessors of the GPU; the interpreter's plans are those of a GPU with four."""
    if device.type != "cuda":
        return 4
    if device not in _processors:
        _processors[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _processors[device]


def dense(x: Tensor | None) -> Tensor | None:
    """The tensor itself if its last axis is dense, else a copy."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def whole(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """The tensor itself if it is contiguous (and of that dtype), else a copy."""
    return None if x is None else (x if dtype is None else x.to(dtype)).contiguous()


def beside_dx(z: Tensor) -> dict[str, Tensor]:
    """Memory for dz, as the right half of ``dxz B L 2D``, whose left half is for dx: one matrix, as x and z are."""
    batch, length, channels = z.shape
    dxz = torch.empty((batch, length, 2 * channels), dtype=z.dtype, device=z.device)
    return {"dxz": dxz, "dz": dxz[..., channels:]}


def strides(*tensors: Tensor | None) -> list[int]:
    """Strides of rows and of steps, of tensors ``B L …``; zeros for those that are not there."""
    return [0 if x is None else x.stride(axis) for x in tensors for axis in (0, 1)]


_compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}


def _kind(x: Any) -> Any:
    """What Triton may specialise a kernel on, and more: dtype and alignment, or an integer's divisibility and width."""
    if x is None or type(x) is float:
        return x is None
    if type(x) is int:
        return (x & 15 == 0) + 2 * (x == 1) + 4 * (x > 0x7FFFFFFF)
    return x.dtype, x.data_ptr() & 15 == 0


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **options: Any) -> None:
    """Launch on the tensors' own device, which need not be the current one.

    ``args`` are all parameters but the compile-time constants, which are in ``options`` with Triton's own. The compiled
    kernel of the first launch is kept and called directly by later ones of the same kind: Triton's way to it takes
    longer than the smaller kernels run.
    """
    if device.type != "cuda":
        kernel[(programs,)](*args, **options)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, device, *args, **options)
        return
    key = (id(kernel), device.index, *options.values(), *map(_kind, args))
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*args, **options)
        constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = compiled, constants
    else:
        compiled, constants = found
        compiled[programs, 1, 1](*args, *constants)
    note(compiled, programs, args, constants)

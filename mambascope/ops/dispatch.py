"""Which backend runs: one decision for every operator, cached, and said in words.

``reference``  plain recurrence, one step at a time: the truth that everything is compared with
``torch``      chunked recurrence in ordinary torch operators: any device, any floating dtype
``cpu``        numba kernels, float32 arithmetic
``triton``     GPU kernels, float32 state

A kernel backend is a module with the functions of `interface.KernelModule`; it is imported only when it may run.
"""

import importlib
import importlib.util
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mambascope.errors import BackendError, nearest
from mambascope.ops.interface import KernelModule

__all__ = ["BACKENDS", "KERNEL_BACKENDS", "Backend", "check_backend", "choose", "kernels", "resolve_backend"]

Backend = Literal["auto", "reference", "torch", "cpu", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

KERNEL_BACKENDS = {"cpu": ("cpu",), "triton": ("cuda", "cpu")}
"""The backends made of kernels, and the devices of their operators (Triton's interpreter takes CPU tensors)."""

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_HOME = {
    "cpu": "mambascope.ops.cpu",
    "triton": "mambascope.ops.scan.triton",
    "torch": "mambascope.ops.scan.chunked",  # its scan only
}
_NEEDS = {"cpu": "numba", "triton": "triton", "torch": "torch"}
_modules: dict[str, Any] = {}
_decisions: dict[tuple[str, torch.device, torch.dtype, int, int], tuple[str, str]] = {}
_noticed: set[str] = set()


def _load(name: str) -> Any:
    """The kernel module of a backend, or the reason in words why there is none."""
    found = _modules.get(name)
    if found is None:
        try:
            importlib.import_module(_NEEDS[name])
        except ImportError as error:
            found = f"the package {_NEEDS[name]!r} cannot be imported ({error})"
        else:
            home = _HOME[name]
            # Only a missing kernel module is a reason; an error inside it is a fault and surfaces.
            module = importlib.import_module(home) if importlib.util.find_spec(home) else None
            found = module if hasattr(module, "supports") else f"this installation has no module {home}"
        _modules[name] = found
    return found


def kernels(name: str) -> KernelModule:
    """The kernel module of ``cpu`` or ``triton``; `BackendError` if it cannot be loaded."""
    return scan_module(name)


def scan_module(name: str) -> Any:
    """The same, or for ``torch`` the module of the chunked scan, which has the scan's functions alone."""
    found = _load(name)
    if isinstance(found, str):
        raise BackendError(f"backend {name!r} cannot run: {found}; use backend='auto' or 'torch'")
    return found


def _why_not(name: str, device: torch.device, dtype: torch.dtype, d_state: int, d_conv: int) -> str:
    """Why a kernel backend cannot take this ('' if it can)."""
    if device.type not in KERNEL_BACKENDS[name]:
        return f"it runs on {KERNEL_BACKENDS[name][0].upper()} tensors, these are on {device}"
    if dtype == torch.float64:
        return "its kernels compute in float32, the inputs are float64"
    found = _load(name)
    return found if isinstance(found, str) else found.supports(device, dtype, d_state, d_conv)


def check_backend(backend: str) -> None:
    """BackendError unless this is the name of a backend, here or elsewhere."""
    if backend not in BACKENDS:
        near = nearest(str(backend), BACKENDS)
        raise BackendError(f"unknown backend {backend!r}{near} (known: {', '.join(BACKENDS)})")


def _decide(backend: str, device: torch.device, dtype: torch.dtype, d_state: int, d_conv: int) -> tuple[str, str]:
    check_backend(backend)
    if dtype not in _DTYPES:
        raise BackendError(f"dtype {dtype} is not supported: the operators take float32, float64, bfloat16 and float16")
    if backend in ("reference", "torch"):
        return backend, "asked for"
    if backend in KERNEL_BACKENDS:
        reason = _why_not(backend, device, dtype, d_state, d_conv)
        if reason:
            raise BackendError(f"backend {backend!r} cannot run: {reason}; use backend='torch' or 'auto'")
        return backend, "asked for"
    if device.type not in ("cpu", "cuda"):
        return "torch", f"no kernels for device {device.type!r}"
    name = "cpu" if device.type == "cpu" else "triton"
    reason = _why_not(name, device, dtype, d_state, d_conv)
    if not reason:
        return name, f"fastest on {device.type}"
    if dtype != torch.float64 and isinstance(_load(name), str) and name not in _noticed:
        _noticed.add(name)
        warnings.warn(
            f"the {name} kernels of mambascope cannot run: {reason}; using the slower torch path", stacklevel=4
        )
    return "torch", f"the {name} kernels cannot run: {reason}"


def resolve_backend(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype,
    needs_grad: bool = False,
    *,
    d_state: int = 16,
    d_conv: int = 4,
) -> tuple[str, str]:
    """The backend that will run for tensors of ``device`` and ``dtype``, and why.

    ``auto`` takes the fused kernels of the device where they can run (``cpu``: numba; ``cuda``: Triton) and ``torch``
    otherwise; the first time that a missing package is the cause it warns once.

    Args:
        backend: one of `BACKENDS`.
        device: where the tensors are.
        dtype: their dtype; the dtype of the computation is float32, or float64 for float64 tensors.
        needs_grad: whether gradients will be asked for (every backend has first derivatives of the scan, so this
            changes nothing today).
        d_state: N, d_conv: K, the sizes that a kernel may refuse.

    Returns:
        ``(name, reason)`` with name one of ``reference``, ``torch``, ``cpu``, ``triton``.

    Raises:
        BackendError: an unknown name, a dtype that is not floating, or an explicit backend that cannot run.
    """
    if isinstance(device, str):
        device = torch.device(device)
    key = (backend, device, dtype, d_state, d_conv)
    found = _decisions.get(key)
    if found is None:
        found = _decisions[key] = _decide(backend, device, dtype, d_state, d_conv)
    return found


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler: a trace takes the decision
# as it is, and does not look into imports and caches.
resolve_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _transformed() -> bool:
    stack = torch._C._functorch.peek_interpreter_stack()  # pyright: ignore[reportAttributeAccessIssue]
    return stack is not None or forward_ad._current_level >= 0


def choose(backend: str, *tensors: Tensor | None, d_state: int = 16, d_conv: int = 4) -> str:
    """The backend's name for a call with these tensors; the first says the device and, float64 aside, the dtype.

    Neither the kernels nor the chunked scan see functorch's transforms (`torch.func`) and forward-mode derivatives:
    there ``auto`` takes the reference, and every other choice is refused.
    """
    first = tensors[0]
    assert first is not None
    dtype = first.dtype
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            dtype = torch.float64
    if backend == "reference":
        return backend
    if not torch.compiler.is_compiling() and _transformed():
        if backend != "auto":
            raise BackendError(
                f"backend {backend!r} cannot run inside torch.func transforms or forward-mode differentiation; "
                "use backend='reference' or 'auto' there"
            )
        return "reference"
    return resolve_backend(backend, first.device, dtype, d_state=d_state, d_conv=d_conv)[0]

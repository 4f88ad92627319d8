"""Which backend runs: one decision for every operator, cached, and said in words.

``reference``  plain recurrence, one step at a time: the truth that everything is compared with
``torch``      chunked recurrence in ordinary torch operators: any device, any floating dtype
``cpu``        numba kernels, float32 arithmetic
``triton``     GPU kernels, float32 state

A kernel backend is a module with the functions that `Kernels` lists; it is imported only when it may run.
"""

import importlib
import importlib.util
import warnings
from types import ModuleType
from typing import Literal, cast, get_args

import torch

from mambascope.errors import BackendError, nearest

__all__ = ["BACKENDS", "Backend", "kernels", "resolve_backend"]

Backend = Literal["auto", "reference", "torch", "cpu", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_HOME = {"cpu": "mambascope.ops.cpu", "triton": "mambascope.ops.scan.triton"}
_NEEDS = {"cpu": "numba", "triton": "triton"}
_modules: dict[str, ModuleType | str] = {}
_decisions: dict[tuple[str, torch.device, torch.dtype, int, int], tuple[str, str]] = {}
_noticed: set[str] = set()


def _load(name: str) -> ModuleType | str:
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
            parent, _, leaf = home.rpartition(".")
            if importlib.util.find_spec(home) is None:
                found = f"{parent} has no {leaf} kernels in this installation"
            else:
                found = importlib.import_module(home)
        _modules[name] = found
    return found


def kernels(name: str) -> ModuleType:
    """The kernel module of ``cpu`` or ``triton``; `BackendError` if it cannot be loaded."""
    found = _load(name)
    if isinstance(found, str):
        raise BackendError(f"backend {name!r} cannot run: {found}; use backend='auto' or 'torch'")
    return found


def _why_not(name: str, device: torch.device, dtype: torch.dtype, d_state: int, d_conv: int) -> str:
    """Why a kernel backend cannot take this ('' if it can)."""
    if name == "cpu" and device.type != "cpu":
        return f"it runs on CPU tensors, these are on {device}"
    if name == "triton" and device.type != "cuda":
        return f"it runs on CUDA tensors, these are on {device}"
    if dtype == torch.float64:
        return "its kernels compute in float32, the inputs are float64"
    found = _load(name)
    return found if isinstance(found, str) else found.supports(device, dtype, d_state, d_conv)


def _decide(backend: str, device: torch.device, dtype: torch.dtype, d_state: int, d_conv: int) -> tuple[str, str]:
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}{nearest(backend, BACKENDS)} Known: {', '.join(BACKENDS)}")
    if not dtype.is_floating_point:
        raise BackendError(f"dtype {dtype} is not supported: the operators take floating-point tensors")
    if backend == "reference":
        return backend, "asked for"
    if backend == "torch" or backend in _HOME:
        raise BackendError(f"backend {backend!r} is not wired yet; use 'auto' or 'reference'")
    if backend in _HOME:
        reason = _why_not(backend, device, dtype, d_state, d_conv)
        if reason:
            way = "use backend='torch' or 'auto'" if device.type != "meta" else "use backend='auto'"
            raise BackendError(f"backend {backend!r} cannot run: {reason}; {way}")
        return backend, "asked for"
    return "reference", "the only backend wired so far"
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


def chosen(backend: str, x: torch.Tensor, d_state: int = 16, d_conv: int = 4) -> str:
    """The backend's name alone, for the operators' front ends."""
    return resolve_backend(backend, x.device, x.dtype, d_state=d_state, d_conv=d_conv)[0]


def as_backend(name: str) -> Backend:
    return cast(Backend, name)

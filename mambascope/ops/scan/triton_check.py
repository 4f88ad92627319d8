"""A tiny comparison of the GPU kernels with the reference, once on every GPU of a kind that nobody has tested.

A compiler that is new to an architecture can be wrong in silence. On compute capability 9.0 the kernels have passed the
full gate (tests/bench/bench_scan_gpu.py); elsewhere the scan and the convolution, forward and backward, run once on a
few numbers. A difference is told as a warning and keeps the kernels from running there.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mambascope.ops.conv import conv_formula
from mambascope.ops.scan import reference

__all__ = ["TESTED", "complaint", "trusted"]

TESTED = ((9, 0),)
"""Compute capabilities on which the full gate has passed."""

_BAR = 1e-4  # rounding is a hundred times smaller, a wrong kernel is off by its values
_answers: dict[torch.device, str] = {}


def trusted(device: torch.device, kernels: Any) -> str:
    """'' if this GPU's kind is tested or the self-check passes on it, else what was wrong, in words."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) in TESTED:
        return ""
    found = _answers.get(device)
    if found is None:
        if torch.cuda.is_current_stream_capturing():  # nothing can be looked at while a graph is recorded
            return ""
        found = complaint(device, kernels)
        if found:
            name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
            found = f"their self-check failed on {name} (compute capability {capability[0]}.{capability[1]}): {found}"
            warnings.warn(f"the Triton kernels of mambascope are not used: {found}", stacklevel=3)
        _answers[device] = found
    return found


def complaint(device: torch.device, kernels: Any) -> str:
    """'' if the kernels agree with the reference in float64 on a small problem, else the first disagreement."""
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng([]):
        g = torch.Generator().manual_seed(0)
        pieces = {**_scan(device, kernels, g), **_convolution(device, kernels, g)}
        for name, (found, truth) in pieces.items():
            apart = float((found.double() - truth).abs().max() / truth.abs().max())
            if not apart <= _BAR:
                return f"{name} differs from the reference by {apart:.1e}"
    return ""


def _leaves(device: torch.device, g: torch.Generator, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, generator=g).to(device) for shape in shapes]


def _scan(device: torch.device, kernels: Any, g: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """u delta A B C and h0, 21 steps of 20 channels with 5 states: whole and partial groups, tiles and blocks."""
    u, delta, A, B, C, h0, dy = _leaves(
        device, g, (2, 21, 20), (2, 21, 20), (20, 5), (2, 21, 5), (2, 21, 5), (2, 20, 5), (2, 21, 20)
    )
    delta, A = delta.abs() / 4, -A.abs() - 0.1
    absent = (None, None, None)
    y, h_last, bound = kernels.scan_forward(u, delta, A, B, C, *absent, h0, None, dt_softplus=False, boundaries=16)
    grads = kernels.scan_backward(
        u, delta, A, B, C, *absent, h0, None, bound, dy, None, None, dt_softplus=False, boundaries=16
    )
    leaves = [x.double().requires_grad_() for x in (u, delta, A, B, C, h0)]
    with torch.enable_grad():
        true_y, true_h, true_bound = reference.scan(*leaves, None, 16)
        truth = torch.autograd.grad(true_y, leaves, dy.double())
    assert true_bound is not None
    found = {"y": (y, true_y), "h_last": (h_last, true_h), "h_boundary": (bound, true_bound)}
    names = ("du", "ddelta", "dA", "dB", "dC", "dh0")
    return found | {name: (grads[name], t) for name, t in zip(names, truth, strict=True)}


def _convolution(device: torch.device, kernels: Any, g: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    x, weight, bias, dy = _leaves(device, g, (2, 21, 20), (20, 4), (20,), (2, 21, 20))
    y, state = kernels.conv_forward(x, weight, bias, None, None, silu=True)
    grads = kernels.conv_backward(x, weight, bias, None, None, dy, None, silu=True)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        true_y, true_state = conv_formula(*leaves, None, None, True)
        truth = torch.autograd.grad(true_y, leaves, dy.double())
    found = {"the convolution": (y, true_y), "its state": (state, true_state)}
    names = ("dx", "dweight", "dbias")
    return found | {f"the convolution's {name}": (grads[name], t) for name, t in zip(names, truth, strict=True)}

"""Inputs and runs of the operators that several test files share."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mambascope import ops
from mambascope.errors import BackendError
from mambascope.ops.dispatch import resolve_backend

TENSORS = ("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "h0")


def backend_params(*names: str) -> list[Any]:
    """The backends as test parameters; those that cannot run here are skipped with the reason."""
    found = []
    for name in names:
        try:
            resolve_backend(name, "cpu", torch.float32)
        except BackendError as error:
            found.append(pytest.param(name, marks=pytest.mark.skip(reason=str(error))))
        else:
            found.append(name)
    return found


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that memory which is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def scan_inputs(
    batch: int,
    length: int,
    channels: int,
    states: int,
    *,
    kind: str = "tame",
    seed: int = 0,
    dtype: Any = torch.float32,
) -> dict[str, Tensor]:
    """All tensors of ``selective_scan``, delta raw (before softplus); made in float32, then rounded to ``dtype``.

    ``wild``: A = −(1…N), delta log-uniform from 1e-4 to 50 (A_bar from 1 to exactly 0), outliers in u.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    x = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels) - 2.0,
        "A": -torch.exp(2.7 * torch.rand(channels, states, generator=g)),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(channels),
        "z": normal(batch, length, channels),
        "dt_bias": 0.3 * normal(channels),
        "h0": normal(batch, channels, states),
    }
    if kind == "wild":
        x["A"] = -torch.arange(1.0, states + 1).expand(channels, states).contiguous()
        low, high = torch.log(torch.tensor([1e-4, 50.0], dtype=torch.float64))
        delta = torch.exp(low + (high - low) * torch.rand(batch, length, channels, generator=g, dtype=torch.float64))
        x["delta"] = (delta + torch.log(-torch.expm1(-delta)) - x["dt_bias"].double()).float()
        x["u"] = torch.where(torch.rand(x["u"].shape, generator=g) < 0.02, 100 * x["u"], x["u"])
    if dtype == torch.float64:
        return {name: t.double() for name, t in x.items()}
    keep = ("A", "h0", "D", "dt_bias")
    return {name: t if name in keep else t.to(dtype) for name, t in x.items()}


def double(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in x.items()}


def run(
    x: dict[str, Tensor], backend: str, *, gradients: bool = True, seed: int = 1, **options: Any
) -> dict[str, Tensor]:
    """Outputs of ``selective_scan`` by name and, as ``d`` + name, the gradients of a fixed weighting of them all."""
    options.setdefault("dt_softplus", "dt_bias" in x)
    if not gradients:
        with torch.no_grad():
            out = ops.selective_scan(**x, backend=backend, **options)
        return {name: t for name, t in out._asdict().items() if t is not None}
    x = {
        name: t.detach().clone().requires_grad_() if t.is_contiguous() else t.detach().requires_grad_()
        for name, t in x.items()
    }
    out = ops.selective_scan(**x, backend=backend, **options)
    found = {name: t for name, t in out._asdict().items() if t is not None}
    g = torch.Generator().manual_seed(seed)
    # The weights of an output of low precision are exact in it, so that every backend is given the same ones.
    weights = [torch.randn(t.shape, generator=g).bfloat16().to(t.dtype) for t in found.values()]
    grads = torch.autograd.grad(list(found.values()), list(x.values()), weights)
    found = {name: t.detach() for name, t in found.items()}
    return {**found, **{f"d{name}": t for name, t in zip(x, grads, strict=True)}}

"""Shared fixtures: small random models whose numbers are far from degenerate."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network

import beartype  # noqa: F401  (before nnsight, which breaks it otherwise)
import pytest
import torch

from mambascope.config import MambaConfig
from mambascope.model import HookedMamba

torch.set_num_threads(1)  # the models are small; tests of threading set their own number

BACKENDS = ("reference", "torch", "cpu")


def make_model(
    seed: int = 0, dtype: torch.dtype | None = None, backend: str = "auto", **options: object
) -> HookedMamba:
    """A random model with lively states: wide delta range, non-trivial A, D, biases and norm weights."""
    base: dict[str, object] = {"d_model": 24, "n_layers": 3, "d_vocab": 50, "d_state": 5, "dt_max": 0.8}
    torch.manual_seed(seed)
    model = HookedMamba(MambaConfig(**{**base, **options}), backend=backend)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("norm.weight", "ln_final.weight", "mixer.D")):
                p.add_(0.3 * torch.randn_like(p))
            elif name.endswith("A_log"):
                p.add_(0.2 * torch.randn_like(p))
            elif name.endswith(("embed.weight", "in_proj.weight", "x_proj.weight")):
                p.mul_(3 if "embed" not in name else 20)
    return model if dtype is None else model.to(dtype)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(backend: str) -> HookedMamba:
    return make_model(backend=backend)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (2, 70), generator=torch.Generator().manual_seed(1))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()

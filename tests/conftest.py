"""Shared fixtures: small random models whose numbers are far from degenerate."""

import os
import sys

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


_early: list[str] = []
"""The first test module that brought Triton in before its interpreter was chosen."""


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if not _early and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        _early.append(report.nodeid)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without a GPU the kernels' tests need Triton's interpreter; brought in too early, they would all be skipped."""
    if _early and not torch.cuda.is_available() and any("triton" in item.path.name for item in session.items):
        raise pytest.UsageError(
            f"{_early[0]} imports triton (transformers brings it in) before the kernels' tests can ask for its "
            "interpreter: import it inside the test functions"
        )

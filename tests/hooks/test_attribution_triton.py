"""Sweeps and attribution on the Triton path: the same numbers, under the interpreter or on a GPU."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import mambascope as ms
from mambascope.hooks.points import LAZY, points_of
from mambascope.model import HookedMamba
from tests.conftest import error, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*mostly noise")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRIC = ms.LogitDifference(1, 2)
SITES = ("resid_pre", "delta", "h")
ANY = [s.name for s in points_of("m") if s.scope == "block" and s.name not in LAZY - {"mixer.hook_h"}]
CORRUPTED = torch.tensor([[5, 9, 14, 3, 8, 20, 14]])
CLEAN = torch.tensor([[5, 9, 15, 3, 8, 21, 14]])


@pytest.fixture
def models() -> tuple[HookedMamba, HookedMamba]:
    options = {"n_layers": 2, "d_model": 8, "d_state": 4}
    model = make_model(backend="triton", **options)
    return make_model(dtype=torch.float64, backend="torch", **options), model.to(DEVICE)


def test_attribution(models: tuple[HookedMamba, HookedMamba]) -> None:
    want, got = (ms.attribute(m, CLEAN, CORRUPTED, METRIC, ANY).change for m in models)
    for s, site in enumerate(ANY):
        assert error(got[s], want[s]) < 1e-4, site


def test_sweeps(models: tuple[HookedMamba, HookedMamba]) -> None:
    over = {"sites": SITES, "positions": [2, 5]}
    want, got = (ms.sweep(m, CLEAN, CORRUPTED, METRIC, over).values for m in models)
    assert float((want - got).abs().max()) < 1e-5

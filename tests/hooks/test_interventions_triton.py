"""Interventions on the Triton path: under the interpreter on a CPU, as they are on a GPU."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from tests.conftest import make_model
from tests.hooks.test_positions_per_row import batch_of, check_closed_form

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)


@pytest.mark.parametrize("where", [[0, 3, 8, 8, 5, 6], [8], [2, 5, 2, 5]])
def test_a_state_edit_follows_the_closed_form(where: list[int]) -> None:
    model = make_model(backend="triton", n_layers=2, d_model=8).to(DEVICE)
    check_closed_form(model, batch_of(len(where), 9).to(DEVICE), where)

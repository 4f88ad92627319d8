"""The same on the Triton path: interpreted on a CPU, as it is on a GPU."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

from mambascope.ops.scan import triton as kernels
from mambascope.ops.scan.adjoint import Course
from mambascope.ops.scan.triton_table import BackwardPlan
from tests.ops.test_adjoint import case, contract
from tests.ops.tolerance import assert_within

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("batch", "length", "channels", "states", "boundaries"),
    [(1, 1, 1, 1, 64), (2, 21, 5, 3, 8), (1, 34, 17, 16, 16), (1, 15, 17, 4, 7)],
)
@pytest.mark.parametrize("chunks", [1, 3])
def test_shapes_and_plans(batch: int, length: int, channels: int, states: int, boundaries: int, chunks: int) -> None:
    x = case(batch, length, channels, states)
    truth = contract(x, torch.float64, boundaries, "reference")
    sequential = contract(x, torch.float32, boundaries, "reference")
    y = {name: value.float().to(DEVICE) for name, value in x.items()}
    segments = -(-length // boundaries)
    chunk = -(-segments // chunks)
    plan = BackwardPlan(16, min(boundaries, 64), chunk, -(-segments // chunk), segments)
    runs = []
    for k in "12":
        u, delta, B, h0 = (y[f"{name}{k}"] for name in ("u", "delta", "B", "h"))
        given = (u, delta, y["A"], B, y["C"], None, None, None, h0, None)
        h = kernels.scan_forward(*given, dt_softplus=False, boundaries=boundaries)[2]
        runs.append(Course(u, delta, B, h))
    found = kernels.state_contraction(
        y["dy"], y["delta1"], y["C"], y["A"], *runs[0], *runs[1], boundaries=boundaries, plan=plan
    )
    assert_within(found.cpu(), truth, sequential)


def test_another_adjoint_and_the_public_way() -> None:
    x = {name: value.to(DEVICE) for name, value in case(1, 40, 18, 5).items()}
    x["delta"] = x["delta2"] * 0.5 + 0.01
    truth = contract(x, torch.float64, 32, "reference")
    assert_within(
        contract(x, torch.float32, 32, "triton").cpu(), truth.cpu(), contract(x, torch.float32, 32, "reference").cpu()
    )

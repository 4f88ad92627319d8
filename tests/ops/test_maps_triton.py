"""The Triton kernels of the effective kernels: under the interpreter on a CPU, as they are on a GPU.

The interpreter shows what the kernels compute, not what a GPU makes of them; ``tests/bench/bench_maps.py`` repeats the
comparison there at full shapes before it times anything.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from maps_cases import OPTIONS, close, maps_inputs, naive, reduced, without

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from mambascope import ops
from mambascope.ops.maps import REDUCTIONS
from mambascope.ops.maps import triton as kernels
from mambascope.ops.maps.problem import problem
from mambascope.ops.maps.triton import Plan, plan_of

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    "torch.empty gives NaN: what a kernel does not write is seen"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def given(parts: tuple[str, ...], *sizes: int, **options: Any) -> dict[str, Any]:
    x = without(maps_inputs(*sizes, **options), *(name for name in OPTIONS if name not in parts))
    return {name: None if v is None else v.to(DEVICE) for name, v in x.items()}


def truth(x: dict[str, Any]) -> torch.Tensor:
    return naive(**{name: None if v is None else v.cpu() for name, v in x.items()})


@pytest.mark.parametrize(
    ("length", "N", "scale", "parts", "reductions"),
    [
        (1, 1, 0.3, (), REDUCTIONS),
        (17, 1, 60.0, (), REDUCTIONS),
        (35, 3, 1e-7, OPTIONS, ("mean_abs",)),
        (20, 1, 0.3, ("taps",), ("max",)),
        (18, 2, 0.3, ("gain", "read"), ("rms", "signed")),
    ],
)
def test_rows_maps_and_columns_are_the_formula(
    length: int, N: int, scale: float, parts: tuple[str, ...], reductions: tuple[Any, ...]
) -> None:
    x = given(parts, length, N, scale=scale, batch=2)
    exact = truth(x)
    for reduce in reductions:
        found = ops.kernel_map(**x, reduce=reduce, backend="triton").cpu()
        assert close(found, reduced(exact, reduce)), reduce
        assert not found.triu(1).any()
    at = length // 2
    row = ops.kernel_row(**x, query=torch.tensor([at, length - 1], device=DEVICE), backend="triton")
    assert close(row.weights.cpu(), torch.stack([exact[0, at], exact[1, -1]]))
    column = ops.kernel_column(**x, source=torch.tensor([at, 0], device=DEVICE), backend="triton")
    assert close(column.cpu(), torch.stack([exact[0, :, at], exact[1, :, 0]]))


@pytest.mark.parametrize("plan", [Plan(32, 4, 1, 1), Plan(64, 4, 5, 2), Plan(32, 4, 2, 5)])
def test_a_map_does_not_depend_on_its_plan(plan: Plan) -> None:
    x = given(("taps", "read") if plan.tile == 32 else (), 70, 2, D=7, scale=0.02)
    exact = reduced(truth(x), "rms")
    found = kernels.kernel_map(problem(**x), "rms", range(70), range(70), plan)
    assert close(found.cpu(), exact)


def test_longer_lines_are_summed_in_chunks() -> None:
    x = given(OPTIONS, 150, 2, scale=0.05)
    exact = truth(x)
    assert close(ops.kernel_row(**x, query=149, backend="triton").weights.cpu(), exact[:, 149])
    assert close(ops.kernel_column(**x, source=2, backend="triton").cpu(), exact[:, :, 2])


@pytest.mark.parametrize(
    ("rows", "cols", "parts"),
    [((0, 9), (3, 40), ()), ((60, 75), (5, 29), OPTIONS), ((70, 71), (0, 75), ()), ((0, 20), (34, 50), ())],
)
def test_windows_are_parts_of_the_map(rows: tuple[int, int], cols: tuple[int, int], parts: tuple[str, ...]) -> None:
    x = given(parts, 75, 2, scale=0.02)
    part = reduced(truth(x), "mean_abs")[:, slice(*rows), slice(*cols)]
    small = Plan(32, 4, 1, 1)
    found = kernels.kernel_map(problem(**x), "mean_abs", range(*rows), range(*cols), small).cpu()
    assert found.shape == part.shape
    assert close(found, part) if part.any() else not found.any()


def test_nan_reaches_what_it_touches() -> None:
    for name in ("delta", "B"):
        x = given((), 20, 1)
        x[name][:, 12] = float("nan")
        for reduce in ("mean_abs", "max"):
            found = ops.kernel_map(**x, reduce=reduce, backend="triton")[0]
            assert found[12:, 12].isnan().all(), (name, reduce)
            assert found[:12].isfinite().all()


def test_plans_fill_the_machine_and_stay_small() -> None:
    x = given((), 700, 16, D=64)
    p = problem(**{**x, "delta": x["delta"].expand(1, -1, -1)})
    plan = plan_of(p, range(700), range(700))
    assert plan.far >= 1 and plan.near >= 1
    assert plan.far * 4 * 700 * 700 <= kernels._SCRATCH + 4 * 700 * 700
    assert plan_of(p, range(0, 700), range(0, 5)).far >= 1


def test_a_single_share_is_finished_in_place() -> None:
    x = given((), 70, 2, D=5, scale=0.02)
    exact = reduced(truth(x), "mean_abs")
    found = kernels.kernel_map(problem(**x), "mean_abs", range(70), range(70), Plan(16, 2, 1, 1))
    assert close(found.cpu(), exact)
    assert found.untyped_storage().nbytes() == 4 * 70 * 70  # nothing else is held by it

"""Effective kernels on every path against the formula written out in float64."""

from typing import Any

import pytest
import torch
from cases import backend_params
from maps_cases import OPTIONS, close, maps_inputs, naive, reduced, spread, without
from torch import Tensor

from mambascope import ops
from mambascope.errors import BackendError, InputError
from mambascope.ops.maps import REDUCTIONS, lines, tiled
from mambascope.ops.maps.problem import problem

PATHS = backend_params("reference", "torch", "cpu")
PARTS = [(), ("gain",), ("taps",), OPTIONS]  # what a call is given beyond delta, A, B, C


def given(x: dict[str, Tensor], parts: tuple[str, ...]) -> dict[str, Any]:
    return without(x, *(name for name in OPTIONS if name not in parts))


@pytest.fixture(params=PATHS)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("N", [1, 7, 16])
@pytest.mark.parametrize("length", [1, 2, 33, 65])
@pytest.mark.parametrize("scale", [1e-7, 0.3, 60.0])
def test_rows_maps_and_columns_are_the_formula(N: int, length: int, scale: float, backend: Any) -> None:
    everything = maps_inputs(length, N, scale=scale, batch=2)
    core = naive(**without(everything, *OPTIONS))
    for parts in PARTS:
        x = given(everything, parts)
        truth = spread(core, **{name: x[name] for name in OPTIONS})
        for reduce in REDUCTIONS:
            found = ops.kernel_map(**x, reduce=reduce, backend=backend)
            assert close(found, reduced(truth, reduce)), (parts, reduce)
            assert not found.triu(1).any()
        at = length // 2
        row = ops.kernel_row(**x, query=torch.tensor([at, length - 1]), backend=backend)
        assert close(row.weights, torch.stack([truth[0, at], truth[1, -1]])), parts
        column = ops.kernel_column(**x, source=torch.tensor([at, 0]), backend=backend)
        assert close(column, torch.stack([truth[0, :, at], truth[1, :, 0]])), parts


def test_maps_longer_than_a_tile(backend: Any) -> None:
    for parts in ((), OPTIONS):
        x = given(maps_inputs(277, 5, D=17, scale=0.05), parts)
        truth = naive(**x)
        for reduce in REDUCTIONS:
            assert close(ops.kernel_map(**x, reduce=reduce, backend=backend), reduced(truth, reduce)), (parts, reduce)


@pytest.mark.parametrize("N", [1, 7, 16])
@pytest.mark.parametrize("scale", [1e-7, 0.3, 60.0])
def test_parts_add_up_to_the_scan(N: int, scale: float, backend: Any) -> None:
    x = maps_inputs(37, N, scale=scale, batch=2)
    g = torch.Generator().manual_seed(9)
    u, h0 = torch.randn(x["delta"].shape, generator=g), torch.randn(2, *x["A"].shape, generator=g)
    read, core = x["read"], without(x, *OPTIONS)
    scan = {name: core[name].double() for name in ("delta", "A", "B", "C")}
    y = ops.selective_scan(u.double(), **scan, h0=h0.double(), backend="reference").y
    for t in (0, 11, 36):
        row = ops.kernel_row(**{**core, "read": read}, query=t, h0=h0, backend=backend)
        assert close((row.weights * u).sum(1) + row.carry, y[:, t] * read[:, t], 1e-5)
        assert row.early.shape == (2, 0, 6)
    total = torch.stack([ops.kernel_column(**core, source=s, backend=backend) * u[:, s, None] for s in range(37)]).sum(
        0
    )
    zero = ops.selective_scan(u.double(), **scan, backend="reference").y
    assert close(total, zero)


def test_early_inputs_of_the_convolution_add_up(backend: Any) -> None:
    x = maps_inputs(20, 7, batch=2)
    g = torch.Generator().manual_seed(9)
    value, before = torch.randn(2, 20, 6, generator=g), torch.randn(2, 3, 6, generator=g)
    conv = ops.causal_conv(value.double(), x["taps"].double(), state=before.transpose(1, 2).double()).y
    scan = {name: x[name].double() for name in ("delta", "A", "B", "C")}
    y = ops.selective_scan(conv * x["gain"], **scan, backend="reference").y
    for t in (0, 1, 2, 19):
        row = ops.kernel_row(**without(x, "read"), query=t, backend=backend)
        assert close((row.weights * value).sum(1) + (row.early * before).sum(1), y[:, t])


@pytest.mark.parametrize(
    ("rows", "cols"), [((0, 9), (3, 40)), ((100, 150), (5, 29)), ((70, 71), (0, 150)), ((0, 150), (149, 150))]
)
def test_windows_are_parts_of_the_map(rows: tuple[int, int], cols: tuple[int, int], backend: Any) -> None:
    for parts in ((), OPTIONS):
        x = given(maps_inputs(150, 4, scale=0.02), parts)
        whole = ops.kernel_map(**x, backend="reference")
        found = ops.kernel_map(**x, rows=slice(*rows), cols=slice(*cols), backend=backend)
        assert found.shape == (1, rows[1] - rows[0], cols[1] - cols[0])
        part = whole[:, slice(*rows), slice(*cols)]
        assert close(found, part) if part.any() else not found.any()


def test_long_sums_of_delta_lose_nothing(backend: Any) -> None:
    """A difference of prefix sums in float32 would be off by far more: Σdelta is in the thousands here."""
    x = without(maps_inputs(700, 16, D=3, scale=20.0), *OPTIONS)
    x["delta"][:, -40:] *= 1e-3
    row = ops.kernel_row(**x, query=-1, backend=backend).weights[0]
    between = x["delta"][0].double().flip(0).cumsum(0).flip(0) - x["delta"][0].double()
    decay = torch.exp(x["A"].double() * between[..., None])
    truth = (x["C"][0, -1].double() * decay * x["B"][0].double()[:, None]).sum(-1) * x["delta"][0].double()
    assert close(row, truth)
    assert close(ops.kernel_map(**x, rows=slice(-1, None), backend=backend)[0, 0], truth.abs().mean(-1))
    cum = x["delta"][0].cumsum(0)
    wrong = (x["C"][0, -1] * torch.exp(x["A"] * (cum[-1] - cum)[..., None]) * x["B"][0][:, None]).sum(-1) * x["delta"][
        0
    ]
    assert not close(wrong, truth)


def test_padding_with_delta_zero_is_nobody(backend: Any) -> None:
    x = without(maps_inputs(40, 5, batch=1), *OPTIONS)
    padded = {name: torch.cat([v, 7 + v[:, :9]], 1) if v is not None and name != "A" else v for name, v in x.items()}
    padded["delta"][:, 40:] = 0
    plain, wide = ops.kernel_map(**x, backend=backend), ops.kernel_map(**padded, backend=backend)
    assert close(wide[:, :40, :40], plain, 1e-6)
    assert not wide[:, :, 40:].any()


def test_float64_and_half_inputs() -> None:
    x = without(maps_inputs(50, 5), "read")
    double = {name: None if v is None else v.double() for name, v in x.items()}
    for backend in ("reference", "torch", "auto"):
        assert close(ops.kernel_map(**double, backend=backend), reduced(naive(**double), "mean_abs"), 1e-12)
        assert close(ops.kernel_row(**double, query=-1, backend=backend).weights, naive(**double)[:, -1], 1e-12)
    half = {**x, "B": x["B"].bfloat16(), "C": x["C"].bfloat16()}
    found = ops.kernel_map(**half)
    assert found.dtype == torch.float32
    assert close(found, reduced(naive(**half), "mean_abs"))
    with pytest.raises(BackendError, match="float64"):
        ops.kernel_map(**double, backend="cpu")


def test_torch_maps_do_not_depend_on_tiles() -> None:
    x = problem(**maps_inputs(41, 4))
    maps = [tiled.kernel_map(x, "mean_abs", range(41), range(41), tile=tile) for tile in (1, 7, 64)]
    assert close(maps[0], maps[2], 1e-6)
    assert close(maps[1], maps[2], 1e-6)


def test_lines_do_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = without(maps_inputs(50, 7, batch=2), *OPTIONS)
    at = torch.tensor([40, 22])
    whole = ops.kernel_row(**x, query=at, backend="torch"), ops.kernel_column(**x, source=at, backend="torch")
    monkeypatch.setattr(lines, "_BLOCK", x["A"].numel() * 2 * 3)
    pieces = ops.kernel_row(**x, query=at, backend="torch"), ops.kernel_column(**x, source=at, backend="torch")
    assert close(pieces[0].weights, whole[0].weights, 1e-6)
    assert close(pieces[1], whole[1], 1e-6)


def test_the_cpu_kernels_give_one_result_on_any_threads_and_strides() -> None:
    x = maps_inputs(300, 5, D=21, scale=0.05, batch=2)
    low = torch.randn(2, 300, 13, generator=torch.Generator().manual_seed(4))
    x |= {"B": low[..., 3:8], "C": low[..., 8:]}  # slices of one product, as in the model
    wide = {name: torch.cat([x[name], x[name]], -1)[..., :21] for name in ("delta", "gain", "read")}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for given in (x, {**x, **wide}):
                row = ops.kernel_row(**given, query=-1, backend="cpu").weights
                found.append((ops.kernel_map(**given, backend="cpu"), row))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))
    assert close(found[0][0], ops.kernel_map(**x, backend="torch"))


def test_autocast_changes_nothing() -> None:
    x = maps_inputs(80, 5)
    for backend in ("torch", "cpu"):
        plain = ops.kernel_map(**x, backend=backend)  # type: ignore[arg-type]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ops.kernel_map(**x, backend=backend), plain)  # type: ignore[arg-type]


def test_bad_input_is_named() -> None:
    x = maps_inputs(20, 4)
    with pytest.raises(InputError, match="reduction 'means_abs' is unknown, did you mean 'mean_abs'"):
        ops.kernel_map(**x, reduce="means_abs")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="query 20 is outside the text of 20 tokens"):
        ops.kernel_row(**x, query=20)
    with pytest.raises(InputError, match="source -21 is outside"):
        ops.kernel_column(**x, source=-21)
    with pytest.raises(InputError, match="query must lie in 0…19, got values from 3 to 25"):
        ops.kernel_row(
            **{**x, **{n: x[n].expand(2, -1, -1) for n in ("delta", "B", "C", "gain", "read")}},
            query=torch.tensor([3, 25]),
        )
    with pytest.raises(InputError, match=r"B must have shape \(1, 20, 4\), got \(1, 20, 3\)"):
        ops.kernel_map(**{**x, "B": x["B"][..., :3]})
    with pytest.raises(InputError, match="rows=slice.20, 30, None. holds none of the 20 tokens"):
        ops.kernel_map(**x, rows=slice(20, 30))
    with pytest.raises(InputError, match="cols must run forward without steps"):
        ops.kernel_map(**x, cols=slice(0, 20, 2))
    with pytest.raises(InputError, match="rows must be a slice of positions"):
        ops.kernel_map(**x, rows=3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="taps must be floating point"):
        ops.kernel_map(**{**x, "taps": x["taps"].long()})
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        ops.kernel_row(**x, query=0, backend="gpu")  # type: ignore[arg-type]


def test_nan_reaches_what_it_touches(backend: Any) -> None:
    for name in ("delta", "B"):
        x = without(maps_inputs(40, 4), *OPTIONS)
        x[name][:, 12] = float("nan")
        for reduce in REDUCTIONS:
            found = ops.kernel_map(**x, reduce=reduce, backend=backend)[0]
            assert found[12:, 12].isnan().all(), (name, reduce)
            assert found[:12].isfinite().all()

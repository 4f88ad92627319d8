"""Which backend runs, what is refused, and that every refusal names the thing."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import scan_inputs
from torch import Tensor

from mambascope import ops
from mambascope.errors import BackendError, InputError
from mambascope.ops import dispatch


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing decided, nothing loaded, nobody warned."""
    monkeypatch.setattr(dispatch, "_modules", {})
    monkeypatch.setattr(dispatch, "_decisions", {})
    monkeypatch.setattr(dispatch, "_noticed", set())
    return monkeypatch


def test_auto_takes_the_cpu_kernels_and_says_why() -> None:
    pytest.importorskip("numba")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name, reason = ops.resolve_backend("auto", "cpu", dtype)
        assert name == "cpu"
        assert "cpu" in reason


def test_float64_takes_torch_and_the_cpu_kernels_refuse_it() -> None:
    name, reason = ops.resolve_backend("auto", "cpu", torch.float64)
    assert name == "torch"
    assert "float64" in reason
    assert ops.resolve_backend("reference", "cpu", torch.float64)[0] == "reference"
    with pytest.raises(BackendError, match=r"'cpu' cannot run.*float64.*backend='torch'"):
        ops.resolve_backend("cpu", torch.device("cpu"), torch.float64)
    x = scan_inputs(1, 4, 3, 2)
    with pytest.raises(BackendError, match="float64"):  # any float64 input makes the computation float64
        ops.selective_scan(**dict(x, A=x["A"].double()), dt_softplus=True, backend="cpu")
    out = ops.selective_scan(**dict(x, A=x["A"].double()), dt_softplus=True)
    assert out.h_last.dtype == torch.float64
    assert out.y.dtype == torch.float32


def test_without_numba_the_torch_path_serves_with_one_notice(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "numba", None)
    x = scan_inputs(1, 20, 5, 3)
    with pytest.warns(UserWarning, match="numba.*slower torch path"):
        found = ops.selective_scan(**x, dt_softplus=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ops.selective_scan(**x, dt_softplus=True)
        ops.causal_conv(x["u"], torch.ones(5, 4))
        ops.rms_norm(x["u"].bfloat16(), None, 1e-5)
    assert torch.equal(found.y, again.y)
    assert torch.equal(found.y, ops.selective_scan(**x, dt_softplus=True, backend="torch").y)
    name, reason = ops.resolve_backend("auto", "cpu", torch.float32)
    assert name == "torch"
    assert "numba" in reason
    with pytest.raises(BackendError, match="numba"):
        ops.resolve_backend("cpu", "cpu", torch.float32)


def test_without_triton_a_gpu_takes_torch_with_one_notice(fresh: pytest.MonkeyPatch) -> None:
    fresh.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="triton"):
        assert ops.resolve_backend("auto", "cuda", torch.float32)[0] == "torch"
    assert ops.resolve_backend("auto", "cuda", torch.bfloat16)[0] == "torch"
    with pytest.raises(BackendError, match=r"'triton' cannot run.*cannot be imported.*backend='torch'"):
        ops.resolve_backend("triton", "cuda", torch.float32)


def test_without_a_kernel_module_the_reason_names_it(fresh: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    fresh.setitem(dispatch._HOME, "cpu", "mambascope.ops.no_such_module")
    with pytest.raises(BackendError, match=r"no module mambascope\.ops\.no_such_module"):
        ops.resolve_backend("cpu", "cpu", torch.float32)


def test_a_kernel_that_refuses_is_believed(fresh: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    fresh.setattr(dispatch.kernels("cpu"), "supports", lambda *a: "N = 300 is beyond it" if a[2] == 300 else "")
    name, reason = ops.resolve_backend("auto", "cpu", torch.float32, d_state=300)
    assert name == "torch"
    assert "N = 300 is beyond it" in reason
    assert ops.resolve_backend("auto", "cpu", torch.float32)[0] == "cpu"
    with pytest.raises(BackendError, match="N = 300"):
        ops.selective_scan(**scan_inputs(1, 2, 3, 300), dt_softplus=True, backend="cpu")


def test_other_devices_names_and_dtypes() -> None:
    assert ops.resolve_backend("auto", "meta", torch.float32)[0] == "torch"
    with pytest.raises(BackendError, match="runs on CPU tensors, these are on cuda"):
        ops.resolve_backend("cpu", "cuda", torch.float32)
    with pytest.raises(BackendError, match="'triton' cannot run"):
        ops.resolve_backend("triton", "meta", torch.float32)
    with pytest.raises(BackendError, match="unknown backend 'refrence', did you mean 'reference'"):
        ops.resolve_backend("refrence", "cpu", torch.float32)
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(BackendError, match=rf"dtype {dtype} is not supported: the operators take float32"):
            ops.resolve_backend("auto", "cpu", dtype)


def test_meta_tensors_give_shapes() -> None:
    x = {name: t.to("meta") for name, t in scan_inputs(2, 100, 5, 3).items()}
    out = ops.selective_scan(**x, dt_softplus=True, boundaries=16)
    assert out.h_boundary is not None
    assert (out.y.shape, out.h_last.shape, out.h_boundary.shape) == ((2, 100, 5), (2, 5, 3), (2, 7, 5, 3))


def test_importing_the_operators_imports_no_kernel_package() -> None:
    code = (
        "import sys, mambascope.ops\n"
        "print([m for m in ('numba', 'triton', 'transformer_lens', 'nnsight', 'transformers', 'mambascope.model')"
        " if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


WRONG_SCANS: dict[str, tuple[dict[str, Any], str]] = {
    "u": ({"u": torch.zeros(2, 6)}, r"u must be B L D, got shape \(2, 6\)"),
    "delta": ({"delta": torch.zeros(2, 7, 4)}, r"delta must be B L D = \(2, 6, 4\), got shape \(2, 7, 4\)"),
    "A": ({"A": torch.zeros(5, 3)}, r"A must be D N = \(4, 3\), got shape \(5, 3\)"),
    "A without N": ({"A": torch.zeros(4)}, r"A must be D N, got shape \(4,\)"),
    "B": ({"B": torch.zeros(2, 6, 2)}, r"B must be B L N = \(2, 6, 3\), got shape \(2, 6, 2\)"),
    "C": ({"C": torch.zeros(2, 3, 6)}, r"C must be B L N = \(2, 6, 3\), got shape \(2, 3, 6\)"),
    "D": ({"D": torch.zeros(1)}, r"D must be D = \(4\), got shape \(1,\)"),
    "z": ({"z": torch.zeros(1, 6, 4)}, r"z must be B L D = \(2, 6, 4\), got shape \(1, 6, 4\)"),
    "h0": ({"h0": torch.zeros(2, 3, 4)}, r"h0 must be B D N = \(2, 4, 3\), got shape \(2, 3, 4\)"),
    "dt_bias": ({"dt_bias": torch.zeros(3)}, r"dt_bias must be D = \(4\), got shape \(3,\)"),
    "bias without softplus": ({"dt_softplus": False}, "dt_bias is given but dt_softplus is False"),
    "no channels": ({"u": torch.zeros(2, 6, 0)}, "D ≥ 1 channels"),
    "no states": ({"A": torch.zeros(4, 0)}, "N ≥ 1 states"),
    "complex": ({"A": torch.zeros(4, 3, dtype=torch.complex64)}, "A is complex.*only real"),
    "integer": ({"u": torch.zeros(2, 6, 4, dtype=torch.long)}, "u must be floating point, got torch.int64"),
    "another dtype of z": ({"z": torch.zeros(2, 6, 4).bfloat16()}, "z must have u's dtype torch.float32, got torch.bf"),
    "another device": ({"C": torch.zeros(2, 6, 3, device="meta")}, "C is on meta, but u or x is on cpu"),
    "lengths beyond": ({"lengths": torch.tensor([6, 7])}, "lengths must lie in 0…L = 0…6, got values from 6 to 7"),
    "lengths below": ({"lengths": torch.tensor([-1, 6])}, "got values from -1 to 6"),
    "lengths of another batch": ({"lengths": torch.tensor([6])}, r"lengths must be B = \(2\), got shape \(1,\)"),
    "float lengths": ({"lengths": torch.tensor([6.0, 6.0])}, "lengths must be int32 or int64, got torch.float32"),
    "boundaries 1.5": ({"boundaries": 1.5}, "boundaries must be a number of steps ≥ 1 or None, got 1.5"),
    "a list": ({"u": [1.0, 2.0]}, "u must be a tensor, got list"),
    "nothing": ({"delta": None}, "delta must be a tensor, got NoneType"),
    "boundaries 0": ({"boundaries": 0}, "boundaries must be a number of steps ≥ 1 or None, got 0"),
    "boundaries True": ({"boundaries": True}, "got True"),
}


@pytest.mark.parametrize("case", WRONG_SCANS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_wrong_scans_are_refused_by_name(backend: Any, case: str) -> None:
    change, message = WRONG_SCANS[case]
    x: dict[str, Any] = {**scan_inputs(2, 6, 4, 3), "dt_softplus": True}
    with pytest.raises(InputError, match=message):
        ops.selective_scan(**{**x, **change}, backend=backend)


WRONG_CONVS: dict[str, tuple[dict[str, Any], str]] = {
    "x": ({"x": torch.zeros(6, 4)}, "x must be B L D"),
    "weight": ({"weight": torch.zeros(5, 4)}, r"weight must be D K = \(4, 4\), got shape \(5, 4\)"),
    "no taps": ({"weight": torch.zeros(4, 0)}, "K ≥ 1"),
    "weight of a full conv": ({"weight": torch.zeros(4, 2, 4)}, "weight must be D K or D 1 K"),
    "bias": ({"bias": torch.zeros(3)}, r"bias must be D = \(4\), got shape \(3,\)"),
    "state": ({"state": torch.zeros(2, 4, 4)}, r"state must be B D K-1 = \(2, 4, 3\), got shape \(2, 4, 4\)"),
    "activation": ({"activation": "relu"}, "activation must be None or 'silu', got 'relu'"),
    "lengths": ({"lengths": torch.tensor([3, 9])}, "lengths must lie in 0…L = 0…6"),
    "integer": ({"x": torch.zeros(2, 6, 4, dtype=torch.int32)}, "x must be floating point"),
}


@pytest.mark.parametrize("case", WRONG_CONVS)
def test_wrong_convolutions_are_refused_by_name(case: str) -> None:
    change, message = WRONG_CONVS[case]
    x = {"x": torch.zeros(2, 6, 4), "weight": torch.zeros(4, 4), "bias": torch.zeros(4), "state": torch.zeros(2, 4, 3)}
    with pytest.raises(InputError, match=message):
        ops.causal_conv(**{**x, **change})


def test_the_other_operators_refuse_by_name() -> None:
    x = scan_inputs(2, 6, 4, 3)
    u, delta, A, B, h0 = (x[name] for name in ("u", "delta", "A", "B", "h0"))
    with pytest.raises(InputError, match=r"weight must be M = \(4\), got shape \(3,\)"):
        ops.rms_norm(u, torch.ones(3), 1e-5)
    with pytest.raises(InputError, match="eps must be ≥ 0"):
        ops.rms_norm(u, None, float("nan"))
    with pytest.raises(InputError, match="last axis"):
        ops.rms_norm(torch.zeros(()), None, 1e-5)
    with pytest.raises(InputError, match=r"y and z must agree, got y \(2, 6, 4\) on cpu, z \(2, 6, 3\)"):
        ops.gate(u, B)
    with pytest.raises(InputError, match=r"x must be floating point, got torch\.int64"):
        ops.softplus(torch.tensor([1]))
    with pytest.raises(InputError, match=r"h_start must be B D N = \(2, 4, 3\), got shape \(2, 3, 4\)"):
        ops.state_window(u, delta, A, B, h0.transpose(1, 2))
    wide = torch.zeros(2, 6, 4, 3)
    for name, args in {
        "A_bar": (wide[0], wide, B),
        "write": (wide, wide[:, :5], B),
        "C": (wide, wide, delta),
        "h0": (wide, wide, B, wide),
    }.items():
        with pytest.raises(InputError, match=f"{name} must "):
            ops.linear_scan(*args)


def test_lengths_are_looked_at_again_after_they_change() -> None:
    x = scan_inputs(2, 6, 4, 3)
    lengths = torch.tensor([6, 2])

    def scan(length: int = 6) -> Tensor:
        cut = {name: t[:, :length] if name in ("u", "delta", "B", "C", "z") else t for name, t in x.items()}
        return ops.selective_scan(**cut, dt_softplus=True, lengths=lengths).y

    scan()
    scan()
    with pytest.raises(InputError, match="0…5"):
        scan(5)
    scan()
    lengths[0] = 7
    with pytest.raises(InputError, match="from 2 to 7"):
        scan()

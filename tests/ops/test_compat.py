"""``selective_scan_fn`` against a float64 restatement of mamba_ssm's documented function, in its layout ``B D L``."""

import inspect
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import backend_params
from tolerance import assert_within, error
from torch import Tensor
from torch.nn import functional as F

from mambascope import ops
from mambascope.errors import BackendError, InputError
from mambascope.ops import layout, selective_scan_fn

ORDER = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def restated(x: dict[str, Tensor], dtype: torch.dtype, softplus: bool) -> tuple[Tensor, Tensor]:
    """out ``B D L`` and last state, one step at a time in ``dtype``; B and C written out for every channel."""
    x = {name: t.to(dtype) for name, t in x.items()}
    u, delta, A = x["u"], x["delta"], x["A"]
    batch, channels, length = u.shape

    def every_channel(X: Tensor) -> Tensor:  # B D N L
        if X.dim() == 2:
            return X[None, :, :, None].expand(batch, channels, -1, length)
        X = X[:, None] if X.dim() == 3 else X
        return X.repeat_interleave(channels // X.shape[1], 1)

    B, C = every_channel(x["B"]), every_channel(x["C"])
    if "delta_bias" in x:
        delta = delta + x["delta_bias"][:, None]
    if softplus:
        delta = F.softplus(delta, threshold=60)
    h = u.new_zeros(batch, channels, A.shape[1])
    outs = []
    for t in range(length):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        outs.append((h * C[..., t]).sum(-1))
    out = torch.stack(outs, -1)
    if "D" in x:
        out = out + x["D"][:, None] * u
    return (out * F.silu(x["z"]) if "z" in x else out), h


def inputs(
    batch: int = 2,
    channels: int = 12,
    length: int = 17,
    states: int = 3,
    *,
    forms: str = "tt",
    leave_out: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    wild: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Forms of B and C: t per time, 2 or 3 groups, c constant. Parameters stay float32, as in mamba_ssm."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def form(kind: str) -> Tensor:
        if kind == "c":
            return normal(channels, states)
        return normal(batch, states, length) if kind == "t" else normal(batch, int(kind), states, length)

    x = {
        "u": normal(batch, channels, length),
        "delta": 0.5 * torch.rand(batch, channels, length, generator=g),
        "A": -4 * torch.rand(channels, states, generator=g),
        "B": form(forms[0]),
        "C": form(forms[1]),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": 0.5 * torch.rand(channels, generator=g),
    }
    if wild:  # steps from 1e-4 to 50, A_bar from 1 to exactly 0, outliers in u
        x["A"] = -torch.arange(1.0, states + 1).expand(channels, states).contiguous()
        x["delta"] = torch.exp(-9.2 + 13.1 * torch.rand(x["u"].shape, generator=g)) - x["delta_bias"][:, None]
        x["u"] = torch.where(torch.rand(x["u"].shape, generator=g) < 0.02, 100 * x["u"], x["u"])
    x = {name: t for name, t in x.items() if name not in leave_out}
    return {
        name: t.to(dtype) if name not in ("A", "D", "delta_bias") or dtype == torch.float64 else t
        for name, t in x.items()
    }


def everything(
    x: dict[str, Tensor], function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """out, last state and, of a fixed weighting of both, the gradients of all inputs."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in x.items()}
    out, state = function(leaves)
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(t.shape, generator=g).to(dtype).to(t.dtype) for t in (out, state)]
    grads = torch.autograd.grad([out, state], list(leaves.values()), weights)
    return {"out": out.detach(), "state": state.detach(), **{f"d{n}": t for n, t in zip(leaves, grads, strict=True)}}


def check(x: dict[str, Tensor], softplus: bool, **options: Any) -> None:
    dtype = x["u"].dtype
    got = everything(
        x, lambda x: selective_scan_fn(**x, delta_softplus=softplus, return_last_state=True, **options), dtype
    )
    truth = everything({n: t.double() for n, t in x.items()}, lambda x: restated(x, torch.float64, softplus), dtype)
    rough = everything(x, lambda x: restated(x, torch.float32, softplus), dtype)
    assert got["out"].dtype == dtype and got["state"].dtype == torch.float32
    assert all(got[f"d{name}"].dtype == t.dtype for name, t in x.items())
    for name, t in got.items():
        assert_within(t, truth[name], rough[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forms", ["".join(pair) for pair in itertools.product("t2c", "t3c")])
def test_every_combination_of_options(forms: str, dtype: torch.dtype) -> None:
    optional = ("D", "z", "delta_bias")
    for count in range(4):
        for leave_out in itertools.combinations(optional, count):
            for softplus in (False, True):
                check(inputs(forms=forms, leave_out=leave_out, dtype=dtype), softplus)


@pytest.mark.parametrize("backend", backend_params("reference", "torch", "cpu"))
@pytest.mark.parametrize("forms", ["tt", "22", "ct"])
def test_every_backend(forms: str, backend: str) -> None:
    check(inputs(1, 6, 70, 5, forms=forms), True, backend=backend)


@pytest.mark.parametrize(
    ("batch", "channels", "length", "states", "forms"),
    [
        (1, 1, 1, 1, "tt"),
        (3, 1, 9, 2, "tt"),
        (2, 40, 1, 7, "2c"),
        (1, 40, 63, 33, "tt"),
        (2, 70, 64, 16, "tt"),
        (2, 70, 65, 16, "22"),
        (1, 40, 1000, 7, "tt"),
        (2, 6, 65, 1, "66"),
        (0, 4, 5, 2, "tt"),
    ],
)
def test_odd_sizes(batch: int, channels: int, length: int, states: int, forms: str) -> None:
    check(inputs(batch, channels, length, states, forms=forms), True)


@pytest.mark.parametrize("forms", ["tt", "2t", "cc"])
def test_adversarial_ranges(forms: str) -> None:
    x = inputs(2, 20, 90, 16, forms=forms, wild=True)
    check(x, False)
    assert torch.isfinite(selective_scan_fn(**x)).all()


def test_negative_steps_and_growing_states_are_computed_as_asked() -> None:
    x = inputs(leave_out=("delta_bias",))
    check({**x, "delta": torch.randn_like(x["delta"]), "A": 0.1 * x["A"].abs()}, False)


def test_no_steps() -> None:
    out, state = selective_scan_fn(**inputs(length=0), return_last_state=True)
    assert out.shape == (2, 12, 0) and torch.equal(state, torch.zeros(2, 12, 3))


def test_only_the_output_without_return_last_state() -> None:
    x = inputs()
    out, _ = selective_scan_fn(**x, return_last_state=True)
    assert torch.equal(selective_scan_fn(*(x[name] for name in ORDER)), out)


def test_same_bits_as_our_scan() -> None:
    x = inputs(2, 70, 65, 16)
    u, delta, A, B, C, D, z, bias = (x[name] for name in ORDER)
    turned = [t.transpose(1, 2).contiguous() for t in (u, delta, B, C, z)]
    ours = ops.selective_scan(*turned[:2], A, *turned[2:4], D, turned[4], dt_bias=bias, dt_softplus=True)
    out, state = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    assert torch.equal(out, ours.y.transpose(1, 2)) and torch.equal(state, ours.h_last)


def test_groups_of_one_kind_are_equal_and_a_group_reads_its_own() -> None:
    x = inputs()
    same = {**x, "B": x["B"][:, None].expand(-1, 2, -1, -1), "C": x["C"][:, None]}
    assert error(selective_scan_fn(**same), selective_scan_fn(**x)) == 0
    other = inputs(forms="2t")
    changed = {**other, "B": other["B"].clone()}
    changed["B"][:, 1] += 1
    apart = (selective_scan_fn(**changed) != selective_scan_fn(**other)).any(2).any(0)
    assert apart.tolist() == [False] * 6 + [True] * 6


def test_nan_stays_in_its_row_and_channel() -> None:
    x = inputs()
    x["delta"][1, 4, 8] = torch.nan
    bad = selective_scan_fn(**x).isnan()
    expected = torch.zeros_like(bad)
    expected[1, 4, 8:] = True
    assert torch.equal(bad, expected)


def test_float64_is_computed_in_float64() -> None:
    x = inputs(dtype=torch.float64)
    out, state = selective_scan_fn(**x, delta_softplus=True, return_last_state=True)
    truth, last = restated(x, torch.float64, True)
    assert out.dtype == state.dtype == torch.float64
    assert error(out, truth) < 1e-13 and error(state, last) < 1e-13


@pytest.mark.parametrize("forms", ["tt", "2t", "ct", "3c"])
def test_gradcheck(forms: str) -> None:
    x = inputs(1, 6, 3, 2, forms=forms, dtype=torch.float64)
    leaves = [x[name].requires_grad_() for name in ORDER]
    assert torch.autograd.gradcheck(
        lambda *t: selective_scan_fn(*t, delta_softplus=True, return_last_state=True), leaves
    )


# --- layout ---


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all tensors that are copied into another layout."""
    found: list[tuple[int, ...]] = []
    whole = layout._copy

    def counting(x: Tensor) -> Tensor:
        found.append(tuple(x.shape))
        return whole(x)

    monkeypatch.setattr(layout, "_copy", counting)
    return found


def test_one_copy_of_each_tensor_and_results_as_the_inputs_lie(copies: list[tuple[int, ...]]) -> None:
    x = {name: t.requires_grad_() for name, t in inputs().items()}
    out = selective_scan_fn(**x, delta_softplus=True)
    inner = [(2, 12, 17)] * 3 + [(2, 3, 17)] * 2  # u, delta, z, B, C
    assert sorted(copies) == sorted([*inner, (2, 17, 12)])
    grads = torch.autograd.grad(out.sum(), list(x.values()))
    assert out.is_contiguous() and all(g.is_contiguous() for g in grads)
    assert len(copies) == 12


def test_tensors_that_lie_as_ours_are_not_copied(copies: list[tuple[int, ...]]) -> None:
    x = inputs()
    lying = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t for n, t in x.items()}
    with torch.no_grad():
        out = selective_scan_fn(**lying)
        assert copies == []
        assert out.stride() == lying["u"].stride() and torch.equal(out, selective_scan_fn(**x))


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 70, 90), (1, 1, 4), (2, 4, 1), (0, 3, 2), (2, 64, 0)])
def test_turning_is_exact_whatever_the_strides(shape: tuple[int, ...]) -> None:
    batch, rows, columns = shape
    for x in (
        torch.randn(shape),
        torch.randn(batch, rows, 2 * columns)[..., ::2],
        torch.randn(rows, batch, columns).transpose(0, 1),  # as "d (b l) -> b d l" gives it
        torch.randn(batch, columns, rows).transpose(1, 2),
    ):
        turned = layout.turned(x)
        assert torch.equal(turned, x.transpose(1, 2))
        assert turned.shape[-1] == 1 or turned.stride(-1) == 1 or not x.numel()
        leaf = x.clone().requires_grad_()
        weight = torch.randn_like(turned)
        assert torch.equal(torch.autograd.grad((layout.turned(leaf) * weight).sum(), leaf)[0], weight.transpose(1, 2))


def test_strided_rows_and_expanded_tensors() -> None:
    x = inputs(3, 70, 90, 4)
    strided = {
        **x,
        "u": torch.stack((x["u"], x["u"]), 1).flatten(0, 1)[::2],
        "delta": x["delta"].transpose(0, 1).contiguous().transpose(0, 1),
        "z": torch.cat((x["u"], x["z"]), 1)[:, 70:],
        "B": x["B"][:1].expand(3, -1, -1),
        "D": x["D"][:1].expand(70),
    }
    assert torch.equal(
        selective_scan_fn(**strided), selective_scan_fn(**{n: t.contiguous() for n, t in strided.items()})
    )


# --- with torch's own machinery ---


@pytest.mark.parametrize("forms", ["tt", "2c"])
def test_traced_transformed_and_compiled(forms: str) -> None:
    x = inputs(1, 6, 9, 2, forms=forms)
    plain = selective_scan_fn(**x, delta_softplus=True)
    compiled = torch.compile(selective_scan_fn, backend="eager", fullgraph=True)
    assert error(compiled(**x, delta_softplus=True), plain) < 1e-6

    def total(u: Tensor) -> Tensor:
        return selective_scan_fn(**{**x, "u": u}, delta_softplus=True).sum()

    leaf = x["u"].clone().requires_grad_()
    assert error(torch.func.grad(total)(x["u"]), torch.autograd.grad(total(leaf), leaf)[0]) < 1e-6


def test_second_derivatives_are_refused_by_name_or_right() -> None:
    x = inputs(1, 2, 3, 1)
    u = x["u"].requires_grad_()
    (first,) = torch.autograd.grad(selective_scan_fn(**x).square().sum(), u, create_graph=True)
    if ops.resolve_backend("auto", "cpu", torch.float32)[0] == "cpu":
        with pytest.raises(BackendError, match="no second derivative"):
            torch.autograd.grad(first.sum(), u)
    (first,) = torch.autograd.grad(selective_scan_fn(**x, backend="torch").square().sum(), u, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(first.sum(), u)[0]).all()


# --- what it is called with ---


def test_signature_is_mamba_ssms_and_one_keyword_more() -> None:
    parameters = inspect.signature(selective_scan_fn).parameters
    assert [*parameters][:-1] == [*ORDER, "delta_softplus", "return_last_state"]
    assert [p.default for p in parameters.values()][5:10] == [None, None, None, False, False]
    last = parameters["backend"]
    assert last.kind is inspect.Parameter.KEYWORD_ONLY and last.default == "auto"


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"A": torch.randn(12, 3, dtype=torch.complex64)},
        "A is complex (torch.complex64): selective_scan_fn",
    ),
    ({"u": torch.randn(2, 12, 17, dtype=torch.complex64)}, "u is complex"),
    ({"B": torch.randn(12, 3, dtype=torch.complex64)}, "B is complex"),
    ({"u": torch.zeros(2, 12, 17, dtype=torch.int64)}, "u must be floating point, got torch.int64"),
    ({"u": torch.randn(12, 17)}, "u must be B D L, got shape (12, 17)"),
    ({"u": None}, "u must be a tensor, got NoneType"),
    ({"C": 3.0}, "C must be a tensor, got float"),
    ({"A": torch.randn(12)}, "A must be D N, got shape (12)"),
    ({"A": torch.randn(11, 3)}, "A must be D N = (12, 3), got shape (11, 3)"),
    ({"A": torch.randn(12, 0)}, "u must have D ≥ 1 channels and A N ≥ 1 states"),
    ({"delta": torch.randn(2, 17, 12)}, "delta must be B D L = (2, 12, 17), got shape (2, 17, 12)"),
    ({"z": torch.randn(2, 17, 12)}, "z must be B D L = (2, 12, 17)"),
    ({"z": torch.randn(2, 12, 17).bfloat16()}, "z must have u's dtype torch.float32, got torch.bfloat16"),
    ({"D": torch.randn(1, 12)}, "D must be D = (12), got shape (1, 12)"),
    ({"delta_bias": torch.randn(13)}, "delta_bias must be D = (12), got shape (13)"),
    ({"B": torch.randn(2, 17, 3)}, "B must be B N L = (2, 3, 17), or B G N L with G a divisor of D = 12, or constant"),
    ({"C": torch.randn(2, 5, 3, 17)}, "C has G = 5 groups, which do not divide the D = 12 channels"),
    ({"C": torch.randn(2, 0, 3, 17)}, "C has G = 0 groups"),
    ({"B": torch.randn(2, 3, 34)}, "got shape (2, 3, 34)"),  # mamba_ssm's complex layout
    ({"D": torch.randn(12, device="meta")}, "D is on meta, but u is on cpu; move them to one device"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        selective_scan_fn(**(inputs() | change))


def test_backends_that_cannot_run_are_refused() -> None:
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        selective_scan_fn(**inputs(), backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="backend 'cpu' cannot run: its kernels compute in float32"):
        selective_scan_fn(**inputs(dtype=torch.float64), backend="cpu")


def test_these_tests_can_fail() -> None:
    x = inputs()
    out = selective_scan_fn(**x)
    truth, _ = restated(x, torch.float64, True)  # softplus that was not asked for
    with pytest.raises(AssertionError, match="error"):
        assert_within(out, truth, None, "out")

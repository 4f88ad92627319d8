"""The numba scan against the float64 recurrence, and its promise that equal questions get equal bits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("numba")

from mambascope.ops import cpu
from mambascope.ops.cpu import threads
from mambascope.ops.scan import reference

ORDER = ("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "h0")
SHAPES = [  # B L D N T
    (1, 1, 1, 1, 1),
    (2, 33, 40, 7, 8),
    (1, 63, 16, 16, 64),
    (2, 65, 5, 33, 16),
    (3, 64, 100, 16, 64),
    (1, 130, 48, 16, 1000),
    (2, 129, 300, 4, 128),
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    "torch.empty gives NaN: what a kernel does not write is seen"
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def problem(batch: int, length: int, channels: int, states: int, *, wild: bool = False) -> dict[str, Any]:
    "strided as in the model: x and z halves of one tensor, B and C slices of another"
    xz, low = torch.randn(batch, length, 2 * channels), torch.randn(batch, length, 3 + 2 * states)
    raw = torch.randn(batch, length, channels) - 3
    A = -torch.exp(torch.rand(channels, states) * 2.7)
    if wild:  # steps from 1e-4 to 50, decay from 1 to exactly 0, outliers in u
        raw = torch.exp(torch.rand(batch, length, channels) * 13.1 - 9.2)
        raw = raw + torch.log(-torch.expm1(-raw))
        A = -torch.arange(1.0, states + 1).expand(channels, states).contiguous()
        xz[:, ::7, ::5] *= 100
    return {
        "u": xz[:, :, :channels],
        "delta": raw,
        "A": A,
        "B": low[:, :, 3 : 3 + states],
        "C": low[:, :, 3 + states :],
        "D": torch.randn(channels),
        "z": xz[:, :, channels:],
        "dt_bias": torch.randn(channels) * 0.1,
        "h0": torch.randn(batch, channels, states),
        "lengths": torch.randint(length // 2, length + 1, (batch,)),
    }


def forward(v: dict[str, Any], boundaries: int | None = None, softplus: bool = True, **changes: Any) -> Any:
    v = v | changes
    return cpu.scan_forward(*(v[k] for k in (*ORDER, "lengths")), dt_softplus=softplus, boundaries=boundaries)


def expected(v: dict[str, Any], boundaries: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q = {k: x.to(dtype) if x is not None and x.is_floating_point() else x for k, x in v.items()}
    raw = q["delta"] if q["dt_bias"] is None else q["delta"] + q["dt_bias"]
    delta = F.softplus(raw, threshold=1e9) if dtype == torch.float64 else F.softplus(raw)
    y, h, entering = reference.scan(q["u"], delta, q["A"], q["B"], q["C"], q["h0"], q["lengths"], boundaries)
    assert entering is not None
    y = y if q["D"] is None else y + q["D"] * q["u"]
    return (y if q["z"] is None else y * F.silu(q["z"])), h, entering


def error(found: Tensor, truth: Tensor) -> float:
    truth = truth.detach()
    assert found.shape == truth.shape
    assert torch.isfinite(found).all()
    return float((found.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)) if truth.numel() else 0.0


def same(*pairs: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_as_exact_as_the_plain_recurrence(shape: tuple[int, ...], wild: bool) -> None:
    v = problem(*shape[:4], wild=wild)
    found, truth, plain = forward(v, shape[4]), expected(v, shape[4]), expected(v, shape[4], torch.float32)
    for name, f, t, p in zip(("y", "h_last", "h_boundary"), found, truth, plain, strict=True):
        assert error(f, t) <= max(1e-6, 2 * error(p, t)), name


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "h0", "lengths"])
def test_every_optional_argument_may_be_absent(absent: str) -> None:
    v = problem(2, 40, 20, 9) | {absent: None}
    for f, t in zip(forward(v, 16), expected(v, 16), strict=True):
        assert error(f, t) < 1e-6


def test_check_can_fail() -> None:
    v = problem(1, 40, 20, 9) | {"lengths": None}
    assert error(forward(v)[0], expected(v | {"A": v["A"] * 1.0001}, 8)[0]) > 1e-6


def test_fused_and_apart_give_the_same_bits() -> None:
    v = problem(2, 65, 37, 16)
    fused = forward(v)
    delta = cpu.softplus_forward(v["delta"] + v["dt_bias"])
    y, h, _ = forward(v, softplus=False, delta=delta, dt_bias=None, D=None, z=None)
    y = torch.add(y, torch.mul(v["D"], v["u"]))
    assert same((fused[0], cpu.gate_forward(y, v["z"])), (fused[1], h))


@pytest.mark.parametrize("cut", range(1, 20))
def test_cut_at_any_position(cut: int) -> None:
    v = problem(2, 20, 24, 16) | {"lengths": None}
    y, h, _ = forward(v)
    parts = [{k: v[k][:, s] for k in ("u", "delta", "B", "C", "z")} for s in (slice(0, cut), slice(cut, None))]
    first = forward(v, **parts[0])
    second = forward(v, **parts[1], h0=first[1])
    assert same((y, torch.cat((first[0], second[0]), 1)), (h, second[1]))


def test_boundaries_threads_strides_and_neighbours_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    v = problem(3, 50, 70, 16)
    y, h, none = forward(v)
    assert none is None
    monkeypatch.setattr(threads, "GRAIN", 0)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert same((y, forward(v, 7)[0]), (h, forward(v, 7)[1]))
    finally:
        torch.set_num_threads(before)
    packed = {k: None if x is None else x.contiguous() for k, x in v.items()}
    assert same((y, forward(packed)[0]))
    alone = {k: x[1:2] if k in ("u", "delta", "B", "C", "z", "h0", "lengths") else x for k, x in v.items()}
    assert same((y[1:2], forward(alone)[0]))
    some = torch.arange(3, 61, 3)
    picked = {k: v[k][..., some] for k in ("u", "delta", "D", "z", "dt_bias")}
    assert same((y[..., some], forward(v, **picked, A=v["A"][some], h0=v["h0"][:, some])[0]))


def test_states_at_boundaries_and_in_a_window_are_those_of_the_scan() -> None:
    v = problem(2, 30, 21, 16) | {"lengths": None}
    delta = cpu.softplus_forward(v["delta"] + v["dt_bias"])
    _, h_last, entering = forward(v, 1)
    window = cpu.state_window(v["u"], delta, v["A"], v["B"], v["h0"])
    assert same((entering[:, 1:], window[:, :-1]), (entering[:, 0], v["h0"]), (h_last, window[:, -1]))
    part = cpu.state_window(v["u"][:, 7:12], delta[:, 7:12], v["A"], v["B"][:, 7:12], window[:, 6])
    assert same((part, window[:, 7:12]))


def test_padding_leaves_the_state_alone_whatever_it_holds() -> None:
    v = problem(1, 12, 20, 16) | {"lengths": torch.tensor([9])}
    short = {k: v[k][:, :9] for k in ("u", "delta", "B", "C", "z")}
    y, h, _ = forward(v, **short, lengths=None)
    spoiled = {k: v[k].clone() for k in ("u", "delta", "B")}
    for x in spoiled.values():
        x[:, 9:] = torch.nan
    found = forward(v, **spoiled)
    assert same((found[0][:, :9], y), (found[1], h))


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "z", "h0"])
def test_nan_passes_through(name: str) -> None:
    v = problem(1, 6, 20, 16) | {"lengths": None}
    v[name] = v[name].clone()
    v[name].view(-1)[3] = torch.nan
    assert torch.isnan(forward(v)[0]).any()


def test_extremes_of_delta() -> None:
    v = problem(1, 4, 16, 16) | {"lengths": None, "D": None, "z": None, "dt_bias": None}
    v["u"] = torch.zeros(1, 4, 16)
    held = forward(v, softplus=False, delta=torch.zeros(1, 4, 16))
    assert same((held[1], v["h0"]))  # exp(0) is exactly 1
    gone = forward(v, softplus=False, delta=torch.full((1, 4, 16), 1e30))
    assert same((gone[1], torch.zeros_like(v["h0"])))
    blown = forward(v, softplus=False, delta=torch.full((1, 4, 16), -1e4))
    assert torch.isnan(blown[1]).all()  # an overflowing exp(delta·A) is seen, it does not wrap
    kept = forward(v, softplus=False, delta=torch.full((1, 4, 16), -0.1))
    assert error(kept[1], v["h0"].double() * torch.exp(-0.4 * v["A"].double())) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_the_float32_run_rounded_once(dtype: torch.dtype) -> None:
    v = problem(2, 20, 24, 16)
    low = {k: v[k].to(dtype) for k in ("u", "delta", "B", "C", "z", "dt_bias")}
    y, h, _ = forward(v, **low)
    wide = forward(v, **{k: x.float() for k, x in low.items()})
    assert y.dtype == dtype
    assert h.dtype == torch.float32
    assert same((y, wide[0].to(dtype)), (h, wide[1]))
    assert forward(v, **low | {"z": None})[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 3, 8, 16), (2, 0, 8, 16)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    v = problem(*shape) | {"lengths": None}
    y, h, entering = forward(v, 4)
    assert y.shape == shape[:3]
    assert same((h, v["h0"]))
    assert entering.shape == (shape[0], -(-shape[1] // 4), *shape[2:])
    window = cpu.state_window(v["u"], v["delta"], v["A"], v["B"], v["h0"])
    assert window.shape == shape


def gradients(v: dict[str, Any], interval: int, seeds: list[Tensor | None], softplus: bool = True) -> dict[str, Any]:
    _, _, entering = forward(v, interval, softplus)
    inputs = [v[k] for k in (*ORDER, "lengths")]
    return cpu.scan_backward(*inputs, entering, *seeds, dt_softplus=softplus, boundaries=interval)


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_gradient(shape: tuple[int, ...], wild: bool) -> None:
    v = problem(*shape[:4], wild=wild)

    def exact(dtype: torch.dtype) -> tuple[Tensor, ...]:
        q = {k: x.to(dtype).requires_grad_() if x.is_floating_point() else x for k, x in v.items()}
        results = expected(q, shape[4], dtype)
        return torch.autograd.grad(results, [q[k] for k in ORDER], [s.to(dtype) for s in seeds])

    seeds = [torch.randn_like(x) for x in forward(v, shape[4])]
    found = gradients(v, shape[4], seeds)
    for name, truth, plain in zip(ORDER, exact(torch.float64), exact(torch.float32), strict=True):
        assert error(found["d" + name], truth) <= max(1e-6, 2 * error(plain, truth)), name


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "h0", "lengths"])
def test_gradients_where_an_argument_is_absent(absent: str) -> None:
    v = problem(2, 40, 20, 9) | {absent: None}
    names = [k for k in ORDER if v[k] is not None]
    q = {k: x.double().requires_grad_() if x is not None and x.is_floating_point() else x for k, x in v.items()}
    seeds = [torch.randn_like(forward(v)[0]), None, None]
    truth = torch.autograd.grad(expected(q, 8)[0], [q[k] for k in names], seeds[0].double())
    found = gradients(v, 8, seeds)
    for name, t in zip(names, truth, strict=True):
        assert error(found["d" + name], t) < 2e-6, name
    assert absent in ("h0", "lengths") or found["d" + absent] is None


def test_gradient_without_softplus() -> None:
    v = problem(2, 40, 20, 9) | {"dt_bias": None, "h0": None, "D": None, "z": None}
    v["delta"] = v["delta"].exp()
    q = {k: x.double().requires_grad_() if x is not None and x.is_floating_point() else x for k, x in v.items()}
    seed = torch.randn_like(v["u"])
    y, _, _ = reference.scan(*(q[k] for k in ("u", "delta", "A", "B", "C", "h0", "lengths")), None)
    names = ("u", "delta", "A", "B", "C")
    truth = torch.autograd.grad(y, [q[k] for k in names], seed.double())
    found = gradients(v, 8, [seed, None, None], softplus=False)
    for name, t in zip(names, truth, strict=True):
        assert error(found["d" + name], t) < 2e-6, name


def test_gradients_repeat_to_the_bit_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    v = problem(2, 70, 600, 16)
    seeds: list[Tensor | None] = [torch.randn_like(x) for x in forward(v, 32)]
    first = gradients(v, 32, seeds)
    monkeypatch.setattr(threads, "GRAIN", 0)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert same(*((first[k], g) for k, g in gradients(v, 32, seeds).items()))
    finally:
        torch.set_num_threads(before)


def test_gradients_in_reduced_precision_have_their_tensors_dtypes() -> None:
    v = problem(1, 20, 24, 16)
    low = {k: v[k].bfloat16() for k in ("u", "delta", "B", "C", "z", "dt_bias")}
    seeds: list[Tensor | None] = [torch.randn(1, 20, 24).bfloat16(), None, None]
    found = gradients(v | low, 8, seeds)
    wide = gradients(v | {k: x.float() for k, x in low.items()}, 8, [seeds[0].float(), None, None])  # type: ignore[union-attr]
    for name, x in low.items():
        assert found["d" + name].dtype == torch.bfloat16
        assert same((found["d" + name], wide["d" + name].to(x.dtype)))
    assert found["dA"].dtype == torch.float32

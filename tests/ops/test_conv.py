"""The causal convolution: against torch's, its state, its bit promise, gradients, every width."""

from typing import Any

import pytest
import torch
from cases import backend_params, poisoned  # noqa: F401  (poisoned is a fixture)
from tolerance import assert_within
from torch import Tensor
from torch.nn import functional as F

from mambascope import ops

EVERY = backend_params("reference", "torch", "cpu")
pytestmark = pytest.mark.usefixtures("poisoned")


def conv_inputs(
    batch: int, length: int, channels: int, width: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, length, channels, generator=g).to(dtype),
        "weight": torch.randn(channels, width, generator=g).to(dtype),
        "bias": torch.randn(channels, generator=g).to(dtype),
        "state": torch.randn(batch, channels, width - 1, generator=g).to(dtype),
    }


def by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by ``conv1d``, in float64."""
    channels, width = weight.shape
    before = x.new_zeros(x.shape[0], channels, width - 1) if state is None else state
    full = torch.cat((before, x.transpose(1, 2)), 2).double()
    y = F.conv1d(full, weight.double()[:, None], None if bias is None else bias.double(), groups=channels)
    return y.transpose(1, 2), full[:, :, x.shape[1] :]


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 63, 130])
def test_against_conv1d(length: int, width: int, backend: Any) -> None:
    x = conv_inputs(2, length, 37, width)
    exact, state = by_torch(**x)
    found = ops.causal_conv(**x, backend=backend)
    assert_within(found.y, exact)
    assert torch.equal(found.state.double(), state)
    assert found.state.shape == (2, 37, width - 1)
    as_module = ops.causal_conv(**dict(x, weight=x["weight"][:, None]), backend=backend)
    assert torch.equal(as_module.y, found.y)
    bare = ops.causal_conv(x["x"], x["weight"], backend=backend)
    assert_within(bare.y, by_torch(x["x"], x["weight"], None, None)[0])


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_fused_and_apart_give_the_same_bits(dtype: torch.dtype, backend: Any) -> None:
    x = conv_inputs(2, 65, 40, 4, dtype)
    strided = torch.cat((x["x"], x["x"] + 1), -1)[..., :40]
    fused = ops.causal_conv(**x, activation="silu", backend=backend)
    plain = ops.causal_conv(**x, backend=backend)
    assert fused.y.dtype == plain.y.dtype == fused.state.dtype == dtype
    assert torch.equal(fused.y, ops.silu(plain.y, backend=backend))
    assert torch.equal(ops.causal_conv(**dict(x, x=strided), activation="silu", backend=backend).y, fused.y)
    with_grad = {name: t.requires_grad_() for name, t in x.items()}
    assert torch.equal(ops.causal_conv(**with_grad, activation="silu", backend=backend).y, fused.y)


@pytest.mark.parametrize("backend", EVERY)
def test_low_precision(backend: Any) -> None:
    """Sums in float32, one rounding for the sum and one for SiLU."""
    x = conv_inputs(2, 65, 40, 4, torch.bfloat16)
    exact, _ = by_torch(**x)
    found = ops.causal_conv(**x, backend=backend)
    assert_within(found.y, exact)
    activated = ops.causal_conv(**x, activation="silu", backend=backend)
    assert_within(activated.y, F.silu(exact), rounded=F.silu(exact.bfloat16().double()).bfloat16())


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("width", [1, 3, 4])
def test_a_text_cut_anywhere_gives_the_bits_of_the_whole(width: int, backend: Any) -> None:
    x = conv_inputs(2, 12, 40, width)
    whole = ops.causal_conv(**x, activation="silu", backend=backend)
    for k in range(1, 12):
        first = ops.causal_conv(**dict(x, x=x["x"][:, :k]), activation="silu", backend=backend)
        second = ops.causal_conv(**dict(x, x=x["x"][:, k:], state=first.state), activation="silu", backend=backend)
        assert torch.equal(torch.cat((first.y, second.y), 1), whole.y)
        assert torch.equal(second.state, whole.state)


@pytest.mark.parametrize("backend", EVERY)
def test_the_state_of_rows_of_different_length(backend: Any) -> None:
    """The last K − 1 real inputs of each row; short rows fill up from the state that came in."""
    x = conv_inputs(5, 9, 6, 4)
    lengths = torch.tensor([9, 4, 2, 1, 0])
    found = ops.causal_conv(**x, lengths=lengths, backend=backend)
    for b, n in enumerate(lengths.tolist()):
        row = {"x": x["x"][b : b + 1, :n], "state": x["state"][b : b + 1]}
        expected = ops.causal_conv(**dict(x, **row), backend=backend)
        assert torch.equal(found.state[b], expected.state[0]), n
        assert torch.equal(found.y[b, :n], expected.y[0]), n
    without = ops.causal_conv(x["x"], x["weight"], lengths=lengths, backend=backend)
    assert not without.state[4].any()


@pytest.mark.parametrize("backend", backend_params("torch", "cpu"))
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradients(ragged: bool, width: int, activation: str | None, backend: Any) -> None:
    x = conv_inputs(2, 33, 40, width)
    lengths = torch.tensor([33, 2]) if ragged else None
    results = []
    for name, dtype in (("reference", torch.float64), ("reference", torch.float32), (backend, torch.float32)):
        y = {k: t.to(dtype).requires_grad_() for k, t in x.items()}
        out = ops.causal_conv(**y, activation=activation, lengths=lengths, backend=name)
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=g).to(dtype) for t in out]
        results.append(torch.autograd.grad(out, list(y.values()), weights, allow_unused=True))
    for name, exact, sequential, found in zip(x, *results, strict=True):
        if x[name].numel():
            assert_within(found, exact, sequential, name)


def test_gradcheck_of_the_reference() -> None:
    x = conv_inputs(2, 5, 3, 4)
    inputs = [t.double().requires_grad_() for t in x.values()]

    def outputs(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return ops.causal_conv(
            x, weight, bias, state=state, activation="silu", lengths=torch.tensor([5, 2]), backend="reference"
        )

    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


@pytest.mark.parametrize("backend", EVERY)
def test_low_precision_gradients(backend: Any) -> None:
    x = conv_inputs(2, 33, 40, 4, torch.bfloat16)
    results = []
    for name, dtype in (("reference", torch.float64), (backend, torch.bfloat16)):
        y = {k: t.to(dtype).requires_grad_() for k, t in x.items()}
        out = ops.causal_conv(**y, backend=name)
        weight = torch.randn(out.y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        results.append(torch.autograd.grad(out.y, list(y.values()), weight))
    for name, exact, found in zip(x, *results, strict=True):
        assert found.dtype == torch.bfloat16
        assert_within(found, exact, name=name)


@pytest.mark.parametrize("backend", EVERY)
def test_a_state_of_higher_precision_is_not_rounded_before_it_is_used(backend: Any) -> None:
    x = conv_inputs(2, 5, 40, 4)
    x["x"] = x["x"].bfloat16()
    found = ops.causal_conv(**x, backend=backend)
    assert found.y.dtype == found.state.dtype == torch.bfloat16
    assert_within(found.y, by_torch(**{name: t.double() for name, t in x.items()})[0])


@pytest.mark.parametrize("backend", EVERY)
def test_nan_reaches_the_taps_that_see_it_and_no_others(backend: Any) -> None:
    x = conv_inputs(2, 20, 40, 4)
    clean = ops.causal_conv(**x, backend=backend).y
    x["x"][1, 7, 3] = float("nan")
    found = ops.causal_conv(**x, backend=backend).y
    touched = torch.zeros_like(clean, dtype=torch.bool)
    touched[1, 7:11, 3] = True
    assert torch.isnan(found[touched]).all()
    assert torch.equal(found[~touched], clean[~touched])


@pytest.mark.parametrize("backend", EVERY)
def test_no_tokens_leave_the_state(backend: Any) -> None:
    x = conv_inputs(2, 0, 6, 4)
    found = ops.causal_conv(**x, backend=backend)
    assert found.y.shape == (2, 0, 6)
    assert torch.equal(found.state, x["state"])


def test_the_comparison_can_fail() -> None:
    x = conv_inputs(2, 20, 40, 4)
    exact, _ = by_torch(**x)
    shifted = ops.causal_conv(**dict(x, weight=x["weight"].flip(1))).y
    with pytest.raises(AssertionError):
        assert_within(shifted, exact)

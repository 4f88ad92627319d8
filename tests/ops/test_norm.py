"""RMSNorm and the elementwise operators: values, open intermediate values, gradients, bits."""

from typing import Any

import pytest
import torch
from cases import backend_params, poisoned  # noqa: F401  (poisoned is a fixture)
from tolerance import assert_within
from torch import Tensor
from torch.nn import functional as F

from mambascope import ops
from mambascope.errors import InputError

EVERY = backend_params("reference", "torch", "cpu")
pytestmark = pytest.mark.usefixtures("poisoned")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("width", [1, 7, 33, 768])
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_against_torch(weighted: bool, width: int, backend: Any) -> None:
    x, weight = 3 * normal(2, 5, width), normal(width, seed=1) if weighted else None
    exact = F.rms_norm(x.double(), (width,), None if weight is None else weight.double(), 1e-5)
    found = ops.rms_norm(x, weight, 1e-5, backend=backend)
    assert found.normalized is None
    assert found.scale is None
    assert_within(found.out, exact)
    opened = ops.rms_norm(x, weight, 1e-5, expose=True, backend=backend)
    assert opened.scale is not None
    assert opened.normalized is not None
    assert torch.equal(opened.out, found.out)
    assert opened.scale.shape == (2, 5, 1)
    assert_within(opened.scale, (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert torch.equal(opened.normalized, x / opened.scale)
    assert torch.equal(opened.out, opened.normalized if weight is None else opened.normalized * weight)
    strided = torch.cat((x, x), -1)[..., :width]
    assert torch.equal(ops.rms_norm(strided, weight, 1e-5, backend=backend).out, found.out)
    flat = ops.rms_norm(x[0, 0], weight, 1e-5, expose=True, backend=backend)
    assert_within(flat.out, exact[0, 0])


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_norm_of_mixed_precision(x_dtype: torch.dtype, weight_dtype: torch.dtype, backend: Any) -> None:
    """A float32 residual with bfloat16 weights gives bfloat16, rounded once."""
    x, weight = normal(2, 5, 96).to(x_dtype), normal(96, seed=1).to(weight_dtype)
    found = ops.rms_norm(x, weight, 1e-5, expose=True, backend=backend)
    assert found.out.dtype == weight_dtype
    assert found.scale is not None
    assert found.normalized is not None
    assert found.scale.dtype == found.normalized.dtype == torch.float32
    assert_within(found.out, F.rms_norm(x.double(), (96,), weight.double(), 1e-5))
    assert torch.equal(found.out, (found.normalized * weight.float()).to(weight_dtype))


@pytest.mark.parametrize("backend", backend_params("torch", "cpu"))
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("through", ["out", "normalized", "scale", "all"])
def test_norm_gradients(through: str, weighted: bool, backend: Any) -> None:
    results = []
    for name, dtype in (("reference", torch.float64), ("reference", torch.float32), (backend, torch.float32)):
        x = (3 * normal(2, 5, 33)).to(dtype).requires_grad_()
        weight = normal(33, seed=1).to(dtype).requires_grad_() if weighted else None
        out = ops.rms_norm(x, weight, 1e-5, expose=True, backend=name)._asdict()
        picked = list(out.values()) if through == "all" else [out[through]]
        weights = [normal(*t.shape, seed=2).to(dtype) for t in picked]
        inputs = [x] if weight is None or through in ("normalized", "scale") else [x, weight]
        results.append(torch.autograd.grad(picked, inputs, weights))
    for exact, sequential, found in zip(*results, strict=True):
        assert_within(found, exact, sequential)


@pytest.mark.parametrize("backend", EVERY)
def test_derivatives_of_the_pieces(backend: Any) -> None:
    """First by the table; second derivatives exist on every backend (these operators have no backward kernel)."""
    x, z = 4 * normal(3, 50), 4 * normal(3, 50, seed=1)
    cases: list[tuple[Any, tuple[Tensor, ...]]] = [
        (lambda x, **k: ops.softplus(x, **k), (x,)),
        (lambda x, **k: ops.silu(x, **k), (x,)),
        (lambda y, z, **k: ops.gate(y, z, **k), (x, z)),
        (lambda x, w, **k: ops.rms_norm(x, w, 1e-5, **k).out, (x, z[0])),
    ]
    for f, inputs in cases:
        results = []
        for name, dtype in (("reference", torch.float64), ("reference", torch.float32), (backend, torch.float32)):
            given = [t.to(dtype).requires_grad_() for t in inputs]
            out = f(*given, backend=name)
            first = torch.autograd.grad(out.square().sum(), given, create_graph=True)
            second = torch.autograd.grad(sum(t.square().sum() for t in first), given)
            results.append((out, *first, *second))
        for exact, sequential, found in zip(*results, strict=True):
            assert_within(found, exact, sequential)


@pytest.mark.parametrize("backend", EVERY)
def test_softplus_and_silu_over_their_whole_range(backend: Any) -> None:
    x = torch.cat((torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-30, 3e38, -3e38])))
    softplus = ops.softplus(x, backend=backend)
    exact = torch.where(x > 0, x.double(), 0.0) + torch.log1p(torch.exp(-x.double().abs()))
    small = exact > 1e-37  # below, float32 has no full precision
    assert ((softplus.double() - exact)[small].abs() <= 5e-7 * exact[small]).all()
    assert (softplus >= 0).all()
    silu = ops.silu(x, backend=backend)
    wide = x.double()
    assert_within(silu[wide.abs() <= 100], (wide * torch.sigmoid(wide))[wide.abs() <= 100])
    assert torch.isfinite(silu).all()
    assert silu[-2] == x[-2]
    assert ops.softplus(torch.tensor([float("inf")]), backend=backend).isinf().all()


@pytest.mark.parametrize("backend", EVERY)
def test_nan_stays_where_it_is(backend: Any) -> None:
    x = normal(3, 40)
    pieces = (ops.softplus, ops.silu, lambda x, **k: ops.gate(x, x, **k))
    clean = [f(x, backend=backend) for f in pieces]
    x[1, 7] = float("nan")
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[1, 7] = True
    for f, before in zip(pieces, clean, strict=True):
        after = f(x, backend=backend)
        assert torch.isnan(after[touched]).all()
        assert torch.equal(after[~touched], before[~touched])
    rows = ops.rms_norm(x, None, 1e-5, backend=backend).out
    assert torch.isnan(rows[1]).all()
    assert torch.isfinite(rows[[0, 2]]).all()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_place_in_a_tensor(dtype: torch.dtype, backend: Any) -> None:
    x = (5 * normal(4000)).to(dtype)
    for f in (ops.softplus, ops.silu, lambda x, **k: ops.gate(x.float(), x, **k)):
        whole = f(x, backend=backend)
        for start, stop in ((0, 1), (3, 20), (17, 1000), (999, 4000)):
            assert torch.equal(f(x[start:stop].clone(), backend=backend), whole[start:stop])
        assert torch.equal(f(x.reshape(50, 80).t(), backend=backend), whole.reshape(50, 80).t())
        assert torch.equal(f(x[::2], backend=backend), whole[::2])


@pytest.mark.parametrize("backend", EVERY)
def test_results_have_the_documented_dtypes(backend: Any) -> None:
    x = normal(2, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = x.to(dtype)
        assert ops.softplus(low, backend=backend).dtype == torch.float32
        assert ops.silu(low, backend=backend).dtype == dtype
        assert ops.gate(x, low, backend=backend).dtype == dtype
        assert_within(ops.silu(low, backend=backend), F.silu(low.double()))
        assert_within(ops.gate(x, low, backend=backend), x.double() * F.silu(low.double()))


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_norm_is_the_sum_and_its_norm(backend: Any, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 5, 24, generator=g).bfloat16(), torch.randn(2, 5, 24, generator=g).to(dtype)
    weight = torch.randn(24, generator=g)
    found = ops.add_norm(x, residual, weight, 1e-5, expose=True, backend=backend)
    assert torch.equal(found.residual, residual + x)
    apart = ops.rms_norm(found.residual, weight, 1e-5, expose=True, backend=backend)
    for a, b in zip(found[1:], apart, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(found.out, ops.rms_norm(residual, weight, 1e-5, backend=backend).out)
    bare = ops.add_norm(x, residual, None, 1e-5, backend=backend)
    assert bare.out.dtype == dtype
    assert bare.normalized is None


def test_add_norm_has_the_gradients_of_both() -> None:
    x, residual, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (3, 6), (6,)))
    assert torch.autograd.gradcheck(lambda *t: ops.add_norm(*t, 1e-5)[:2], (x, residual, weight))


def test_add_norm_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="x and residual must agree"):
        ops.add_norm(torch.zeros(2, 4), torch.zeros(1, 4), None, 1e-5)

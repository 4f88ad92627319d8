"""float32 products in three TF32 terms: interpreted (where a dot is exact float32), and when they are taken at all."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from mambascope import ops
from mambascope.ops.linear import _exact
from mambascope.ops.scan import triton, triton_matmul
from tests.ops.tolerance import error

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)
DEVICE = "cuda" if CUDA else "cpu"


@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 32, 5), (130, 64, 70), (300, 96, 129)])
@pytest.mark.parametrize("biased", [False, True])
def test_against_float64(rows: int, depth: int, width: int, biased: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, depth + 8, device=DEVICE)[:, 4 : depth + 4]
    weight = torch.randn(width, depth, device=DEVICE)
    bias = torch.randn(width, device=DEVICE) if biased else None
    want = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = triton_matmul.linear_forward(x, weight, bias)
    assert error(got, want) < 1e-6
    assert torch.equal(got, triton_matmul.linear_forward(x, weight, bias))
    assert error(triton_matmul.linear_forward(x.half().float(), weight, bias), want) > 1e-5  # such an error is seen


def test_it_serves_large_plain_float32_products_on_hopper_only() -> None:
    meta = torch.empty(2048, 768), torch.empty(3072, 768)
    assert triton_matmul.serves(*meta) == (CUDA and torch.cuda.get_device_capability()[0] == 9 and meta[0].is_cuda)


def test_the_front_takes_torchs_product_where_anything_speaks_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(2, 3, 32), torch.randn(5, 32), torch.randn(5)
    called: list[int] = []
    monkeypatch.setattr(triton, "serves", lambda rows, weight: True)
    monkeypatch.setattr(triton, "linear_forward", lambda *a: (called.append(1), triton_matmul.linear_forward(*a))[1])
    want = torch.nn.functional.linear(x, weight, bias)
    assert error(ops.linear(x, weight, bias, backend="triton"), want.double()) < 1e-6
    assert not called  # on a CPU
    assert _exact(x, weight, bias)
    weight.requires_grad_()
    assert not _exact(x, weight, bias)
    ops.linear(x, weight, bias, backend="triton").sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert _exact(x, weight, bias)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        assert not _exact(x, weight, bias)
        torch.set_float32_matmul_precision(before)

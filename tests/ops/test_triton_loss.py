"""The loss kernel against float64, interpreted or on a GPU."""

import os

import pytest
import torch
import torch.nn.functional as F

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from mambascope.ops import linear_cross_entropy, softmax_losses
from mambascope.ops.scan import triton_loss
from tests.ops.tolerance import error

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)
DEVICE = "cuda" if CUDA else "cpu"
NARROW = torch.bfloat16 if CUDA else torch.float16  # the interpreter truncates where it should round to bfloat16


def problem(rows: int, columns: int, spread: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(columns)
    logits = spread * torch.randn(rows, columns, generator=g)
    targets = torch.randint(columns, (rows,), generator=g)
    targets[::4] = -100
    return logits.to(DEVICE), targets.to(DEVICE)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (6, 300), (9, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_against_float64(rows: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = problem(rows, columns)
    logits = logits.to(dtype)
    exact = logits.double().requires_grad_()
    want = F.cross_entropy(exact, targets, ignore_index=-100, reduction="none")
    slope = torch.autograd.grad(want.sum(), exact)[0]
    for block in (256, 8192):  # in pieces of a row, and whole
        monkeypatch.setattr(triton_loss, "_BLOCK", block)
        monkeypatch.setattr(triton_loss, "_LONG_BLOCK", block)
        given = logits.clone()
        assert error(softmax_losses(given, targets, backend="triton"), want) < 1e-6
        assert torch.equal(given, logits)
        found = softmax_losses(given, targets, gradient=True, backend="triton")
        assert error(found, want) < 1e-6
        assert error(given, slope) <= (1e-6 if dtype == torch.float32 else 1.1 * error(slope.to(dtype), slope))
        assert not given[::4].any()
    if columns > 1:
        assert error(softmax_losses(logits, targets.roll(1), backend="triton"), want) > 1e-2


def test_a_sure_target_has_a_gradient_still() -> None:
    logits = torch.tensor([[0.0, 9.0, -3.0], [12.0, 0.0, 0.0]], device=DEVICE)
    targets = torch.tensor([1, 0], device=DEVICE)
    exact = logits.double()
    want = torch.softmax(exact, -1)
    rest = want.gather(1, torch.tensor([[0, 2], [1, 2]], device=DEVICE)).sum(1)
    softmax_losses(logits, targets, gradient=True, backend="triton")
    found = logits.double().gather(1, targets[:, None])[:, 0]
    assert float((found + rest).abs().max()) < 1.2e-7  # one rounding of the sum of exponentials, which is about 1


def test_odd_values() -> None:
    inf, nan = float("inf"), float("nan")
    rows = [[-inf, 1.0, 2.0], [nan, 0.0, 0.0], [nan, 0.0, 0.0], [80.0, -80.0, 0.0], [1.0, 2.0, 3.0]]
    logits, targets = torch.tensor(rows, device=DEVICE), torch.tensor([2, 1, -100, 1, 3], device=DEVICE)
    found = softmax_losses(logits, targets, gradient=True, backend="triton")
    want = F.cross_entropy(torch.tensor(rows[:4]), targets[:4].cpu(), ignore_index=-100, reduction="none")
    assert torch.allclose(found[:4].cpu(), want, rtol=1e-6, equal_nan=True)
    assert torch.isnan(found[4]), "an id outside the vocabulary is seen"
    assert logits[0, 0] == 0
    assert torch.isnan(logits[1]).all()
    assert not logits[2].any()


def test_two_calls_give_the_same_bits_and_the_head_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from mambascope.ops.scan import triton

    used: list[bool] = []
    kernel = triton_loss.loss_forward
    monkeypatch.setattr(triton, "loss_forward", lambda *a: (used.append(a[2]), kernel(*a))[1])
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=g).to(DEVICE).requires_grad_() for s in ((40, 8), (50, 8)))
    targets = torch.randint(50, (40,), generator=g).to(DEVICE)

    def head(backend: str) -> list[torch.Tensor]:
        loss = linear_cross_entropy(x, w, targets, chunk=16 * 50, backend=backend)  # type: ignore[arg-type]
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    first, second, plain = head("triton"), head("triton"), head("torch")
    assert used == [True] * 6
    for a, b, c in zip(first, second, plain, strict=True):
        assert torch.equal(a, b)
        assert error(a, c) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_gradients_are_scaled_and_rounded_once(dtype: torch.dtype) -> None:
    x, factor = problem(7, 999)[0], torch.tensor([0.3], device=DEVICE)
    for given in (x, x.to(dtype)):
        found = triton_loss.scaled(given, factor, dtype)
        assert torch.equal(found, (given.float() * factor).to(dtype))
    assert not torch.equal(triton_loss.scaled(x, 2 * factor, dtype), found)

"""The head that never holds length x vocabulary equals plain cross-entropy: loss, gradients, second derivatives."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.ops import linear_cross_entropy, softmax_losses
from mambascope.ops.loss import IGNORED


def problem(seed: int = 0, rows: int = 37, dtype: torch.dtype = torch.float64):
    rng = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(*shape, generator=rng, dtype=dtype).requires_grad_() for shape in ((rows, 6), (11, 6)))
    targets = torch.randint(11, (rows,), generator=rng)
    targets[::5] = IGNORED
    return x, w, targets


@pytest.mark.parametrize("chunk", [1, 11 * 5, 1 << 20])
def test_loss_and_gradients_in_chunks(chunk: int) -> None:
    x, w, targets = problem()
    plain = F.cross_entropy(x @ w.t(), targets, ignore_index=IGNORED)
    want = torch.autograd.grad(3 * plain, (x, w))
    found = linear_cross_entropy(x, w, targets, chunk=chunk)
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(3 * found, (x, w)), want, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-6  # the softmax is float32
    shifted = linear_cross_entropy(x, w, targets.roll(1))
    assert shifted.item() != pytest.approx(plain.item(), rel=1e-3), "the comparison can fail"


def test_nothing_scored_is_nan_as_in_torch() -> None:
    x, w, targets = problem()
    assert torch.isnan(linear_cross_entropy(x, w, torch.full_like(targets, IGNORED)))


def test_under_autocast_the_products_are_narrow() -> None:
    x, w, targets = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(x, w, targets)
    want = linear_cross_entropy(x, w, targets)
    assert found.dtype == torch.float32
    assert found.item() != want.item()
    assert found.item() == pytest.approx(want.item(), rel=2e-2)
    assert torch.autograd.grad(found, w)[0].dtype == torch.float32


def test_only_the_gradient_that_is_wanted() -> None:
    x, w, targets = problem()
    want = torch.autograd.grad(linear_cross_entropy(x, w, targets), (x, w))
    alone = linear_cross_entropy(x, w.detach(), targets)
    assert torch.equal(torch.autograd.grad(alone, x)[0], want[0])
    assert torch.equal(torch.autograd.grad(linear_cross_entropy(x.detach(), w, targets), w)[0], want[1])
    assert not linear_cross_entropy(x.detach(), w.detach(), targets).requires_grad
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, w, targets), alone.detach())


def test_second_derivatives() -> None:
    x, w, targets = problem(rows=7)

    def twice(loss: torch.Tensor) -> torch.Tensor:
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(3 * loss, (x, w), create_graph=True)])
        return torch.cat([g.flatten() for g in torch.autograd.grad((slope**2).sum(), (x, w))])

    want = twice(F.cross_entropy(x @ w.t(), targets, ignore_index=IGNORED))
    for chunk in (22, 1 << 20):
        found = twice(linear_cross_entropy(x, w, targets, chunk=chunk))
        assert float((found - want).abs().max() / want.abs().max()) < 1e-10


def test_losses_row_by_row_and_the_gradient_in_place() -> None:
    x, w, targets = problem()
    logits = (x @ w.t()).detach()
    kept = logits.clone().requires_grad_()
    losses = F.cross_entropy(kept, targets, ignore_index=IGNORED, reduction="none")
    want = losses.detach()
    assert float((softmax_losses(logits, targets) - want).abs().max()) < 1e-12
    assert torch.equal(logits, kept)
    softmax_losses(logits, targets, gradient=True)
    assert float((logits - torch.autograd.grad(losses.sum(), kept)[0]).abs().max()) < 1e-12
    assert float(logits[::5].abs().max()) == 0.0

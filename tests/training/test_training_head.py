"""The chunked head equals plain cross-entropy, gradients too; a batch on its way is the batch; the floor is a floor."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.config import MambaConfig
from mambascope.errors import InputError
from mambascope.model import HookedMamba
from mambascope.training.feed import Feed
from mambascope.training.floor import Floor, measure_floor
from mambascope.training.head import answer_loss, linear_cross_entropy
from mambascope.training.metrics import largest_fall
from mambascope.training.sampler import IGNORED, Batch


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


def mamba() -> HookedMamba:
    torch.manual_seed(1)
    return HookedMamba(MambaConfig(d_model=8, n_layers=2, d_vocab=13, d_state=4))


def logits_loss(model: HookedMamba, batch: Batch) -> torch.Tensor:
    logits = model(batch.tokens, logits_to_keep=batch.targets.shape[1])
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("keep", [20, 3])
def test_the_model_s_loss_and_gradients(keep: int) -> None:
    rng, model = torch.Generator().manual_seed(0), mamba()
    tokens = torch.randint(13, (3, 21), generator=rng)
    batch = Batch(tokens[:, :-1], tokens[:, -keep:])
    names, parameters = zip(*model.named_parameters(), strict=True)
    found, want = answer_loss(model, batch), logits_loss(model, batch)
    assert found.item() == pytest.approx(want.item(), rel=1e-6)
    pairs = zip(torch.autograd.grad(found, parameters), torch.autograd.grad(want, parameters), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        assert float((a - b).abs().max()) <= 2e-6 * float(b.abs().max()) + 1e-9, name


def test_hooks_on_the_head_still_fire() -> None:
    model, seen = mamba(), []
    batch = Batch(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64))
    plain = float(answer_loss(model, batch).detach())
    with model.hooks(fwd_hooks=[("ln_final.hook_normalized", lambda x, hook: seen.append(x.shape))]):
        assert float(answer_loss(model, batch).detach()) == pytest.approx(plain, rel=1e-6)
    assert seen == [(2, 5, 8)]
    handle = model.unembed.register_forward_hook(lambda *_: seen.append("unembed"))
    answer_loss(model, batch)
    handle.remove()
    assert seen[-1] == "unembed"


def test_a_feed_gives_the_batches_and_checks_their_ids() -> None:
    def batches(step: int) -> Batch:
        return Batch(torch.full((1, 2), step), torch.full((1, 1), step))

    feed = Feed(batches, 5, torch.device("cpu"), 10)
    assert [int(feed(step).tokens[0, 0]) for step in (3, 0, 1)] == [3, 0, 1]
    with pytest.raises(InputError, match=r"the batch of step 7: tokens\[0, 0\] is 7, outside the vocabulary of 5"):
        feed(7)
    feed.close()


def test_the_largest_fall_is_found() -> None:
    rows = [{"step": step, "x": x} for step, x in ((10, 4.0), (20, 3.9), (30, 1.0), (40, 0.9))]
    fall = largest_fall([*rows, {"step": 50}], "x")
    assert fall is not None
    assert (fall.steps, fall.values) == ((20, 30), (3.9, 1.0))
    assert str(fall) == "largest fall of x: 3.9000 to 1.0000 between steps 20 and 30 (94% of its range)"
    assert largest_fall(rows[:1], "x") is None
    assert largest_fall(rows[::-1], "x") is None
    assert largest_fall(rows, "y") is None


def test_the_floor_counts_products_and_scans() -> None:
    floor = measure_floor(mamba(), 2, 16)
    assert floor.products > 0
    assert floor.scans > 0
    assert floor.tokens == 32
    assert str(Floor(1e-3, 3e-3, 8)) == "floor: 2,000 tokens/s (a step: matrix products 1.00 ms, scans 3.00 ms)"

"""A step's loss equals plain cross-entropy, gradients too; a batch on its way is the batch; the floor is a floor."""

import pytest
import torch
import torch.nn.functional as F

from mambascope.config import MambaConfig
from mambascope.errors import InputError
from mambascope.model import HookedMamba
from mambascope.training.feed import Feed
from mambascope.training.floor import Floor, measure_floor
from mambascope.training.graph import GradientGraph
from mambascope.training.head import answer_loss
from mambascope.training.metrics import largest_fall
from mambascope.training.sampler import IGNORED, Batch


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


def test_recorded_gradients_need_a_gpu() -> None:
    with pytest.raises(InputError, match="a CUDA graph needs a model on an NVIDIA GPU, this one is on cpu"):
        GradientGraph(mamba())

"""A recorded step trains like a step by itself (needs a GPU)."""

import pytest
import torch

from mambascope.config import MambaConfig
from mambascope.errors import InputError
from mambascope.model import HookedMamba
from mambascope.training.build import train_recipe
from mambascope.training.command import recipe_for
from mambascope.training.graph import GradientGraph
from mambascope.training.head import answer_loss
from mambascope.training.loop import train
from mambascope.training.recipe import TrainSettings
from mambascope.training.sampler import Batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")


def quiet(_: str) -> None:
    return None


def test_recorded_and_plain_steps_give_the_same_losses(tmp_path):
    changes = ["train.steps=24", "train.log_every=4", "train.checkpoint_every=12", "train.evaluate_every=24"]
    changes += ["train.length=64", "train.schedule='cosine'", "task.evaluate_lengths=[64]"]
    plain = recipe_for("induction-2l", [*changes, "train.cuda_graph=false"])
    recorded = recipe_for("induction-2l", [*changes, "train.cuda_graph=true"])
    _, a = train_recipe(plain, tmp_path / "a", device="cuda", report=quiet)
    model, b = train_recipe(recorded, tmp_path / "b", device="cuda", report=quiet)
    assert [row["loss"] for row in b.rows] == pytest.approx([row["loss"] for row in a.rows], rel=1e-4)
    assert b.rows[-1]["grad_norm"] == pytest.approx(a.rows[-1]["grad_norm"], rel=1e-2)
    stopped = train_recipe(recorded, tmp_path / "c", device="cuda", report=quiet, minutes=0.0)[1]
    assert stopped.step == 4
    again, resumed = train_recipe(recorded, tmp_path / "c", device="cuda", report=quiet, resume=True)
    assert [row["loss"] for row in resumed.rows] == pytest.approx([row["loss"] for row in b.rows], rel=1e-4)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_a_text_step_in_bf16_is_recorded_too(tmp_path):
    """All tokens scored, autocast, the chunked head: what a language model's step is made of."""

    def batches(step: int) -> Batch:
        rows = (torch.randint(50, (4, 1), generator=torch.Generator().manual_seed(step)) + torch.arange(65)) % 50
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    losses = {}
    for graph in (False, True):
        torch.manual_seed(0)
        model = HookedMamba(MambaConfig(d_model=64, n_layers=2, d_vocab=50), device="cuda")
        settings = TrainSettings(
            steps=24, batch=4, length=64, lr=1e-2, log_every=4, checkpoint_every=24, evaluate_every=24,
            precision="bf16", cuda_graph=graph,
        )  # fmt: skip
        result = train(model, batches, settings, tmp_path / str(graph), recipe={}, report=quiet)
        losses[graph] = [row["loss"] for row in result.rows]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    assert losses[True][-1] < losses[True][0] - 0.5


def test_recorded_gradients_are_the_eager_ones_bit_for_bit():
    torch.manual_seed(0)
    model = HookedMamba(MambaConfig(d_model=64, n_layers=2, d_vocab=50), device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = GradientGraph(model)
    for step in range(6):
        tokens = torch.randint(50, (2, 65), generator=torch.Generator().manual_seed(step)).cuda()
        batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        loss = gradients(batch)
        found = [p.grad.clone() for p in model.parameters()]
        want = answer_loss(model, batch)
        assert torch.equal(loss, want)
        for a, b in zip(found, torch.autograd.grad(want, list(model.parameters())), strict=True):
            assert torch.equal(a, b)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with pytest.raises(InputError, match="make one for each shape"):
        gradients(Batch(tokens[:, :10], tokens[:, 1:11]))
    model.ln_final.weight.data = model.ln_final.weight.data.clone()
    with pytest.raises(InputError, match="a weight lies elsewhere"):
        gradients(batch)

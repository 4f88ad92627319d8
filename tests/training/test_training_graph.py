"""A recorded step trains like a step by itself (needs a GPU)."""

import json

import pytest
import torch

from mambascope.config import MambaConfig
from mambascope.errors import InputError
from mambascope.model import HookedMamba
from mambascope.training.build import train_recipe
from mambascope.training.command import recipe_for
from mambascope.training.executors import in_turns
from mambascope.training.graph import GradientGraph, StepGraph
from mambascope.training.head import answer_loss
from mambascope.training.loop import train
from mambascope.training.recipe import TrainSettings
from mambascope.training.sampler import Batch
from mambascope.training.sweep import load_sweep, run_sweep

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


RIVALS = {
    "h": ["model.d_inner=112"],
    "s": ["model.d_inner=140"],
    "p": ["model.d_inner=200"],
    "l": ["model.d_inner=58"],
    "g": ["model.d_inner=164"],
    "af": ["model.n_layers=4", "model.n_heads=4", "model.d_ff=84"],
    "wf": ["model.n_layers=4", "model.n_heads=4", "model.d_ff=84", "model.window=16"],
}


@pytest.mark.parametrize("pattern", RIVALS)
def test_steps_of_every_rival_can_be_recorded(tmp_path, pattern: str):
    changes = ["train.steps=24", "train.log_every=4", "train.checkpoint_every=24", "train.evaluate_every=24"]
    changes += ["train.length=64", "task.evaluate_lengths=[64]", f"model.pattern='{pattern}'", *RIVALS[pattern]]
    losses, lines = {}, []
    for graph in ("false", "true"):
        recipe = recipe_for("induction-2l", [*changes, f"train.cuda_graph={graph}"])
        _, result = train_recipe(recipe, tmp_path / graph, device="cuda", floor=False, report=lines.append)
        losses[graph] = [row["loss"] for row in result.rows]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-3)
    assert not [line for line in lines if "cannot be recorded" in line]


def test_a_step_that_cannot_be_recorded_runs_as_it_is():
    batch, told, calls = Batch(torch.ones(2, 3).long(), torch.ones(2, 3).long()), [], []

    def step(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(batch.tokens.sum().item())  # reads back: no recording can do that
        return batch.tokens.sum().float(), batch.tokens.sum().float()

    graph = StepGraph(step, torch.device("cuda"), told.append)
    found = [graph(batch)[0].item() for _ in range(6)]
    assert found == [6.0] * 6
    assert len(calls) == 6
    assert len(told) == 1 and "cannot be recorded" in told[0]
    strict = StepGraph(step, torch.device("cuda"))
    for _ in range(3):
        strict(batch)
    with pytest.raises(RuntimeError):
        strict(batch)


def test_runs_in_turns_train_as_they_do_alone(tmp_path):
    """Rows enough for products that sum over parts, whose scratch must not be shared by recordings."""
    changes = {"train.steps": 60, "train.log_every": 10, "train.checkpoint_every": 60, "train.evaluate_every": 60}
    sweep = load_sweep("selective-copying", changes | {"task.evaluate_sequences": 8})
    run_sweep(sweep, tmp_path / "together", in_turns(99), device="cuda", retries=0, report=quiet)
    for spec in sweep.runs[::2]:
        together = json.loads((tmp_path / "together" / spec.name / "curve.json").read_text())["rows"]
        _, alone = train_recipe(spec.recipe, tmp_path / spec.name, device="cuda", floor=False, report=quiet)
        for a, b in zip(together, alone.rows, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-2), (spec.name, a["step"])


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

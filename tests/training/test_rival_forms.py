"""Quick form of the table of induction by length: attention falls beyond what it was trained at, Mamba much later.

The full form is ``python -m mambascope.zoo sweep induction-rivals``.
"""

import pytest
import torch

from mambascope import zoo
from mambascope.analyses.tasks import evaluate
from mambascope.loading.names import count_parameters
from mambascope.training.build import train_recipe
from mambascope.training.recipe import Recipe, load_recipe
from mambascope.training.sweep import load_sweep


@pytest.mark.parametrize(
    ("pattern", "length", "steps", "batch", "model", "least", "most"),
    [("a", 16, 700, 32, {"n_heads": 1}, 0.0, 0.35), ("m", 24, 500, 24, {"d_state": 8}, 0.45, 1.0)],
)
def test_attention_forgets_beyond_its_length_what_mamba_still_finds(
    tmp_path, pattern: str, length: int, steps: int, batch: int, model: dict, least: float, most: float
) -> None:
    """Seeds 1 to 5: attention has 0.91 to 1 at its length, 0.08 to 0.19 at 16 times it; Mamba 1, and 0.57 to 0.96."""
    values = load_recipe(zoo.recipe_path("induction-2l")).to_dict()
    values["model"] = {"d_vocab": 16, "d_model": 32, "n_layers": 2, "pattern": pattern, **model}
    values["train"] |= {"steps": steps, "batch": batch, "length": length, "lr": 5e-3, "warmup": 20, "log_every": 100}
    values["train"] |= {"cuda_graph": False, "checkpoint_every": 10**6, "evaluate_every": 10**6}
    values["task"] |= {"evaluate_lengths": [], "evaluate_sequences": 1}
    recipe = Recipe.from_dict(values)
    made, _ = train_recipe(recipe, tmp_path, report=lambda _: None)
    assert recipe.task is not None
    task = recipe.task.make()
    with torch.no_grad():
        near, far = (evaluate(task, made, n, 200).accuracy for n in (length, 16 * length))
    assert near > 0.85
    assert least <= far <= most


def test_the_full_form_compares_models_of_one_size() -> None:
    runs = load_sweep("induction-rivals").runs
    models = [load_recipe(zoo.recipe_path("induction-2l")).model, *(run.recipe.model for run in runs)]
    sizes = [count_parameters(model) for model in models]
    assert set("awmsgh") <= set("".join(model.layers for model in models))
    assert max(sizes) / min(sizes) < 1.025
    seen = {(run.recipe.train.steps, run.recipe.train.batch, run.recipe.train.length) for run in runs}
    train = load_recipe(zoo.recipe_path("induction-2l")).train
    assert seen == {(train.steps, train.batch, train.length)}
    assert all(run.recipe.task == runs[0].recipe.task for run in runs)

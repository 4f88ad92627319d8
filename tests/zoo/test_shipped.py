"""The models that ship: what their cards say is what the recipes and the weights are."""

import json
from pathlib import Path

import pytest
import torch

import mambascope as ms
from mambascope import zoo
from mambascope.analyses.tasks import InductionHeads, evaluate
from mambascope.training.recipe import Recipe, load_recipe

MODELS = tuple(info.name for info in ms.list_models() if info.embedded)


@pytest.mark.parametrize("name", MODELS)
def test_the_card_tells_the_recipe_that_is_in_the_repository(name: str) -> None:
    card = json.loads((zoo.model_folder(name) / "card.json").read_text())
    assert Recipe.from_dict(card["recipe"]) == load_recipe(zoo.recipe_path(name))
    assert card["licence"]
    text = (zoo.model_folder(name) / "card.md").read_text()
    assert card["licence"] in text
    assert "seed" in text.lower()


def test_the_models_that_ship() -> None:
    assert {"lm-mini", "induction-2l"} <= set(MODELS)
    home = Path(str(zoo.recipes())).parent
    assert sum(file.stat().st_size for file in home.rglob("*") if file.is_file()) <= 130 * 2**20


@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_small_and_all_there(name: str) -> None:
    folder = Path(zoo.model_folder(name))
    weights = sorted(folder.glob("*.safetensors"))
    assert weights
    assert all(file.stat().st_size <= 16 * 2**20 + 2**16 for file in weights)  # a header comes on top
    assert {"config.json", "card.json", "card.md", "curve.csv"} <= {f.name for f in folder.iterdir()}
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    assert {file.name for file in weights} == named


@torch.no_grad()
def test_lm_mini_predicts_english() -> None:
    model = ms.load("lm-mini", device="cpu")
    english = "The river runs through the valley, and the people of the village live along its banks."
    shuffled = " ".join(sorted(english.split(), key=lambda word: word[::-1]))
    loss = float(model(english, return_type="loss"))
    assert loss < 5.0
    assert float(model(shuffled, return_type="loss")) > loss + 1
    assert "".join(model.to_str_tokens(english)) == english


@torch.no_grad()
@pytest.mark.parametrize(("length", "count"), [(64, 100), (333, 50), (2048, 10)])
def test_induction_2l_makes_no_error(length: int, count: int) -> None:
    model = ms.load("induction-2l", device="cpu")
    assert evaluate(InductionHeads(), model, length, count, seed=5).errors == 0


@torch.no_grad()
def test_an_untrained_model_of_that_shape_is_at_chance() -> None:
    torch.manual_seed(0)
    model = ms.HookedMamba(load_recipe(zoo.recipe_path("induction-2l")).model)
    assert evaluate(InductionHeads(), model, 64, 200, seed=5).errors > 150

"""Training of small Mamba models from recipes: data, sampling, the loop and its checkpoints."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambascope.training.build import build_model, train_recipe
    from mambascope.training.evaluate import bits_per_byte
    from mambascope.training.graph import GradientGraph
    from mambascope.training.loop import TrainingError, TrainResult, train
    from mambascope.training.recipe import Recipe, load_recipe
    from mambascope.training.sampler import Batch

_HOME = {
    "Batch": "sampler",
    "GradientGraph": "graph",
    "Recipe": "recipe",
    "TrainResult": "loop",
    "TrainingError": "loop",
    "bits_per_byte": "evaluate",
    "build_model": "build",
    "load_recipe": "recipe",
    "train": "loop",
    "train_recipe": "build",
}

__all__ = [
    "Batch",
    "GradientGraph",
    "Recipe",
    "TrainResult",
    "TrainingError",
    "bits_per_byte",
    "build_model",
    "load_recipe",
    "train",
    "train_recipe",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

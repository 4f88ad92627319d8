"""The models that ship with mambascope, each with its recipe, its card and the command that made it.

``python -m mambascope.zoo list | prepare | train | sweep | match | export | evaluate | compare``; see ``--help``.
Importing this needs no torch.
"""

from importlib import resources
from pathlib import Path

from mambascope.errors import LoadError, UnknownNameError, nearest
from mambascope.zoo.card import read_card

__all__ = ["model_folder", "names", "recipe_path", "recipes", "task_of"]


def _home() -> Path:
    return Path(str(resources.files(__name__)))


def recipes() -> Path:
    """The folder of the recipes."""
    return _home() / "recipes"


def names() -> list[str]:
    """The models that have a recipe here, shipped or not."""
    return sorted(path.stem for path in recipes().glob("*.toml"))


def recipe_path(name: str) -> Path:
    """The recipe of a zoo model. Raises UnknownNameError with the nearest names."""
    if name not in names():
        raise UnknownNameError(
            f"the zoo has no recipe {name!r}{nearest(name, names()) or '.'} It has: {', '.join(names())}"
        )
    return recipes() / f"{name}.toml"


def model_folder(name: str) -> Path:
    """The folder of a model that ships here. Raises LoadError for one that has only a recipe."""
    recipe_path(name)  # an unknown name gets its own error
    folder = _home() / name
    if not (folder / "config.json").is_file():
        raise LoadError(
            f"{name!r} does not ship with this package; "
            f"train it with: python -m mambascope.zoo train {name} --data … --out …"
        )
    return folder


def task_of(folder: Path) -> str | None:
    """The generated task that a model folder was trained on, by its card; None for a language model."""
    task = read_card(folder)["recipe"].get("task")
    return None if task is None else str(task["name"])

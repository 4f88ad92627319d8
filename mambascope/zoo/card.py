"""Model cards: ``card.json`` is the truth, ``card.md`` is written from it."""

import json
from pathlib import Path
from typing import Any

from mambascope.errors import LoadError
from mambascope.storage import write_bytes

__all__ = ["add_evaluation", "markdown", "number", "read_card", "write_card"]

_PARTS: dict[str, type] = {
    "name": str, "summary": str, "licence": str, "parameters": int, "recipe": dict, "training": dict
}  # fmt: skip
"""What every card has."""


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a model folder. Raises LoadError where it is missing, no JSON object, or no whole card."""
    path = folder / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read the model card {path}: {error}") from None
    if not isinstance(card, dict):
        raise LoadError(f"the model card {path} must be a JSON object, got {type(card).__name__}")
    missing = [key for key, kind in _PARTS.items() if not isinstance(card.get(key), kind)]
    if missing:
        raise LoadError(
            f"the model card {path} lacks {', '.join(missing)}; python -m mambascope.zoo export writes cards"
        )
    return card


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Write ``card.json`` and ``card.md`` into a model folder."""
    write_bytes(folder / "card.json", (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
    write_bytes(folder / "card.md", markdown(card).encode("utf-8"))


def add_evaluation(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Put the result of a committed command into a card, in place of an earlier one of the same name."""
    card = read_card(folder)
    card.setdefault("evaluations", {})[name] = values
    write_card(folder, card)


def number(value: Any) -> str:
    """A value as a person reads it: thousands apart, four digits of what is no whole number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    keys = list(rows[0])
    lines = ["| " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(number(row.get(key, "")) for key in keys) + " |" for row in rows]


def markdown(card: dict[str, Any]) -> str:
    """The card as Markdown: what the model is, how it was measured, from what and how it was trained."""
    recipe = card["recipe"]
    lines = [f"# {card['name']}", "", f"{card['summary']}.", ""]
    lines += [f"- Parameters: {card['parameters']:,}", f"- Licence of the weights: {card['licence']}"]
    lines += [f"- Seed: {recipe['seed']}", ""]
    for name, values in card.get("evaluations", {}).items():
        values = dict(values)
        rows = values.pop("rows", None)
        lines += [f"## {name}", ""]
        lines += [f"- {key.replace('_', ' ')}: {number(value)}" for key, value in values.items()]
        lines += ([""] if rows else []) + (_table(rows) if rows else []) + [""]
    if card.get("sources"):
        lines += ["## Training text", "", *_table(card["sources"]), ""]
    lines += ["## Training", ""]
    lines += [f"- {key.replace('_', ' ')}: {number(value)}" for key, value in card["training"].items()]
    lines += ["", "## Recipe", "", "```json", json.dumps(recipe["model"]), json.dumps(recipe["train"]), "```", ""]
    return "\n".join(lines)

"""Interventions as files, and whole runs: tokens, edits and options, to be repeated from their record."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mambascope.errors import CacheError, HookError
from mambascope.hooks.interventions.base import Intervention
from mambascope.hooks.interventions.pairs import tokens_of
from mambascope.storage import read_tensors, write_tensors

__all__ = ["Record", "load", "load_record", "record", "save"]


Edits = Intervention | Iterable[Intervention]


def _listed(interventions: Edits) -> list[Intervention]:
    """One intervention or several, as a list; HookError for anything else."""
    given: Any = interventions
    every = list(given) if isinstance(given, Iterable) else [given]
    for iv in every:
        if not isinstance(iv, Intervention):
            raise HookError(f"only interventions have a record, got {type(iv).__name__}")
    return every


def _packed(interventions: Edits) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    every = _listed(interventions)
    tensors = {f"edit/{i}/{name}": value for i, iv in enumerate(every) for name, value in iv.tensors.items()}
    return [iv.to_dict() for iv in every], tensors


def _unpacked(data: list[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Intervention]:
    out = []
    if not isinstance(data, list) or not all(isinstance(one, dict) for one in data):
        raise HookError("this is no list of interventions")
    for i, one in enumerate(data):
        prefix = f"edit/{i}/"
        mine = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        out.append(Intervention.from_dict(one, mine))
    return out


def save(path: str | Path, interventions: Edits) -> None:
    """Write interventions as one safetensors file: their tensors, and the rest as JSON in its header (atomic)."""
    data, tensors = _packed(interventions)
    write_tensors(path, tensors, {"kind": "interventions", "interventions": json.dumps(data)})


def load(path: str | Path) -> list[Intervention]:
    """Read what :func:`save` wrote; CacheError if it is no such file, HookError if it names unknown kinds."""
    tensors, meta = read_tensors(path, kind="interventions", error=CacheError)
    return _unpacked(_json(path, meta, "interventions"), tensors)


def _json(path: str | Path, meta: dict[str, str], key: str) -> Any:
    try:
        return json.loads(meta[key])
    except (KeyError, ValueError) as error:
        raise CacheError(f"{path} is damaged: {error!r}") from None


@dataclass(frozen=True)
class Record:
    """A run that can be repeated: tokens ``B L``, mask, interventions, the call's options, and the weights it needs."""

    tokens: Tensor
    interventions: list[Intervention]
    weights: str
    model_name: str
    mask: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, model: Any) -> Any:
        """Run it again: on the same device, path and versions the same bits. HookError for a model of other weights."""
        if model.weight_hash() != self.weights:
            raise HookError(f"this record belongs to other weights (model {self.model_name!r}) than {model.cfg.name!r}")
        options = self.options if self.mask is None else {**self.options, "attention_mask": self.mask}
        return model.run_with(self.tokens, self.interventions, **options)

    def save(self, path: str | Path) -> None:
        """Write it as one safetensors file (atomic)."""
        data, tensors = _packed(self.interventions)
        tensors["tokens"] = self.tokens
        if self.mask is not None:
            tensors["mask"] = self.mask
        about = {"weights": self.weights, "model": self.model_name, "options": self.options}
        meta = {"kind": "run", "interventions": json.dumps(data), "about": json.dumps(about)}
        write_tensors(path, tensors, meta)


def record(model: Any, text: Any, interventions: Edits, **options: Any) -> Record:
    """The record of ``model.run_with(text, interventions, **options)``; options must be JSON values."""
    try:
        json.dumps(options)
    except TypeError as error:
        raise HookError(f"a record keeps JSON values as options: {error}") from None
    tokens, padding = tokens_of(model, text)
    mask = None if padding is None else padding.mask
    return Record(tokens, _listed(interventions), model.weight_hash(), model.cfg.name, mask, options)


def load_record(path: str | Path) -> Record:
    """Read what :meth:`Record.save` wrote."""
    tensors, meta = read_tensors(path, kind="run", error=CacheError)
    about, data = _json(path, meta, "about"), _json(path, meta, "interventions")
    try:
        ids, weights, name = tensors["tokens"], str(about["weights"]), about["model"]
        options = dict(about["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} is damaged: {error!r}") from None
    return Record(ids, _unpacked(data, tensors), weights, name, tensors.get("mask"), options)

"""A model folder in our own format: config.json, model.safetensors (or shards with an index), tokenizer.json."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mambascope.errors import ConfigError, LoadError
from mambascope.loading.files import atomic_write, write_text
from mambascope.loading.formats import OUR_FORMAT, OUR_VERSION
from mambascope.loading.names import TIED_HEAD, parameter_shapes
from mambascope.loading.weights import keep_fp32

if TYPE_CHECKING:
    from mambascope.model import HookedMamba

__all__ = ["save_model"]

_INDEX = "model.safetensors.index.json"


def save_model(
    model: "HookedMamba",
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4 << 30,
    card: dict[str, Any] | None = None,
) -> None:
    """Save a model so that :func:`mambascope.load` opens the folder.

    Every file is written beside its final place and moved there when it is whole; the config comes last. Files of
    an earlier save that are no longer needed are removed, others are left alone.

    Parameters
    ----------
    folder: made if it does not exist.
    dtype: stored type, the model's own by default; A_log and D are never below float32.
    max_shard_bytes: above this the weights are split into files of at most this size (or one tensor).
    card: written as card.json; ``list_models`` reads its ``licence`` and ``summary``.

    Raises
    ------
    LoadError: the folder cannot be written (full disk, read-only); an older model in it is still whole.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoadError(f"cannot make the folder {str(target)!r}: {error}") from error
    tensors = _tensors(model, dtype)
    shards = _split(tensors, max_shard_bytes)
    names = _shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        atomic_write(target / name, lambda path, shard=shard: _write_safetensors(path, {k: tensors[k] for k in shard}))
    keep = set(names)
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(target / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        keep.add(_INDEX)
    if model.tokenizer is not None:
        model.tokenizer.save(target)
    if card is not None:
        _write_json(target / "card.json", card)
    tokenizer = "tokenizer.json" if model.tokenizer is not None else None
    head = {"format": OUR_FORMAT, "format_version": OUR_VERSION, "tokenizer": tokenizer}
    _write_json(target / "config.json", {**head, **model.cfg.to_dict()})
    _remove_stale(target, keep, tokenizer is not None)


def _tensors(model: "HookedMamba", dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The parameters by name, contiguous, in the stored type; a tied head is left out."""
    found = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    if model.cfg.tie_embeddings:
        found.pop(TIED_HEAD, None)
    shapes = parameter_shapes(model.cfg)
    if {name: tuple(t.shape) for name, t in found.items()} != shapes:
        odd = sorted(set(found) ^ set(shapes)) or [n for n in shapes if tuple(found[n].shape) != shapes[n]]
        raise ConfigError(f"the model's parameters are not those of its config: {odd[0]!r} differs")
    return {
        name: t.to("cpu", keep_fp32(name, dtype) if dtype is not None else t.dtype).contiguous()
        for name, t in found.items()
    }


def _split(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _remove_stale(folder: Path, keep: set[str], has_tokenizer: bool) -> None:
    """Remove weights of an earlier save that would now be read instead of, or beside, the new ones."""
    stale = {path.name for path in folder.glob("model-*-of-*.safetensors")} | {"model.safetensors", _INDEX}
    if not has_tokenizer:
        stale |= {"tokenizer.json", "tokenizer_config.json"}
    for name in stale - keep:
        (folder / name).unlink(missing_ok=True)

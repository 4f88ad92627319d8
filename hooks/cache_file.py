"""Caches as files: one safetensors file, tied to the weights that made it, checked when it is read."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from mambascope.errors import CacheError
from mambascope.hooks.cache import MambaCache
from mambascope.hooks.model_protocol import Scope
from mambascope.hooks.recorder import BlockRecord, Recording
from mambascope.hooks.run import Anchors
from mambascope.hooks.sites import padding_of
from mambascope.hooks.weights import WeightsSeen
from mambascope.ops.dispatch import BACKENDS
from mambascope.storage import read_tensors, write_tensors

__all__ = ["load_cache", "save_cache"]


def save_cache(cache: MambaCache, path: str | Path) -> None:
    """Write what a cache stores, its tokens, the model's name and weight hash (atomic; see MambaCache.save)."""
    rec = cache.recording
    cache.check_unedited()
    for layer in rec.blocks:  # the file names the weights that it belongs to
        cache.check_fresh(layer)
    tensors: dict[str, Tensor] = {f"top/{n}": v for n, v in rec.top.items()}
    tensors |= {f"grad/{n}": v for n, v in rec.gradients.items()}
    if rec.tokens is not None:
        tensors["tokens"] = rec.tokens
    if rec.padding is not None:
        tensors["mask"] = rec.padding.mask
    about: dict[str, Any] = {}
    for i, block in rec.blocks.items():
        about[str(i)] = {"edited": block.edited}
        tensors |= {f"block/{i}/stored/{n}": v for n, v in block.stored.items()}
        tensors |= {f"block/{i}/exposed/{n}": v for n, v in block.exposed.items()}
        if block.x is not None:
            tensors[f"block/{i}/x"] = block.x
        if block.state is not None:
            tensors |= {f"block/{i}/state/{n}": v for n, v in block.state.tensors().items()}
        if block.anchors is not None:
            tensors[f"block/{i}/anchors"] = block.anchors.states
            about[str(i)] |= {"columns": block.anchors.columns, "aligned": block.anchors.aligned}
    write_tensors(
        path,
        tensors,
        {
            "kind": "cache",
            "model": cache.model.cfg.name,
            "weights": cache.model.weight_hash(),
            "backend": rec.backend,
            "shape": json.dumps(list(rec.shape)),
            "names": json.dumps(rec.names),
            "bos": json.dumps(rec.bos),
            "batch": json.dumps(cache.has_batch_dim),
            "blocks": json.dumps(about),
        },
    )


def load_cache(path: str | Path, model: Scope) -> MambaCache:
    """Read what :meth:`MambaCache.save` wrote; CacheError if it was recorded with other weights.

    Recomputation works as before; on a machine that lacks the backend of the recording it runs on the model's.
    """
    tensors, meta = read_tensors(path, kind="cache", error=CacheError)
    if meta.get("weights") != model.weight_hash():
        raise CacheError(
            f"{path} was recorded with other weights (model {meta.get('model')!r}) than {model.cfg.name!r}"
        )
    try:
        shape = tuple(int(n) for n in json.loads(meta["shape"]))
        names, about = list(json.loads(meta["names"])), dict(json.loads(meta["blocks"]))
        batch, bos = bool(json.loads(meta["batch"])), json.loads(meta["bos"])
        if meta["backend"] not in BACKENDS:
            raise ValueError(f"unknown backend {meta['backend']!r}")
        tensors = {name: value.to(model.device) for name, value in tensors.items()}
        blocks = {
            int(i): _block_from(int(i), facts, tensors, model, (shape[0], shape[1])) for i, facts in about.items()
        }
        mask = tensors.get("mask")
        padding = None if mask is None else padding_of(mask, (shape[0], shape[1]), model.device)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as cause:
        raise CacheError(f"{path} is damaged: {cause!r}") from None
    top = {n.removeprefix("top/"): v for n, v in tensors.items() if n.startswith("top/")}
    gradients = {n.removeprefix("grad/"): v for n, v in tensors.items() if n.startswith("grad/")}
    recording = Recording(
        names,
        meta["backend"],
        tensors.get("tokens"),
        padding,
        bos,
        (shape[0], shape[1]),
        top,
        blocks,
        gradients,
        WeightsSeen(model),
    )
    return MambaCache(recording, model, batch)


def _block_from(
    layer: int, facts: dict[str, Any], tensors: dict[str, Tensor], model: Scope, shape: tuple[int, int]
) -> BlockRecord:
    prefix = f"block/{layer}/"
    mine = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    def part(kind: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{kind}/"): v for n, v in mine.items() if n.startswith(f"{kind}/")}

    state, anchors = part("state"), None
    if "anchors" in mine:
        columns = [int(c) for c in facts["columns"]]
        ordered = all(a < b for a, b in pairwise(columns)) and columns[:1] == [-1] and columns[-1] < shape[1]
        if not ordered or mine["anchors"].shape[:2] != (shape[0], len(columns)):
            raise ValueError(f"block {layer}: its states do not fit their positions")
        anchors = Anchors(columns, mine["anchors"], bool(facts["aligned"]))
    if "x" in mine and mine["x"].shape != (*shape, model.cfg.d_model):
        raise ValueError(f"block {layer}: its input has shape {tuple(mine['x'].shape)}")
    return BlockRecord(
        layer,
        mine.get("x"),
        model.state_from_tensors(state, layer) if state else None,
        bool(facts["edited"]),
        part("stored"),
        part("exposed"),
        anchors,
    )

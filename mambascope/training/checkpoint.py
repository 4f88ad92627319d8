"""Checkpoints of a training run: weights, optimizer state and progress, written whole or not at all.

A checkpoint is a folder ``checkpoints/step-00000500`` with ``weights.safetensors``, ``optimizer.safetensors`` and
``progress.json``; nothing in it is pickled. It appears under its name by one rename, so the newest folder is
always complete. The two newest are kept.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mambascope.errors import InputError, LoadError
from mambascope.memory import human
from mambascope.storage import read_tensors, write_bytes, write_tensors
from mambascope.training.files import read_json, sync_folder

__all__ = ["latest_checkpoint", "load_checkpoint", "read_progress", "require_room", "save_checkpoint"]

_KEEP = 2
_STEPS = "step-[0-9]*"


def _named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def save_checkpoint(
    out: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> Path:
    """Write ``out/checkpoints/step-…`` and drop the oldest but two; a full disk leaves the older ones whole."""
    home = out / "checkpoints"
    part = home / f".part-{step:08d}"
    for left in home.glob(".part-*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        weights: dict[str, torch.Tensor] = dict(model.named_parameters())  # tied tensors once
        write_tensors(part / "weights.safetensors", weights, {"kind": "training weights"})
        write_tensors(part / "optimizer.safetensors", _named_state(model, optimizer), {"kind": "optimizer state"})
        write_bytes(part / "progress.json", json.dumps({"step": step, **progress}).encode())
        sync_folder(part)
        target = home / f"step-{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        sync_folder(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in sorted(home.glob(_STEPS))[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def require_room(out: Path, model: nn.Module) -> None:
    """InputError, before anything is trained, where the disk cannot take the checkpoints: those that are kept, and
    one in the making (weights and Adam's two moments each)."""
    one = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    kept = len(list((out / "checkpoints").glob(_STEPS)))
    need, free = one * max(1, _KEEP + 1 - kept), shutil.disk_usage(out).free
    if need > free:
        raise InputError(
            f"the checkpoints need {human(need)} below {out}, where {human(free)} are free; "
            "make room or give another --out"
        )


def latest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint folder below ``out``, or None."""
    found = sorted((out / "checkpoints").glob(_STEPS))
    return found[-1] if found else None


def read_progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its training: ``recipe``, ``step``, ``seconds``, the loss ``rows``, ``evaluations``.

    Raises LoadError where it cannot be read.
    """
    return read_json(folder / "progress.json", ("recipe", "step", "seconds", "rows", "evaluations"))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Put a checkpoint into a model (and optimizer) in place and return its progress.

    Raises LoadError naming the tensor, where names or shapes differ, and the file, where one is damaged.
    """
    weights, _ = read_tensors(folder / "weights.safetensors", "training weights", LoadError)
    parameters = dict(model.named_parameters())
    _same_names(parameters.keys(), weights.keys(), folder / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise LoadError(
                    f"{folder / 'weights.safetensors'}: {name} is {tuple(weights[name].shape)}, "
                    f"the model has {tuple(parameter.shape)}"
                )
            parameter.copy_(weights[name])
    if optimizer is not None:
        _load_optimizer(folder / "optimizer.safetensors", parameters, optimizer)
    return read_progress(folder)


def _load_optimizer(path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    tensors, _ = read_tensors(path, "optimizer state", LoadError)
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(parameter, {})[key] = value
    _same_names(parameters.keys(), state.keys(), path)
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in parameters.items()}
    packed = optimizer.state_dict()
    # load_state_dict moves each tensor to its parameter's device and keeps ``step`` as the optimizer wants it
    # the fresh groups stay: their rates belong to the recipe, not to the checkpoint
    packed["state"] = {index: state[names[id(parameter)]] for index, parameter in enumerate(order)}
    optimizer.load_state_dict(packed)


def _same_names(wanted: Any, found: Any, path: Path) -> None:
    if set(wanted) != set(found):
        raise LoadError(
            f"{path} belongs to another model: missing {sorted(set(wanted) - set(found))[:3]}, "
            f"unexpected {sorted(set(found) - set(wanted))[:3]}"
        )

"""The recurrent state: what a Mamba model remembers of everything it has read, in fixed size."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambascope.errors import StateError
from mambascope.model.mixers.states import LayerState
from mambascope.storage import read_tensors, write_tensors

if TYPE_CHECKING:
    from mambascope.model.language_model import HookedMamba

__all__ = ["MambaState", "State"]


@dataclass
class MambaState(LayerState):
    """The state of one Mamba mixer.

    ``ssm`` is h ``B D N``, always float32 (float64 in a float64 model). ``conv`` holds the last K-1 inputs
    of the conv, oldest first, as ``B D K-1``: the one tensor that is not laid out ``B L D``.
    """

    noun = "Mamba"

    ssm: Tensor  # B D N
    conv: Tensor  # B D K-1

    def map(self, fn: Callable[[Tensor], Tensor]) -> "MambaState":
        return MambaState(fn(self.ssm), fn(self.conv))

    def tensors(self) -> dict[str, Tensor]:
        """By name, for files."""
        return {"ssm": self.ssm, "conv": self.conv}


@dataclass
class State:
    """One typed state per layer, the number of tokens read so far, and whose state it is.

    ``position`` is an int, or ``B`` integers where rows have read different numbers of tokens. Gradients
    flow into a state and out of the one that a forward pass returns.
    """

    layers: list[Any]  # a LayerState each: MambaState, AttentionState, …
    position: int | Tensor
    model_id: str

    @property
    def ssm(self) -> Tensor:
        """All recurrent states, ``n_layers B D N``; StateError where a layer is no Mamba."""
        return torch.stack([layer.ssm for layer in self._mamba("ssm")])

    @property
    def conv(self) -> Tensor:
        """All conv states, ``n_layers B D K-1``; StateError where a layer is no Mamba."""
        return torch.stack([layer.conv for layer in self._mamba("conv")])

    def _mamba(self, what: str) -> list[MambaState]:
        others = [f"layer {i} is {s.noun}" for i, s in enumerate(self.layers) if not isinstance(s, MambaState)]
        if others:
            raise StateError(
                f"state.{what} stacks the states of Mamba layers, and {', '.join(others)}; take state.layers[i], which "
                "has each layer's own kind of state"
            )
        return self.layers

    @property
    def batch_size(self) -> int:
        return next(iter(self.layers[0].tensors().values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all states: the same whatever was read where all layers are Mamba; key-value caches grow."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors().values())

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "State":
        position = fn(self.position) if isinstance(self.position, Tensor) else self.position
        return dataclasses.replace(self, layers=[layer.map(fn) for layer in self.layers], position=position)

    def clone(self) -> "State":
        return self._map(torch.clone)

    def __deepcopy__(self, memo: dict[int, Any]) -> "State":
        """A clone: torch copies no tensor that is part of a graph."""
        return self.clone()

    def detach(self) -> "State":
        return self._map(torch.detach)

    def to(self, device: torch.device | str) -> "State":
        return self._map(lambda t: t.to(device))

    def rows(self, index: slice | list[int] | Tensor) -> "State":
        """The states of some rows of the batch."""
        return self._map(lambda t: t[index])

    def save(self, path: str | Path, model: "HookedMamba") -> None:
        """Write as safetensors with the model's weight hash; an existing file stays whole if writing fails."""
        if self.model_id != model.model_id:
            raise StateError("this state belongs to another model than the one given to save()")
        if all(isinstance(layer, MambaState) for layer in self.layers):
            tensors = {"ssm": self.ssm, "conv": self.conv}
        else:
            tensors = {f"{i}.{n}": t for i, layer in enumerate(self.layers) for n, t in layer.tensors().items()}
        if isinstance(self.position, Tensor):
            tensors["position"] = self.position
        number = "" if isinstance(self.position, Tensor) else str(self.position)
        write_tensors(
            path,
            tensors,
            {"kind": "state", "model": model.cfg.name, "weights": model.weight_hash(), "position": number},
        )

    @classmethod
    def load(cls, path: str | Path, model: "HookedMamba") -> "State":
        """Read what :meth:`save` wrote; StateError if it was made with other weights."""
        tensors, meta = read_tensors(path, kind="state", error=StateError)
        if meta.get("weights") != model.weight_hash():
            raise StateError(
                f"{path} is a state of model {meta.get('model')!r} with other weights than {model.cfg.name!r}"
            )
        layers = _layers({name: t.to(model.device) for name, t in tensors.items()}, path, model)
        device = model.device
        position: int | Tensor = tensors["position"].to(device) if "position" in tensors else int(meta["position"])
        state = cls(layers, position, model.model_id)
        model.check_state(state, state.batch_size)
        return state


def _layers(tensors: dict[str, Tensor], path: str | Path, model: "HookedMamba") -> list[Any]:
    """The states of a file, by the kinds of the model's layers."""
    if not model.cfg.pattern:
        if not {"ssm", "conv"} <= tensors.keys():
            raise StateError(f"{path} lacks 'ssm' or 'conv'")
        return [MambaState(*pair) for pair in zip(tensors["ssm"], tensors["conv"], strict=True)]
    try:
        return [
            model.state_from_tensors(
                {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}, i
            )
            for i in range(model.cfg.n_layers)
        ]
    except KeyError as missing:
        raise StateError(f"{path} lacks {missing} of a layer") from None

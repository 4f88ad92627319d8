"""What every mixer is to its block, to the state and to the readouts, and how all of them multiply by a matrix."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mambascope import ops
from mambascope.config import MIXERS, MambaConfig
from mambascope.errors import StateError
from mambascope.hooks.run import PathTaken, Run
from mambascope.model.mixers.states import LayerState

__all__ = ["Mixer", "hooked", "project", "watched"]


class Mixer(nn.Module):
    """The base of mixers: ``(r, run, state) -> (out, state)``, with a hook point at every intermediate.

    A subclass names its ``letter`` in a layer pattern, its ``state_type``, and ``inner``: the hook point whose value
    ``out_proj``, its last matrix, reads (per-channel decompositions of the residual stream multiply the two). Its hook
    points are attributes named as in ``mambascope.hooks.points``.
    """

    letter: ClassVar[str]
    state_type: ClassVar[type[LayerState]]
    inner: ClassVar[str]
    in_proj: nn.Linear
    out_proj: nn.Linear

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.path = PathTaken("none", "none", "has not run yet")

    @property
    def noun(self) -> str:
        """What the layer is, in words."""
        return MIXERS[self.letter]

    @property
    def placed(self) -> Tensor:
        """A weight that tells the mixer's device and dtype."""
        return self.in_proj.weight

    def initial_state(self, batch: int) -> Any:
        """The state before the first token."""
        raise StateError(f"{self.noun} does not say what state it starts from")

    def forward(self, r: Tensor, run: Run, state: Any = None) -> tuple[Tensor, Any]:
        """Mix the normalised residual ``B L M``; the output ``B L M`` and the state after the last real token."""
        raise StateError(f"{self.noun} has no forward pass")

    def check_state(self, state: Any, like: Any, batch: int, where: str) -> None:
        """StateError unless ``state`` is one of this mixer's, shaped as ``like`` (of no rows) but for ``batch``."""
        if type(state) is not type(like):
            raise StateError(f"{where} is {self.noun}, its state must be {type(like).__name__}, got {type(state)}")
        for name, want in like.tensors().items():
            self.check_tensor(f"{where}: state.{name}", getattr(state, name), want, (batch, *want.shape[1:]))

    def check_tensor(self, name: str, got: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
        """StateError unless a tensor of a state has this shape, and the dtype and device of ``like``."""
        if tuple(got.shape) != shape:
            raise StateError(f"{name} has shape {tuple(got.shape)}, expected {shape}")
        if got.dtype != like.dtype or got.device != like.device:
            raise StateError(f"{name} is {got.dtype} on {got.device}, expected {like.dtype} on {like.device}")

    def core(self, batch: int, length: int, dtype: torch.dtype) -> Callable[[], None] | None:
        """What a training step costs here besides the linear layers, forward and backward on random values: a function
        to be timed, or None where that is little (see ``mambascope.training.floor``)."""
        return None


def project(x: Tensor, linear: nn.Module, backend: ops.Backend) -> Tensor:
    """x W^T + b for ``B L *`` with any row stride, as one matrix product over all B*L rows.

    A module that was exchanged (adapters do that) or that carries hooks of torch's own is called as it is.
    """
    if not isinstance(linear, nn.Linear) or type(linear) is not nn.Linear or watched(linear):
        return linear(x)
    return ops.linear(x, linear.weight, linear.bias, backend=backend)


def watched(module: nn.Module) -> bool:
    """Whether somebody hooked this module itself or replaced its forward."""
    return hooked(module) or "forward" in module.__dict__


def hooked(module: nn.Module) -> bool:
    """Whether the module carries hooks of torch's own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks)

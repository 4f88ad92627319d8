"""Whether a model's weights are still those that a recording was made with."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mambascope.hooks.model_protocol import Scope

__all__ = ["WeightsSeen"]

_SMALL = 1 << 17
"""Entries up to which a parameter's norm is looked at: A_log, norms, biases, the convolution, not the projections."""


class WeightsSeen:
    """Every block parameter's place and version, and the norms of the small ones.

    The version alone does not do: fused optimizers and edits through ``.data`` leave it as it was. Optimizers change
    the small parameters as well; an edit through ``.data`` of a projection alone is left to the comparison that a
    replay makes of its result.
    """

    def __init__(self, model: "Scope") -> None:
        self._blocks = [_look(block) for block in model.blocks]

    def changed(self, model: "Scope", layer: int) -> str | None:
        """The name of a parameter of block ``layer`` that is not what it was; None if all are."""
        places, norms = self._blocks[layer]
        places_now, norms_now = _look(model.blocks[layer])
        for name, place in places.items():
            if places_now.get(name) != place:
                return f"blocks.{layer}.{name}"
        for name, then in norms.items():
            now = norms_now[name]
            if not bool((now == then) | (now.isnan() & then.isnan())):
                return f"blocks.{layer}.{name}"
        return None


def _look(block: torch.nn.Module) -> tuple[dict[str, tuple[int, int]], dict[str, Tensor]]:
    named = {name: p.detach() for name, p in block.named_parameters()}
    places = {n: (p.data_ptr(), -1 if p.is_inference() else p._version) for n, p in named.items()}
    small = [n for n, p in named.items() if p.numel() <= _SMALL]
    return places, dict(zip(small, torch._foreach_norm([named[n] for n in small]), strict=True))

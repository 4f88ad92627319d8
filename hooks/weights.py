"""Whether a model's weights are still those that a recording was made with."""

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

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
    replay makes of its result. With ``now=False`` the look is taken later, by `look`.
    """

    def __init__(self, model: "Scope", now: bool = True) -> None:
        self.taken = False
        if now:
            self.look(model)

    def look(self, model: "Scope") -> None:
        """Note the weights as they are; nothing here waits for a GPU."""
        blocks = [_named(block) for block in model.blocks]
        self._places = [_places(named) for named in blocks]
        small = [_small(named) for named in blocks]
        self._small = [list(named) for named in small]
        norms = _norms([p for named in small for p in named.values()])
        self._norms = norms.split([len(names) for names in self._small])
        self.taken = True

    def changed(self, model: "Scope", layer: int) -> str | None:
        """The name of a parameter of block ``layer`` that is not what it was; None if all are."""
        return self.moved(model, layer) or self.edited(model, layer)()

    def moved(self, model: "Scope", layer: int) -> str | None:
        """What the host knows: the name of a parameter at another place or of another version."""
        places = _places(_named(model.blocks[layer]))
        found = next((name for name, place in self._places[layer].items() if places.get(name) != place), None)
        return None if found is None else f"blocks.{layer}.{found}"

    def edited(self, model: "Scope", layer: int) -> Callable[[], str | None]:
        """Which small parameter has another norm: a question for later, since its answer waits for a GPU to compare."""
        small = self._small[layer]
        differs = _bits(self._norms[layer]) != _bits(_norms(list(_small(_named(model.blocks[layer])).values())))
        any_differs = differs.any()

        def answer() -> str | None:
            return f"blocks.{layer}.{small[int(differs.nonzero()[0])]}" if bool(any_differs) else None

        return answer


def _bits(norms: Tensor) -> Tensor:
    """As integers: NaN is what it was, too."""
    return norms.view(torch.int64 if norms.dtype == torch.float64 else torch.int32)


def _places(named: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {n: (p.data_ptr(), -1 if p.is_inference() else p._version) for n, p in named.items()}


def _small(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: p for n, p in named.items() if p.numel() <= _SMALL}


def _norms(tensors: list[Tensor]) -> Tensor:
    """Their norms in one tensor; each comes out the same whatever stands beside it."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    found: list[Tensor] = [torch.empty(0)] * len(tensors)
    foreach: Any = torch
    with torch.no_grad():
        for dtype in {t.dtype for t in tensors}:
            at = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            for i, norm in zip(at, foreach._foreach_norm([tensors[i] for i in at], 2, wide), strict=True):
                found[i] = norm
        return torch.stack(found)


_known: WeakKeyDictionary[Any, tuple[list[Any], list[Any], list[tuple[str, Any]]]] = WeakKeyDictionary()


def _named(block: Any) -> dict[str, Tensor]:
    """A block's parameters by name. Where they hang is remembered, as long as its modules are the same."""
    found = _known.get(block)
    if found is None or list(chain.from_iterable(map(dict.values, found[0]))) != found[1]:
        modules = [(f"{name}." if name else "", m) for name, m in block.named_modules()]
        children = [m._modules for _, m in modules]
        owners = [(prefix, m._parameters) for prefix, m in modules if m._parameters]
        found = _known[block] = (children, list(chain.from_iterable(map(dict.values, children))), owners)
    return {prefix + n: p for prefix, owned in found[2] for n, p in owned.items() if p is not None}

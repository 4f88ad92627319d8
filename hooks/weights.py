"""Whether a model's weights are still those that a recording was made with."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from mambascope.hooks.model_protocol import Scope

__all__ = ["WeightsSeen", "small_norms"]

_SMALL = 1 << 17
"""Entries up to which a parameter's norm is looked at: A_log, norms, biases, the convolution, not the projections."""


class WeightsSeen:
    """Every block parameter's place and version, and the norms of the small ones.

    The version alone does not do: fused optimizers and edits through ``.data`` leave it as it was. Optimizers change
    the small parameters as well; an edit through ``.data`` of a projection alone is left to the comparison that a
    replay makes of its result. With ``now=False`` the look is taken later, by `look`.
    """

    def __init__(self, model: "Scope", now: bool = True) -> None:
        self.taken, self._good = False, None
        if now:
            self.look(model)

    def look(self, model: "Scope", norms: Tensor | None = None) -> None:
        """Note the weights as they are; nothing here waits for a GPU. ``norms``: what `small_norms` gives now."""
        self._blocks = [_Seen.of(block) for block in model.blocks]
        self._ends = _ends(model)
        norms = small_norms(model) if norms is None else norms
        self._norms = norms.split([len(seen.small) for seen in self._blocks])
        self.taken = True

    def changed_anywhere(self, model: "Scope") -> str | None:
        """`changed` of all blocks and of what stands before and after them, for frequent calls.

        Where nothing that torch counts has happened since a call that found nothing, only that is looked at.
        """
        glance = _glance(model)
        if glance == self._good:
            return None
        now = _ends(model)
        found = next((name for name, place in self._ends.items() if now[name] != place), None)
        found = found or next(filter(None, (self.changed(model, i) for i in range(len(self._blocks)))), None)
        self._good = glance if found is None else None
        return found

    def changed(self, model: "Scope", layer: int) -> str | None:
        """The name of a parameter of block ``layer`` that is not what it was; None if all are."""
        return self.moved(model, layer) or self.edited(model, layer)()

    def moved(self, model: "Scope", layer: int) -> str | None:
        """What the host knows: the name of a parameter at another place or of another version."""
        then, now = self._blocks[layer], _Seen.of(model.blocks[layer])
        if then == now:
            return None
        places = now.named(now.places)
        found = next((name for name, place in then.named(then.places).items() if places.get(name) != place), None)
        return None if found is None else f"blocks.{layer}.{found}"

    def edited(self, model: "Scope", layer: int) -> Callable[[], str | None]:
        """Which small parameter has another norm: a question for later, since its answer waits for a GPU to compare."""
        then, block = self._blocks[layer], model.blocks[layer]
        differs = _bits(self._norms[layer]) != _bits(_norms(_small(_parameters(_home(block)))))
        any_differs = differs.any()

        def answer() -> str | None:
            if not bool(any_differs):
                return None
            names = list(then.named(then.places))
            return f"blocks.{layer}.{names[then.small[int(differs.nonzero()[0])]]}"

        return answer


@dataclass(frozen=True)
class _Home:
    """Where parameters of a block or model hang: ``_parameters``, and the ``_modules`` that tell whether that holds."""

    children: list[dict[str, Any]]
    modules: list[Any]
    prefixes: list[str]
    owners: list[dict[str, Any]]


@dataclass(frozen=True)
class _Seen:
    """A block's parameters at a moment: names without prefixes, how many each owner has, places, and which are small.

    Plain lists that C loops fill and compare, since every recorded pass makes one of every block.
    """

    prefixes: list[str]
    names: list[str]
    counts: list[int]
    places: list[tuple[int, int]]
    small: list[int]

    @staticmethod
    def of(block: Any) -> "_Seen":
        home = _home(block)
        found = _parameters(home)
        places = [_place(p) for p in found]
        small = [i for i, p in enumerate(found) if p is not None and p.numel() <= _SMALL]
        return _Seen(home.prefixes, list(chain.from_iterable(home.owners)), list(map(len, home.owners)), places, small)

    def named(self, values: list[Any]) -> dict[str, Any]:
        """``values``, one for each parameter, by full name."""
        owners = chain.from_iterable(repeat(prefix, n) for prefix, n in zip(self.prefixes, self.counts, strict=True))
        return {prefix + name: v for prefix, name, v in zip(owners, self.names, values, strict=True)}


def _ends(model: "Scope") -> dict[str, tuple[int, int]]:
    """Places of the weights before and after the blocks that their activations depend on."""
    weights = {"embed.weight": model.embed.weight, "ln_final.weight": model.norm_weight(len(model.blocks))}
    return {name: _place(weight) for name, weight in weights.items()}


def _place(p: Tensor | None) -> tuple[int, int]:
    return (0, 0) if p is None else (p.data_ptr(), -1 if p.is_inference() else p._version)


def _glance(model: "Scope") -> tuple[Any, ...]:
    """Every parameter's place and version, and the steps that optimizers took: lists that C loops fill."""
    _count_steps()
    found = [p for p in _parameters(_home(model)) if p is not None]
    try:
        versions = list(map(_version, found))
    except RuntimeError:  # some are inference tensors, which have none
        versions = []
    return list(map(Tensor.data_ptr, found)), versions, _steps


_version = attrgetter("_version")
_steps = -1  # of all optimizers of this process, from when somebody asks; fused ones leave versions as they are


def _count_steps() -> None:
    global _steps
    if _steps < 0:
        _steps = 0
        register_optimizer_step_post_hook(_stepped)


def _stepped(*_: Any) -> None:
    global _steps
    _steps += 1


def _bits(norms: Tensor) -> Tensor:
    """As integers: NaN is what it was, too."""
    return norms.view(torch.int64 if norms.dtype == torch.float64 else torch.int32)


def small_norms(model: "Scope") -> Tensor:
    """The norms of all blocks' small parameters, in one tensor; on a GPU a few launches."""
    return _norms([p for block in model.blocks for p in _small(_parameters(_home(block)))])


def _parameters(home: _Home) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, home.owners)))


def _small(parameters: list[Any]) -> list[Tensor]:
    return [p for p in parameters if p is not None and p.numel() <= _SMALL]


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


_homes: WeakKeyDictionary[Any, _Home] = WeakKeyDictionary()


def _home(block: Any) -> _Home:
    """Of a block or a model; remembered for as long as its modules are the same."""
    found = _homes.get(block)
    if found is None or list(chain.from_iterable(map(dict.values, found.children))) != found.modules:
        named = [(f"{name}." if name else "", m) for name, m in block.named_modules()]
        children = [m._modules for _, m in named if m._modules or m._parameters]
        owners = [(prefix, m._parameters) for prefix, m in named if m._parameters]
        modules = list(chain.from_iterable(map(dict.values, children)))
        found = _homes[block] = _Home(children, modules, [p for p, _ in owners], [o for _, o in owners])
    return found

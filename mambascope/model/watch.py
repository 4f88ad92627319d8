"""Whether a model is just its weights: no hook, no exchanged module, no replaced ``forward`` anywhere in it.

Only then may its blocks run as something else than Python: a recorded graph, or fused kernels for one token. The look
is made before every such run, so it must be quick: lists that C loops compare, and torch's own count of hooks. Torch
numbers its hooks: where the numbers since the last look are all of hooks that the model itself placed, nobody else
placed one, and only those points need to be looked at.
"""

from collections.abc import Iterator
from itertools import chain, repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from mambascope.config import MIXERS, MambaConfig
from mambascope.hooks.points import tail_of
from mambascope.hooks.sites import SitePoint
from mambascope.hooks.state_point import StatePoint
from mambascope.model.block import Block
from mambascope.model.mixer import MambaMixer
from mambascope.model.norm import RMSNorm

if TYPE_CHECKING:
    from mambascope.model.language_model import HookedMamba

__all__ = ["ENTRY", "EXIT", "HOOKED", "INSIDE", "Watch", "why_in_turn"]

HOOKED = "a hook sits in the model"
"""The last thing that is looked for: where this is the answer, nothing else stands in the way."""

ENTRY, EXIT, INSIDE = 1, 2, 4
"""Where hooks sit in a block: at the residual stream before it, at the one after it, or anywhere else."""

_EDGES = {"hook_resid_pre": ENTRY, "hook_resid_post": EXIT}
_MOST_NOTED = 4096
_FORWARD = (itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks"))

_PLAIN = (Block, MambaMixer, RMSNorm, SitePoint, StatePoint, nn.Linear, nn.Conv1d, nn.Embedding, nn.ModuleList)
_SLOTS: dict[type, dict[str, type]] = {
    Block: {"norm": RMSNorm, "mixer": MambaMixer},
    MambaMixer: {
        "in_proj": nn.Linear,
        "conv1d": nn.Conv1d,
        "x_proj": nn.Linear,
        "dt_proj": nn.Linear,
        "out_proj": nn.Linear,
    },
}


class Watch:
    """Looks at one model; holds references to its modules' dictionaries, never copies of its weights."""

    def __init__(self) -> None:
        self._children: list[Any] = []  # the _modules of modules that have some
        self._modules: list[nn.Module] = []  # what these held when the model was last walked through
        self._spaces: list[dict[str, Any]] = []  # the modules' __dict__
        self._owners: list[Any] = []  # the _parameters of modules that own some
        self._constants: list[Any] = []  # modules with numbers of their own
        self._why = self.answer = "was not looked at yet"
        self._hooks_at = -1  # torch's count of hooks when there were none in the model
        self._noted: dict[int, SitePoint] = {}  # the points of hooks that came since, by torch's numbers
        self._blocks: list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = []  # as `_spaces_of` gives

    def note(self, point: SitePoint, number: int) -> None:
        """The model placed a hook at a point of its own, which torch gave this number."""
        if len(self._noted) >= _MOST_NOTED:  # no look came out clean for long: forget them, and look everywhere
            self._noted, self._hooks_at = {}, -1
        self._noted[number] = point

    def why_not(self, model: "HookedMamba") -> str:
        """What stands in the way of running the weights alone; empty if nothing does. ``answer`` keeps it."""
        self.answer = self._look(model)
        return self.answer

    def _look(self, model: "HookedMamba") -> str:
        if list(chain.from_iterable(map(dict.values, self._children))) != self._modules or not self._modules:
            self._walk(model)
        if self._why:
            return self._why
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "torch has a global hook on all modules"
        if any(map(dict.__contains__, self._spaces, repeat("forward"))):
            return "a module's forward was replaced"
        count = RemovableHandle.next_id
        if count != self._hooks_at:
            if any(map(_hooked, self._noted_spaces() if self._all_noted(count) else self._spaces)):
                return HOOKED
            self._hooks_at, self._noted = count, {}
        return ""

    def _all_noted(self, count: int) -> bool:
        """Whether every hook that torch numbered since the last clean look is one of those noted."""
        return self._hooks_at >= 0 and len(self._noted) == count - self._hooks_at

    def _noted_spaces(self) -> list[dict[str, Any]]:
        return [point.__dict__ for point in list(self._noted.values())]

    @property
    def hooks_placed(self) -> int:
        """Torch's count of hooks ever placed: as long as it stays, nobody added one."""
        return RemovableHandle.next_id

    def looks(self, model: "HookedMamba") -> list[int]:
        """Where in each block hooks see a forward pass: 0, or ENTRY, EXIT and INSIDE added up.

        Asked after `why_not` of the same pass answered ``HOOKED``.
        """
        if self._all_noted(self.hooks_placed):
            found = [0] * len(model.blocks)
            for point in list(self._noted.values()):
                layer, tail = tail_of(str(point.name))
                if layer is not None and (point._forward_hooks or point._forward_pre_hooks):
                    found[layer] |= _EDGES.get(tail, INSIDE)
            return found
        if not self._blocks:
            self._blocks = [_spaces_of(cast(Block, block)) for block in model.blocks]
        return [
            ENTRY * any(look(entry) for look in _FORWARD)
            + EXIT * any(look(leave) for look in _FORWARD)
            + INSIDE * any(chain.from_iterable(map(look, inside) for look in _FORWARD))
            for entry, leave, inside in self._blocks
        ]

    def _walk(self, model: "HookedMamba") -> None:
        self._why = "is being looked at"  # for other threads
        found = list(model.modules())
        self._children = [m._modules for m in found if m._modules]  # the others' forwards look for none
        self._modules = list(chain.from_iterable(map(dict.values, self._children)))
        self._blocks = []
        self._spaces = [m.__dict__ for m in found if m is not model]
        self._owners = [m._parameters for m in found if m._parameters]
        self._constants = [m for m in found if isinstance(m, RMSNorm)]
        self._hooks_at, self._noted = -1, {}
        self._why = next(_strange(model), "")

    def weights(self) -> list[Tensor]:
        """The model's parameters, as they are now."""
        return [p for p in chain.from_iterable(map(dict.values, self._owners)) if p is not None]

    def places(self) -> tuple[Any, ...]:
        """Where the weights lie and how, and the norms' eps: what a recorded kernel reads, whatever the values are."""
        weights = self.weights()
        return (*map(Tensor.data_ptr, weights), *map(Tensor.stride, weights), *[m.eps for m in self._constants])


def _spaces_of(block: Block) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The __dict__s of the points at a block's entry and exit, and of all its other modules."""
    edges = block.hook_resid_pre, block.hook_resid_post
    inside = [m.__dict__ for m in cast(nn.Module, block).modules() if m not in edges]
    return edges[0].__dict__, edges[1].__dict__, inside


def _hooked(space: dict[str, Any]) -> bool:
    forward = space["_forward_hooks"] or space["_forward_pre_hooks"]
    return bool(forward or space["_backward_hooks"] or space["_backward_pre_hooks"] or space.get("_on_gradient"))


def why_in_turn(cfg: MambaConfig) -> str:
    """Why the blocks of a model with other mixers run one by one: the first of those; empty if all are Mamba."""
    other = next((i for i, letter in enumerate(cfg.layers) if letter != "m"), None)
    return "" if other is None else f"blocks run one by one, since layer {other} is {MIXERS[cfg.layers[other]]}"


def _strange(model: "HookedMamba") -> Iterator[str]:
    if model.cfg.pattern:
        yield why_in_turn(model.cfg)
    for name, m in model.named_modules():
        if m is model:
            continue
        if type(m) not in _PLAIN:
            yield f"{name} is a {type(m).__name__}"
        for slot, kind in _SLOTS.get(type(m), {}).items():
            if type(getattr(m, slot)) is not kind:
                yield f"{name}.{slot} was exchanged"
    if type(model.unembed) is not nn.Linear or type(model.embed) is not nn.Embedding:
        yield "the embedding was exchanged"
    weights = list(model.parameters())
    if any(p.device != weights[0].device for p in weights):
        yield "the weights lie on several devices"
    if any(type(p) is not nn.Parameter or not p.dtype.is_floating_point for p in weights):
        yield "a weight is no plain parameter"
    if {p.dtype for p in weights} - {model.dtype, torch.float32}:
        yield "the weights have several dtypes"

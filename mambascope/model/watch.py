"""Whether a model is just its weights: no hook, no exchanged module, no replaced ``forward`` anywhere in it.

Only then may its blocks run as something else than Python: a recorded graph, or fused kernels for one token. The look
is made before every such run, so it must be quick: lists that C loops compare, and torch's own count of hooks. Torch
numbers its hooks: where the numbers since the last look are all of hooks that the model itself placed, nobody else
placed one, and only those points need to be looked at.
"""

from collections.abc import Iterator
from itertools import chain, compress, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from mambascope.config import MIXERS as NOUNS
from mambascope.config import MambaConfig
from mambascope.hooks.sites import SitePoint
from mambascope.hooks.state_point import StatePoint
from mambascope.model.block import Block
from mambascope.model.mixer import MambaMixer
from mambascope.model.mixers.registry import MIXERS
from mambascope.model.norm import RMSNorm

if TYPE_CHECKING:
    from mambascope.model.language_model import HookedMamba

__all__ = ["ENTRY", "EXIT", "HOOKED", "INSIDE", "STATE", "Watch", "why_in_turn"]

HOOKED = "a hook sits in the model"
"""The last thing that is looked for: where this is the answer, nothing else stands in the way."""

ENTRY, EXIT, INSIDE, STATE = 1, 2, 4, 8
"""Where hooks sit in a block: at the residual stream before it, the one after it, anywhere else, or at its states."""

_PLACES = {"hook_resid_pre": ENTRY, "hook_resid_post": EXIT, "mixer.hook_h": STATE}
_MOST_NOTED = 4096

_PLAIN = (
    Block,
    *MIXERS.values(),
    nn.LSTM,
    RMSNorm,
    SitePoint,
    StatePoint,
    nn.Linear,
    nn.Conv1d,
    nn.Embedding,
    nn.ModuleList,
)
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
        self._children: list[Any] = []  # the _modules of modules that have some, or weights
        self._modules: list[nn.Module] = []  # what these held when the model was last walked through
        self._spaces: list[dict[str, Any]] = []  # the modules' __dict__
        self._names: list[str] = []
        self._owners: list[Any] = []  # the _parameters of modules that own some
        self._constants: list[Any] = []  # modules with numbers of their own
        self._why = self.answer = "was not looked at yet"
        self._hooks_at = -1  # torch's count of hooks at the last look everywhere, and what was noted since added
        self._suspects: list[_Suspect] = []  # where there were hooks then
        self._noted: dict[int, SitePoint] = {}  # the points of hooks that came since, by torch's numbers

    def note(self, point: SitePoint, number: int) -> None:
        """The model placed a hook at a point of its own, which torch gave this number."""
        if len(self._noted) >= _MOST_NOTED:  # nobody looked for long: look everywhere next time
            self._noted, self._hooks_at = {}, -1
        self._noted[number] = point

    def why_not(self, model: "HookedMamba") -> str:
        """What stands in the way of running the weights alone; empty if nothing does. ``answer`` keeps it."""
        self.answer = why_in_turn(model.cfg) if model.cfg.pattern else self.look(model)
        return self.answer

    def presumed(self) -> bool:
        """Whether the last look found nothing and nobody placed a hook since. An exchanged module or ``forward`` is not
        seen: who presumes must ask `why_not` before the result is used."""
        return not self.answer and not self._noted and RemovableHandle.next_id == self._hooks_at

    def look(self, model: "HookedMamba") -> str:
        """What is not as the constructor made it; empty if nothing is, whatever kinds of layers there are."""
        if list(chain.from_iterable(map(dict.values, self._children))) != self._modules or not self._modules:
            self._walk(model)
        if self._why:
            return self._why
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "torch has a global hook on all modules"
        if any(map(dict.__contains__, self._spaces, repeat("forward"))):
            return "a module's forward was replaced"
        self._look_for_hooks()
        return HOOKED if self._suspects else ""

    def _look_for_hooks(self) -> None:
        """Find all hooks: everywhere, or where they were and where the model placed some, if nobody else did."""
        count, noted = RemovableHandle.next_id, self._noted
        if self._hooks_at < 0 or len(noted) != count - self._hooks_at:
            found = compress(zip(self._spaces, self._names, strict=True), map(_hooked, self._spaces))
            suspects = [_Suspect(space, *_place_of(name)) for space, name in found]
        else:
            suspects = [s for s in self._suspects if _hooked(s.space)]
            known = {id(s.space) for s in suspects}
            for point in list(noted.values()):
                if id(point.__dict__) not in known and _hooked(point.__dict__):
                    known.add(id(point.__dict__))
                    suspects.append(_Suspect(point.__dict__, *_place_of(str(point.name))))
        self._suspects, self._hooks_at, self._noted = suspects, count, {}

    @property
    def hooks_placed(self) -> int:
        """Torch's count of hooks ever placed: as long as it stays, nobody added one."""
        return RemovableHandle.next_id

    def looks(self, model: "HookedMamba") -> list[int]:
        """Where in each block hooks see a forward pass: 0, or ENTRY, EXIT, INSIDE and STATE added up.

        Asked after `why_not` of the same pass answered ``HOOKED``.
        """
        if self.hooks_placed != self._hooks_at:
            self._look_for_hooks()
        found = [0] * len(model.blocks)
        for s in self._suspects:
            if s.layer is not None and (s.space["_forward_hooks"] or s.space["_forward_pre_hooks"]):
                found[s.layer] |= s.where
        return found

    def _walk(self, model: "HookedMamba") -> None:
        self._why = "is being looked at"  # for other threads
        named = list(model.named_modules())
        found = [m for _, m in named]
        # A point has neither, and looks for none; a parametrised weight moves from a module into a child of it.
        self._children = [m._modules for m in found if m._modules or m._parameters]
        self._modules = list(chain.from_iterable(map(dict.values, self._children)))
        self._names = [name for name, m in named if m is not model]
        self._spaces = [m.__dict__ for m in found if m is not model]
        self._owners = [m._parameters for m in found if m._parameters]
        self._constants = [m for m in found if isinstance(m, RMSNorm)]
        self._hooks_at, self._noted, self._suspects = -1, {}, []
        self._why = next(_strange(model), "")

    def weights(self) -> list[Tensor]:
        """The model's parameters, as they are now."""
        return [p for p in chain.from_iterable(map(dict.values, self._owners)) if p is not None]

    def places(self) -> tuple[Any, ...]:
        """Where the weights lie and how, and the norms' eps: what a recorded kernel reads, whatever the values are."""
        weights = self.weights()
        return (*map(Tensor.data_ptr, weights), *map(Tensor.stride, weights), *[m.eps for m in self._constants])


class _Suspect(NamedTuple):
    """A module's __dict__ in which hooks were seen, its block (None: outside of them), and the place there."""

    space: dict[str, Any]
    layer: int | None
    where: int


def _place_of(name: str) -> tuple[int | None, int]:
    """From a module's name the block and the place there."""
    parts = name.split(".", 2)
    if parts[0] != "blocks" or len(parts) < 2:
        return None, INSIDE
    return int(parts[1]), _PLACES.get(parts[-1], INSIDE) if len(parts) == 3 else INSIDE


def _hooked(space: dict[str, Any]) -> bool:
    forward = space["_forward_hooks"] or space["_forward_pre_hooks"]
    return bool(forward or space["_backward_hooks"] or space["_backward_pre_hooks"] or space.get("_on_gradient"))


def why_in_turn(cfg: MambaConfig) -> str:
    """Why a pass of a model with other mixers is not recorded: the first of those; empty if all are Mamba."""
    other = next((i for i, letter in enumerate(cfg.layers) if letter != "m"), None)
    return "" if other is None else f"no recordings, since layer {other} is {NOUNS[cfg.layers[other]]}"


def _strange(model: "HookedMamba") -> Iterator[str]:
    for name, m in model.named_modules():
        if m is model:
            continue
        if type(m) not in _PLAIN:
            yield f"{name} is a {type(m).__name__}"
        for slot, kind in _SLOTS.get(type(m), {}).items():
            if slot == "mixer":
                kind = MIXERS[model.cfg.layers[int(name.split(".")[1])]]
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

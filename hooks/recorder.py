"""What a forward pass leaves behind for the cache: little stored, everything readable."""

import math
from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mambascope.errors import CacheError, HookError
from mambascope.hooks.points import LAZY, resolve_name, size_of, spec_of, tail_of
from mambascope.hooks.run import Anchors
from mambascope.hooks.sites import Padding, SitePoint
from mambascope.hooks.weights import WeightsSeen
from mambascope.memory import require_bytes

if TYPE_CHECKING:
    from mambascope.hooks.model_protocol import Scope

__all__ = ["BOUNDARY", "BlockRecord", "CacheRecorder", "Recording", "compact", "joined", "select_names"]

BOUNDARY = 64
"""Tokens between two stored states: 1.5 KB a token and layer at 130m size."""

_INPUTS_OF_H = ("mixer.hook_delta", "mixer.hook_B", "mixer.hook_u_write")


def select_names(names_filter: Any, names: list[str]) -> list[str]:
    """The hook points that a ``names_filter`` means: None (all), a name, a list of names, or a function.

    Short forms are understood. A name that is unknown, or a filter that matches nothing, is an error.
    """
    if names_filter is None:
        return list(names)
    if isinstance(names_filter, str):
        return [resolve_name(names_filter, names)]
    if callable(names_filter):
        found = [name for name in names if names_filter(name)]
    elif isinstance(names_filter, (list, tuple, set)):
        wanted = {resolve_name(name, names) for name in names_filter}
        found = [name for name in names if name in wanted]
    else:
        raise HookError(
            f"names_filter must be a name, a list of names or a function, got {type(names_filter).__name__}"
        )
    if not found:
        raise HookError("names_filter matches no hook point; mambascope.HOOK_POINTS lists them")
    return found


@dataclass
class BlockRecord:
    """One block's part of a recording.

    ``x`` is the residual entering the block and ``state`` the mixer's state then: enough to run the block
    again. ``edited`` blocks had hooks on them; they keep no ``x``, are never run again, and ``stored`` holds all that
    was asked.
    """

    layer: int
    x: Tensor | None = None
    state: Any = None
    edited: bool = False
    stored: dict[str, Tensor] = field(default_factory=dict)
    exposed: dict[str, Tensor] = field(default_factory=dict)
    anchors: Anchors | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "BlockRecord":
        """The same record with every tensor replaced (moved, or some rows of the batch taken)."""
        return replace(
            self,
            x=None if self.x is None else fn(self.x),
            state=None if self.state is None else self.state.map(fn),
            stored={name: fn(value) for name, value in self.stored.items()},
            exposed={name: fn(value) for name, value in self.exposed.items()},
            anchors=None if self.anchors is None else self.anchors.map(fn),
        )


@dataclass
class Recording:
    """All that one forward pass left behind."""

    names: list[str]
    backend: str
    tokens: Tensor | None
    padding: Padding | None
    bos: bool | None
    shape: tuple[int, int]
    top: dict[str, Tensor]
    blocks: dict[int, BlockRecord]
    gradients: dict[str, Tensor]
    weights: WeightsSeen
    autocast: torch.dtype | None = None  # what torch.autocast computed in, None if it was off

    def forget_states(self) -> None:
        """Drop what the mixers had read before: for a piece that will be joined to the one before it."""
        for block in self.blocks.values():
            block.state = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Recording":
        """The same recording with every tensor replaced."""
        batch = self.shape[0]

        def each(value: Tensor) -> Tensor:
            nonlocal batch
            out = fn(value)
            batch = out.shape[0]
            return out

        padding = self.padding
        if padding is not None:
            padding = Padding(each(padding.mask), each(padding.left), each(padding.lengths))
        tokens = None if self.tokens is None else each(self.tokens)
        top = {name: each(value) for name, value in self.top.items()}
        blocks = {i: block.map(each) for i, block in self.blocks.items()}
        gradients = {name: each(value) for name, value in self.gradients.items()}
        return replace(
            self,
            tokens=tokens,
            padding=padding,
            top=top,
            blocks=blocks,
            gradients=gradients,
            shape=(batch, self.shape[1]),
        )


def compact(value: Tensor) -> Tensor:
    """The tensor, or a copy where it is a view that would keep a larger one alive."""
    return value.clone() if value.untyped_storage().nbytes() > value.numel() * value.element_size() else value


def _own(tokens: Tensor | None) -> Tensor | None:
    """A copy: the caller may write into theirs afterwards."""
    return None if tokens is None else tokens.clone()


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _hooked(block: Any) -> bool:
    """Whether any hook, ours or on a module, may make this block differ from what its weights say."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or (isinstance(m, SitePoint) and m.live) for m in block.modules()
    )


def joined(pieces: list[Recording]) -> Recording:
    """Recordings of consecutive pieces of a text as one, along the position axis."""
    first = pieces[0]
    others = [set(piece.names) for piece in pieces[1:]]
    names = [n for n in first.names if all(n in other for other in others)]
    tokens = None if first.tokens is None else torch.cat([cast(Tensor, piece.tokens) for piece in pieces], 1)
    length = sum(piece.shape[1] for piece in pieces)
    top = {n: torch.cat([piece.top[n] for piece in pieces], 1) for n in first.top if n in names}
    blocks = {i: _joined_block([piece.blocks[i] for piece in pieces], pieces) for i in first.blocks}
    return replace(first, names=names, tokens=tokens, top=top, blocks=blocks, shape=(first.shape[0], length))


def _joined_block(records: list[BlockRecord], pieces: list[Recording]) -> BlockRecord:
    first = records[0]

    def cat(values: list[Any]) -> Any:
        return None if any(v is None for v in values) else torch.cat(values, 1)

    def cat_all(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        shared = [n for n in parts[0] if all(n in part for part in parts)]
        return {n: _joined_values(n, [part[n] for part in parts]) for n in shared}

    anchors = None
    if all(record.anchors is not None for record in records):
        columns, states, offset = [-1], [cast(Anchors, first.anchors).states[:, :1]], 0
        for record, piece in zip(records, pieces, strict=True):
            mine = cast(Anchors, record.anchors)
            columns += [c + offset for c in mine.columns[1:]]
            states.append(mine.states[:, 1:])
            offset += piece.shape[1]
        anchors = Anchors(columns, torch.cat(states, 1), cast(Anchors, first.anchors).aligned)
    return replace(
        first,
        x=cat([record.x for record in records]),
        stored=cat_all([record.stored for record in records]),
        exposed=cat_all([record.exposed for record in records]),
        anchors=anchors,
    )


def _joined_values(name: str, parts: list[Tensor]) -> Tensor:
    """Values of consecutive pieces along their positions. Where each piece has the keys that it could see as its last
    axis, the others' columns are what a softmax over them would give: nothing."""
    spec = spec_of(name)
    if "S" not in spec.shape.split():
        return torch.cat(parts, spec.axis)
    read = [0, *accumulate(part.shape[2] for part in parts)]
    begins = [end - part.shape[3] for end, part in zip(read[1:], parts, strict=True)]  # of its first key; < 0: before
    first, blank = min(begins), -math.inf if name.endswith("hook_attn_scores") else 0.0
    padded = [
        torch.nn.functional.pad(part, (begin - first, read[-1] - end), value=blank)
        for part, begin, end in zip(parts, begins, read[1:], strict=True)
    ]
    return torch.cat(padded, 2)


@dataclass(frozen=True)
class Asked:
    """What names mean to a recorder: ``lazy_layers`` keep their input and states, ``stored`` are kept as they pass."""

    lazy_layers: frozenset[int]
    stored: frozenset[str]

    @staticmethod
    @lru_cache(64)
    def of(names: tuple[str, ...], n_layers: int, everything: bool, eager: bool) -> "Asked":
        """The same for every pass of a model: 28 names a block are many to go through each time."""
        tails = [(name, *tail_of(name)) for name in names]
        lazy = frozenset(layer for _, layer, tail in tails if tail in LAZY and layer is not None)
        if everything and not eager:
            end = f"blocks.{n_layers - 1}.hook_resid_post"
            stored = {name for name, layer, _ in tails if layer is None or name == end}
        else:
            stored = {name for name, _, tail in tails if tail not in LAZY}
        return Asked(lazy, frozenset(stored))


class CacheRecorder:
    """Watches one forward pass and keeps what the cache will need (see mambascope.hooks.run.Recorder)."""

    early: frozenset[str] = frozenset()

    def __init__(
        self, model: "Scope", names: list[str], *, everything: bool, eager: bool, spelled_out: bool = False
    ) -> None:
        self._model = model
        self._names = names
        self._everything = everything
        self._explicit = not everything
        self._spelled_out = spelled_out  # every name was given by hand, so each must be reached
        asked = Asked.of(tuple(names), model.cfg.n_layers, everything, eager)
        self._lazy_layers, self._wanted = asked.lazy_layers, asked.stored
        self._only_inputs = everything and not eager
        self.boundaries: int | None = BOUNDARY if self._lazy_layers else None
        self._recording: Recording | None = None
        self._norms: Tensor | None = None  # of the weights, if the pass knew them

    def gradient_names(self) -> list[str]:
        """The names whose gradients ``incl_bwd`` keeps: all but the lazy ones and those met step by step."""
        kept = [n for n in self._names if tail_of(n)[1] not in LAZY and not spec_of(n).stepwise]
        left = next((n for n in self._names if spec_of(n).stepwise and tail_of(n)[1] not in LAZY), None)
        if self._spelled_out and self._explicit and left is not None:
            raise HookError(
                f"{left}: its gradient comes step by step and is not kept by incl_bwd; read it with "
                f"bwd_hooks=[({left!r}, fn)]"
            )
        return kept

    # ---- called by the forward pass

    def begin(
        self,
        tokens: Tensor | None,
        padding: Padding | None,
        bos: bool | None,
        backend: str,
        shape: tuple[int, int],
        plain: bool = False,
    ) -> None:
        # Without hooks nobody changes a weight or a token on the way: that can wait until the GPU has its work.
        self._norms = None
        seen, autocast = WeightsSeen(self._model, now=not plain), _autocast(self._model.device)
        kept = tokens if plain else _own(tokens)
        self._recording = Recording([], backend, kept, padding, bos, shape, {}, {}, {}, seen, autocast)
        if not plain:
            self.check_room()

    def check_room(self) -> None:
        """CacheError if the activations that were asked for, and the inputs and states of blocks, cannot fit."""
        self._check_size(self._wanted, self._model.cfg.n_layers if self._everything else len(self._lazy_layers))

    def _check_size(self, names: Set[str], layers: int = 0) -> None:
        """CacheError if ``names``, and the input and states of so many layers, cannot fit."""
        cfg, (batch, length) = self._model.cfg, self.recording.shape
        values = sum(size_of(name, cfg, batch, length) for name in names)
        if layers:
            states = 2 + length // BOUNDARY if self._lazy_layers else 0
            values += batch * layers * (length * cfg.d_model + states * cfg.d_inner * cfg.d_state)
        need = 4 * values
        way_out = "name fewer activations in names_filter, or take a shorter text"
        what = f"storing {len(names)} activations" + (f" and the inputs of {layers} blocks" if layers else "")
        require_bytes(need, self._model.device, what, way_out, CacheError)

    def only_inputs(self) -> bool:
        return self._only_inputs

    def begin_block(self, layer: int, resid: Tensor, state: Any, plain: bool = False) -> None:
        edited = not plain and _hooked(self._model.blocks[layer])
        record = BlockRecord(layer, edited=edited)
        self.recording.blocks[layer] = record
        if edited:
            here = {n for n in self._names if tail_of(n)[0] == layer and tail_of(n)[1] not in LAZY}
            if layer in self._lazy_layers:  # h is recomputed from these, not from the block's input
                here |= {f"blocks.{layer}.{tail}" for tail in _INPUTS_OF_H}
            self._check_size(here)
            self._wanted |= here
        if self._everything or layer in self._lazy_layers:
            record.x = None if edited else resid.detach()
            record.state = None if state is None else state.map(torch.detach)

    def wants(self, name: str) -> bool:
        return name in self._wanted

    def take(self, name: str, value: Tensor) -> None:
        if name not in self._wanted:
            return
        layer, _ = tail_of(name)
        place = self.recording.top if layer is None else self.recording.blocks[layer].stored
        place[name] = compact(value.detach())

    def take_anchors(self, name: str, anchors: Anchors) -> None:
        layer, tail = tail_of(name)
        if layer not in self._lazy_layers or layer is None:
            return
        record = self.recording.blocks[layer]
        kept = anchors.map(torch.detach)
        if tail == "mixer.hook_h":
            record.anchors = kept
        else:
            record.exposed[name] = kept.states

    def take_norms(self, norms: Tensor) -> None:
        self._norms = norms

    def take_gradient(self, grad: Tensor, hook: Any) -> None:
        self.recording.gradients[f"{hook.name}_grad"] = grad.detach()

    # ---- afterwards

    @property
    def recording(self) -> Recording:
        if self._recording is None:
            raise CacheError("no forward pass was recorded")
        return self._recording

    def finish(self) -> Recording:
        """The recording; CacheError if a name asked for by name was never reached."""
        recording = self.recording
        if not recording.weights.taken:
            recording.tokens = _own(recording.tokens)
            recording.weights.look(self._model, self._norms)
        reached = list(self._names) if self._complete() else [n for n in self._names if self._reached(n)]
        missing = [] if len(reached) == len(self._names) else [n for n in self._names if n not in set(reached)]
        if missing and self._explicit and (self._spelled_out or not reached):
            raise CacheError(f"{missing[0]} was not reached: the run left it out (start_at_layer, stop_at_layer)")
        recording.names = reached
        return recording

    def _complete(self) -> bool:
        """Whether every block's input was kept, so that everything can be read (and names need no look each)."""
        if not self._everything or len(self.recording.blocks) < self._model.cfg.n_layers:
            return False
        tops = [n for n in self._wanted if tail_of(n)[0] is None]
        return all(n in self.recording.top for n in tops) and all(
            record.x is not None for record in self.recording.blocks.values()
        )

    def _reached(self, name: str) -> bool:
        layer, tail = tail_of(name)
        if layer is None:
            return name in self.recording.top
        if layer not in self.recording.blocks:
            return False
        record = self.recording.blocks[layer]
        return tail in LAZY or record.x is not None or name in record.stored

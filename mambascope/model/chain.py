"""A model's blocks as recordings that can be put together: each by itself, and what comes often as one.

A chain's recordings read and write memory of the chain's own, so a pass owns it while it uses it (``busy``).
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mambascope.hooks.run import Run
from mambascope.hooks.sites import Clock
from mambascope.model import recording
from mambascope.model.straight import ScanArguments, add_and_norm, decays, from_scan, through, to_scan

if TYPE_CHECKING:
    from mambascope.model.block import Block
    from mambascope.model.language_model import HookedMamba

__all__ = ["Chain", "Cut"]

_MOST_PARTS, _OFTEN = 48, 3  # stretches recorded as one, of a chain, and how often one must have come for it


class Seam(NamedTuple):
    """What enters a block: the residual entering the block before it, and what that one adds; ``B L M`` each."""

    resid: Tensor
    out: Tensor


class Front(NamedTuple):
    """Blocks up to the scan of the last: the residual entering that block, and what its scan reads."""

    resid: Tensor
    scan: ScanArguments
    h0: Tensor


class Cut(NamedTuple):
    """Blocks [first, last), of which ``layer`` has hooks at its states, and the others none."""

    first: int
    layer: int
    last: int


class Whole(NamedTuple):
    """A stretch recorded as one, and the residual stream after it, in the recording's memory."""

    graph: recording.Recorded
    leaving: Tensor


class Halves(NamedTuple):
    """A cut recorded: up to the open scan, and from what that gave on."""

    front: recording.Recorded
    to_scan: Front
    back: recording.Recorded
    leaving: Tensor


@dataclass
class Part:
    """A stretch or a cut of a chain: how often it came, and its recording once that was often."""

    came: int = 0
    taped: Whole | Halves | None = None


@dataclass
class Chain:
    """Every block's recording, for one shape, and stretches of them. The lock of ``Graphs`` guards all replays."""

    seams: list[Seam]
    graphs: list[recording.Recorded]
    rates: recording.Recorded  # of every block's A
    decays: list[Tensor]  # what that writes, D N each
    resid: Tensor  # B L M: what enters a stretch that is recorded as one
    gated: Tensor  # B L D: what enters a block's out_proj, where a stretch begins there
    fronts: Any = None  # the pool of what a pass may leave lying while other recordings are replayed
    parts: OrderedDict[tuple[int, int] | Cut, Part] = field(default_factory=OrderedDict)
    busy: bool = False

    @classmethod
    def record(cls, model: "HookedMamba", shape: tuple[int, int], backend: Any, pool: Any) -> "tuple[Chain, int]":
        """Record every block by itself; also the bytes by which the pool grew."""
        run, count = _run(backend), len(model.blocks)
        width, first = model.cfg.d_model, cast("Block", model.blocks[0])
        mixers = [cast("Block", block).mixer for block in model.blocks]
        graph, rates, held = recording.record(lambda: decays(mixers), model.device, pool)
        zeros = {"device": model.device, "dtype": model.dtype}
        resid = torch.zeros(*shape, width, device=model.device, dtype=first.residual_dtype)
        gated = torch.zeros(*shape, model.cfg.d_inner, **zeros)
        made = cls([Seam(resid, torch.zeros(*shape, width, **zeros))], [], graph, rates, resid.clone(), gated)
        held += 3 * resid.numel() * resid.element_size() + gated.numel() * gated.element_size()
        for i in range(count):
            seam = made.seams[i]

            def block(i: int = i, seam: Seam = seam) -> tuple[Tensor, Tensor]:
                layers, join = [None] * count, _joining(seam.out, backend)
                resid, out = through(model, seam.resid, layers, run, i, i + 1, join, rates=rates[i : i + 1])
                return resid, cast(Tensor, out)

            block()  # compiles what is not compiled yet, which a recording cannot
            graph, (resid, out), grown = recording.record(block, model.device, pool)
            made.graphs.append(graph)
            made.seams.append(Seam(resid, out))
            held += grown
        return made, held

    def play(self, resid: Tensor, first: int, last: int) -> Tensor:
        """The residual stream after blocks [first, last), in memory of its own."""
        part = self.parts.get((first, last))
        if part is not None and isinstance(part.taped, Whole):
            self.resid.copy_(resid)
            part.taped.graph.replay()
            return part.taped.leaving.clone()
        self.seams[first].resid.copy_(resid)
        self.seams[first].out.zero_()
        self.rates.replay()
        for graph in self.graphs[first:last]:
            graph.replay()
        seam = self.seams[last]
        return seam.resid + seam.out

    def play_front(self, resid: Tensor, cut: Cut) -> Front:
        """A cut up to its open scan, in memory of the chain's that no other recording touches."""
        taped = cast(Halves, self.parts[cut].taped)
        self.resid.copy_(resid)
        taped.front.replay()
        return taped.to_scan

    def play_back(self, gated: Tensor, cut: Cut) -> Tensor:
        """The residual stream after a cut from what its open scan gave, in memory of its own."""
        taped = cast(Halves, self.parts[cut].taped)
        self.resid.copy_(taped.to_scan.resid)
        self.gated.copy_(gated)
        taped.back.replay()
        return taped.leaving.clone()

    def ready(self, model: "HookedMamba", key: "tuple[int, int] | Cut", backend: Any) -> bool:
        """Whether a stretch or a cut is recorded, as is done when it comes for the third time (with the lock held)."""
        part = self.parts.setdefault(key, Part())
        self.parts.move_to_end(key)
        if len(self.parts) > _MOST_PARTS:
            self.parts.popitem(last=False)
        part.came += 1
        if part.came == _OFTEN and model.graphs.room(model.device):
            work = (model, self, backend)
            make = partial(_halves, *work, key) if isinstance(key, Cut) else partial(_whole, *work, key)
            try:
                with torch.inference_mode(False), torch.no_grad():
                    part.taped = model.graphs.hold(model.device, make)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                recording.notice(f"a stretch of {key[-1] - key[0]} blocks", error)
        return part.taped is not None


def _run(backend: Any) -> Run:
    return Run(backend, "recorded", Clock(), False, quiet=True)


def _joining(begin: Tensor, backend: Any) -> Any:
    """How blocks are joined where ``begin`` is what the block before the first of them wrote."""

    def join(_: int, out: Tensor | None, resid: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        return add_and_norm(begin if out is None else out, resid, norm, backend)

    return join


def _whole(model: "HookedMamba", chain: Chain, backend: Any, span: tuple[int, int], pool: Any) -> tuple[Whole, int]:
    def stretch() -> Tensor:
        resid, out = through(model, chain.resid, [None] * len(model.blocks), _run(backend), *span)
        return resid + cast(Tensor, out)

    graph, leaving, held = recording.record(stretch, model.device, pool)
    return Whole(graph, leaving), held


def _halves(model: "HookedMamba", chain: Chain, backend: Any, cut: Cut, pool: Any) -> tuple[Halves, int]:
    layers, block = [None] * len(model.blocks), cast("Block", model.blocks[cut.layer])

    def front() -> Front:
        resid, out = through(model, chain.resid, list(layers), _run(backend), cut.first, cut.layer)
        resid, normed = add_and_norm(out, resid, block.norm, backend)
        scan = to_scan(block.mixer, normed, None, decays([block.mixer])[0], backend)
        return Front(resid, scan, block.mixer.initial_state(len(resid)).ssm)

    def back() -> Tensor:
        resid, out = chain.resid, from_scan(block.mixer, chain.gated, backend)
        if cut.layer + 1 < cut.last:
            join = _joining(out, backend)
            resid, out = through(model, resid, list(layers), _run(backend), cut.layer + 1, cut.last, join)
        return resid + cast(Tensor, out)

    if chain.fronts is None:
        chain.fronts = recording.new_pool(model.device)
    first, to_the_scan, held = recording.record(front, model.device, chain.fronts)
    second, leaving, more = recording.record(back, model.device, pool)
    return Halves(first, to_the_scan, second, leaving), held + more

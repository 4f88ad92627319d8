"""Passes with hooks in some blocks only: the blocks between them run straight, and on a GPU from recordings.

One hooked block must not cost the others their speed. A chain is a recording of every block by itself, each reading
what the one before it wrote, so that any stretch of them can be replayed, whichever blocks the hooks sit in: one set
of recordings for a sweep over all layers. A stretch that comes often gets a recording of its own, since a GPU rests for
some microseconds between two. Hooks at the residual stream between blocks end a stretch and need no open block. The
same kernels on the same values, so the same bits.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mambascope.hooks.run import PathTaken, Run
from mambascope.hooks.sites import Clock
from mambascope.model import recording
from mambascope.model.straight import add_and_norm, decays, through, took
from mambascope.model.watch import ENTRY, EXIT, HOOKED, INSIDE
from mambascope.ops.ready import unwatched

if TYPE_CHECKING:
    from mambascope.model.block import Block
    from mambascope.model.language_model import HookedMamba

__all__ = ["Chain", "Stretches"]

_MOST_TOKENS = 4096  # of one chain: beyond, launches are hidden, and what stands between blocks takes much memory
_MOST_CHAINS = 4
_MOST_WHOLE, _OFTEN = 48, 3  # stretches recorded as one, of a chain, and how often one must have come for it


@dataclass
class Seam:
    """What enters a block: the residual entering the block before it, and what that one adds; ``B L M`` each."""

    resid: Tensor
    out: Tensor


@dataclass
class Chain:
    """Every block's recording, for one shape. ``busy`` while a pass uses its memory."""

    seams: list[Seam]
    graphs: list[recording.Recorded]
    rates: recording.Recorded  # of every block's A
    decays: list[Tensor]  # what that writes, D N each
    entry: Tensor  # B L M: the residual stream entering a stretch that is recorded as one
    whole: OrderedDict[tuple[int, int], "Whole"] = field(default_factory=OrderedDict)
    busy: bool = False

    def play(self, resid: Tensor, first: int, last: int) -> Tensor:
        """The residual stream after blocks [first, last), in memory of its own."""
        whole = self.whole.get((first, last))
        if whole is not None and whole.graph is not None and whole.leaving is not None:
            self.entry.copy_(resid)
            whole.graph.replay()
            return whole.leaving.clone()
        self.seams[first].resid.copy_(resid)
        self.seams[first].out.zero_()
        self.rates.replay()
        for graph in self.graphs[first:last]:
            graph.replay()
        seam = self.seams[last]
        return seam.resid + seam.out

    def comes(self, first: int, last: int) -> bool:
        """Note that a stretch comes; whether it has come so often that it should be recorded as one."""
        if last - first < 2:
            return False
        whole = self.whole.setdefault((first, last), Whole())
        self.whole.move_to_end((first, last))
        if len(self.whole) > _MOST_WHOLE:
            self.whole.popitem(last=False)
        whole.came += 1
        return whole.came == _OFTEN


@dataclass
class Whole:
    """A stretch of a chain: how often it came, and its own recording once that was often."""

    came: int = 0
    graph: recording.Recorded | None = None
    leaving: Tensor | None = None  # the residual stream after it, in the recording's memory


class Stretches:
    """One model's chains, and the look for blocks without hooks. The lock of ``Graphs`` guards them."""

    def __init__(self) -> None:
        self._chains: dict[Any, Chain | str] = {}  # or why there is none; "" after the first time

    def clear(self) -> None:
        self._chains.clear()

    def looks(self, model: "HookedMamba", run: Run) -> list[int] | None:
        """Where hooks sit in each block (see `Watch.looks`); None if the pass must run block by block as a whole."""
        if run.needs_grad or run.padding is not None or run.recorder is not None or model.cfg.activation != "silu":
            return None
        if not unwatched() or model.graphs.watch.answer != HOOKED:  # the look of this very pass: it was not quiet
            return None
        return model.graphs.watch.looks(model)

    def run(
        self, model: "HookedMamba", resid: Tensor, layers: list[Any], run: Run, span: tuple[int, int], carry: bool
    ) -> Tensor:
        """The residual stream after blocks ``span``; ``layers`` gets the states, all of them with ``carry``."""
        looks, (first, last), watch = self.looks(model, run), span, model.graphs.watch
        if looks is None or all(look & INSIDE for look in looks[first:last]):
            for i in range(first, last):
                resid, layers[i] = model.run_block(i, resid, run, layers[i])
            return resid
        chain, placed = (
            None if carry or layers[first] is not None else self._claim(model, resid, run),
            watch.hooks_placed,
        )
        i, entered = first, -1  # the block whose entry's hooks have been called
        try:
            while i < last:
                if watch.hooks_placed != placed:  # a hook placed another one, maybe in a block that is still to come
                    looks, placed = watch.looks(model), watch.hooks_placed
                block = cast("Block", model.blocks[i])
                if looks[i] & INSIDE:
                    go_on = block.inside if entered == i else partial(model.run_block, i)
                    resid, layers[i] = go_on(resid, run, layers[i])
                    i += 1
                elif looks[i] & ENTRY and entered != i:
                    resid, entered = run.emit(block.hook_resid_pre, resid.to(block.residual_dtype), fork=True), i
                else:
                    stop = _end(looks, i, last)
                    resid = self._between(model, chain, resid, layers, run, i, stop)
                    if looks[stop - 1] & EXIT:
                        resid = run.emit(cast("Block", model.blocks[stop - 1]).hook_resid_post, resid)
                    i = stop
        finally:
            if chain is not None:
                chain.busy = False
        return resid

    def _between(
        self,
        model: "HookedMamba",
        chain: Chain | None,
        resid: Tensor,
        layers: list[Any],
        run: Run,
        first: int,
        last: int,
    ) -> Tensor:
        """Blocks [first, last), where nobody looks."""
        if chain is not None:
            return self._replay(model, chain, resid, run, first, last)
        resid, out = through(model, resid, layers, run, first, last)
        return resid if out is None else resid + out

    def _replay(self, model: "HookedMamba", chain: Chain, resid: Tensor, run: Run, first: int, last: int) -> Tensor:
        graphs, path = model.graphs, PathTaken(run.backend, "graph", run.why)
        with graphs.replaying(resid.device):
            if chain.comes(first, last) and graphs.room(resid.device):
                _record_whole(model, chain, run.backend, first, last)
            out = chain.play(resid, first, last)
        took(list(model.blocks)[first:last], path)
        return out

    def _claim(self, model: "HookedMamba", resid: Tensor, run: Run) -> Chain | None:
        """A chain for this shape that nobody else is using; made when the shape comes for the second time."""
        shape = (resid.shape[0], resid.shape[1])
        if shape[0] * shape[1] > _MOST_TOKENS:
            return None
        with model.graphs.entered(model, run) as key:
            if key is None:
                return None
            key = (shape, *key)
            found = self._chains.get(key)
            if found is None:
                self._chains[key] = ""
                return None
            if found == "":
                found = self._make(model, key, shape, run)
            if isinstance(found, str) or found.busy:
                return None
            found.busy = True
            return found

    def _make(self, model: "HookedMamba", key: Any, shape: tuple[int, int], run: Run) -> Chain | str:
        kept = [k for k, v in self._chains.items() if isinstance(v, Chain) and not v.busy]
        for old in kept[: max(0, len(kept) - _MOST_CHAINS + 1)]:
            del self._chains[old]
        try:
            with torch.inference_mode(False), torch.no_grad():
                made: Chain | str = model.graphs.hold(
                    model.device, lambda pool: _record(model, shape, run.backend, pool)
                )
        except (RuntimeError, torch.OutOfMemoryError) as error:
            made = recording.notice(f"a pass of {shape[0]} x {shape[1]} tokens, block by block,", error)
        self._chains[key] = made
        return made


def _end(looks: list[int], first: int, last: int) -> int:
    """Where the stretch that begins with block ``first`` must end: at the first hook, and not after ``last``."""
    stop = first + 1
    while stop < last and not (looks[stop - 1] & EXIT or looks[stop] & (ENTRY | INSIDE)):
        stop += 1
    return stop


def _record_whole(model: "HookedMamba", chain: Chain, backend: Any, first: int, last: int) -> None:
    """Record a stretch of a chain as one; where that fails, block by block does as well."""
    run, whole = Run(backend, "recorded", Clock(), False, quiet=True), chain.whole[first, last]

    def stretch() -> Tensor:
        resid, out = through(model, chain.entry, [None] * len(model.blocks), run, first, last)
        assert out is not None
        return resid + out

    def make(pool: Any) -> tuple[tuple[recording.Recorded, Tensor], int]:
        graph, leaving, held = recording.record(stretch, model.device, pool)
        return (graph, leaving), held

    try:
        with torch.inference_mode(False), torch.no_grad():
            whole.graph, whole.leaving = model.graphs.hold(model.device, make)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        recording.notice(f"a stretch of {last - first} blocks", error)


def _record(model: "HookedMamba", shape: tuple[int, int], backend: Any, pool: Any) -> tuple[Chain, int]:
    """Record every block by itself; also the bytes by which the pool grew."""
    run, count = Run(backend, "recorded", Clock(), False, quiet=True), len(model.blocks)
    width, first = model.cfg.d_model, cast("Block", model.blocks[0])
    mixers = [cast("Block", block).mixer for block in model.blocks]
    graph, rates, held = recording.record(lambda: decays(mixers), model.device, pool)
    resid = torch.zeros(*shape, width, device=model.device, dtype=first.residual_dtype)
    made = Chain([], [], graph, rates, torch.zeros_like(resid))
    made.seams.append(Seam(resid, torch.zeros(*shape, width, device=model.device, dtype=model.dtype)))
    held += 3 * resid.numel() * resid.element_size()
    for i in range(count):
        seam = made.seams[i]

        def block(i: int = i, seam: Seam = seam) -> tuple[Tensor, Tensor]:
            def join(_: int, out: Tensor | None, resid: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
                return add_and_norm(seam.out, resid, norm, backend)

            resid, out = through(model, seam.resid, [None] * count, run, i, i + 1, join, rates=rates[i : i + 1])
            assert out is not None
            return resid, out

        block()  # compiles what is not compiled yet, which a recording cannot
        graph, (resid, out), grown = recording.record(block, model.device, pool)
        made.graphs.append(graph)
        made.seams.append(Seam(resid, out))
        held += grown
    return made, held

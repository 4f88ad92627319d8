"""Passes with hooks in some blocks only: the blocks between them run straight, and on a GPU from recordings.

One hooked block must not cost the others their speed. A chain is a recording of every block by itself, each reading
what the one before it wrote, so that any stretch of them can be replayed, whichever blocks the hooks sit in: one set
of recordings for a sweep over all layers. The same kernels on the same values, so the same bits.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mambascope.hooks.run import PathTaken, Run
from mambascope.hooks.sites import Clock
from mambascope.model import recording
from mambascope.model.straight import add_and_norm, decays, through
from mambascope.model.watch import HOOKED
from mambascope.ops.ready import unwatched

if TYPE_CHECKING:
    from mambascope.model.block import Block
    from mambascope.model.language_model import HookedMamba

__all__ = ["Chain", "Stretches"]

_MOST_TOKENS = 4096  # of one chain: beyond, launches are hidden, and what stands between blocks takes much memory
_MOST_CHAINS = 4


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
    busy: bool = False

    def play(self, resid: Tensor, first: int, last: int) -> Tensor:
        """The residual stream after blocks [first, last), in memory of its own."""
        self.seams[first].resid.copy_(resid)
        self.seams[first].out.zero_()
        self.rates.replay()
        for graph in self.graphs[first:last]:
            graph.replay()
        seam = self.seams[last]
        return seam.resid + seam.out


class Stretches:
    """One model's chains, and the look for blocks without hooks. The lock of ``Graphs`` guards them."""

    def __init__(self) -> None:
        self._chains: dict[Any, Chain | str] = {}  # or why there is none; "" after the first time

    def clear(self) -> None:
        self._chains.clear()

    def quiet(self, model: "HookedMamba", run: Run) -> list[bool] | None:
        """Which blocks nobody looks into; None if the pass must run block by block as a whole."""
        if run.needs_grad or run.padding is not None or run.recorder is not None or model.cfg.activation != "silu":
            return None
        watch = model.graphs.watch
        if not unwatched() or watch.answer != HOOKED:  # the look of this very pass: it was not quiet
            return None
        return watch.quiet_blocks(model)

    def run(
        self, model: "HookedMamba", resid: Tensor, layers: list[Any], run: Run, span: tuple[int, int], carry: bool
    ) -> Tensor:
        """The residual stream after blocks ``span``; ``layers`` gets the states, all of them with ``carry``."""
        quiet, (first, last) = self.quiet(model, run), span
        if quiet is None or not any(quiet[first:last]):
            for i in range(first, last):
                resid, layers[i] = model.run_block(i, resid, run, layers[i])
            return resid
        chain = None if carry or layers[first] is not None else self._claim(model, resid, run)
        i = first
        try:
            while i < last:
                stop = i
                while stop < last and quiet[stop]:
                    stop += 1
                if stop == i:
                    resid, layers[i] = model.run_block(i, resid, run, layers[i])
                    i += 1
                    continue
                if chain is not None:
                    resid = self._replay(model, chain, resid, run, i, stop)
                else:
                    resid, out = through(model, resid, layers, run, i, stop)
                    resid = resid if out is None else resid + out
                i = stop
        finally:
            if chain is not None:
                chain.busy = False
        return resid

    def _replay(self, model: "HookedMamba", chain: Chain, resid: Tensor, run: Run, first: int, last: int) -> Tensor:
        graphs, path = model.graphs, PathTaken(run.backend, "graph", run.why)
        with graphs.replaying(resid.device):
            out = chain.play(resid, first, last)
        for block in model.blocks[first:last]:
            cast("Block", block).mixer.path = path
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


def _record(model: "HookedMamba", shape: tuple[int, int], backend: Any, pool: Any) -> tuple[Chain, int]:
    """Record every block by itself; also the bytes by which the pool grew."""
    run, count = Run(backend, "recorded", Clock(), False, quiet=True), len(model.blocks)
    width, first = model.cfg.d_model, cast("Block", model.blocks[0])
    mixers = [cast("Block", block).mixer for block in model.blocks]
    graph, rates, held = recording.record(lambda: decays(mixers), model.device, pool)
    made = Chain([], [], graph, rates)
    resid = torch.zeros(*shape, width, device=model.device, dtype=first.residual_dtype)
    made.seams.append(Seam(resid, torch.zeros(*shape, width, device=model.device, dtype=model.dtype)))
    held += 2 * resid.numel() * resid.element_size()
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

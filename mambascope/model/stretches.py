"""Passes with hooks in some blocks only: the blocks between them run straight, and on a GPU from recordings.

One hooked block must not cost the others their speed. A chain (mambascope.model.chain) is a recording of every block by
itself, each reading what the one before it wrote, so that any stretch of them can be replayed, whichever blocks the
hooks sit in: one set of recordings for a sweep over all layers. A stretch that comes often gets a recording of its own,
since a GPU rests for some microseconds between two. Hooks at the residual stream between blocks end a stretch and need
no open block; of a block with hooks at its states alone only the scan is open. The same kernels on the same values, so
the same bits.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mambascope.hooks.run import PathTaken, Run
from mambascope.model import recording
from mambascope.model.chain import Chain, Cut
from mambascope.model.straight import through, took
from mambascope.model.watch import ENTRY, EXIT, HOOKED, INSIDE, STATE
from mambascope.ops.ready import unwatched

if TYPE_CHECKING:
    from mambascope.model.block import Block
    from mambascope.model.language_model import HookedMamba

__all__ = ["Stretches"]

_MOST_TOKENS = 4096  # of one chain: beyond, launches are hidden, and what stands between blocks takes much memory
_MOST_CHAINS = 4


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
        if looks is None or all(look & (INSIDE | STATE) for look in looks[first:last]):
            for i in range(first, last):
                resid, layers[i] = model.run_block(i, resid, run, layers[i])
            return resid
        chain = None if carry or layers[first] is not None else self._claim(model, resid, run)
        placed = watch.hooks_placed
        i, entered, tried = first, -1, -1  # the block whose entry's hooks have been called; one that cannot be cut
        try:
            while i < last:
                if watch.hooks_placed != placed:  # a hook placed another one, maybe in a block that is still to come
                    looks, placed = watch.looks(model), watch.hooks_placed
                block = cast("Block", model.blocks[i])
                cut = None
                if chain is not None and (entered == i or not looks[i] & ENTRY):
                    cut = _cut(model, looks, i, last)
                    if cut is not None and (cut.layer == tried or not self._ready(model, chain, run, cut)):
                        tried, cut = cut.layer, None
                if chain is not None and cut is not None:
                    resid, i = self._around(model, chain, resid, run, cut, looks)
                elif looks[i] & (INSIDE | STATE):
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

    def _ready(self, model: "HookedMamba", chain: Chain, run: Run, cut: Cut) -> bool:
        """Whether a cut is recorded."""
        with model.graphs.replaying(model.device):
            return chain.ready(model, cut, run.backend)

    def _around(
        self, model: "HookedMamba", chain: Chain, resid: Tensor, run: Run, cut: Cut, looks: list[int]
    ) -> tuple[Tensor, int]:
        """The residual stream after a cut's blocks, its scan open for the hooks at its states; and the next block.

        That is the one after the open scan's where hooks placed others meanwhile, maybe further on in these blocks.
        """
        graphs, block, placed = model.graphs, cast("Block", model.blocks[cut.layer]), model.graphs.watch.hooks_placed
        path, others = PathTaken(run.backend, "graph", run.why), list(model.blocks)
        with graphs.replaying(resid.device):
            front = chain.play_front(resid, cut)
        took(others[cut.first : cut.layer], path)
        u, raw, A, B, C, z, _ = front.scan
        gated, _ = block.mixer.around_states(u, raw, A, B, C, z, front.h0, run)
        if graphs.watch.hooks_placed != placed:
            return block.leave(front.resid, gated, run), cut.layer + 1
        with graphs.replaying(resid.device):
            out = chain.play_back(gated, cut)
        took(others[cut.layer + 1 : cut.last], path)
        if looks[cut.last - 1] & EXIT:
            out = run.emit(cast("Block", model.blocks[cut.last - 1]).hook_resid_post, out)
        return out, cut.last

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
            if last - first > 1:
                chain.ready(model, (first, last), run.backend)
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
                    model.device, lambda pool: Chain.record(model, shape, run.backend, pool)
                )
        except (RuntimeError, torch.OutOfMemoryError) as error:
            made = recording.notice(f"a pass of {shape[0]} x {shape[1]} tokens, block by block,", error)
        self._chains[key] = made
        return made


def _cut(model: "HookedMamba", looks: list[int], first: int, last: int) -> Cut | None:
    """The stretch from block ``first`` on through one whose states alone are hooked, if that comes next."""
    layer = first if looks[first] & (INSIDE | STATE) else _end(looks, first, last)
    if layer == last or looks[layer] & (INSIDE | STATE) != STATE:
        return None
    if layer > first and (looks[layer] & ENTRY or looks[layer - 1] & EXIT):
        return None
    if cast("Block", model.blocks[layer]).mixer.hook_h.demand is not None:  # who may ask for more than states
        return None
    return Cut(first, layer, _end(looks, layer, last))


def _end(looks: list[int], first: int, last: int) -> int:
    """Where the stretch that begins with block ``first`` must end: at the first hook, and not after ``last``."""
    stop = first + 1
    while stop < last and not (looks[stop - 1] & EXIT or looks[stop] & (ENTRY | INSIDE | STATE)):
        stop += 1
    return stop

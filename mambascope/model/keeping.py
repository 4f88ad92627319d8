"""A recorded pass that a cache listens to: what it keeps, and where a replay puts that.

A replay writes into the same memory each time, and a cache lives on: so what it keeps is written at once to memory made
for this replay, whose addresses the recorded kernels read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mambascope import ops
from mambascope.hooks.model_protocol import Scope
from mambascope.hooks.run import Anchors, Recorder, Run
from mambascope.hooks.weights import small_norms
from mambascope.model import recording
from mambascope.model.block import Block
from mambascope.model.straight import through

if TYPE_CHECKING:
    from mambascope.model.language_model import HookedMamba

__all__ = ["Addresses", "Kept", "run_keeping"]

_ALIGN = 64  # entries
_COPYING = 4  # blocks whose states are copied while the next ones run; so many copies of states are held


@dataclass(frozen=True)
class Addresses:
    """Where a replay puts what a cache keeps: in one piece of memory, whose address is written before it (an int64).

    There lie n_layers+1 B L M, the residual stream entering each block and leaving the last; then n_layers B C+1 D N.
    """

    memory: Tensor
    boundaries: int
    resid: tuple[int, ...]
    states: tuple[int, ...]
    states_at: int  # of float32
    columns: list[int]  # after which states are kept

    @classmethod
    def on(cls, model: "HookedMamba", shape: tuple[int, int], boundaries: int) -> "Addresses":
        cfg, n = model.cfg, len(model.blocks)
        columns = [*range(-1, shape[1] - 1, boundaries), shape[1] - 1]
        resid, states = (n + 1, *shape, cfg.d_model), (n, shape[0], len(columns), cfg.d_inner, cfg.d_state)
        wide = math.prod(resid) * _residual_dtype(model).itemsize // torch.float32.itemsize
        address = torch.zeros(1, dtype=torch.int64, device=model.device)
        return cls(address, boundaries, resid, states, -(-(wide + 1) // _ALIGN) * _ALIGN, columns)


def _residual_dtype(model: "HookedMamba") -> torch.dtype:
    return cast(Block, model.blocks[0]).residual_dtype


class Kept:
    """New memory for what one replay keeps, and how a recorder hears of it."""

    def __init__(self, model: "HookedMamba", at: Addresses) -> None:
        self.columns = list(at.columns)
        size = at.states_at + math.prod(at.states)
        memory = torch.empty(size, dtype=torch.float32, device=at.memory.device)
        resid = memory.view(_residual_dtype(model))[: math.prod(at.resid)]
        self.resid = resid.view(at.resid)
        # .data: an edit in place, after which a cache refuses to go on from a tensor, is none of the residual stream's
        self.states = memory.data[at.states_at :].view(at.states)
        at.memory.fill_(memory.data_ptr())

    def tell(self, model: "HookedMamba", tokens: Tensor, entered: list[Any], run: Run, norms: Tensor) -> Tensor:
        """Offer it all to the run's recorder, as the blocks would have; the final norm of the residual stream."""
        recorder = cast(Recorder, run.recorder)
        recorder.take_norms(norms.clone())
        model.hooked_embed(tokens, run)
        for i, block in enumerate(model.blocks):
            recorder.begin_block(i, self.resid[i], entered[i], plain=True)
            anchors = Anchors(self.columns, self.states[i])
            recorder.take_anchors(str(cast(Block, block).mixer.hook_h.name), anchors)
        recorder.take(str(cast(Block, model.blocks[-1]).hook_resid_post.name), self.resid[-1])
        return model.ln_final(self.resid[-1], run)


def run_keeping(model: "HookedMamba", embedded: Tensor, layers: list[Any], run: Run, keeps: Addresses) -> Tensor:
    """The blocks, each one's input and states written to where ``keeps`` says at replay; the small weights' norms."""
    from mambascope.ops.scan.triton_keep import Place, join_kept, keep_states

    norms, wait = recording.beside(model.device, lambda: small_norms(cast(Scope, model)))
    size, residual = embedded.numel(), _residual_dtype(model)
    copying: list[tuple[Callable[[], None], Tensor]] = []  # states, beside what follows

    def join(i: int, out: Tensor | None, resid: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        before = None if out is None else Place(keeps.memory, (i - 1) * size, residual)
        here = Place(keeps.memory, i * size, residual)
        normed = join_kept(resid if out is None else out, before, here, norm.weight, norm.eps)
        return resid, cast(Tensor, normed)

    def left(i: int, scan: ops.ScanOutput) -> None:
        bound = cast(Tensor, scan.h_boundary)
        entries = (bound.shape[1] + 1) * scan.h_last.numel()
        place = Place(keeps.memory, keeps.states_at + i * entries, torch.float32)
        if len(copying) == _COPYING:
            settle()
        copying.append((recording.beside(model.device, lambda: keep_states(bound, scan.h_last, place))[1], bound))

    def settle() -> None:
        for done, _ in copying:
            done()
        copying.clear()

    n = len(layers)
    _, out = through(model, embedded, layers, run, 0, n, join, left, keeps.boundaries)
    before, after = (Place(keeps.memory, i * size, residual) for i in (n - 1, n))
    join_kept(cast(Tensor, out), before, after, None, 0.0)
    settle()
    wait()
    return norms

"""A recorded pass that a cache listens to: what it keeps, and where a replay puts that.

A replay writes into the same memory each time, and a cache lives on: so what it keeps is written at once to memory made
for this replay, whose addresses the recorded kernels read.
"""

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


@dataclass(frozen=True)
class Addresses:
    """Where a replay puts what a cache keeps: one int64 each, written before it."""

    resid: Tensor  # of n_layers+1 B L M: the residual stream entering each block, and leaving the last
    states: Tensor  # of n_layers B C+1 D N
    boundaries: int

    @classmethod
    def on(cls, device: torch.device, boundaries: int) -> "Addresses":
        resid, states = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        return cls(resid, states, boundaries)


class Kept:
    """New memory for what one replay keeps, and how a recorder hears of it."""

    def __init__(self, model: "HookedMamba", at: Addresses, shape: tuple[int, int]) -> None:
        cfg, n, device = model.cfg, len(model.blocks), model.device
        residual = cast(Block, model.blocks[0]).residual_dtype
        count = -(-shape[1] // at.boundaries)
        self.columns = [*(c * at.boundaries - 1 for c in range(count)), shape[1] - 1]
        self.resid = torch.empty(n + 1, *shape, cfg.d_model, dtype=residual, device=device)
        self.states = torch.empty(n, shape[0], count + 1, cfg.d_inner, cfg.d_state, dtype=torch.float32, device=device)
        for address, memory in ((at.resid, self.resid), (at.states, self.states)):
            address.fill_(memory.data_ptr())

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
    size, residual = embedded.numel(), cast(Block, model.blocks[0]).residual_dtype

    def join(i: int, out: Tensor | None, resid: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        before = None if out is None else Place(keeps.resid, (i - 1) * size, residual)
        here = Place(keeps.resid, i * size, residual)
        normed = join_kept(resid if out is None else out, before, here, norm.weight, norm.eps)
        return resid, cast(Tensor, normed)

    def left(i: int, scan: ops.ScanOutput) -> None:
        bound = cast(Tensor, scan.h_boundary)
        entries = (bound.shape[1] + 1) * scan.h_last.numel()
        keep_states(bound, scan.h_last, Place(keeps.states, i * entries, torch.float32))

    n = len(layers)
    _, out = through(model, embedded, layers, run, 0, n, join, left, keeps.boundaries)
    before, after = (Place(keeps.resid, i * size, residual) for i in (n - 1, n))
    join_kept(cast(Tensor, out), before, after, None, 0.0)
    wait()
    return norms

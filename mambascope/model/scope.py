"""What a cache asks of the model that made it (hooks.model_protocol.Scope): weights, and blocks run again."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mambascope import ops
from mambascope.errors import BackendError, InputError
from mambascope.hooks.run import Recorder, Run
from mambascope.hooks.sites import Clock, Padding
from mambascope.model.block import Block
from mambascope.model.lanes import through_lanes
from mambascope.model.mixer import MambaMixer
from mambascope.model.put_states import put_states
from mambascope.model.state import MambaState

__all__ = ["ScopeMethods"]


class ScopeMethods:
    """Mixed into HookedMamba."""

    if TYPE_CHECKING:
        cfg: Any
        blocks: Any
        ln_final: Any
        repeats: Any
        device: torch.device

        @property
        def backend(self) -> ops.Backend: ...

        @property
        def dtype(self) -> torch.dtype: ...

    def decay(self, layer: int) -> Tensor:
        """A = -exp(A_log) of a Mamba layer, ``D N``."""
        with torch.no_grad():
            return self._mamba(layer, "decay A").decay()

    def _mamba(self, layer: int, what: str) -> MambaMixer:
        mixer = cast(Block, self.blocks[layer]).mixer
        if not isinstance(mixer, MambaMixer):
            raise InputError(f"layer {layer} is {mixer.noun}: it has no {what}, which Mamba layers have")
        return mixer

    def norm_weight(self, layer: int) -> Tensor:
        """The weight of the norm before block ``layer``; ``n_layers`` means the final norm."""
        norm = self.ln_final if layer == self.cfg.n_layers else cast(Block, self.blocks[layer]).norm
        return norm.weight.detach()

    def state_from_tensors(self, tensors: dict[str, Tensor], layer: int = 0) -> Any:
        """A state of that layer's mixer, the inverse of its ``tensors``; KeyError where one is missing."""
        return cast(Block, self.blocks[layer]).mixer.state_type.from_tensors(tensors)

    def replay(
        self,
        layer: int,
        resid: Tensor,
        state: Any,
        padding: Padding | None,
        backend: str,
        recorder: Recorder | None,
    ) -> Tensor:
        """Run one block on its recorded input, without the user's hooks, for ``recorder`` to watch.

        The residual stream that leaves it, ``B L M``, without gradient.
        """
        run = self._replaying(backend, recorder, padding)
        path = cast(Block, self.blocks[layer]).mixer.path
        with torch.no_grad():
            out, _ = cast(Block, self.blocks[layer])(resid, run, state)
        cast(Block, self.blocks[layer]).mixer.path = path
        return out

    def scan_inputs(self, layer: int, resid: Tensor, state: Any, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """u, delta ``B L D`` and B ``B L N`` of one block on its input, without hooks and without the rest of it."""
        block, run = cast(Block, self.blocks[layer]), self._replaying(backend, None, None)
        with torch.no_grad():
            u, delta, B, _, _ = self._mamba(layer, "scan").scan_inputs(block.norm(resid, run), run, state)
            return u, delta, B

    def conv_inputs(self, layer: int, resid: Tensor, backend: str) -> Tensor:
        """What the conv of one block reads, ``B L D``, without hooks."""
        block, run = cast(Block, self.blocks[layer]), self._replaying(backend, None, None)
        with torch.no_grad():
            return self._mamba(layer, "scan").conv_inputs(block.norm(resid, run), run)

    def replay_lanes(
        self,
        layer: int,
        stream: Tensor,
        shapes: Sequence[tuple[int, int]],
        states: Sequence[Any],
        backend: str,
        keep: int | None = None,
    ) -> Tensor:
        """As `replay`, for the tokens ``T M`` of several batches (rows, length) one after the other, without gradient.

        Each goes on from its own state (None: the start of its text). ``keep``: give the last so many tokens of every
        row only. See ``mambascope.model.lanes``.
        """
        run = self._replaying(backend, None, None)
        with torch.no_grad():
            return through_lanes(cast(Block, self.blocks[layer]), stream, shapes, states, run, keep)

    def put_states(
        self, layer: int, resid: Tensor, state: MambaState | None, steps: Tensor, h: Tensor, backend: str
    ) -> Tensor:
        """Run one block without hooks on its input ``B L M``, once for each of P edits: h ``P B D N`` put in after
        step ``steps`` ``P``. The residual stream that leaves it, ``P B L M``."""
        mixer, block = self._mamba(layer, "state h"), cast(Block, self.blocks[layer])
        run = self._replaying(backend, None, None)
        with torch.no_grad():
            return put_states(mixer, block.norm, resid.to(block.residual_dtype), state, steps, h, run)

    def again(self, key: Any, inputs: list[Tensor], function: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """``function(inputs)``, work on a GPU that comes again with other values of the same shapes: recorded when it
        comes for the second time, and replayed from then on; see ``mambascope.model.again``."""
        return self.repeats.run(self, key, inputs, function)

    def _replaying(self, backend: str, recorder: Recorder | None, padding: Padding | None) -> Run:
        try:
            name, _ = ops.resolve_backend(backend, self.device, self.dtype)
        except BackendError:  # recorded on another machine
            name, _ = ops.resolve_backend(self.backend, self.device, self.dtype)
        return Run(cast(ops.Backend, name), "replayed for the cache", Clock(), False, recorder, padding)

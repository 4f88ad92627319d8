"""What the hooks need to know of a model: a small protocol, so that they depend on no mixer."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mambascope.config import MambaConfig
from mambascope.hooks.run import Recorder
from mambascope.hooks.sites import Padding

__all__ = ["Runnable", "Scope"]


class Scope(Protocol):
    """A model that can be recorded and whose blocks can be run again."""

    blocks: Any
    embed: Any
    model_id: str

    @property
    def cfg(self) -> MambaConfig: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def W_U(self) -> Tensor: ...

    def weight_hash(self) -> str: ...

    def decay(self, layer: int) -> Tensor:
        """A = -exp(A_log) of a Mamba layer, ``D N``."""
        ...

    def replay(
        self, layer: int, resid: Tensor, state: Any, padding: Padding | None, backend: str, recorder: Recorder | None
    ) -> Tensor:
        """Run one block without hooks, for ``recorder`` to watch; the residual stream that leaves it."""
        ...

    def scan_inputs(self, layer: int, resid: Tensor, state: Any, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        """u, delta and B of one block on its input, without hooks and without the rest of the block."""
        ...

    def norm_weight(self, layer: int) -> Tensor:
        """The weight of the norm before block ``layer``; ``n_layers`` means the final norm."""
        ...

    def accumulated_bias(self, layer: int) -> Tensor: ...

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor: ...

    def state_from_tensors(self, tensors: dict[str, Tensor], layer: int = 0) -> Any:
        """A state of that layer's mixer from the tensors that its own ``tensors()`` gave."""
        ...


class Runnable(Scope, Protocol):
    """A model that sweeps can also run from any block on, with hooks, and read words for."""

    tokenizer: Any
    hook_dict: Any
    ln_final: Any
    unembed: Any

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(self, input: Any, **options: Any) -> Any: ...

    def run_with_hooks(self, *args: Any, **options: Any) -> Any: ...

    def encode_texts(self, texts: list[str], prepend_bos: bool | None = None) -> tuple[list[list[int]], bool]: ...

    def to_single_token(self, string: str) -> int: ...

    def initial_state(self, batch: int = 1) -> Any: ...

    def conv_inputs(self, layer: int, resid: Tensor, backend: str) -> Tensor:
        """What the conv of one block reads, ``B L D``, without hooks."""
        ...

    def replay_lanes(
        self,
        layer: int,
        stream: Tensor,
        shapes: Sequence[tuple[int, int]],
        states: Sequence[Any],
        backend: str,
        keep: int | None = None,
    ) -> Tensor:
        """As `replay`, for the tokens ``T M`` of several batches (rows, length), each with a state of its own; the last
        ``keep`` tokens of every row."""
        ...

    def again(self, key: Any, inputs: list[Tensor], function: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """``function(inputs)``; work that comes with this key again may be replayed on the new inputs."""
        ...

    def put_states(self, layer: int, resid: Tensor, state: Any, steps: Tensor, h: Tensor, backend: str) -> Tensor:
        """Run one block without hooks on its input ``B L M``, once for each of P edits: h ``P B D N`` put in after
        step ``steps`` ``P``. The residual stream that leaves it, ``P B L M``."""
        ...

"""What eager calls skip the second time: checks and decisions that depend on the kind of the tensors alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambascope.ops import dispatch

__all__ = ["Ready", "kind_of", "plain", "unwatched"]

_PLAIN = frozenset((Tensor, nn.Parameter))
_MOST = 4096  # kinds that are remembered, of one operator


def unwatched() -> bool:
    """Whether nobody traces, compiles, transforms or intercepts: kernels may be called without their operators."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    return not dispatch._transformed()


def plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether all are ordinary tensors, not of a class that wraps, fakes or spreads them."""
    return all(x is None or type(x) in _PLAIN for x in tensors)


def kind_of(tensors: Sequence[Tensor | None]) -> tuple[Any, ...] | None:
    """All that checks, kernels, their compilation and their host code may depend on, but values and addresses.

    None if a tensor is of a class that only torch's own dispatch knows how to treat.
    """
    found: list[Any] = []
    for x in tensors:
        if x is None:
            found.append(None)
        else:
            if type(x) not in _PLAIN:
                return None
            found += (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15)
    return tuple(found)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class Ready:
    """Of one operator on a GPU: by kind, the function that does all the rest of a call."""

    def __init__(self) -> None:
        self.known: dict[Any, Callable[..., Any]] = {}

    def find(self, tensors: Sequence[Tensor | None], *flags: Any) -> tuple[Any, Any]:
        """The key of a call, None if it must take the long way, and what was learned for it, None if nothing."""
        first = tensors[0]
        if not isinstance(first, Tensor) or not _on_gpu(first) or not unwatched():
            return None, None
        kind = kind_of(tensors)
        if kind is None:
            return None, None
        grads = False
        if torch.is_grad_enabled():
            for x in tensors:
                if x is not None and x.requires_grad:
                    grads = True
                    break
        key = (kind, grads, *flags)
        return key, self.known.get(key)

    def learn(
        self,
        key: Any,
        function: Any,
        *options: tuple[str, Any],
        rest: tuple[Any, ...] = (),
        wrap: Callable[[Any], Callable[..., Any]] | None = None,
    ) -> None:
        """After a call the long way that ended in a kernel module's ``function``, given these further arguments and
        options: what repeats it, once there is anything, ``wrap`` around it."""
        replay = function.ready(key[0], *options, rest=rest) if key is not None and hasattr(function, "ready") else None
        if replay is not None:
            if len(self.known) >= _MOST:
                self.known.clear()
            self.known[key] = wrap(replay) if wrap else replay

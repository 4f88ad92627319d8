"""The scan with gradients, again for tensors of a kind that it has met: forward and backward as replays.

What `operators.call` does in eager mode, less everything that comes out the same for a kind: checks, decisions, kinds
of tensors that were looked at already.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mambascope.ops import operators
from mambascope.ops.dispatch import scan_module
from mambascope.ops.ready import Guarded, eager_apply, kind_of, unwatched

__all__ = ["ScanOfKind"]


class ScanOfKind:
    """Called with the ten inputs: y, h_last and, if asked for, the boundary states; on the graph."""

    def __init__(
        self, backend: str, dt_softplus: bool, boundaries: int | None, interval: int, forward: Callable[..., Any]
    ) -> None:
        self.backend, self.forward = backend, forward
        self.options = {"dt_softplus": dt_softplus, "boundaries": interval}
        self.every = 0 if boundaries is None else boundaries // interval  # of the saved states; 0: none are asked for
        self.backward = Guarded()  # by the tensors that were saved, and what arrives

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        y, h_last, *states = _apply(self, *inputs)
        if not states:
            return y, h_last, None
        return y, h_last, states[0] if self.every == 1 else states[0][:, :: self.every]

    def gradients(self, tensors: Sequence[Any], arriving: Sequence[Tensor | None]) -> Sequence[Any]:
        """Of the first nine tensors: ten inputs and the saved states. Hooks on saved tensors, or an assignment to
        .data, may bring others back than the forward call took: their kind is looked at again."""
        args = (*tensors, *arriving)
        free = not torch.is_grad_enabled() and unwatched()
        replay, where = self.backward.find(args, None) if free else (None, None)
        if replay is not None:
            found = replay(*args)
            return [
                None if x is None else found[name] if found[name].dtype is x.dtype else found[name].to(x.dtype)
                for name, x in zip(operators.SCAN_GRADS, tensors, strict=False)
            ]
        ready = operators.arriving_at_scan(tensors, *arriving)
        grads = operators.scan_gradients(self.backend, (*tensors, *ready), self.options)
        if where is not None and all(a is b for a, b in zip(arriving, ready, strict=True)):
            kind = kind_of(args)
            backward = scan_module(self.backend).scan_backward
            replay = None if kind is None else backward.ready(kind, *self.options.items())
            if replay is not None and replay.aligned:
                self.backward.learn(where, replay)
        return grads


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: ScanOfKind, *inputs: Any) -> Any:
        y, h_last, states = own.forward(*inputs)
        ctx.save_for_backward(*inputs, states)
        ctx.set_materialize_grads(False)
        ctx.own = own
        return (y, h_last, states) if own.every else (y, h_last)

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        if len(arriving) == 2:
            arriving = (*arriving, None)
        return None, *ctx.own.gradients(ctx.saved_tensors, arriving), None


_apply = eager_apply(_Scan)

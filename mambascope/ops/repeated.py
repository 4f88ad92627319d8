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
from mambascope.ops.ready import kind_of, unwatched

__all__ = ["ScanOfKind"]


class ScanOfKind:
    """Called with the ten inputs: y, h_last and, if asked for, the boundary states; on the graph."""

    def __init__(
        self, backend: str, dt_softplus: bool, boundaries: int | None, interval: int, forward: Callable[..., Any]
    ) -> None:
        self.backend, self.forward = backend, forward
        self.options = {"dt_softplus": dt_softplus, "boundaries": interval}
        self.every = 0 if boundaries is None else boundaries // interval  # of the saved states; 0: none are asked for
        self.backward: dict[Any, Callable[..., Any]] = {}  # by the kind of what arrives

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        y, h_last, *states = _Scan.apply(self, *inputs)  # type: ignore[misc]
        if not states:
            return y, h_last, None
        return y, h_last, states[0] if self.every == 1 else states[0][:, :: self.every]

    def gradients(self, tensors: Sequence[Any], arriving: Sequence[Tensor | None], same: bool) -> Sequence[Any]:
        """Of the first nine tensors; ``same``: they are those of the forward call, so of the kind that is known."""
        kind = kind_of(arriving) if same and unwatched() else None
        replay = None if kind is None else self.backward.get(kind)
        if replay is None:
            args = (*tensors, *arriving)
            found = operators.scan_gradients(self.backend, args, self.options)
            every = kind_of(args)
            replay = None
            if kind is not None and every is not None:
                replay = scan_module(self.backend).scan_backward.ready(every, *self.options.items())
            if replay is not None:
                self.backward[kind] = replay
            return found
        found = replay(*tensors, *arriving)
        return [
            None if x is None else found[name] if found[name].dtype is x.dtype else found[name].to(x.dtype)
            for name, x in zip(operators.SCAN_GRADS, tensors, strict=False)
        ]


def _places(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: ScanOfKind, *inputs: Any) -> Any:
        y, h_last, states = own.forward(*inputs)
        ctx.save_for_backward(*inputs, states)
        ctx.set_materialize_grads(False)
        # Hooks on saved tensors, or an assignment to .data, may bring back tensors of another kind.
        ctx.own, ctx.places = own, _places(inputs)
        return (y, h_last, states) if own.every else (y, h_last)

    @staticmethod
    def backward(ctx: Any, *arriving: Any) -> Any:
        dy, dh_last, dh_boundary = arriving if len(arriving) == 3 else (*arriving, None)
        tensors, own = ctx.saved_tensors, ctx.own
        args = operators.arriving_at_scan(tensors, dy, dh_last, dh_boundary)
        if torch.is_grad_enabled():
            return None, *operators.scan_gradients(own.backend, (*tensors, *args), own.options), None
        same = _places(tensors[:-1]) == ctx.places
        return None, *own.gradients(tensors, args, same), None

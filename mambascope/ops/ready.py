"""What eager calls skip the second time: checks and decisions that depend on the kind of the tensors alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mambascope.ops import dispatch

__all__ = ["Guarded", "Ready", "eager_apply", "kind_of", "plain", "unwatched"]

_PLAIN = frozenset((Tensor, nn.Parameter))
_MOST = 4096  # kinds that are remembered, of one operator
_LATEST = 8  # of them, of the same flags, those that are looked at first


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


def guard_of(given: Sequence[Tensor]) -> Any:
    """What tells in one call whether as many tensors are of the kind of these, or None where this torch has no such.

    It compares what `kind_of` notes but for addresses, and the class, requires_grad and what torch's dispatch would do
    with it, but not whether gradients are recorded. torch's own compiler guards its code with it; read from Python, the
    same facts take seven times as long.
    """
    if _Guards is None:
        return None
    sizes, strides = [list(x.shape) for x in given], [list(x.stride()) for x in given]
    return _Guards(*given, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)


def _guards() -> Any:
    """torch's own class, which takes arguments unchecked: of versions only that were tried."""
    version = tuple(int(n) for n in torch.__version__.split(".")[:2])
    home = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return getattr(home, "TensorGuards", None) if (2, 11) <= version <= (2, 13) else None


_Guards = _guards()


class Guarded:
    """Functions by the kind of the tensors that they take, the latest first."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[tuple[Any, Any], ...]] = {}  # by what is None, and flags

    def find(self, tensors: Sequence[Tensor | None], flags: Any) -> tuple[Any, Any]:
        """What was learned for tensors like these, None if nothing; and where `learn` puts it."""
        place = (flags, *[x is None for x in tensors])
        given = [x for x in tensors if x is not None]
        for guard, function in self.known.get(place, ()):
            if guard.check(*given):
                return function, None
        return None, (place, given)

    def learn(self, where: tuple[Any, list[Tensor]], function: Any) -> None:
        """``function`` does not depend on addresses: it looks after their alignment itself."""
        place, given = where
        guard = guard_of(given)
        if guard is None or len({id(x) for x in given}) < len(given):  # a guard refuses a tensor that comes twice
            return
        if len(self.known) >= _MOST:
            self.known.clear()
        self.known[place] = ((guard, function), *self.known.get(place, ())[: _LATEST - 1])


def eager_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` less what it does for functorch's transforms: for calls that are `unwatched`."""
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class Ready:
    """Of one operator on a GPU: by kind, the function that does all the rest of a call."""

    def __init__(self) -> None:
        self.known: dict[Any, Callable[..., Any]] = {}
        self.latest = Guarded()

    def find(self, tensors: Sequence[Tensor | None], *flags: Any) -> tuple[Any, Any]:
        """The key of a call, None if there is none to be learned, and what was learned for it, None if nothing."""
        first = tensors[0]
        if not isinstance(first, Tensor) or not _on_gpu(first) or not unwatched():
            return None, None
        found, where = self.latest.find(tensors, (torch.is_grad_enabled(), *flags))
        if found is not None:
            return None, found
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
        found = self.known.get(key)
        if found is not None and getattr(found, "aligned", False):
            self.latest.learn(where, found)
        return key, found

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
            repeat = wrap(replay) if wrap else replay
            repeat.aligned = getattr(replay, "aligned", False)  # pyright: ignore[reportFunctionMemberAccess]
            self.known[key] = repeat

"""Hooks belong to a model, not to a thread: two threads at one model must not meet where one of them has hooks."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mambascope.errors import HookError

__all__ = ["Occupancy"]

_LOCK = threading.Lock()
_WAY_OUT = "give each thread its own copy.deepcopy(model), or let one thread at a time use it (threading.Lock)"


class Occupancy:
    """Which threads run a model now, and whose temporary hooks are in force.

    Plain forward passes may run side by side. A hook would see, and change, the other thread's pass at positions of
    this one: that is refused, by whoever comes second.
    """

    def __init__(self) -> None:
        self._running: dict[int, int] = {}
        self._hooking: dict[int, int] = {}

    def __reduce__(self) -> Any:
        return Occupancy, ()  # a copied model is used by nobody yet

    @contextmanager
    def running(self, points: Iterable[Any]) -> Iterator[None]:
        """For the time of a forward pass; HookError if another thread's hooks would take part in it."""
        me = threading.get_ident()
        with _LOCK:
            if _others(self._hooking, me):
                raise HookError(f"hooks of another thread are in force in this model; {_WAY_OUT}")
            if _others(self._running, me) and any(point.live for point in points):
                raise HookError(f"this model has hooks, and another thread is running it; {_WAY_OUT}")
            _count(self._running, me, 1)
        try:
            yield
        finally:
            with _LOCK:
                _count(self._running, me, -1)

    @contextmanager
    def hooking(self) -> Iterator[None]:
        """For the time that hooks of this thread are in force; HookError if another thread uses the model."""
        me = threading.get_ident()
        with _LOCK:
            self._check(me)
            _count(self._hooking, me, 1)
        try:
            yield
        finally:
            with _LOCK:
                _count(self._hooking, me, -1)

    def check(self) -> None:
        """HookError if another thread uses the model, so that no hook may be added now."""
        with _LOCK:
            self._check(threading.get_ident())

    def _check(self, me: int) -> None:
        if _others(self._running, me) or _others(self._hooking, me):
            raise HookError(f"another thread is using this model, so no hook may be added now; {_WAY_OUT}")


def _others(threads: dict[int, int], me: int) -> bool:
    """Whether another thread is among these. Autograd's own threads are this one's: they run again what it ran."""
    others = threads.keys() - {me}
    return bool(others) and not isinstance(threading.current_thread(), threading._DummyThread)  # type: ignore[attr-defined]


def _count(threads: dict[int, int], me: int, by: int) -> None:
    threads[me] = threads.get(me, 0) + by
    if not threads[me]:
        del threads[me]

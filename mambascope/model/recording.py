"""Work recorded as a CUDA graph: what a function launches, to be launched again without it."""

import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["Recorded", "beside", "follow", "new_pool", "notice", "record"]

T = TypeVar("T")


class Recorded(Protocol):
    """What `record` gives: ``replay`` launches everything again, on the same memory."""

    def replay(self) -> None: ...


def new_pool(device: torch.device) -> Any:
    """Memory that recordings may share: those whose replays never overlap, and are read before the next."""
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()


def record(
    function: Callable[[], T], device: torch.device, pool: Any = None, generator: torch.Generator | None = None
) -> tuple[Recorded, T, int]:
    """Record ``function``, which must have run before (so that its kernels are compiled).

    What it draws from ``generator`` is drawn anew at every replay, from where the generator stands then.
    Gives the recording, what the function returned (tensors in the recording's own memory, undefined until the first
    replay), and the bytes by which the pool grew. Threads that do other work are not disturbed.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        before = torch.cuda.memory_reserved(device)
        result = function()
        grown = torch.cuda.memory_reserved(device) - before
    return graph, result, grown


def beside(device: torch.device, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """What a function returns, its work launched beside what follows; and what to call before that is read.

    In a recording it becomes a branch.
    """
    if device.type != "cuda":
        return function(), lambda: None
    now, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(now)
    with torch.cuda.stream(side):
        result = function()
    return result, lambda: now.wait_stream(side)


def follow(device: torch.device, last: Any) -> Any:
    """Let the current stream wait for ``last``, a stream that used the same memory; gives the current one."""
    now = torch.cuda.current_stream(device)
    if last is not None and last != now:
        now.wait_stream(last)
    return now


def notice(what: str, error: Exception) -> str:
    """Warn that ``what`` runs without a recording; gives the reason."""
    reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    warnings.warn(
        f"{what} cannot be recorded as a CUDA graph and runs without, within the same tolerances ({reason})",
        stacklevel=3,
    )
    return reason

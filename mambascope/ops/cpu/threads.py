"""Runs a kernel on the threads that torch already has.

Torch's idle workers spin for a while after each operator; a second pool beside them halves the speed of both. So a
kernel is a C callback of one address, started by `GOMP_parallel` of the very OpenMP runtime that torch is linked to,
and its threads take units of work from an atomic counter: any number of threads gives the same bits.

Where torch has no such runtime (macOS, Windows) a small thread pool calls the same callback, which never holds the GIL.
After a fork the runtime's workers are gone, and starting it again would hang: a child process stays on one thread.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mambascope.errors import BackendError

GRAIN = 1 << 18
"""Elementary steps (one state of one channel at one position) below which starting a team costs more than it saves."""

_CAPACITY = 64  # int64 slots of one call
_local = threading.local()
_forked = False
_pool: tuple[int, ThreadPoolExecutor] | None = None
_pool_lock = threading.Lock()


def _after_fork() -> None:
    global _forked, _pool, _pool_lock
    _forked, _pool, _pool_lock = True, None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Arguments:
    """The int64 arguments of one kernel, by name; slots 0 and 1 are the counters of units taken and units done."""

    def __init__(self, names: str) -> None:
        self.names = ("taken", "done", "units", *names.split())
        if len(self.names) > _CAPACITY:
            raise ValueError(f"a kernel takes at most {_CAPACITY} arguments, got {len(self.names)}")
        self.pack_into = struct.Struct(f"={len(self.names)}q").pack_into


class _Buffer:
    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(8 * _CAPACITY)
        self.address = ctypes.addressof(self.memory)
        self.done = ctypes.c_int64.from_buffer(self.memory, 8)


def run(kernel: Any, units: int, work: int, *values: int) -> None:
    """Calls `kernel` until its `units` are done, on as many threads as torch would use and the work is worth.

    Raises:
        BackendError: a thread could not finish its units (out of memory); nothing of the result is to be used.
    """
    if units <= 0:
        return
    try:
        buffer = _local.buffer
    except AttributeError:
        buffer = _local.buffer = _Buffer()
    kernel.arguments.pack_into(buffer.memory, 0, 0, 0, units, *values)
    threads = 1
    if work >= GRAIN and units > 1 and not _forked:
        threads = min(torch.get_num_threads(), units)
    if threads == 1:
        kernel.call(buffer.address)
    else:
        _parallel(kernel, buffer.address, threads)
    if buffer.done.value != units:
        raise BackendError(
            f"the cpu kernel {kernel.name!r} finished {buffer.done.value} of {units} units: most likely memory ran "
            "out; use a shorter input, a smaller batch or fewer threads"
        )


def _parallel(kernel: Any, address: int, threads: int) -> None:
    team = _openmp()
    if team is not None:
        team(kernel.address, address, threads, 0)
        return
    pool = _threads(threads - 1)
    helpers: list[Future[None]] = [pool.submit(kernel.call, address) for _ in range(threads - 1)]
    try:
        kernel.call(address)
    finally:  # nobody may still write when the caller goes on, whatever interrupted it
        for helper in helpers:
            while not helper.done():
                helper.exception()


@cache
def _openmp() -> Any:
    "`GOMP_parallel(function, data, threads, flags)` as torch's own library resolves it, or None"
    for library in sorted(Path(torch.__file__ or "").parent.glob("lib/libtorch_cpu.*")):
        try:
            function = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None or _pool[0] < count:
            _pool = (count, ThreadPoolExecutor(count, thread_name_prefix="mambascope"))
        return _pool[1]

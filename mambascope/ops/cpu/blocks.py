"""What the kernels share: blocks of 16 channels, their states, and the arguments of a call.

A unit of work is one batch row's block of up to 16 channels. A block's states lie in scratch memory as N vectors (state
n of its 16 channels), while tensors hold them as D rows of N: `gather` and `scatter` turn one into the other.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from mambascope.ops.cpu.vector import (
    BYTES,
    WIDTH,
    address_of,
    load,
    load_float,
    splat,
    store,
    store_float,
    transpose,
)

ZERO = np.float32(0)


@njit
def scratch(vectors: int) -> tuple[np.ndarray, int]:
    "memory for that many vectors and its first address on a cache line (a vector over two lines costs a quarter)"
    memory = np.empty((vectors + 1) * WIDTH, np.float32)
    return memory, (address_of(memory) + BYTES - 1) // BYTES * BYTES


@njit
def clear(target: int, vectors: int) -> None:
    for i in range(vectors):
        store(target + BYTES * i, splat(ZERO))


@njit
def copy(source: int, target: int, vectors: int) -> None:
    for i in range(vectors):
        store(target + BYTES * i, load(source + BYTES * i))


@njit
def gather(source: int, states: int, lanes: int, target: int) -> None:
    "`lanes` rows of `states` floats → `states` vectors, zero in the lanes that do not exist"
    done = 0
    if lanes == WIDTH:
        while done + WIDTH <= states:
            transpose(source + 4 * done, 4 * states, target + BYTES * done, BYTES)
            done += WIDTH
    for n in range(done, states):
        store(target + BYTES * n, splat(ZERO))
        for lane in range(lanes):
            store_float(target + BYTES * n + 4 * lane, load_float(source + 4 * (lane * states + n)))


@njit
def scatter(source: int, states: int, lanes: int, target: int) -> None:
    "`states` vectors → `lanes` rows of `states` floats"
    done = 0
    if lanes == WIDTH:
        while done + WIDTH <= states:
            transpose(source + BYTES * done, BYTES, target + 4 * done, 4 * states)
            done += WIDTH
    for n in range(done, states):
        for lane in range(lanes):
            store_float(target + 4 * (lane * states + n), load_float(source + BYTES * n + 4 * lane))


def rows(x: Tensor) -> Tensor:
    "float32 with a contiguous last axis; the other strides stay as they are"
    if x.dtype is not torch.float32:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(x: Tensor) -> Tensor:
    "float32 and contiguous"
    return (x if x.dtype is torch.float32 else x.float()).contiguous()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    "x.to(dtype), a microsecond cheaper where there is nothing to do"
    return x if x.dtype is dtype else x.to(dtype)


def real_lengths(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def pointer(x: Tensor | None) -> int:
    "0 says that a kernel's optional argument is absent"
    return 0 if x is None else x.data_ptr()

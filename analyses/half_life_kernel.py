"""Half-lives on a CPU: the binary searches of :mod:`mambascope.analyses.timescales` as one merge a state dimension.

From token to token the sum that must be reached only grows, so a pointer that never goes back finds all answers in
O(L), and a histogram of them gives the median without sorting. Compiled by numba at first use.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["merge_half_lives"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def _merge(total: Floats, least: Floats, low: Integers, high: Integers, censored: Integers) -> None:
    """Fill the two middle half-lives (length + 1: censored) and the number censored of every state dimension."""
    width, states = least.shape
    length = total.shape[1] - 1
    count = np.zeros(length + 2, np.int64)
    for d in range(width):
        for n in range(states):
            count[:] = 0
            at = 0
            for t in range(length):
                goal = total[d, t + 1] + least[d, n]
                at = max(at, t + 2)
                while at <= length and total[d, at] < goal:
                    at += 1
                if at > length:
                    count[length + 1] += length - t
                    break
                count[at - t - 1] += 1
            censored[d, n] = count[length + 1]
            seen, k = count[0], 0
            while seen <= (length - 1) // 2:
                k += 1
                seen += count[k]
            low[d, n] = k
            while seen <= length // 2:
                k += 1
                seen += count[k]
            high[d, n] = k


@cache
def _compiled() -> Callable[..., None]:
    from numba import njit

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(_merge)
    except RuntimeError:  # numba's way to say: no folder that it may write to
        return njit(**options)(_merge)


def merge_half_lives(total: Tensor, least: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two middle half-lives and the number censored, ``D N`` int64, from prefix sums ``D L+1`` and the sums to
    reach ``D N``, both float64 on the CPU. length + 1 stands for a censored one."""
    low, high, censored = (torch.empty(least.shape, dtype=torch.int64) for _ in range(3))
    arrays = (x.contiguous().numpy() for x in (total, least, low, high, censored))
    _compiled()(*arrays)
    return low, high, censored

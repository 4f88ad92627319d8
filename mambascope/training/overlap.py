"""How much of a held-out text was trained on: the share of its windows of 13 tokens that also stand in training text.

1. Every window of n consecutive ids gets a 64-bit polynomial hash; n = 13 as in the contamination counts of GPT-3
   (Brown et al., 2005.14165, appendix C). Two different windows share one with probability about 2^-64.
2. The training ids are read in pieces, and each piece's hashes are looked up among the held-out ones.

Time O(T log H), memory one piece and the held-out hashes.
"""

from collections.abc import Iterable

import numpy as np

__all__ = ["WINDOW", "shared_windows"]

WINDOW = 13
_PIECE = 1 << 21
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, from the golden ratio: spreads small ids over all bits


def _hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all windows, uint64, wrapping."""
    count = len(ids) - n + 1
    total = np.zeros(max(0, count), np.uint64)
    for j in range(n if count > 0 else 0):
        total *= _FACTOR
        total += ids[j : j + count].astype(np.uint64) + np.uint64(1)
    return total


def shared_windows(held: np.ndarray, trained: Iterable[np.ndarray], n: int = WINDOW) -> float:
    """Share of ``held``'s windows of ``n`` ids that also stand in one of the ``trained`` arrays; 0 if it has none."""
    own = _hashes(held, n)
    if not len(own):
        return 0.0
    known, counts = np.unique(own, return_counts=True)
    found = np.zeros(len(known), bool)
    for ids in trained:
        for start in range(0, len(ids), _PIECE):
            seen = _hashes(ids[start : start + _PIECE + n - 1], n)
            at = np.minimum(np.searchsorted(known, seen), len(known) - 1)
            found[at[known[at] == seen]] = True
    return float(counts[found].sum() / counts.sum())

"""Clean and corrupted texts side by side: which token of one stands for which token of the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.tokens import token_labels

__all__ = ["Align", "Group", "Pairs", "pairs_of"]

Align = Literal["start", "end"]


@dataclass(frozen=True)
class Group:
    """The pairs with the same lengths: their numbers, and clean ``B L'`` and corrupted ``B L`` ids."""

    rows: tuple[int, ...]
    clean: Tensor
    corrupted: Tensor


@dataclass(frozen=True)
class Pairs:
    """All pairs of a sweep, in groups of the same lengths.

    A position is a number from 0 (``align="start"``), or one below 0, counted from both ends (``"end"``).
    """

    groups: tuple[Group, ...]
    align: Align
    clean: tuple[tuple[int, ...], ...]
    corrupted: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return len(self.corrupted)

    @property
    def shortest(self) -> int:
        return min(map(len, (*self.clean, *self.corrupted)))

    @property
    def same_length(self) -> bool:
        return len(self.groups) == 1 and self.groups[0].clean.shape == self.groups[0].corrupted.shape

    def positions(self, wanted: Sequence[int] | int | slice | None) -> tuple[int, ...]:
        """The positions asked for (None: all), checked; InputError names the first that some text has not."""
        n = self.shortest
        every = range(n) if self.align == "start" else range(-n, 0)
        if wanted is None:
            return tuple(every)
        if isinstance(wanted, slice) and self.align == "start":
            wanted = every[wanted]
        found = []
        for p in [wanted] if isinstance(wanted, (int, slice)) else wanted:
            if isinstance(p, bool) or not isinstance(p, int):
                raise InputError(f"positions must be integers, got {p!r}")
            q = p % n if self.same_length and -n <= p < n and self.align == "start" else p
            if q not in every:
                raise InputError(
                    f"position {p} is outside {every.start}…{every.stop - 1}, what all texts have counted from the "
                    f"{self.align} (the shortest has {n} tokens)"
                )
            found.append(q)
        if not found or len(set(found)) < len(found):
            raise InputError(f"positions must name at least one position and none twice, got {wanted!r}")
        return tuple(sorted(found))

    def labels(self, model: Runnable, positions: Sequence[int]) -> tuple[str, ...]:
        """The tokens at these positions of the first pair, ``clean|corrupted`` where they differ."""
        good = token_labels(model, [self.clean[0][p] for p in positions])
        bad = token_labels(model, [self.corrupted[0][p] for p in positions])
        return tuple(a if a == b else f"{a}|{b}" for a, b in zip(good, bad, strict=True))


def pairs_of(
    model: Runnable, clean: Any, corrupted: Any, align: Align | None = None, prepend_bos: bool | None = None
) -> Pairs:
    """Texts or ids, one or many, as checked pairs; see :func:`~mambascope.hooks.sweeps.sweep`."""
    if align not in (None, "start", "end"):
        raise InputError(f"align must be 'start', 'end' or None, got {align!r}")
    good, bad = _ids(model, clean, "clean", prepend_bos), _ids(model, corrupted, "corrupted", prepend_bos)
    if len(good) != len(bad):
        raise InputError(f"there are {len(good)} clean texts and {len(bad)} corrupted ones; give one for one")
    uneven = [i for i, (a, b) in enumerate(zip(good, bad, strict=True)) if len(a) != len(b)]
    if uneven and align is None:
        rows = ", ".join(f"row {i}: {len(good[i])} and {len(bad[i])}" for i in uneven[:5])
        more = f" and {len(uneven) - 5} more" if len(uneven) > 5 else ""
        raise InputError(
            f"clean and corrupted text have different numbers of tokens ({rows}{more}). Say align='end' (position -1 "
            "is the last token of both, and so on backwards) or align='start', or pad the shorter text with words that "
            "carry nothing, up to as many tokens"
        )
    lengths = [(len(a), len(b)) for a, b in zip(good, bad, strict=True)]
    if align is None and len(set(lengths)) > 1:
        raise InputError(
            f"the pairs have different lengths ({', '.join(str(b) for _, b in lengths[:5])} … tokens); say align='end' "
            "or align='start': from which end positions count"
        )
    groups = []
    for size in sorted(set(lengths), reverse=True):
        rows = tuple(i for i, pair in enumerate(lengths) if pair == size)
        a, b = (torch.tensor([x[i] for i in rows], device=model.device) for x in (good, bad))
        groups.append(Group(rows, a, b))
    return Pairs(tuple(groups), align or "start", tuple(map(tuple, good)), tuple(map(tuple, bad)))


def _ids(model: Runnable, value: Any, what: str, prepend_bos: bool | None) -> list[list[int]]:
    """The ids of each row; InputError naming the row that cannot be read."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        return model.encode_texts(list(value), prepend_bos)[0]
    if prepend_bos is not None:
        raise InputError(f"{what}: prepend_bos goes with text; token ids are taken as they are")
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
        value = [value]
    if isinstance(value, Tensor):
        value = value[None] if value.ndim == 1 else value
        if value.ndim != 2 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise InputError(f"{what} must be integer ids B L, got {value.dtype} {tuple(value.shape)}")
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(f"{what} must be a text, a list of texts, or ids B L, got {type(value).__name__}")
    rows = []
    for i, row in enumerate(value):
        ids = row.tolist() if isinstance(row, Tensor) else row
        if not isinstance(ids, (list, tuple)) or not ids:
            raise InputError(f"{what}, row {i}: expected ids, got {ids!r}")
        bad = [t for t in ids if isinstance(t, bool) or not isinstance(t, int) or not 0 <= t < model.cfg.n_tokens]
        if bad:
            raise InputError(f"{what}, row {i}: {bad[0]!r} is no id of the vocabulary of {model.cfg.n_tokens} tokens")
        rows.append(list(ids))
    return rows

"""What a mixer remembers of the tokens it has read: one typed state for each kind of mixer."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

__all__ = ["AttentionState", "ConvSSMState", "ConvState", "LSTMState", "LayerState", "Room", "SSMState", "Stateless"]

_LEAST_ROOM = 64  # columns


@dataclass
class LayerState:
    """The state of one mixer: a dataclass of tensors, each with the rows of the batch as its first axis."""

    noun: ClassVar[str] = "a mixer"
    """What has such a state, for error texts."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same state with every tensor replaced (moved, or some rows of the batch taken)."""
        return dataclasses.replace(self, **{name: fn(value) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """By name, for files."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The inverse of :meth:`tensors`; KeyError where one is missing."""
        return cls(**{f.name: tensors[f.name] for f in dataclasses.fields(cls)})


@dataclass
class Stateless(LayerState):
    """The state of a mixer that looks at one token at a time: nothing, for so many rows."""

    noun = "a feed-forward layer"

    rows: Tensor  # B 0


class Room:
    """Memory of keys and values with columns to spare, as many again: n tokens of a generation copy O(n) columns.

    It belongs to the newest state. What was written is not written again, so that earlier states, which are views of
    it, stay what they were.
    """

    def __init__(self, k: Tensor, v: Tensor, more: int) -> None:
        """``k``, ``v`` ``B P H E`` at its begin, and place for ``more`` columns and for what will come after them."""
        past = k.shape[1]
        shape = (k.shape[0], max(_LEAST_ROOM, 2 * (past + more)), *k.shape[2:])
        self._k, self._v, self._used = k.new_empty(shape), v.new_empty(shape), past
        self._k[:, :past], self._v[:, :past] = k, v

    @property
    def left(self) -> int:
        """Columns to spare."""
        return self._k.shape[1] - self._used

    def append(self, k: Tensor, v: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Write columns behind the last; the newest ``past`` and these, as views."""
        begin, end = self._used, self._used + k.shape[1]
        # .data: views of the columns before are told of edits by their version, and this is none
        self._k.data[:, begin:end], self._v.data[:, begin:end], self._used = k, v, end
        return self._k[:, begin - past : end], self._v[:, begin - past : end]


@dataclass
class AttentionState(LayerState):
    """Keys (turned by their positions) and values of the tokens read, the newest last, and how many each row read.

    Columns are aligned on the right: column P-1 holds each row's last token. Where rows have read different numbers of
    tokens, a shorter one's first columns hold nothing; ``even`` says that there are no such columns. Sliding-window
    attention keeps the last ``window - 1``, which is all that a later query can see.
    """

    noun = "attention"

    k: Tensor  # B P H E
    v: Tensor  # B P H E
    read: Tensor  # B
    even: bool = True
    room: "Room | None" = field(default=None, repr=False, compare=False)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "AttentionState":
        return dataclasses.replace(super().map(fn), room=None)

    def followed_by(self, k: Tensor, v: Tensor, grows: bool) -> "tuple[Tensor, Tensor, Room | None]":
        """Keys and values with these ``B L H E`` behind them, and what memory to spare that leaves.

        ``grows``: the state belongs to a generation, which reads from it once: its memory has room, and appending to it
        costs what is appended. Otherwise, and where the room is gone, all is copied. The state stays as it is, but for
        the room, which goes to the state that follows.
        """
        if not grows:
            return torch.cat([self.k, k], 1), torch.cat([self.v, v], 1), None
        room, self.room = self.room, None
        if room is None or room.left < k.shape[1]:
            room = Room(self.k, self.v, k.shape[1])
        keys, values = room.append(k, v, self.k.shape[1])
        return keys, values, room

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        k, v, read = (tensors[name] for name in ("k", "v", "read"))
        return cls(k, v, read, bool((read >= k.shape[1]).all()) and bool((read == read[:1]).all()))

    def positions(self) -> Tensor:
        """The position of every column, ``B P``; negative where it holds nothing."""
        return self.read[:, None] + torch.arange(-self.k.shape[1], 0, device=self.k.device)


@dataclass
class SSMState(LayerState):
    """The state of a time-invariant state space model, always float32 (float64 in a float64 model).

    ``ssm``: N real states a channel, or N/2 complex ones, each its real and then its imaginary part.
    """

    noun = "S4D"

    ssm: Tensor  # B D N


@dataclass
class ConvSSMState(LayerState):
    """The same behind a conv of width K (H3: its shift SSM), whose last K-1 inputs ``conv`` holds, oldest first."""

    noun = "S4D or H3"

    ssm: Tensor  # B D N
    conv: Tensor  # B D K-1


@dataclass
class ConvState(LayerState):
    """The last K-1 inputs of a conv, oldest first."""

    noun = "a gated convolution"

    conv: Tensor  # B D K-1


@dataclass
class LSTMState(LayerState):
    """Hidden state and cell state of an LSTM, float32 (float64 in a float64 model)."""

    noun = "an LSTM"

    h: Tensor  # B D
    c: Tensor  # B D

"""Held-out quality of a language model: bits per byte of a text, and losses on windows during training."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mambascope.errors import InputError
from mambascope.training.data import SEPARATOR, encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["BitsPerByte", "bits_per_byte", "held_out_losses"]


@dataclass(frozen=True)
class BitsPerByte:
    """How well a text was predicted: all its tokens, each once."""

    nats: float
    tokens: int
    utf8_bytes: int
    words: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.utf8_bytes

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def word_perplexity(self) -> float:
        """exp(nats per white-space separated word): comparable with word-level models of the same text."""
        return math.exp(self.nats / self.words)


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    tokenizer: "Tokenizer",
    text: str,
    *,
    piece: int = 2048,
    reset_every: int | None = None,
    window: int | None = None,
    report: Callable[[str], None] | None = None,
) -> BitsPerByte:
    """Bits per UTF-8 byte of a text: total nats / ln 2 / bytes.

    The model reads the separator token and then the whole text as one stream, in pieces of ``piece`` tokens with its
    state carried on, so that every token is predicted from all that came before and scored exactly once.
    ``reset_every`` (tokens, a multiple of ``piece``) starts afresh from the separator instead: a measure of what long
    context brings. ``window`` (tokens, even) reads windows that overlap by half and scores the second halves, so that
    every token has between half a window and a window before it: for attention, which knows no more than the length it
    was trained at. Sums are float64. Raises InputError for an empty text or a tokenizer without separator.
    """
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None:
        raise InputError(f"the tokenizer has no {SEPARATOR!r} token to start from")
    if not text:
        raise InputError("the text is empty: bits per byte needs at least one byte")
    if reset_every is not None and (reset_every < piece or reset_every % piece):
        raise InputError(f"reset_every must be a multiple of piece = {piece}, got {reset_every}")
    device = next(model.parameters()).device
    ids = torch.from_numpy(encode(tokenizer, text).astype(np.int64)).to(device)
    inputs = torch.cat([ids.new_tensor([separator]), ids[:-1]])
    if window is not None:
        if reset_every is not None or window < 2 or window % 2:
            raise InputError(f"window must be an even number of tokens, without reset_every, got {window}")
        return _counted(_window_nats(model, inputs, ids, window, report), text, len(ids))
    nats, state = torch.zeros((), dtype=torch.float64, device=device), None
    for start in range(0, len(ids), piece):
        tokens, targets = inputs[start : start + piece], ids[start : start + piece]
        if reset_every is not None and start % reset_every == 0:
            state = None
            tokens = torch.cat([tokens.new_tensor([separator]), tokens[1:]])
        logits, state = model(tokens[None], return_type="logits", state=state, return_state=True)
        nats += F.cross_entropy(logits[0].float(), targets, reduction="none").double().sum()
        if report is not None and start // piece % 32 == 31:
            report(f"{start + len(targets):,}/{len(ids):,} tokens")
    return _counted(nats.item(), text, len(ids))


def _counted(nats: float, text: str, tokens: int) -> BitsPerByte:
    return BitsPerByte(nats, tokens, len(text.encode("utf-8")), len(text.split()))


def _window_nats(
    model: nn.Module, inputs: torch.Tensor, ids: torch.Tensor, window: int, report: Callable[[str], None] | None
) -> float:
    """-log p of ``ids``, each read after the half window before its own; eight windows at a time."""
    half, total = window // 2, 0.0
    first, rest = ids[:half], ids[half:]
    logits = model(inputs[None, : len(first)], return_type="logits")[0]
    total += F.cross_entropy(logits.float(), first, reduction="none").double().sum().item()
    starts = list(range(0, len(rest), half))
    for a in range(0, len(starts), 8):
        for group in _of_one_length([inputs[s : s + window] for s in starts[a : a + 8]]):
            rows = torch.stack([row for _, row in group])
            logits = model(rows, return_type="logits")[:, half:].float()  # B half V
            goal = torch.stack([rest[starts[a + i] :][: rows.shape[1] - half] for i, _ in group])
            total += F.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="none").double().sum().item()
        if report is not None and a // 8 % 32 == 31:
            report(f"{starts[a]:,}/{len(ids):,} tokens")
    return total


def _of_one_length(rows: list[torch.Tensor]) -> list[list[tuple[int, torch.Tensor]]]:
    """Rows with their places, grouped by length: the last of a text may be short."""
    groups: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(len(row), []).append((i, row))
    return list(groups.values())


def held_out_losses(
    streams: dict[str, np.ndarray], *, length: int, windows: int, batch: int
) -> Callable[[nn.Module], dict[str, float]]:
    """A function model -> mean nats per token on the first ``windows`` windows of each stream, for use in training."""
    chosen: dict[str, torch.Tensor] = {}
    for name, ids in streams.items():
        count = min(windows, (len(ids) - 1) // length)
        if count < 1:
            raise InputError(f"held-out part of {name!r} has {len(ids):,} tokens, fewer than one window of {length}")
        rows = [ids[i * length : (i + 1) * length + 1] for i in range(count)]
        chosen[name] = torch.from_numpy(np.stack(rows).astype(np.int64))  # windows L+1

    def losses(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        result: dict[str, float] = {}
        for name, rows in chosen.items():
            nats = 0.0
            for part in rows.split(batch):
                part = part.to(device)
                logits = model(part[:, :-1].contiguous(), return_type="logits")
                nats += F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item()
            result[name] = nats / (rows.shape[0] * length)
        return result

    return losses

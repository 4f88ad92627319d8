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
    report: Callable[[str], None] | None = None,
) -> BitsPerByte:
    """Bits per UTF-8 byte of a text: total nats / ln 2 / bytes.

    The model reads the separator token and then the whole text as one stream, in pieces of ``piece`` tokens with its
    state carried on, so that every token is predicted from all that came before and scored exactly once.
    ``reset_every`` (tokens, a multiple of ``piece``) starts afresh from the separator instead: a measure of what long
    context brings. Sums are float64. Raises InputError for an empty text or a tokenizer without separator.
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
    return BitsPerByte(nats.item(), len(ids), len(text.encode("utf-8")), len(text.split()))


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

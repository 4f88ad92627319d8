"""Tokens as text: labels for tables and figures."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["token_labels"]


def token_labels(model: Any, tokens: Tensor | Sequence[int]) -> tuple[str, ...]:
    """One text a token, as the tokenizer writes it; ``[id]`` where the model has no tokenizer."""
    ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    if model.tokenizer is None:
        return tuple(f"[{i}]" for i in ids)
    known = {i: model.tokenizer.token(i) for i in set(ids)}
    return tuple(known[i] for i in ids)

"""Two prompts to compare, row by row: checked for equal token lengths, or padded and aligned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.hooks.sites import Padding

__all__ = ["Pair", "pair", "tokens_of"]


def tokens_of(model: Any, text: Any, attention_mask: Tensor | None = None) -> tuple[Tensor, Padding | None]:
    """Tokens ``B L`` and padding of whatever the model takes."""
    options = {} if attention_mask is None else {"attention_mask": attention_mask}
    with torch.no_grad():
        _, cache = model.run_with_cache(text, names_filter="hook_embed", stop_at_layer=0, **options)
    return cache.recording.tokens, cache.recording.padding


@dataclass(frozen=True)
class Pair:
    """Clean and corrupted tokens ``B L`` of one shape; masks ``B L`` bool where rows are padded (right), else None."""

    clean: Tensor
    corrupted: Tensor
    clean_mask: Tensor | None = None
    corrupted_mask: Tensor | None = None

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Real tokens of every row: (clean, corrupted)."""
        return list(
            zip(_lengths(self.clean, self.clean_mask), _lengths(self.corrupted, self.corrupted_mask), strict=True)
        )

    def counterpart(self, positions: Sequence[int] | int, align: str = "start") -> list[int]:
        """For a corrupted position in every row, the clean one: counted from the ``start`` or from the ``end``.

        InputError where a row's clean text has no such token.
        """
        if align not in ("start", "end"):
            raise InputError(f"align is 'start' or 'end', got {align!r}")
        out = []
        each = [positions] * len(self.lengths) if isinstance(positions, int) else list(positions)
        for b, (t, (n, m)) in enumerate(zip(each, self.lengths, strict=True)):
            if not -m <= t < m:
                raise InputError(f"row {b}: position {t} is outside the corrupted text of {m} tokens")
            at = t % m + (n - m if align == "end" else 0)
            if not 0 <= at < n:
                raise InputError(f"row {b}: position {t} has no counterpart in the clean text of {n} tokens")
            out.append(at)
        return out


def _lengths(tokens: Tensor, mask: Tensor | None) -> list[int]:
    return [tokens.shape[1]] * tokens.shape[0] if mask is None else mask.sum(1).tolist()


def pair(model: Any, clean: Any, corrupted: Any, unequal: str = "refuse") -> Pair:
    """Tokenise two prompts (texts, lists of texts, ids) so that row b of one goes with row b of the other.

    ``unequal="refuse"``: rows of different token counts are an InputError that lists them; ``"pad"``: all rows are
    padded on the right to one length, with masks; positions then count each row's own tokens, and
    :meth:`Pair.counterpart` maps them from the start or from the end.
    """
    if unequal not in ("refuse", "pad"):
        raise InputError(f"unequal is 'refuse' or 'pad', got {unequal!r}")
    (a, pad_a), (b, pad_b) = tokens_of(model, clean), tokens_of(model, corrupted)
    if a.shape[0] != b.shape[0]:
        raise InputError(f"{a.shape[0]} clean prompts, {b.shape[0]} corrupted ones; give as many of each")
    mask_a, mask_b = (None if p is None else p.mask for p in (pad_a, pad_b))
    both = list(zip(_lengths(a, mask_a), _lengths(b, mask_b), strict=True))
    wrong = [(i, n, m) for i, (n, m) in enumerate(both) if n != m]
    if wrong and unequal == "refuse":
        shown = ", ".join(f"row {i}: {n} and {m}" for i, n, m in wrong[:5]) + (", …" if len(wrong) > 5 else "")
        raise InputError(
            f"clean and corrupted prompts differ in their number of tokens ({shown}); change words for words of as "
            "many tokens, or take pair(…, unequal='pad') and say which positions go together (counterpart)"
        )
    if mask_a is None and mask_b is None and not wrong:
        return Pair(a, b)
    width = max(a.shape[1], b.shape[1])
    (a, mask_a), (b, mask_b) = _padded(model, a, mask_a, width), _padded(model, b, mask_b, width)
    return Pair(a, b, mask_a, mask_b)


def _padded(model: Any, tokens: Tensor, mask: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    missing = width - tokens.shape[1]
    fill = tokens.new_full((tokens.shape[0], missing), model.pad_token_id)
    return torch.cat([tokens, fill], 1), torch.cat([mask, torch.zeros_like(fill, dtype=torch.bool)], 1)

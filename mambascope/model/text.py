"""The text side of the model: TransformerLens' tokenisation vocabulary on our tokenizer."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.model.inputs import check_ids

if TYPE_CHECKING:
    from mambascope.config import MambaConfig
    from mambascope.loading.tokenizer import Tokenizer

__all__ = ["TextMethods"]


class TextMethods:
    """Mixed into HookedMamba: text to ids and back, and directions of tokens in the residual stream."""

    cfg: "MambaConfig"
    tokenizer: "Tokenizer | None"
    device: torch.device
    W_U: Tensor

    def _tokenizer(self) -> "Tokenizer":
        if self.tokenizer is None:
            raise InputError(f"model {self.cfg.name!r} has no tokenizer; pass token ids, or give it one (tokenizer=)")
        return self.tokenizer

    @property
    def pad_token_id(self) -> int:
        """The id that fills padded columns; it is masked, so its choice changes no number."""
        return self.cfg.eos_token_id if self.cfg.eos_token_id is not None else 0

    def encode_texts(self, texts: list[str], prepend_bos: bool | None = None) -> tuple[list[list[int]], bool]:
        """Ids of each text, and whether a BOS was put in front (``None``: as the model was trained)."""
        bos = self.cfg.prepend_bos if prepend_bos is None else prepend_bos
        if bos and self.cfg.bos_token_id is None:
            raise InputError(f"prepend_bos=True, but model {self.cfg.name!r} has no BOS token")
        front = [self.cfg.bos_token_id] if bos and self.cfg.bos_token_id is not None else []
        rows = []
        for i, text in enumerate(texts):
            row = front + list(self._tokenizer().encode(text))
            if not row:
                raise InputError(f"text {i} is empty: it has no token" if len(texts) > 1 else "the text is empty")
            if max(row) >= self.cfg.n_tokens:
                raise InputError(f"the tokenizer gives id {max(row)}, but the model knows {self.cfg.n_tokens} tokens")
            rows.append(row)
        return rows, bool(front)

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
        padding_side: str = "right",
    ) -> Tensor:
        """Text -> ids ``B L``. Ragged texts are padded; ``model(list of texts)`` also masks the padding for you.

        ``truncate`` is accepted for TransformerLens' sake: a recurrent model has no context limit.
        """
        if padding_side not in ("left", "right"):
            raise InputError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        if not isinstance(input, str) and not (
            isinstance(input, (list, tuple)) and input and all(isinstance(t, str) for t in input)
        ):
            raise InputError(f"to_tokens takes a text or a list of texts, got {type(input).__name__}")
        rows, _ = self.encode_texts([input] if isinstance(input, str) else list(input), prepend_bos)
        width = max(len(row) for row in rows)
        fill = [[self.pad_token_id] * (width - len(row)) for row in rows]
        padded = [f + row if padding_side == "left" else row + f for row, f in zip(rows, fill, strict=True)]
        tokens = torch.tensor(padded)
        return tokens.to(self.device) if move_to_device else tokens

    def to_string(self, tokens: Tensor | list[int] | int) -> str | list[str]:
        """Ids -> text; a ``B L`` tensor gives a list of texts."""
        tokens = torch.as_tensor(tokens)
        if tokens.ndim == 2:
            return [self._tokenizer().decode(row) for row in tokens.tolist()]
        return self._tokenizer().decode(tokens.reshape(-1).tolist())

    def to_str_tokens(self, input: str | Tensor | list[Any], prepend_bos: bool | None = None) -> list[Any]:
        """Each token as text; a list of texts or a ``B L`` tensor gives a list for each row."""
        if isinstance(input, str):
            return self._pieces(self.encode_texts([input], prepend_bos)[0][0])
        if isinstance(input, list) and input and isinstance(input[0], str):
            return [self._pieces(row) for row in self.encode_texts(input, prepend_bos)[0]]
        tokens = torch.as_tensor(input)
        if tokens.ndim == 2 and tokens.shape[0] > 1:
            return [self._pieces(row) for row in tokens.tolist()]
        return self._pieces(tokens.reshape(-1).tolist())

    def _pieces(self, ids: list[int]) -> list[str]:
        return [self._tokenizer().decode([i]) for i in ids]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is exactly one token; InputError naming its pieces if it is not."""
        ids = self.encode_texts([string], prepend_bos=False)[0][0]
        if len(ids) != 1:
            raise InputError(f"{string!r} is {len(ids)} tokens: {self._pieces(ids)}; give a text that is one token")
        return ids[0]

    def to_single_str_token(self, token: int) -> str:
        """The text of one id."""
        check_ids(torch.tensor([[token]]), self.cfg.n_tokens)
        return self._tokenizer().decode([token])

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """Columns of W_U: the directions that raise these tokens' logits, ``M`` or ``… M``."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=self.device)
        check_ids(ids.reshape(1, -1), self.cfg.n_tokens)
        directions = self.W_U.T[ids]  # … M
        return directions.reshape(-1) if ids.numel() == 1 else directions

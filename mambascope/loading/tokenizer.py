"""Text to token ids and back: a thin wrapper over ``tokenizers.Tokenizer`` that hides nothing.

It never adds special tokens by itself, never truncates and never pads, whatever tokenizer.json asks for: a token
that a state space model sees changes every later number, so only the model decides on BOS.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mambascope.errors import InputError, LoadError
from mambascope.loading.files import ModelFolder, write_text

__all__ = ["Tokenizer"]

TOKENIZER_BYTES = 256 << 20


class Tokenizer:
    """A tokenizer from a ``tokenizer.json``.

    ``backend`` is the wrapped ``tokenizers.Tokenizer``; truncation, padding and BPE dropout that its file may ask
    for are switched off in it. ``bos_token`` and ``eos_token`` are texts of its vocabulary.

    Raises
    ------
    LoadError: a bos or eos token that the vocabulary does not hold.
    """

    def __init__(
        self, backend: "tokenizers.Tokenizer", *, bos_token: str | None = None, eos_token: str | None = None
    ) -> None:
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            warnings.warn("the tokenizer's BPE dropout (random tokens, for training) is switched off", stacklevel=2)
            backend.model.dropout = None  # type: ignore[attr-defined]
        self.bos_token, self.eos_token = bos_token, eos_token
        self.bos_token_id = self._special("bos_token", bos_token)
        self.eos_token_id = self._special("eos_token", eos_token)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        """One more than the highest id, added tokens included."""

    def _special(self, role: str, token: str | None) -> int | None:
        if token is None:
            return None
        found = self.backend.token_to_id(token)
        if found is None:
            raise LoadError(f"the {role} {token!r} is not in the tokenizer's vocabulary")
        return found

    # ---- where it comes from ----------------------------------------------------------------------

    @classmethod
    def from_bytes(cls, data: bytes, where: str, **special: Any) -> "Tokenizer":
        """A tokenizer from the content of a tokenizer.json; LoadError names ``where`` it came from."""
        try:
            backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except BaseException as error:
            # The Rust side reports a broken file by bare Exception, and now and then by a panic.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise LoadError(f"{where} is not a tokenizer: {str(error)[:200]}") from None
        return cls(backend, **special)

    @classmethod
    def from_file(cls, path: str | Path, *, bos_token: str | None = None, eos_token: str | None = None) -> "Tokenizer":
        """A tokenizer from a tokenizer.json that you name (its folder's other files are not read)."""
        path = Path(path)
        folder = ModelFolder(path.parent)
        data = folder.read_bytes(path.name, TOKENIZER_BYTES)
        return cls.from_bytes(data, f"{str(path)!r}", bos_token=bos_token, eos_token=eos_token)

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """tokenizer.json of a model folder, with bos and eos from tokenizer_config.json or special_tokens_map.json.

        Raises
        ------
        LoadError: the folder has no tokenizer.json, or it is broken.
        """
        folder = ModelFolder(path)
        if not folder.has("tokenizer.json"):
            raise LoadError(
                f"{str(path)!r} has no tokenizer.json. Put one there, or pass tokenizer= (a folder, a tokenizer.json, "
                "a hub id such as 'EleutherAI/gpt-neox-20b', which Mambas trained on the Pile use, or a Tokenizer), or "
                "tokenizer=False to work with token ids only"
            )
        data = folder.read_bytes("tokenizer.json", TOKENIZER_BYTES)
        special: dict[str, str | None] = {"bos_token": None, "eos_token": None}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if folder.has(name):
                values = folder.read_json(name, TOKENIZER_BYTES)
                special.update({role: _text(values[role]) for role in special if _text(values.get(role))})
        tokenizer = cls.from_bytes(data, f"tokenizer.json in {str(path)!r}")
        for role, token in special.items():
            if token is not None and tokenizer.backend.token_to_id(token) is None:
                warnings.warn(f"the {role} {token!r} of {str(path)!r} is not in its vocabulary: ignored", stacklevel=2)
            else:
                setattr(tokenizer, role, token)
                setattr(tokenizer, f"{role}_id", tokenizer._special(role, token))
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json (bos and eos) that :meth:`from_folder` reads."""
        write_text(Path(folder) / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {role: getattr(self, role) for role in ("bos_token", "eos_token") if getattr(self, role) is not None}
        write_text(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")

    # ---- what it does -----------------------------------------------------------------------------

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer.json itself would put the BOS token in front of a text (its trained convention)."""
        if self.bos_token_id is None:
            return False
        with_special = self.backend.encode("a", add_special_tokens=True).ids
        return with_special[:1] == [self.bos_token_id] and with_special != self.encode("a")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens of the tokenizer's own; NUL is a character like any other.

        Raises
        ------
        InputError: not a text, or a lone surrogate (its position is named), which has no UTF-8 form.
        """
        return self.backend.encode(_checked(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in parallel."""
        if isinstance(texts, str):
            raise InputError("encode_batch takes a list of texts; use encode for one")
        checked = [_checked(text, f"text {i}: ") for i, text in enumerate(texts)]
        return [found.ids for found in self.backend.encode_batch(checked, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens spelled out; an incomplete UTF-8 sequence shows as U+FFFD.

        Raises
        ------
        InputError: an id that the vocabulary does not hold (it would vanish without a trace).
        """
        for token in ids:
            self._known(token)
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of token ids."""
        return [self.decode(row) for row in rows]

    def token(self, token_id: int) -> str:
        """One id as text."""
        return self.decode([token_id])

    def single_token(self, text: str) -> int:
        """The id of a text that is exactly one token.

        Raises
        ------
        InputError: it is none or several; the text names the pieces.
        """
        ids = self.encode(text)
        if len(ids) != 1:
            pieces = [self.token(i) for i in ids]
            raise InputError(f"{text!r} is {len(ids)} tokens, {pieces}; give a text that is one token")
        return ids[0]

    def _known(self, token: int) -> None:
        if isinstance(token, bool) or not isinstance(token, int):
            raise InputError(f"token ids are integers, got {type(token).__name__} {token!r}")
        if not 0 <= token < self.vocab_size or self.backend.id_to_token(token) is None:
            raise InputError(f"the tokenizer has no token with id {token}; its ids go from 0 to {self.vocab_size - 1}")

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens, bos={self.bos_token!r}, eos={self.eos_token!r})"


def _text(value: object) -> str | None:
    """A special token as transformers stores it: a text, or an object with its ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _checked(text: object, which: str = "") -> str:
    if not isinstance(text, str):
        raise InputError(f"{which}expected a text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{which}character {error.start} is the lone surrogate {text[error.start]!r}, which no UTF-8 text can "
            "hold; decode the source with errors='replace', or remove it"
        ) from None
    return text

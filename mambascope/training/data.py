"""From text files to a memory-mapped file of token ids.

1. :func:`read_documents` reads a ``.txt`` or ``.txt.xz`` file, one document between separator lines.
2. :func:`train_tokenizer` learns a byte-level BPE (Sennrich 1508.07909 on bytes) on those documents.
3. :func:`write_tokens` encodes them once, a separator id after each, into a flat uint16 file.
4. :class:`TokenFile` opens it without reading it; :mod:`mambascope.training.sampler` draws windows.
"""

import hashlib
import json
import lzma
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mambascope.errors import InputError, LoadError
from mambascope.storage import write_bytes
from mambascope.training.recipe import check_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "HELD_OUT",
    "SEPARATOR",
    "TokenFile",
    "encode",
    "find_file",
    "pieces",
    "read_documents",
    "read_text",
    "sha256",
    "train_tokenizer",
    "write_tokens",
]

HELD_OUT = "wikitext-2/valid.txt.xz"
"""The text that language models are measured on, below a data folder; it is in no training source."""

SEPARATOR = "<|endoftext|>"
"""A line with this text alone ends a document; it is also the one special token, id 0."""

_PIECE = 1 << 16
_CUT = re.compile(r"\s(?=\S)")


def find_file(name: str, folders: Iterable[Path]) -> Path:
    """The first ``folder/name`` that exists; raises LoadError with the places looked at."""
    tried = [Path(folder) / name for folder in folders]
    for path in tried:
        if path.is_file():
            return path
    raise LoadError(
        f"data file {name!r} was not found; tried {', '.join(map(str, tried)) or 'nothing, without a data folder'}. "
        "Pass its folder with --data."
    )


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | Path) -> str:
    """The whole text of a UTF-8 file, unpacked if its name ends in ``.xz``; newlines are left as they are.

    Raises LoadError where the file is missing, damaged, empty or not UTF-8.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    except (lzma.LZMAError, EOFError) as error:
        raise LoadError(f"{path} is not a whole xz file ({error}); fetch it again") from None
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text:
        raise LoadError(f"{path} holds no text")
    return text


def read_documents(path: str | Path, documents: tuple[int, int | None] = (0, None)) -> list[str]:
    """The documents of a file, in order, without their separator lines; ``documents`` selects a slice of them.

    Raises LoadError for an unreadable file and InputError for an empty selection.
    """
    found = re.split(rf"^{re.escape(SEPARATOR)}\n?", read_text(path), flags=re.MULTILINE)
    found = [document for document in found if document.strip()]
    chosen = found[documents[0] : documents[1]]
    if not chosen:
        raise InputError(f"{path} has {len(found)} documents; the slice {documents[0]}:{documents[1]} selects none")
    return chosen


def pieces(text: str, size: int = _PIECE) -> Iterator[str]:
    """Cut a text into parts of about ``size`` characters whose encodings, joined, equal the text's own.

    The byte-level pre-tokenizer never joins a token across the last white-space character before
    a visible one, so that is where the cuts are.
    """
    start = 0
    while len(text) - start > size:
        cut = _CUT.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    if start < len(text):
        yield text[start:]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> "Tokenizer":
    """A byte-level BPE of ``vocabulary`` entries: :data:`SEPARATOR` (id 0), the 256 bytes, then merges.

    Every string round-trips, since all bytes are entries. Same texts, same result. Takes about
    100 s and 1 GB for 70 MB on two cores. Raises ConfigError for a vocabulary that does not hold the bytes
    (257 at least) or that ids of 16 bits do not hold (65,536 at most), InputError for one that the texts cannot fill.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocabulary(vocabulary)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise InputError(
            f"the texts give a vocabulary of {tokenizer.get_vocab_size()}, not {vocabulary}: they are too short or too "
            "uniform; ask for a smaller vocabulary or give more text"
        )
    return tokenizer


def encode(tokenizer: "Tokenizer", text: str) -> np.ndarray:
    """Token ids of a text, uint16, without separators; equal to encoding it in one go, at less memory."""
    parts: list[np.ndarray] = []
    batch: list[str] = []
    for piece in pieces(text):
        batch.append(piece)
        if len(batch) == 64:  # enough for every core, few enough to keep the encodings small
            parts += _encode_batch(tokenizer, batch)
            batch = []
    parts += _encode_batch(tokenizer, batch)
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def _encode_batch(tokenizer: "Tokenizer", batch: list[str]) -> list[np.ndarray]:
    if not batch:
        return []
    return [np.asarray(e.ids, np.uint16) for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]


@dataclass(frozen=True)
class _Header:
    """What the ``.json`` beside a token file says about it."""

    tokens: int
    documents: int
    utf8_bytes: int
    vocabulary: int
    tokenizer_sha256: str
    source_sha256: str


class TokenFile:
    """Token ids of many documents in one memory-mapped uint16 file, with its header in ``<path>.json``.

    ``ids`` is the array (tokens,), not read until touched. Raises LoadError where the header is missing
    or does not fit the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.header = _Header(**json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8")))
            size = self.path.stat().st_size
        except OSError as error:
            raise LoadError(f"cannot open token file {self.path}: {error.strerror} ({error.filename})") from None
        except (ValueError, TypeError) as error:
            raise LoadError(f"{self.path.with_suffix('.json')} is no header of a token file: {error}") from None
        if size != 2 * self.header.tokens:
            raise LoadError(
                f"{self.path} has {size:,} bytes, its header says {2 * self.header.tokens:,}: the file was cut short; "
                "delete it and prepare the data again"
            )
        self.ids: np.ndarray = np.memmap(self.path, np.uint16, "r") if size else np.zeros(0, np.uint16)

    def __len__(self) -> int:
        return self.header.tokens


def write_tokens(
    path: str | Path, tokenizer: "Tokenizer", documents: Iterable[str], source_sha256: str = ""
) -> TokenFile:
    """Encode documents into ``path``, the separator's id after each, and open the result.

    Written under a temporary name and renamed, so that an interrupted call leaves no half file. Raises
    InputError where the tokenizer has no separator or more than 65,536 entries.
    """
    path = Path(path)
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None:
        raise InputError(f"the tokenizer has no {SEPARATOR!r} token; documents could not be told apart")
    if tokenizer.get_vocab_size() > 65536:
        raise InputError(f"token files hold 16-bit ids; this tokenizer has {tokenizer.get_vocab_size():,} entries")
    tokens = count = utf8 = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            for document in documents:
                ids = encode(tokenizer, document)
                file.write(ids.tobytes())
                file.write(np.uint16(separator).tobytes())
                tokens += len(ids) + 1
                count += 1
                utf8 += len(document.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)  # most of all where the disk is full
        raise
    digest = hashlib.sha256(tokenizer.to_str().encode("utf-8")).hexdigest()
    header = _Header(tokens, count, utf8, tokenizer.get_vocab_size(), digest, source_sha256)
    os.replace(part, path)
    write_bytes(path.with_suffix(".json"), (json.dumps(asdict(header), indent=1) + "\n").encode())
    return TokenFile(path)

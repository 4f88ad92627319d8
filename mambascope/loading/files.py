"""Files of a model folder: read only from inside the folder, written so that the old file survives a failure.

A model folder comes from anywhere, so nothing in it is trusted: names are plain file names, links may not lead
out of the folder (the hub cache's own links into its ``blobs`` are the one exception), JSON is size-limited and
may not repeat a key.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambascope.errors import LoadError
from mambascope.storage import replacing

__all__ = ["CONFIG_BYTES", "INDEX_BYTES", "ModelFolder", "atomic_write", "parse_json", "plain_name", "write_text"]

CONFIG_BYTES = 1 << 20
INDEX_BYTES = 64 << 20


def plain_name(name: object, where: str) -> str:
    """``name`` if it is a bare file name; a path, a drive, ``..`` or a control character is refused.

    Raises
    ------
    LoadError: names the offending entry and ``where`` it stands.
    """
    good = (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and not any(c in "/\\:" or ord(c) < 32 for c in name)
    )
    if not good:
        raise LoadError(
            f"{where}: {_short(name)} is not a plain file name; a checkpoint may only name files of its own folder"
        )
    assert isinstance(name, str)
    return name


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def parse_json(data: bytes, where: str) -> Any:
    """JSON in UTF-8; repeated keys, excessive nesting and malformed text are refused with ``where`` they are."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise LoadError(f"{where}: the key {_short(key)} appears twice, so its meaning is ambiguous")
                seen.add(key)
        return out

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    except RecursionError:
        raise LoadError(f"{where}: JSON nested too deeply; this is not a file that a model needs") from None
    except ValueError as error:  # also UnicodeDecodeError, JSONDecodeError and over-long integers
        raise LoadError(f"{where}: not valid JSON ({error}); download the file again") from None


class ModelFolder:
    """A folder with a model's files, read without ever leaving it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.root = self.path.resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links before Python 3.13
            raise LoadError(f"the folder {str(path)!r} cannot be opened: {error}") from None
        if not self.root.is_dir():
            raise LoadError(f"{str(path)!r} is a file; give the folder that holds config.json and the weights")

    def __str__(self) -> str:
        return str(self.path)

    def _allowed_roots(self) -> list[Path]:
        """The folder itself and, for a snapshot of the hub's cache, the two places its links point to."""
        roots = [self.root]
        repo = self.root.parent.parent
        if self.root.parent.name == "snapshots" and repo.name.startswith("models--"):
            roots += [repo / "blobs", repo.parent / "blobs"]
        return roots

    def has(self, name: str) -> bool:
        """Whether the folder lists ``name``, even as a broken link (which :meth:`file` then reports)."""
        return os.path.lexists(self.root / name)

    def file(self, name: str, where: str | None = None) -> Path:
        """The resolved path of a regular file of this folder.

        Raises
        ------
        LoadError: ``name`` is no plain name, is missing, leads out of the folder, or is no regular file.
        """
        where = where or str(self)
        path = self.root / plain_name(name, where)
        if not self.has(name):
            raise LoadError(f"{where}: the file {name!r} is missing from {str(self)!r}; download the model again")
        try:
            target = path.resolve(strict=True)
            mode = target.stat().st_mode
        except (OSError, RuntimeError) as error:
            raise LoadError(f"{where}: the file {name!r} cannot be opened: {error}") from None
        if not any(target.is_relative_to(root) for root in self._allowed_roots()):
            raise LoadError(
                f"{where}: {name!r} is a link that leads out of the folder (to {str(target)!r}); "
                "copy the file into the folder if you trust it"
            )
        if not stat.S_ISREG(mode):
            raise LoadError(f"{where}: {name!r} is not a regular file")
        return target

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The content of a file of at most ``limit`` bytes."""
        path = self.file(name)
        try:
            with open(path, "rb") as stream:
                data = stream.read(limit + 1)
        except OSError as error:
            raise LoadError(f"{name!r} in {str(self)!r} cannot be read: {error}") from None
        if len(data) > limit:
            raise LoadError(f"{name!r} in {str(self)!r} is larger than {limit:,} bytes; no model needs that")
        return data

    def read_json(self, name: str, limit: int = CONFIG_BYTES) -> dict[str, Any]:
        """A JSON object of this folder, repeated keys refused."""
        where = f"{name!r} in {str(self)!r}"
        value = parse_json(self.read_bytes(name, limit), where)
        if not isinstance(value, dict):
            raise LoadError(f"{where} holds a JSON {type(value).__name__}, expected an object")
        return value


def atomic_write(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, then put it in place in one step.

    A failure at any point (full disk, read-only folder, an interrupt) leaves the old file whole and no debris.

    Raises
    ------
    LoadError: the file cannot be written; the text names it and the cause.
    """
    final = Path(path)
    try:
        with replacing(final) as part:
            write(part)
    except OSError as error:
        raise LoadError(f"cannot write {str(final)!r}: {error}; whatever was there before is unchanged") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """A UTF-8 file, written as :func:`atomic_write` does."""

    def write(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    atomic_write(path, write)

"""Safetensors files of our own making: written whole or not at all, read with their kind checked."""

import glob
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mambascope.errors import MambascopeError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_tensors", "replacing", "sweep_out", "write_bytes", "write_tensors"]

_FORMAT = "mambascope/1"
_UNFINISHED = ".unfinished"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write into, flushed to disk and put in its place at the end, in one step.

    A failure at any point (full disk, an interrupt) leaves the old file whole and no debris, a kill only debris. An
    OSError tells the path.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")
    try:
        temporary.open("xb").close()
        mode = temporary.stat().st_mode  # as the system makes files; who writes may put another one in its place
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename == str(path):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file
    finally:
        temporary.unlink(missing_ok=True)
    _settle(path.parent)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part; see :func:`replacing`."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    with replacing(path) as part:
        part.write_bytes(data)


def sweep_out(path: Path) -> None:
    """Remove what killed writers of this file left beside it, or of any file of this folder in it. Only for one who
    knows that nobody else writes there."""
    folder, name = (path, "*") if path.is_dir() else (path.parent, glob.escape(path.name))
    for left in folder.glob(f".{name}.*{_UNFINISHED}"):
        left.unlink(missing_ok=True)


def _settle(folder: Path) -> None:
    """Let the new name itself reach the disk, where the system can be asked to."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot; the file's content is on disk all the same
        pass
    finally:
        os.close(handle)


def write_tensors(path: str | Path, tensors: dict[str, "Tensor"], meta: dict[str, str]) -> None:
    """Write tensors with text metadata; atomic, see :func:`write_bytes`. The same content gives the same bytes."""
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    seen: set[int] = set()
    for name, value in plain.items():  # safetensors refuses tensors that share storage
        if value.untyped_storage().data_ptr() in seen:
            plain[name] = value.clone()
        seen.add(plain[name].untyped_storage().data_ptr())
    write_bytes(path, _ordered(save(plain, {"format": _FORMAT, **meta})))


def _ordered(data: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them in an order that changes by process."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read_tensors(
    path: str | Path, kind: str, error: type[MambascopeError]
) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Tensors and metadata of a file that :func:`write_tensors` wrote for this ``kind``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            meta = dict(file.metadata() or {})
            if meta.get("format") != _FORMAT or meta.get("kind") != kind:
                raise error(f"{path} is no {kind} file of mambascope (format {meta.get('format')!r})")
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as cause:
        raise error(f"{path} cannot be read: {cause}") from None

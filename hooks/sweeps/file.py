"""A sweep's file: what was asked, and what is done so far; safe against kills, full disks and second processes.

One safetensors file: ``values`` and ``done``, one entry an edit, and a manifest in its metadata. Every finished piece
replaces the file as a whole (written beside it, synced, renamed), so what is there is always readable. A lock file next
to it is held while a sweep writes; the system drops the lock of a process that dies.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import SweepError
from mambascope.storage import read_tensors, sweep_out, write_tensors

__all__ = ["SweepFile", "read_sweep_file"]

_KIND = "sweep"
_SHOWN = 60  # characters of a value in an error


def read_sweep_file(path: str | Path) -> tuple[dict[str, Any], Tensor, Tensor]:
    """``(manifest, values E, done E)``; SweepError if it is no sweep's file."""
    tensors, meta = read_tensors(path, _KIND, SweepError)
    try:
        manifest = json.loads(meta["manifest"])
        values, done = tensors["values"], tensors["done"]
    except (KeyError, json.JSONDecodeError) as error:
        raise SweepError(f"{path} is a sweep file without {error}; it was changed by something else") from error
    if values.shape != done.shape or values.dtype != torch.float64 or done.dtype != torch.bool:
        raise SweepError(f"{path}: values and done do not fit together; it was changed by something else")
    return manifest, values, done


class SweepFile:
    """The file while a sweep writes it. ``asked`` is compared with what an existing file was made for."""

    def __init__(self, path: str | Path, asked: dict[str, Any], about: dict[str, Any], size: int) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise SweepError(f"file must be a path, got {type(path).__name__}")
        self.path = Path(path)
        if self.path.is_dir():
            raise SweepError(f"{self.path} is a folder; give the name of a file to write the sweep in")
        if not self.path.parent.is_dir():
            raise SweepError(f"{self.path.parent} is no folder to write a sweep in; make it first")
        self._manifest = {"asked": _plain(asked), "about": _plain(about)}
        self._lock = _Lock(self.path)
        try:
            sweep_out(self.path)  # the lock is ours
            self.values = torch.full((size,), float("nan"), dtype=torch.float64)
            self.done = torch.zeros(size, dtype=torch.bool)
            if self.path.exists():
                self._go_on()
            else:
                self.write()
        except BaseException:
            self.close()
            raise

    def _go_on(self) -> None:
        manifest, values, done = read_sweep_file(self.path)
        differs = _differences(manifest.get("asked", {}), self._manifest["asked"])
        if differs:
            raise SweepError(
                f"{self.path} holds a sweep of other inputs ({'; '.join(differs)}); "
                "give another file, or delete this one"
            )
        if values.shape != self.values.shape:
            raise SweepError(f"{self.path} holds {len(values)} edits, this sweep has {len(self.values)}")
        self.values, self.done, self._manifest = values, done, manifest

    def put(self, numbers: list[int], values: Tensor) -> None:
        """Keep a finished piece, on disk before this returns."""
        self.values[numbers] = values
        self.done[numbers] = True
        self.write()

    def write(self) -> None:
        try:
            write_tensors(
                self.path,
                {"done": self.done, "values": self.values},
                {"kind": _KIND, "manifest": json.dumps(self._manifest, sort_keys=True)},
            )
        except OSError as error:
            on_disk = "what was done before is in it" if self.path.exists() else "nothing is in it"
            raise SweepError(
                f"{self.path} could not be written ({error}); {on_disk}: make room and run the same call again"
            ) from error

    def close(self) -> None:
        self._lock.release()


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    out = []
    for key in sorted(then.keys() | now.keys()):
        a, b, where = then.get(key), now.get(key), key
        if a == b:
            continue
        while len(json.dumps([a, b])) > _SHOWN and isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            i = next(
                i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y
            )  # long: the first place that differs
            where, a, b = f"{where}[{i}]", a[i], b[i]
        out.append(f"{where}: the file has {_short(a)}, this call {_short(b)}")
    return out


def _short(value: Any) -> str:
    text = json.dumps(value)
    count = f" ({len(value)} entries)" if isinstance(value, list) else ""
    return text if len(text) <= _SHOWN else f"{text[:40]}…{text[-16:]}{count}"


class _Lock:
    """An exclusive lock on ``.NAME.lock`` beside a file; SweepError if another process holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path.parent / f".{path.name}.lock"
        self._handle: int | None = None
        try:
            while True:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                if not _take(handle):
                    os.close(handle)
                    raise SweepError(f"{path} is being written by another sweep; wait for it, or give another file")
                if _same(handle, self.path):
                    break
                os.close(handle)  # its owner removed it between our open and our lock
        except OSError as error:
            raise SweepError(f"{path} cannot be locked ({error}); is its folder writable?") from error
        self._handle = handle

    def release(self) -> None:
        if self._handle is None:
            return
        self.path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None


def _take(handle: int) -> bool:
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
    import msvcrt  # pragma: no cover

    try:  # pragma: no cover
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
    except OSError:  # pragma: no cover
        return False
    return True  # pragma: no cover


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False

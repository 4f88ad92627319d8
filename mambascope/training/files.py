"""One writer to an output folder, folders whose entries have reached the disk, and the JSON files in them."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mambascope.errors import InputError, LoadError
from mambascope.storage import sweep_out

__all__ = ["disk_is_full", "only_writer", "read_json", "sync_folder"]


def disk_is_full(error: OSError) -> bool:
    """Whether a write failed for want of room: the disk, the quota, or the largest size of a file."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut (no effect where unsupported)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder; a second trainer on it is refused. The system frees it when we die.

    What killed writers left of unfinished files in the folder itself is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another training is writing to {folder}; wait for it or give another --out") from None
        sweep_out(folder)
        yield


def read_json(path: Path, keys: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object that a training wrote. Raises LoadError where it is missing, damaged, or lacks one of ``keys``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise LoadError(f"{path} is damaged: {error}") from None
    missing = sorted(set(keys) - set(found)) if isinstance(found, dict) else ["everything: it is no JSON object"]
    if missing:
        raise LoadError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return found

"""A strict reader of one safetensors file, tensor by tensor, into memory of its own.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data
(https://huggingface.co/docs/safetensors). Everything is checked before a byte of data is read. Unlike a memory map,
reading costs the host one tensor at a time and survives a change of the file on disk.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mambascope.errors import LoadError
from mambascope.loading.files import parse_json

__all__ = ["HEADER_BYTES", "NAME_CHARS", "Entry", "SafetensorsFile"]

HEADER_BYTES = 16 << 20
"""Largest header that is read; a model of 100,000 tensors needs about 10 MB."""

NAME_CHARS = 1024
"""Longest tensor name that is read; ours have fewer than 50 characters."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "C64": 64, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What a weight file says of one tensor, known before its data is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None: a stored type that is not a plain float (see ``stored``)."""
    stored: str
    offset: int = 0
    nbytes: int = 0


class SafetensorsFile:
    """One safetensors file; ``entries`` lists its tensors, ``read`` brings one in.

    Raises
    ------
    LoadError: truncated, corrupt, overlapping or over-long content; the text names the file and what is wrong.
    """

    def __init__(self, path: Path, shown: str) -> None:
        self._shown = shown
        try:
            self._stream = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by close())
        except OSError as error:
            raise LoadError(f"{shown!r} cannot be read: {error}") from None
        try:
            self.entries = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bad(self, what: str) -> LoadError:
        return LoadError(f"{self._shown!r} is not a whole safetensors file: {what}; download it again")

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = self._stream.readinto(view[done:])
            except OSError as error:
                raise LoadError(f"{self._shown!r} cannot be read: {error}") from None
            if not count:
                raise self._bad("it ended early (was it changed while it was read?)")
            done += count

    def _read_header(self) -> dict[str, Entry]:
        size = os.fstat(self._stream.fileno()).st_size
        if size < 8:
            raise self._bad(f"it has {size} bytes, fewer than the 8 that say how long the header is")
        prefix = bytearray(8)
        self._fill(memoryview(prefix))
        length = int.from_bytes(prefix, "little")
        if length > HEADER_BYTES or length > size - 8:
            raise self._bad(
                f"the header claims {length:,} bytes, but the file has {size:,} and {HEADER_BYTES:,} is the limit"
            )
        header = bytearray(length)
        self._fill(memoryview(header))
        if not header.startswith(b"{"):
            raise self._bad("the header does not start with '{'")
        values = parse_json(bytes(header), f"the header of {self._shown!r}")
        start = 8 + length
        self._check_metadata(values.pop("__metadata__", {}))
        entries = {name: self._entry(name, value, start) for name, value in values.items()}
        self._check_layout(entries, start, size)
        return entries

    def _check_metadata(self, value: Any) -> None:
        good = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        if not good:
            raise self._bad("'__metadata__' is not a map from text to text")

    def _entry(self, name: str, value: Any, start: int) -> Entry:
        def natural(items: Any) -> bool:
            return isinstance(items, list) and all(type(item) is int and item >= 0 for item in items)

        if len(name) > NAME_CHARS:
            raise self._bad(f"a tensor's name has {len(name):,} characters")
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"tensor {name!r} is not described by dtype, shape and data_offsets")
        stored, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(stored, str) or stored not in _BITS:
            raise self._bad(f"tensor {name!r} has the unknown dtype {str(stored)[:40]!r}")
        if not natural(shape) or len(shape) > 16:
            raise self._bad(f"tensor {name!r} has the impossible shape {str(shape)[:80]}")
        if not natural(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
            raise self._bad(f"tensor {name!r} has the impossible data_offsets {str(offsets)[:80]}")
        begin, end = offsets
        bits = math.prod(shape) * _BITS[stored]
        if bits != 8 * (end - begin):
            raise self._bad(
                f"tensor {name!r} of shape {tuple(shape)} and dtype {stored} needs {-(-bits // 8):,} bytes, "
                f"its data_offsets give {end - begin:,}"
            )
        return Entry(tuple(shape), _DTYPES.get(stored), stored, start + begin, end - begin)

    def _check_layout(self, entries: dict[str, Entry], start: int, size: int) -> None:
        at, before = start, None
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset != at:
                what = "overlaps" if entry.offset < at else "leaves a hole after"
                raise self._bad(f"tensor {name!r} {what} {'the header' if before is None else repr(before)}")
            at, before = at + entry.nbytes, name
        if at != size:
            what = "truncated" if at > size else "followed by bytes that belong to no tensor"
            raise self._bad(f"it is {what}: the header describes {at:,} bytes, the file has {size:,}")

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor ``name`` in ``dtype`` on ``device``, in memory of its own."""
        entry = self.entries[name]
        assert entry.dtype is not None, "callers refuse other stored types by name first"
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._stream.seek(entry.offset)
        self._fill(raw.numpy().data)
        return raw.view(entry.dtype).reshape(entry.shape).to(device=device, dtype=dtype)

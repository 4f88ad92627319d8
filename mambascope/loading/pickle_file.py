"""A reader of one ``pytorch_model.bin`` (a pickle), which never runs code from it."""

import pickle
import zipfile
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mambascope.errors import LoadError
from mambascope.loading.safetensors_file import NAME_CHARS, Entry

__all__ = ["PickleFile"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class PickleFile:
    """One pickled state dict, memory-mapped and opened with ``weights_only=True``.

    Raises
    ------
    LoadError: the pickle carries code (it is refused, not run), is truncated, or holds anything but named tensors.
    """

    def __init__(self, path: Path, shown: str) -> None:
        self._shown = shown
        self._tensors = self._open(path)
        self.entries = {name: self._entry(name, value) for name, value in self._tensors.items()}

    def close(self) -> None:
        self._tensors = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> dict[str, Tensor]:
        try:
            zipped = zipfile.is_zipfile(path)
            if zipped:
                self._check_archive(path)
            # Files from before torch 1.6 are no archives and cannot be mapped: they cost their size in memory.
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except LoadError:
            raise
        except pickle.UnpicklingError as error:
            raise LoadError(
                f"{self._shown!r} is refused: {_reason(error)}. A pickle can run code, so only plain tensors are "
                "accepted and nothing of it was run; ask its author for safetensors"
            ) from None
        except Exception as error:
            raise LoadError(
                f"{self._shown!r} is truncated or corrupt: {type(error).__name__}: {_reason(error)}; download it again"
            ) from None
        if not isinstance(values, dict):
            raise LoadError(f"{self._shown!r} holds a {type(values).__name__}, expected a dict from names to tensors")
        return values

    def _check_archive(self, path: Path) -> None:
        """torch.save stores without compression; a compressed entry is a way to fill the memory."""
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise LoadError(f"{self._shown!r} is refused: its entry {info.filename!r} is compressed")

    def _entry(self, name: object, value: object) -> Entry:
        if not isinstance(name, str):
            raise LoadError(f"{self._shown!r} has a key that is no text: {str(name)[:80]}")
        if len(name) > NAME_CHARS:
            raise LoadError(f"{self._shown!r} has a tensor whose name has {len(name):,} characters")
        if not isinstance(value, Tensor):
            raise LoadError(
                f"{self._shown!r}: {name!r} is a {type(value).__name__}, expected a tensor; "
                "if the weights are nested inside, save the inner dict"
            )
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        dtype = value.dtype if plain and value.dtype in _FLOATS else None
        return Entry(tuple(value.shape), dtype, str(value.dtype).removeprefix("torch.") if plain else "special layout")

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor ``name`` in ``dtype`` on ``device``, copied out of the map."""
        tensor = self._tensors[name].detach()
        return tensor.to(device=device, dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def _reason(error: Exception) -> str:
    """The first sentence of torch's long advice (which suggests to switch the check off)."""
    text = str(error)
    for line in text.splitlines():
        if "WeightsUnpickler error:" in line or "Unsupported" in line:
            return line.split("WeightsUnpickler error:")[-1].strip().split("Please")[0].strip(" .")[:200]
    return (text.splitlines() or ["no reason given"])[0].split("Please")[0].strip(" .")[:200]

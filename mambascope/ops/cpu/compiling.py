"""Compiles kernels at their first call, and keeps the machine code in numba's cache folder where there is one."""

from __future__ import annotations

import ctypes
import hashlib
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

from numba import cfunc, types
from numba.core.errors import NumbaError

from mambascope.errors import BackendError
from mambascope.ops.cpu.threads import Arguments

_lock = threading.RLock()
_SIGNATURE = types.void(types.int64)
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_int64)


class Kernel:
    """A C callback `void(int64 address of arguments)`; `address` and `call` compile it when first asked for."""

    def __init__(self, body: Callable[[int], None], arguments: Arguments) -> None:
        self.name, self.arguments, self._body = body.__name__, arguments, body

    def __getattr__(self, name: str) -> Any:
        if name not in ("address", "call", "cached"):
            raise AttributeError(name)
        with _lock:
            if "call" not in self.__dict__:
                self._compile()
        return self.__dict__[name]

    def _compile(self) -> None:
        body = _stamped(self._body, _stamp(Path(self._body.__code__.co_filename).parent))
        options: dict[str, Any] = {"nopython": True, "error_model": "numpy"}
        try:
            self._compiled, self.cached = cfunc(_SIGNATURE, cache=True, **options)(body), True
        except NumbaError as error:
            raise BackendError(
                f"numba could not compile the cpu kernel {self.name!r}: {error}; use backend='torch'"
            ) from error
        except Exception as error:
            if not isinstance(error, RuntimeError):  # that is numba's way to say: no folder that it may write to
                warnings.warn(
                    f"numba's cached code of {self.name!r} cannot be used ({type(error).__name__}: {error}), so it is "
                    "compiled at every start; delete numba's *.nbi and *.nbc files (beside the source files, or in "
                    "NUMBA_CACHE_DIR), or make room on the disk",
                    stacklevel=5,
                )
            self._compiled, self.cached = cfunc(_SIGNATURE, **options)(body), False
        self.address = int(self._compiled.address or 0)
        self.call = _PROTOTYPE(self.address)


def kernel(arguments: Arguments) -> Callable[[Callable[[int], None]], Kernel]:
    """Marks a function of one address as a kernel with these arguments."""
    return lambda body: Kernel(body, arguments)


@cache
def _stamp(folder: Path) -> str:
    """Of the files here and of those in a kernel's own folder, whose functions it inlines."""
    digest = hashlib.sha256()
    for place in sorted({Path(__file__).parent, folder}):
        for file in sorted(place.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _stamped(body: Callable[[int], None], stamp: str) -> FunctionType:
    """The same function with `stamp` in its closure.

    Numba's cache looks at a function's own file, code and closure, not at the files whose functions it inlines: without
    this an edit of `vector.py` would leave old machine code in use."""

    def holder() -> str:
        return stamp

    code = body.__code__.replace(co_freevars=holder.__code__.co_freevars)
    return FunctionType(code, body.__globals__, body.__name__, None, holder.__closure__)

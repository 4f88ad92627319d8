"""Every error that mambascope raises on purpose, and the helper that offers the nearest names.

An error text says what was asked, what was found, and what to do about it.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "CacheError",
    "ConfigError",
    "HookError",
    "InputError",
    "LoadError",
    "MambascopeError",
    "StateError",
    "SweepError",
    "UnknownNameError",
    "nearest",
]


class MambascopeError(Exception):
    """Base of all errors raised by mambascope."""


class ConfigError(MambascopeError, ValueError):
    """A configuration that is contradictory, out of range, or of another architecture."""


class LoadError(MambascopeError, RuntimeError):
    """A checkpoint, tokenizer or hub that cannot be read as asked."""


class InputError(MambascopeError, ValueError):
    """Tokens, masks or arguments that the model cannot take."""


class HookError(MambascopeError, RuntimeError):
    """A hook that cannot fire where it was put, or that returned something unusable."""


class BackendError(MambascopeError, RuntimeError):
    """A compute path that was asked for and cannot run here."""


class StateError(MambascopeError, ValueError):
    """A recurrent state of another model, batch or dtype."""


class CacheError(MambascopeError, RuntimeError):
    """A cache that is stale, belongs to another model, or would not fit."""


class SweepError(MambascopeError, RuntimeError):
    """A sweep whose file belongs to other inputs, is in use, or cannot be written, or whose runs did not all finish."""


class UnknownNameError(MambascopeError, KeyError):
    """A name that matches nothing; the text offers the nearest ones."""

    def __str__(self) -> str:
        # KeyError would show the repr of its argument, quotes included.
        return str(self.args[0]) if self.args else ""


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """A suffix for error texts: ``", did you mean 'x' or 'y'?"``, or nothing if no name is close."""
    found = difflib.get_close_matches(name, list(names), n=n, cutoff=0.5)
    return f", did you mean {' or '.join(repr(x) for x in found)}?" if found else ""

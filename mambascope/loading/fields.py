"""Typed reading of a config's JSON object, with every key accounted for."""

import math
from typing import Any

from mambascope.errors import ConfigError

__all__ = ["Fields"]

_REQUIRED: Any = object()


class Fields:
    """A config's values by key; each getter checks the type, names the key on a mismatch, and marks it as read.

    JSON's ``null`` counts as absent.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self._values = values
        self._read: set[str] = set()
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def unread(self) -> dict[str, Any]:
        """What no getter has asked for."""
        return {key: value for key, value in self._values.items() if key not in self._read}

    def error(self, key: str, expected: str) -> ConfigError:
        text = repr(self._values.get(key))
        return ConfigError(f"{self.where}: {key} is {text[:80]}, expected {expected}")

    def raw(self, key: str, default: Any = None) -> Any:
        """Whatever JSON holds under ``key``."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where} lacks {key!r}")
            return default
        return value

    def skip(self, *keys: str) -> None:
        """Marks keys that mean nothing for the numbers."""
        self._read.update(keys)

    def integer(self, key: str, default: int = _REQUIRED, minimum: int = 1) -> int:
        value = self.raw(key, default)
        if type(value) is not int or not minimum <= value < 2**31:
            raise self.error(key, f"an integer from {minimum}")
        return value

    def number(self, key: str, default: float = _REQUIRED) -> float:
        value = self.raw(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise self.error(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        value = self.raw(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def one_of(self, key: str, default: str, allowed: tuple[str, ...], why: str = "") -> str:
        value = self.raw(key, default)
        if value not in allowed or not isinstance(value, str):
            raise self.error(key, f"{' or '.join(map(repr, allowed))}{why}")
        return value

    def same(self, key: str, resolved: object) -> None:
        """``key``, if present, must repeat a value that was read elsewhere."""
        if key in self and self.raw(key) != resolved:
            raise self.error(key, f"{resolved!r}, which other options of the same config say")

    def must_be(self, key: str, allowed: tuple[object, ...], why: str) -> None:
        """``key``, if present, may only have a value that changes nothing here."""
        value = self.raw(key)
        if value is not None and not any(value == good and type(value) is type(good) for good in allowed):
            raise self.error(key, f"{' or '.join(map(repr, allowed))}: {why}")

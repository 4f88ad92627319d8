"""Whether Triton can compile for NVIDIA here, found out without importing it: that would settle its interpreter."""

import importlib.util
from pathlib import Path

import pytest

__all__ = ["needs_compiler"]


def needs_compiler() -> pytest.MarkDecorator:
    """A mark for tests that compile in a process of their own."""
    found = importlib.util.find_spec("triton")
    if found is None:
        return pytest.mark.skipif(True, reason="triton is not installed (extra 'test')")
    folders = [Path(p) / "backends" / "nvidia" for p in found.submodule_search_locations or ()]
    return pytest.mark.skipif(not any(p.is_dir() for p in folders), reason="triton has no NVIDIA backend here")

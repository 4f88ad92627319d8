"""Triton compiling for NVIDIA without a GPU: a stand-in for its driver, and whether that can be done here.

The second is found out without importing Triton: that would settle its interpreter.
"""

import importlib.util
from pathlib import Path

import pytest

__all__ = ["DRIVER", "needs_compiler"]

DRIVER = r"""
import json, os, re, subprocess, sys, tempfile
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched = []


class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, *arguments):
        launched.append((self.name, arguments))


class Utils:
    def load_binary(self, *_):
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    utils, launcher_cls = Utils(), Launcher
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 7)
    set_current_device = staticmethod(lambda device: None)


driver.set_active(Driver())
torch.cuda.current_device = lambda: 0
"""
"""The head of a program that runs in a process of its own; what would have been launched is in ``launched``."""


def needs_compiler() -> pytest.MarkDecorator:
    """A mark for tests that compile in a process of their own."""
    found = importlib.util.find_spec("triton")
    if found is None:
        return pytest.mark.skipif(True, reason="triton is not installed (extra 'test')")
    folders = [Path(p) / "backends" / "nvidia" for p in found.submodule_search_locations or ()]
    return pytest.mark.skipif(not any(p.is_dir() for p in folders), reason="triton has no NVIDIA backend here")

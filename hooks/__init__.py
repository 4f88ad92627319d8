"""Hook points, sites, caches and lazy states: everything that looks inside a running model.

``points`` is the table of hook points, ``sites`` names one with a position, ``run`` carries one
forward pass's hooks and recording, ``cache`` and ``lazy`` are what ``run_with_cache`` gives back.
"""

from mambascope.hooks.points import HOOK_POINTS, HookSpec, hook_names

__all__ = ["HOOK_POINTS", "HookSpec", "hook_names"]

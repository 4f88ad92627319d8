"""Interventions: edits of a run, one line each, that compose, report what they did, and can be written down.

    import mambascope as ms
    iv = ms.interventions
    model.run_with(x, [iv.patch("blocks.3.mixer.hook_h[10]", cache), iv.knockout(4, sources=2, targets=slice(8, None))])

Values: ``patch``, ``zero``, ``mean``, ``resample``, ``steer``, ``clamp``, ``scale``, ``swap``. States: ``erase``,
``decay``. Mechanisms: ``freeze`` (delta, B, C, SiLU, gate of another run), ``knockout`` (flow from tokens to tokens),
``path_patch``. Prompts: ``pair``. Records: ``save``, ``load``, ``record``, ``load_record``.

Edits at one site run in the order of the list. One that changes what is there (steer, clamp, scale, swap, add,
knockout) may follow any other; one that replaces it (patch, zero, mean, resample, freeze) may not follow another at the
same place, since that would be lost: a HookError names both.
"""

from mambascope.hooks.interventions.base import Intervention
from mambascope.hooks.interventions.freeze import freeze
from mambascope.hooks.interventions.knockout import knockout
from mambascope.hooks.interventions.pairs import Pair, pair
from mambascope.hooks.interventions.paths import path_patch
from mambascope.hooks.interventions.records import Record, load, load_record, record, save
from mambascope.hooks.interventions.values import (
    clamp,
    decay,
    erase,
    mean,
    patch,
    resample,
    scale,
    state,
    steer,
    swap,
    zero,
)

__all__ = [
    "Intervention",
    "Pair",
    "Record",
    "clamp",
    "decay",
    "erase",
    "freeze",
    "knockout",
    "load",
    "load_record",
    "mean",
    "pair",
    "patch",
    "path_patch",
    "record",
    "resample",
    "save",
    "scale",
    "state",
    "steer",
    "swap",
    "zero",
]

"""mambascope: see inside Mamba language models.

``import mambascope as ms`` is cheap: torch and everything else is imported when first used.

Glossary of letters, everywhere in code and docs:

====== ============================ ======= ==========================================
``B``  batch                        ``A``   decay rates, ``D N``, negative
``L``  length in tokens             ``B``   input matrix of the recurrence, ``B L N``
``D``  inner channels (d_inner)     ``C``   output matrix, ``B L N``
``N``  state size (d_state)         ``D``   skip weights, one a channel
``K``  conv width (d_conv)          ``u``   the scan's input: after conv and SiLU
``R``  rank of delta (dt_rank)      ``delta``  step size, after softplus
``V``  vocabulary (d_vocab)         ``h``   state *after* the step
``M``  residual width (d_model)     ``y``   ``C h``, before skip and gate
``H``  attention heads (n_heads)    ``T``   positions of queries, ``B H T S``
``E``  width of a head              ``S``   positions of keys, or sources
``F``  feed-forward width (d_ff)
====== ============================ ======= ==========================================

A letter in a shape comment (``# B L D``) is always the left column.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambascope.config import MambaConfig
    from mambascope.errors import MambascopeError
    from mambascope.hooks.attribution import attribute
    from mambascope.hooks.cache import MambaCache
    from mambascope.hooks.cache_file import load_cache
    from mambascope.hooks.metrics import KL, LogitDifference, LogProbability, Loss, Probability, Rank
    from mambascope.hooks.nnsight_bridge import wrap
    from mambascope.hooks.points import HOOK_POINTS
    from mambascope.hooks.positions import Site, at
    from mambascope.hooks.sweeps import Sweep, load_sweep, sweep
    from mambascope.loading import list_models, load
    from mambascope.loading.accelerate import accelerate
    from mambascope.loading.tokenizer import Tokenizer
    from mambascope.model import HookedMamba
    from mambascope.model.state import State

__version__ = "0.1.0"

_HOME = {
    "HOOK_POINTS": "mambascope.hooks.points",
    "HookedMamba": "mambascope.model",
    "KL": "mambascope.hooks.metrics",
    "LogProbability": "mambascope.hooks.metrics",
    "LogitDifference": "mambascope.hooks.metrics",
    "Loss": "mambascope.hooks.metrics",
    "MambaCache": "mambascope.hooks.cache",
    "MambaConfig": "mambascope.config",
    "MambascopeError": "mambascope.errors",
    "Probability": "mambascope.hooks.metrics",
    "Rank": "mambascope.hooks.metrics",
    "Site": "mambascope.hooks.positions",
    "State": "mambascope.model.state",
    "Sweep": "mambascope.hooks.sweeps",
    "Tokenizer": "mambascope.loading.tokenizer",
    "accelerate": "mambascope.loading.accelerate",
    "at": "mambascope.hooks.positions",
    "attribute": "mambascope.hooks.attribution",
    "list_models": "mambascope.loading",
    "load": "mambascope.loading",
    "load_cache": "mambascope.hooks.cache_file",
    "load_sweep": "mambascope.hooks.sweeps",
    "sweep": "mambascope.hooks.sweeps",
    "wrap": "mambascope.hooks.nnsight_bridge",
}
_MODULES = {"interventions": "mambascope.hooks.interventions"}
_SUBPACKAGES = ("analyses", "errors", "hooks", "loading", "model", "ops", "training", "zoo")

__all__ = [
    "HOOK_POINTS",
    "HookedMamba",
    "KL",
    "LogProbability",
    "LogitDifference",
    "Loss",
    "MambaCache",
    "MambaConfig",
    "MambascopeError",
    "Probability",
    "Rank",
    "Site",
    "State",
    "Sweep",
    "Tokenizer",
    "__version__",
    "accelerate",
    "at",
    "attribute",
    "list_models",
    "load",
    "load_cache",
    "load_sweep",
    "sweep",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _SUBPACKAGES:
        return importlib.import_module(f"mambascope.{name}")
    raise AttributeError(f"module 'mambascope' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES, *_SUBPACKAGES})

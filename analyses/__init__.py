"""One question a file: what do the model's insides do on this text?

Every analysis is a function of a model and a source (a text, ids, a cache of one row) that returns a small frozen
result with ``.table()`` (pandas) and ``.figure()`` (plotly).

============================ ===========================================================================
``scope``                    the overview of one text, and the page ``mambascope scope`` writes
``gates``                    delta by token and layer; open and closed channels
``gates_by``                 delta by token, position or word class, against chance
``timescale_spectrum``       half-lives in tokens of every state dimension; ``reach``: how far back channels look
``lti_view``                 a layer as a plain convolution; ``freezing_cost``: what holding delta, B, C still costs
``effective_kernel``         which earlier tokens one token reads in a layer, exactly
``sources``                  the same in every layer; ``hidden_attention``: all queries of a short text
``logit_contributions``      each layer's and each source token's direct share of a logit, adding up
``token_relevance``          a logit traced through all layers to every token, conserved at every depth
``token_flow``               which token's embedding each last residual stream comes from, through the whole model
``state_norms``              how much every layer's state holds after every token
``predictions, logit_lens``  loss and guesses by token; the same read off every layer
``induction_score``          repeated random tokens: loss, and where each layer looks back
``passage_score``            the same for passages; ``induction_pair``: for a model of the induction heads task
``copy_capacity``            how many tokens the model can repeat
``patch``                    which layer and position restores a corrupted answer
``sweep_figure``             the map of any ``ms.sweep`` or ``ms.attribute``
============================ ===========================================================================

Names are imported when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambascope.analyses.capacity import Capacity, copy_capacity
    from mambascope.analyses.contributions import LogitContributions, Target, logit_contributions
    from mambascope.analyses.gating import Gating, gates
    from mambascope.analyses.gating_groups import GatingGroups, gates_by
    from mambascope.analyses.induction import Induction, induction_score, passage_score
    from mambascope.analyses.induction_heads import InductionPair, induction_pair
    from mambascope.analyses.kernels import (
        AttentionMap,
        KernelRow,
        Sources,
        effective_kernel,
        hidden_attention,
        sources,
    )
    from mambascope.analyses.logits import LogitLens, Predictions, TokenPredictions, logit_lens, predictions
    from mambascope.analyses.lti import LTILayer, Selection, lti_view, mean_selection
    from mambascope.analyses.lti_freezing import FreezingCost, freezing_cost
    from mambascope.analyses.overview import Overview, scope
    from mambascope.analyses.patching import Patching, patch
    from mambascope.analyses.relevance import Relevance, token_relevance
    from mambascope.analyses.repeats import repeated_tokens
    from mambascope.analyses.rollout import Flow, token_flow
    from mambascope.analyses.source import Reading, read
    from mambascope.analyses.states import StateNorms, state_norms
    from mambascope.analyses.sweeps import sweep_figure
    from mambascope.analyses.timescales import Reach, Timescales, reach, timescale_spectrum

_HOME = {
    "AttentionMap": "kernels",
    "Capacity": "capacity",
    "Flow": "rollout",
    "FreezingCost": "lti_freezing",
    "Gating": "gating",
    "GatingGroups": "gating_groups",
    "Induction": "induction",
    "InductionPair": "induction_heads",
    "KernelRow": "kernels",
    "LTILayer": "lti",
    "LogitContributions": "contributions",
    "LogitLens": "logits",
    "Overview": "overview",
    "Patching": "patching",
    "Predictions": "logits",
    "Reach": "timescales",
    "Reading": "source",
    "Relevance": "relevance",
    "Selection": "lti",
    "Sources": "kernels",
    "StateNorms": "states",
    "Target": "contributions",
    "Timescales": "timescales",
    "TokenPredictions": "logits",
    "copy_capacity": "capacity",
    "effective_kernel": "kernels",
    "freezing_cost": "lti_freezing",
    "gates": "gating",
    "gates_by": "gating_groups",
    "hidden_attention": "kernels",
    "induction_pair": "induction_heads",
    "induction_score": "induction",
    "logit_contributions": "contributions",
    "logit_lens": "logits",
    "lti_view": "lti",
    "mean_selection": "lti",
    "passage_score": "induction",
    "patch": "patching",
    "predictions": "logits",
    "reach": "timescales",
    "read": "source",
    "repeated_tokens": "repeats",
    "scope": "overview",
    "sources": "kernels",
    "state_norms": "states",
    "sweep_figure": "sweeps",
    "timescale_spectrum": "timescales",
    "token_flow": "rollout",
    "token_relevance": "relevance",
}

__all__ = [
    "AttentionMap",
    "Capacity",
    "Flow",
    "FreezingCost",
    "Gating",
    "GatingGroups",
    "Induction",
    "InductionPair",
    "KernelRow",
    "LTILayer",
    "LogitContributions",
    "LogitLens",
    "Overview",
    "Patching",
    "Predictions",
    "Reach",
    "Reading",
    "Relevance",
    "Selection",
    "Sources",
    "StateNorms",
    "Target",
    "Timescales",
    "TokenPredictions",
    "copy_capacity",
    "effective_kernel",
    "freezing_cost",
    "gates",
    "gates_by",
    "hidden_attention",
    "induction_pair",
    "induction_score",
    "logit_contributions",
    "logit_lens",
    "lti_view",
    "mean_selection",
    "passage_score",
    "patch",
    "predictions",
    "reach",
    "read",
    "repeated_tokens",
    "scope",
    "sources",
    "state_norms",
    "sweep_figure",
    "timescale_spectrum",
    "token_flow",
    "token_relevance",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"mambascope.analyses.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'mambascope.analyses' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Small traced models for the tests of nnsight's bridge."""

from typing import Any

import mambascope as ms
from mambascope.hooks.nnsight_bridge import TracedMamba
from mambascope.model import HookedMamba
from tests.conftest import make_model
from tests.hooks.letters import letter_tokenizer

__all__ = ["TEXT", "inner", "traced"]

TEXT = "abcab abdc"


def traced(backend: str = "cpu", padding_side: str = "right", **options: Any) -> TracedMamba:
    model = make_model(backend=backend, **{"n_layers": 2, **options})
    model.tokenizer = letter_tokenizer()
    return ms.wrap(model, padding_side)


def inner(lm: TracedMamba) -> HookedMamba:
    return lm._module

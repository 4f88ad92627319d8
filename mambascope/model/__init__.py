"""The hookable Mamba language model: mixer, block, model, state."""

from mambascope.model.language_model import HookedMamba
from mambascope.model.mixers.states import AttentionState
from mambascope.model.state import MambaState, State

__all__ = ["AttentionState", "HookedMamba", "MambaState", "State"]

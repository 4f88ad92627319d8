"""Which class stands for which letter of a layer pattern (``mambascope.config.MIXERS`` says what they are)."""

from mambascope.model.mixer import MambaMixer
from mambascope.model.mixers.attention import AttentionMixer, WindowAttentionMixer
from mambascope.model.mixers.base import Mixer
from mambascope.model.mixers.feed_forward import FeedForwardMixer
from mambascope.model.mixers.gated_conv import GatedConvMixer
from mambascope.model.mixers.h3 import H3Mixer
from mambascope.model.mixers.lstm import LSTMMixer
from mambascope.model.mixers.s4d import PlainS4DMixer, S4DMixer

__all__ = ["MIXERS"]

_KINDS: tuple[type[Mixer], ...] = (
    MambaMixer,
    AttentionMixer,
    WindowAttentionMixer,
    FeedForwardMixer,
    LSTMMixer,
    GatedConvMixer,
    S4DMixer,
    PlainS4DMixer,
    H3Mixer,
)
MIXERS: dict[str, type[Mixer]] = {kind.letter: kind for kind in _KINDS}

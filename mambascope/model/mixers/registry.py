"""Which class stands for which letter of a layer pattern (``mambascope.config.MIXERS`` says what they are)."""

from mambascope.model.mixer import MambaMixer
from mambascope.model.mixers.attention import AttentionMixer, WindowAttentionMixer
from mambascope.model.mixers.base import Mixer
from mambascope.model.mixers.feed_forward import FeedForwardMixer

__all__ = ["MIXERS"]

MIXERS: dict[str, type[Mixer]] = {
    kind.letter: kind for kind in (MambaMixer, AttentionMixer, WindowAttentionMixer, FeedForwardMixer)
}

"""The shape of a Mamba-1 language model and every option that changes its numbers."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mambascope.errors import ConfigError, nearest

__all__ = ["ACTIVATIONS", "MIXERS", "OPTIONS", "SSM_INITS", "MambaConfig"]

ACTIVATIONS = ("silu", "gelu", "relu", "identity")
"""Activations of conv and gate that the model can compute; ``silu`` alone has fused kernels."""

MIXERS: dict[str, str] = {
    "m": "Mamba",
    "a": "attention",
    "w": "sliding-window attention",
    "f": "feed-forward",
    "l": "LSTM",
    "g": "gated convolution",
    "s": "S4D",
    "p": "plain S4D",
    "h": "H3",
}
"""What the letters of a layer pattern mean; ``mambascope.model.mixers.registry`` has the classes."""

OPTIONS: dict[str, str] = {"n_heads": "aw", "rotary_base": "aw", "window": "w", "d_ff": "f"}
"""Options of single mixers, and the letters that read them: elsewhere they may not be set."""

SSM_INITS = ("lin", "inv", "real")
"""Initialisations of time-invariant state space models (S4D, 2206.11893), the default first."""

_SSM = "sph"  # letters of the mixers that have one


@dataclass(frozen=True)
class MambaConfig:
    """Shape and options of a model (Mamba, 2312.00752, section 3; names as in ``mambascope``'s glossary).

    ``d_vocab`` counts the rows of the embedding; ids in ``[n_tokens, d_vocab)`` are padding of the
    matrix and never valid input. ``mixer_norm_eps`` switches on Falcon-Mamba's weightless RMSNorm of
    dt_low, B and C. ``dt_*`` and ``initializer_range`` only shape fresh weights.

    ``pattern``: one letter of :data:`MIXERS` a layer (``"mmam"``: the third is attention), or a shorter one that is
    repeated (``"af"``: a Transformer); empty: Mamba everywhere. A feed-forward layer is a layer of its own, and the
    options of the mixers are 0 for their defaults: ``n_heads`` (heads of d_model / n_heads channels; d_model / 64),
    ``rotary_base`` (10,000), ``window`` (positions that a query sees, itself among them; no default), ``d_ff`` (inner
    channels of SwiGLU; 8/3 d_model). Without attention ``n_heads`` is 1: TransformerLens' patchers ask for the number.
    ``ssm_init``: one of :data:`SSM_INITS` for S4D and H3 layers; "lin" and "inv" have d_state / 2 complex states a
    channel, "real" d_state real ones.
    """

    d_model: int
    n_layers: int
    d_vocab: int
    d_inner: int = 0  # 0: 2 * d_model
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = 0  # 0: ceil(d_model / 16)
    norm_eps: float = 1e-5
    mixer_norm_eps: float | None = None
    conv_bias: bool = True
    proj_bias: bool = False
    activation: str = "silu"
    residual_in_fp32: bool = True
    tie_embeddings: bool = True
    n_tokens: int = 0  # 0: d_vocab
    prepend_bos: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_scale: float = 1.0
    dt_init: str = "random"
    initializer_range: float = 0.02
    name: str = "mamba"
    pattern: str = ""
    n_heads: int = 0
    rotary_base: float = 0.0
    window: int = 0
    d_ff: int = 0
    ssm_init: str = ""

    def __post_init__(self) -> None:
        def put(field: str, value: int) -> None:
            if getattr(self, field) == 0:
                object.__setattr__(self, field, value)

        put("d_inner", 2 * self.d_model)
        put("dt_rank", math.ceil(self.d_model / 16))
        put("n_tokens", self.d_vocab)
        for field in ("d_model", "n_layers", "d_vocab", "d_inner", "d_state", "d_conv", "dt_rank", "n_tokens"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field} must be a positive integer, got {value!r}")
        for field in ("norm_eps", "mixer_norm_eps", "dt_min", "dt_max"):
            value = getattr(self, field)
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ConfigError(f"{field} must be a positive number, got {value!r}")
        for field in ("dt_floor", "dt_scale", "initializer_range"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ConfigError(f"{field} must be a number >= 0, got {value!r}")
        if self.dt_min > self.dt_max:
            raise ConfigError(f"dt_min={self.dt_min} exceeds dt_max={self.dt_max}: delta is drawn between them")
        for field in ("conv_bias", "proj_bias", "residual_in_fp32", "tie_embeddings", "prepend_bos"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field} must be true or false, got {getattr(self, field)!r}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(f"activation {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}")
        if self.dt_init not in ("random", "constant"):
            raise ConfigError(f"dt_init must be 'random' or 'constant', got {self.dt_init!r}")
        if self.n_tokens > self.d_vocab:
            raise ConfigError(f"n_tokens={self.n_tokens} exceeds d_vocab={self.d_vocab} rows of the embedding")
        for field in ("bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{field} must be the id of a token or None, got {value!r}")
            if value is not None and not 0 <= value < self.n_tokens:
                raise ConfigError(f"{field}={value} is outside the vocabulary of {self.n_tokens} tokens")
        if self.prepend_bos and self.bos_token_id is None:
            raise ConfigError("prepend_bos=True needs bos_token_id")
        self._check_pattern()
        self._check_options()

    def _check_pattern(self) -> None:
        known = ", ".join(f"{letter} ({noun})" for letter, noun in MIXERS.items())
        if not isinstance(self.pattern, str):
            raise ConfigError(f"pattern must be a string of letters, one a layer ({known}), got {self.pattern!r}")
        for letter in self.pattern:
            if letter not in MIXERS:
                raise ConfigError(f"pattern {self.pattern!r} has an unknown letter {letter!r}; known: {known}")
        if self.pattern and self.n_layers % len(self.pattern):
            raise ConfigError(
                f"pattern {self.pattern!r} of {len(self.pattern)} letters does not fill n_layers={self.n_layers}: "
                "give a letter for each layer, or a part that repeats"
            )
        if set(self.pattern) == {"m"}:
            object.__setattr__(self, "pattern", "")

    def _check_options(self) -> None:
        layers = set(self.pattern or "m")  # not expanded: a file may claim any number of layers
        for field, letters in OPTIONS.items():
            value, unset = getattr(self, field), (0, 1) if field == "n_heads" else (0,)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"{field} must be a positive number, or 0 for its default, got {value!r}")
            if field != "rotary_base" and not isinstance(value, int):
                raise ConfigError(f"{field} must be a positive integer, or 0 for its default, got {value!r}")
            if value not in unset and not layers & set(letters):
                raise ConfigError(
                    f"{field}={value} is an option of {' and '.join(MIXERS[x] for x in letters)} "
                    f"({', '.join(letters)}), which pattern {self.pattern or 'm'!r} does not have"
                )

        def put(field: str, value: float) -> None:
            if getattr(self, field) == 0:
                object.__setattr__(self, field, value)

        put("n_heads", max(1, self.d_model // 64) if layers & set("aw") else 1)
        if layers & set("aw"):
            put("rotary_base", 10_000.0)
            if self.d_model % self.n_heads or self.d_head % 2:
                raise ConfigError(
                    f"n_heads={self.n_heads} must divide d_model={self.d_model} into heads of an even width (rotary "
                    "positions turn pairs of channels)"
                )
        if "w" in layers and not self.window:
            raise ConfigError("pattern has sliding-window attention (w): give window=, the positions that a query sees")
        if "f" in layers:
            put("d_ff", 8 * math.ceil(self.d_model / 3))
        self._check_ssm(bool(layers & set(_SSM)))

    def _check_ssm(self, present: bool) -> None:
        if self.ssm_init and not present:
            raise ConfigError(
                f"ssm_init={self.ssm_init!r} is an option of {', '.join(MIXERS[x] for x in _SSM)} ({', '.join(_SSM)}), "
                f"which pattern {self.pattern or 'm'!r} does not have"
            )
        if not present:
            return
        if not self.ssm_init:
            object.__setattr__(self, "ssm_init", SSM_INITS[0])
        if self.ssm_init not in SSM_INITS:
            raise ConfigError(f"ssm_init must be one of {', '.join(SSM_INITS)}, got {self.ssm_init!r}")
        if self.ssm_init != "real" and self.d_state % 2:
            raise ConfigError(
                f"d_state={self.d_state} must be even with ssm_init={self.ssm_init!r}, whose states are conjugate pairs"
            )

    @property
    def layers(self) -> str:
        """The letter of every layer, ``n_layers`` of them."""
        pattern = self.pattern or "m"
        return pattern * (self.n_layers // len(pattern))

    @property
    def d_head(self) -> int:
        """Channels of one attention head."""
        return self.d_model // self.n_heads

    def with_pattern(self, pattern: str, **changes: Any) -> "MambaConfig":
        """The same backbone with other mixers, whose options are ``changes`` or their defaults."""
        return dataclasses.replace(self, pattern=pattern, **{**dict.fromkeys(OPTIONS, 0), "ssm_init": "", **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; without the pattern and its options where all layers are Mamba."""
        values = dataclasses.asdict(self)
        others = {"pattern", "ssm_init", *OPTIONS}
        return values if self.pattern else {k: v for k, v in values.items() if k not in others}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MambaConfig":
        """The inverse of :meth:`to_dict`; an unknown field is an error that offers the nearest names."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"config has an unknown field {key!r}{nearest(key, known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"config is incomplete: {error}") from None

    # What TransformerLens' helpers ask a config for.

    @property
    def normalization_type(self) -> str:
        return "RMS"

    @property
    def attn_only(self) -> bool:
        """True: a block has one residual write, so the helpers add no MLP terms."""
        return True

    @property
    def n_key_value_heads(self) -> None:
        return None

    @property
    def device(self) -> Any:
        """Where the model that this config belongs to lies; None for a config alone."""
        return self.__dict__.get("_device")

    def on(self, device: Any) -> "MambaConfig":
        """A copy that tells this device: a model keeps such a copy for TransformerLens' helpers."""
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "_device", device)
        return copy

    @property
    def model_name(self) -> str:
        return self.name

    @property
    def d_vocab_out(self) -> int:
        return self.d_vocab

    @property
    def default_prepend_bos(self) -> bool:
        return self.prepend_bos

"""Which parameters a model has, and what other formats call them."""

import math
import re
from collections.abc import Iterable

from mambascope.config import MambaConfig

__all__ = ["TIED_HEAD", "count_parameters", "layer_count", "parameter_shapes", "to_our_name"]

TIED_HEAD = "unembed.weight"

_PREFIX = re.compile(r"^(?:(?:module|model|backbone)\.)+")
_LAYER = re.compile(r"^layers\.(0|[1-9][0-9]{0,5})\.(norm|mixer)\.(.+)$", re.DOTALL)
_TOP = {
    "embedding.weight": "embed.weight",
    "embeddings.weight": "embed.weight",
    "norm_f.weight": "ln_final.weight",
    "lm_head.weight": "unembed.weight",
}
_OUR_LAYER = re.compile(r"^blocks\.([0-9]+)\.")


def parameter_shapes(cfg: MambaConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a ``HookedMamba`` and its shape, in the model's order; a tied head is not listed."""
    M = cfg.d_model
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (cfg.d_vocab, M)}
    mixers = {letter: _mixer_shapes(cfg, letter) for letter in set(cfg.layers)}
    for i, letter in enumerate(cfg.layers):
        shapes[f"blocks.{i}.norm.weight"] = (M,)
        shapes |= {f"blocks.{i}.mixer.{name}": shape for name, shape in mixers[letter].items()}
    shapes["ln_final.weight"] = (M,)
    if not cfg.tie_embeddings:
        shapes[TIED_HEAD] = (cfg.d_vocab, M)
    return shapes


def _mixer_shapes(cfg: MambaConfig, letter: str) -> dict[str, tuple[int, ...]]:
    """The parameters of one mixer. Mamba's are written down, so that lists of models need no torch."""
    if letter != "m":
        import torch

        from mambascope.model.mixers.registry import MIXERS

        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in MIXERS[letter](cfg).named_parameters()}
    M, D, N, R, K = cfg.d_model, cfg.d_inner, cfg.d_state, cfg.dt_rank, cfg.d_conv
    shapes = {
        "in_proj.weight": (2 * D, M),
        "in_proj.bias": (2 * D,) if cfg.proj_bias else None,
        "conv1d.weight": (D, 1, K),
        "conv1d.bias": (D,) if cfg.conv_bias else None,
        "x_proj.weight": (R + 2 * N, D),
        "dt_proj.weight": (D, R),
        "dt_proj.bias": (D,),
        "A_log": (D, N),
        "D": (D,),
        "out_proj.weight": (M, D),
        "out_proj.bias": (M,) if cfg.proj_bias else None,
    }
    return {name: shape for name, shape in shapes.items() if shape is not None}


def count_parameters(cfg: MambaConfig) -> int:
    """Number of scalars in the model, a tied head counted once."""
    each = {letter: sum(map(math.prod, _mixer_shapes(cfg, letter).values())) for letter in set(cfg.layers)}
    layers = sum(each[letter] + cfg.d_model for letter in cfg.layers)  # and the norm's weight
    return layers + cfg.d_model + cfg.d_vocab * cfg.d_model * (1 if cfg.tie_embeddings else 2)


def to_our_name(name: str) -> str:
    """Our name for a tensor of transformers' or the authors' checkpoints; an unknown one is returned as it is.

    The leading ``backbone.``, ``model.`` and ``module.`` are optional, ``embedding`` and ``embeddings`` mean the same.
    """
    bare = _PREFIX.sub("", name)
    if bare in _TOP:
        return _TOP[bare]
    found = _LAYER.match(bare)
    if found is None:
        return name
    index, part, rest = found.groups()
    return f"blocks.{index}.{part}.{rest}"


def layer_count(names: Iterable[str]) -> int:
    """One more than the highest layer index among our names (0 if there is none)."""
    found = (_OUR_LAYER.match(name) for name in names)
    return max((int(match.group(1)) + 1 for match in found if match), default=0)

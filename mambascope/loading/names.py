"""Which parameters a model has, and what other formats call them."""

import dataclasses
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
    M, D, N, R, K = cfg.d_model, cfg.d_inner, cfg.d_state, cfg.dt_rank, cfg.d_conv
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (cfg.d_vocab, M)}
    for i in range(cfg.n_layers):
        mixer = f"blocks.{i}.mixer"
        shapes[f"blocks.{i}.norm.weight"] = (M,)
        shapes[f"{mixer}.in_proj.weight"] = (2 * D, M)
        if cfg.proj_bias:
            shapes[f"{mixer}.in_proj.bias"] = (2 * D,)
        shapes[f"{mixer}.conv1d.weight"] = (D, 1, K)
        if cfg.conv_bias:
            shapes[f"{mixer}.conv1d.bias"] = (D,)
        shapes[f"{mixer}.x_proj.weight"] = (R + 2 * N, D)
        shapes[f"{mixer}.dt_proj.weight"] = (D, R)
        shapes[f"{mixer}.dt_proj.bias"] = (D,)
        shapes[f"{mixer}.A_log"] = (D, N)
        shapes[f"{mixer}.D"] = (D,)
        shapes[f"{mixer}.out_proj.weight"] = (M, D)
        if cfg.proj_bias:
            shapes[f"{mixer}.out_proj.bias"] = (M,)
    shapes["ln_final.weight"] = (M,)
    if not cfg.tie_embeddings:
        shapes[TIED_HEAD] = (cfg.d_vocab, M)
    return shapes


def count_parameters(cfg: MambaConfig) -> int:
    """Number of scalars in the model, a tied head counted once."""
    one_layer = parameter_shapes(dataclasses.replace(cfg, n_layers=1))
    return sum(math.prod(shape) * (cfg.n_layers if _OUR_LAYER.match(name) else 1) for name, shape in one_layer.items())


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

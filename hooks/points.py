"""The one table of hook points: name, shape, dtype, meaning. Code, docs and errors draw from it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mambascope.config import MIXERS, MambaConfig
from mambascope.errors import HookError, UnknownNameError, nearest

__all__ = [
    "ALIASES",
    "BEFORE_SCAN",
    "HOOK_POINTS",
    "LAZY",
    "ON_DEMAND",
    "HookSpec",
    "hook_names",
    "points_of",
    "resolve_name",
    "scan_layers",
    "size_of",
    "spec_of",
    "tail_of",
    "widths",
]


@dataclass(frozen=True)
class HookSpec:
    """One hook point.

    ``name`` is relative to its block (``scope="block"``) or to the model. ``shape`` uses the glossary's
    letters. ``dtype`` is ``"model"`` (the weights' dtype), ``"residual"`` (float32 where the model keeps
    its residual stream so) or ``"compute"`` (float32; float64 in a float64 model). ``lazy`` points hold
    ``B L D N`` values that exist only when somebody asks; ``on_demand`` ones are made whole, and only for those who
    hook them or ask for them by name. ``stepwise`` points lie inside a recurrence: a hook is called once for every
    addressed step, with the shape's ``L`` left out. ``mixers``: the letters of the layers that have the point (see
    ``mambascope.config.MIXERS``); empty: all of them.
    """

    name: str
    scope: Literal["model", "block"]
    shape: str
    dtype: Literal["model", "residual", "compute"]
    meaning: str
    lazy: bool = False
    mixers: str = ""
    on_demand: bool = False
    stepwise: bool = False

    @property
    def axis(self) -> int:
        """Which axis counts positions."""
        letters = self.shape.split()
        return letters.index("T") if "T" in letters else 1


HOOK_POINTS: tuple[HookSpec, ...] = (
    HookSpec("hook_embed", "model", "B L M", "model", "token embedding"),
    HookSpec("hook_resid_pre", "block", "B L M", "residual", "residual stream entering the block"),
    HookSpec("hook_mixer_in", "block", "B L M", "residual", "copy of the residual that only this block's mixer reads"),
    HookSpec("norm.hook_scale", "block", "B L 1", "compute", "root mean square, sqrt(mean(x^2) + eps)"),
    HookSpec("norm.hook_normalized", "block", "B L M", "model", "x / scale, before the norm's weight"),
    HookSpec(
        "mixer.hook_x", "block", "B L D", "model", "in_proj's output, or the half that the conv reads", mixers="msgp"
    ),
    HookSpec(
        "mixer.hook_gate_in", "block", "B L D", "model", "gate z before SiLU: second half of in_proj", mixers="msg"
    ),
    HookSpec("mixer.hook_conv", "block", "B L D", "model", "causal depthwise conv + bias, before SiLU", mixers="msg"),
    HookSpec("mixer.hook_in_q", "block", "B L D", "model", "q: what the output is multiplied by", mixers="h"),
    HookSpec("mixer.hook_in_k", "block", "B L D", "model", "k: what the shift SSM reads", mixers="h"),
    HookSpec("mixer.hook_in_v", "block", "B L D", "model", "v: what the shifted k is multiplied by", mixers="h"),
    HookSpec("mixer.hook_shift", "block", "B L D", "model", "k through the shift SSM", mixers="h"),
    HookSpec("mixer.hook_u", "block", "B L D", "model", "u = SiLU(conv): what the recurrence reads", mixers="msgh"),
    HookSpec("mixer.hook_u_select", "block", "B L D", "model", "u as x_proj reads it: selects delta, B, C", mixers="m"),
    HookSpec("mixer.hook_u_write", "block", "B L D", "model", "u as the recurrence writes it to the state", mixers="m"),
    HookSpec("mixer.hook_u_skip", "block", "B L D", "model", "u as the skip D*u reads it", mixers="m"),
    HookSpec("mixer.hook_dt_low", "block", "B L R", "model", "low-rank delta (after Falcon-Mamba's norm)", mixers="m"),
    HookSpec("mixer.hook_B", "block", "B L N", "model", "input matrix (after Falcon-Mamba's norm)", mixers="m"),
    HookSpec("mixer.hook_C", "block", "B L N", "model", "output matrix (after Falcon-Mamba's norm)", mixers="m"),
    HookSpec("mixer.hook_delta_raw", "block", "B L D", "model", "dt_proj(dt_low) + bias, before softplus", mixers="m"),
    HookSpec("mixer.hook_delta", "block", "B L D", "compute", "step, softplus(delta_raw); 0 at padding", mixers="m"),
    HookSpec("mixer.hook_A_bar", "block", "B L D N", "compute", "exp(delta*A), zero-order hold", lazy=True, mixers="m"),
    HookSpec("mixer.hook_B_bar", "block", "B L D N", "compute", "input gain delta*B, Euler", lazy=True, mixers="m"),
    HookSpec("mixer.hook_write", "block", "B L D N", "compute", "added to the state, B_bar*u", lazy=True, mixers="m"),
    HookSpec(
        "mixer.hook_h",
        "block",
        "B L D N",
        "compute",
        "state after step, A_bar*h + write",
        lazy=True,
        stepwise=True,
        mixers="m",
    ),
    HookSpec(
        "mixer.hook_ssm_kernel", "block", "B L D", "compute", "a row's kernel by lag", mixers="sph", on_demand=True
    ),
    HookSpec(
        "mixer.hook_state",
        "block",
        "B L D N",
        "compute",
        "SSM state, pairs",
        mixers="sph",
        on_demand=True,
        stepwise=True,
    ),
    HookSpec("mixer.hook_y", "block", "B L D", "compute", "y = C h, before skip and gate", mixers="msph"),
    HookSpec("mixer.hook_skip", "block", "B L D", "compute", "skip term D*u", mixers="msph"),
    HookSpec("mixer.hook_gated", "block", "B L D", "model", "(y + skip) * SiLU(z): out_proj's input", mixers="msgph"),
    HookSpec("mixer.hook_q", "block", "B L H E", "model", "queries, before their rotation", mixers="aw"),
    HookSpec("mixer.hook_k", "block", "B L H E", "model", "keys, before their rotation", mixers="aw"),
    HookSpec("mixer.hook_v", "block", "B L H E", "model", "values", mixers="aw"),
    HookSpec("mixer.hook_rot_q", "block", "B L H E", "model", "queries, turned by their position", mixers="aw"),
    HookSpec("mixer.hook_rot_k", "block", "B L H E", "model", "keys, turned, as the cache keeps them", mixers="aw"),
    HookSpec("mixer.hook_attn_scores", "block", "B H T S", "compute", "q k / sqrt(E)", mixers="aw", on_demand=True),
    HookSpec("mixer.hook_pattern", "block", "B H T S", "compute", "softmax of it", mixers="aw", on_demand=True),
    HookSpec("mixer.hook_z", "block", "B L H E", "model", "pattern times values, out_proj's input", mixers="aw"),
    HookSpec("mixer.hook_result", "block", "B L H M", "model", "what each head adds", mixers="aw", on_demand=True),
    HookSpec("mixer.hook_i", "block", "B L D", "compute", "input gate", mixers="l", on_demand=True, stepwise=True),
    HookSpec("mixer.hook_f", "block", "B L D", "compute", "forget gate", mixers="l", on_demand=True, stepwise=True),
    HookSpec(
        "mixer.hook_g", "block", "B L D", "compute", "cell's candidate", mixers="l", on_demand=True, stepwise=True
    ),
    HookSpec("mixer.hook_o", "block", "B L D", "compute", "output gate", mixers="l", on_demand=True, stepwise=True),
    HookSpec("mixer.hook_cell", "block", "B L D", "compute", "cell state", mixers="l", on_demand=True, stepwise=True),
    HookSpec("mixer.hook_hidden", "block", "B L D", "compute", "o tanh(c)", mixers="l", on_demand=True, stepwise=True),
    HookSpec("mixer.hook_pre", "block", "B L F", "model", "SwiGLU's gate before SiLU", mixers="f"),
    HookSpec("mixer.hook_pre_linear", "block", "B L F", "model", "what is gated", mixers="f"),
    HookSpec("mixer.hook_post", "block", "B L F", "model", "SiLU(pre) * pre_linear, out_proj's input", mixers="f"),
    HookSpec("hook_mixer_out", "block", "B L M", "model", "what the block adds to the residual stream"),
    HookSpec("hook_resid_post", "block", "B L M", "residual", "residual stream leaving the block"),
    HookSpec("ln_final.hook_scale", "model", "B L 1", "compute", "root mean square before the unembedding"),
    HookSpec("ln_final.hook_normalized", "model", "B L M", "model", "final residual / scale, before the norm's weight"),
)

LAZY = frozenset(spec.name for spec in HOOK_POINTS if spec.lazy)
BEFORE_SCAN = frozenset(f"mixer.hook_{name}" for name in ("u", "u_select", "u_write", "u_skip", "delta", "B", "C")) | {
    "hook_resid_pre"
}
"""What a Mamba block has before its scan: a pass that stops at no hook point can hand it over."""
ON_DEMAND = frozenset(spec.name for spec in HOOK_POINTS if spec.on_demand)

_STATES = ("mixer.hook_state", "mixer.hook_hidden")  # what hook_h means in a layer that has none

# TransformerLens' short forms lack our `mixer.` and `norm.` levels: get_act_name("delta", 3) is
# "blocks.3.hook_delta". Each block-level tail below also answers to those tails.
ALIASES: dict[str, str] = {
    **{
        spec.name.removeprefix("mixer."): spec.name
        for spec in HOOK_POINTS
        if spec.scope == "block" and spec.name.startswith("mixer.")
    },
    **{
        f"{level}hook_{tail}": f"norm.hook_{tail}"
        for level in ("", "ln1.", "norm.")
        for tail in ("scale", "normalized")
    },
    **{  # and what it calls them where they sit in an attention or a feed-forward layer
        f"{level}.{spec.name.removeprefix('mixer.')}": spec.name
        for level, letters in (("attn", "aw"), ("mlp", "f"))
        for spec in HOOK_POINTS
        if set(letters) & set(spec.mixers)
    },
    "hook_attn_out": "hook_mixer_out",
}


def points_of(letter: str) -> tuple[HookSpec, ...]:
    """The points of a model whose layers are all of this letter, in the order they fire in a block."""
    return tuple(spec for spec in HOOK_POINTS if not spec.mixers or letter in spec.mixers)


def hook_names(layers: int | str) -> list[str]:
    """Every hook point's full name in a model, in the order they fire; ``layers``: its letters, or how many Mamba."""
    return list(_hook_names("m" * layers if isinstance(layers, int) else layers))


@lru_cache(64)
def _hook_names(letters: str) -> tuple[str, ...]:
    first = next(i for i, spec in enumerate(HOOK_POINTS) if spec.scope == "block")
    last = max(i for i, spec in enumerate(HOOK_POINTS) if spec.scope == "block")
    tails = {letter: [s.name for s in points_of(letter) if s.scope == "block"] for letter in set(letters)}
    names = [spec.name for spec in HOOK_POINTS[:first]]
    for layer, letter in enumerate(letters):
        names += [f"blocks.{layer}.{tail}" for tail in tails[letter]]
    return (*names, *(spec.name for spec in HOOK_POINTS[last + 1 :]))


def widths(cfg: MambaConfig) -> dict[str, int]:
    """How long the axes of the table's shapes are, but for batch and positions."""
    sizes = {"M": cfg.d_model, "D": cfg.d_inner, "N": cfg.d_state, "R": cfg.dt_rank, "1": 1}
    return sizes | {"H": cfg.n_heads, "E": cfg.d_head, "F": cfg.d_ff}


@lru_cache(1 << 14)
def tail_of(name: str) -> tuple[int | None, str]:
    """``("blocks.3.mixer.hook_h")`` -> ``(3, "mixer.hook_h")``; a model-level name gives ``(None, name)``."""
    if name.startswith("blocks."):
        _, layer, tail = name.split(".", 2)
        return int(layer), tail
    return None, name


@lru_cache(1 << 14)
def spec_of(name: str) -> HookSpec:
    """The table's row for a full name."""
    _, tail = tail_of(name)
    return next(spec for spec in HOOK_POINTS if spec.name == tail)


def resolve_name(name: str, known: dict[str, object] | frozenset[str] | set[str] | list[str]) -> str:
    """The full name that ``name`` means, or UnknownNameError with the nearest ones.

    Accepts full names, TransformerLens' ``get_act_name`` results, and its compact form ``"delta3"``.
    """
    if name in known:
        return name
    candidate = name
    if not candidate.startswith(("blocks.", "hook_", "ln_final.")):
        head = candidate.rstrip("0123456789")
        digits = candidate[len(head) :]
        candidate = f"blocks.{digits}.hook_{head}" if digits else f"hook_{head}"
    if candidate.startswith("blocks.") and candidate.count(".") >= 2:
        _, layer, tail = candidate.split(".", 2)
        candidate = f"blocks.{layer}.{ALIASES.get(tail, tail)}"
    if candidate in known:
        return candidate
    for other in _STATES:  # the state of whatever recurrence the layer has
        if candidate.endswith("mixer.hook_h") and (there := candidate.removesuffix("mixer.hook_h") + other) in known:
            return there
    _refuse_elsewhere(candidate, known)
    layered = next((n for n in known if n.startswith("blocks.") and n.endswith(f".{candidate}")), None)
    if layered is not None and candidate.startswith("hook_"):
        short = candidate.removeprefix("hook_")
        raise UnknownNameError(f"{name!r} stands in every block: name one of them, {layered!r} or '{short}0'")
    raise UnknownNameError(f"no hook point is called {name!r}{nearest(candidate, known) or nearest(name, known)}")


def scan_layers(cfg: MambaConfig, what: str) -> list[int]:
    """The Mamba layers, for what goes through "all"; HookError if there is none."""
    found = [i for i, letter in enumerate(cfg.layers) if letter == "m"]
    if not found:
        raise HookError(f"{what}: no layer has a selective scan (pattern {cfg.pattern!r})")
    return found


def size_of(name: str, cfg: MambaConfig, batch: int, length: int) -> int:
    """Entries of the value at a point, by its full name, for so many rows and tokens."""
    sizes = widths(cfg) | {"B": batch, "L": length, "T": length, "S": length}
    return math.prod(sizes[letter] for letter in spec_of(name).shape.split())


def _refuse_elsewhere(name: str, known: Iterable[str]) -> None:
    """UnknownNameError if the point exists, but not in the layer's kind of mixer: says what that layer has."""
    parts = name.split(".", 2)
    if len(parts) < 3 or parts[0] != "blocks":
        return
    spec = next((s for s in HOOK_POINTS if s.name == parts[2]), None)
    here = [n.split(".", 2)[2] for n in known if n.startswith(f"blocks.{parts[1]}.mixer.")]
    if spec is None or not spec.mixers or not here:
        return
    same = (x for x in MIXERS if {s.name for s in points_of(x) if s.name.startswith("mixer.")} == set(here))
    kind = next((MIXERS[letter] for letter in same), "exchanged")  # windows: as attention
    raise UnknownNameError(
        f"no hook point is called {name!r}: layer {parts[1]} is {kind} and has no {parts[2]} "
        f"({', '.join(MIXERS[x] for x in spec.mixers)} has it); it has "
        f"{', '.join(tail.removeprefix('mixer.') for tail in here)}"
    )

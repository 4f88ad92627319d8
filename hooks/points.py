"""The one table of hook points: name, shape, dtype, meaning. Code, docs and errors draw from it."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from mambascope.errors import UnknownNameError, nearest

__all__ = ["ALIASES", "HOOK_POINTS", "LAZY", "HookSpec", "hook_names", "resolve_name", "spec_of", "tail_of"]


@dataclass(frozen=True)
class HookSpec:
    """One hook point.

    ``name`` is relative to its block (``scope="block"``) or to the model. ``shape`` uses the glossary's
    letters. ``dtype`` is ``"model"`` (the weights' dtype), ``"residual"`` (float32 where the model keeps
    its residual stream so) or ``"compute"`` (float32; float64 in a float64 model). ``lazy`` points hold
    ``B L D N`` values that exist only when somebody asks.
    """

    name: str
    scope: Literal["model", "block"]
    shape: str
    dtype: Literal["model", "residual", "compute"]
    meaning: str
    lazy: bool = False


HOOK_POINTS: tuple[HookSpec, ...] = (
    HookSpec("hook_embed", "model", "B L M", "model", "token embedding"),
    HookSpec("hook_resid_pre", "block", "B L M", "residual", "residual stream entering the block"),
    HookSpec("hook_mixer_in", "block", "B L M", "residual", "copy of the residual that only this block's mixer reads"),
    HookSpec("norm.hook_scale", "block", "B L 1", "compute", "root mean square, sqrt(mean(x^2) + eps)"),
    HookSpec("norm.hook_normalized", "block", "B L M", "model", "x / scale, before the norm's weight"),
    HookSpec("mixer.hook_x", "block", "B L D", "model", "the conv's input: first half of in_proj"),
    HookSpec("mixer.hook_gate_in", "block", "B L D", "model", "z, the gate before SiLU: second half of in_proj"),
    HookSpec("mixer.hook_conv", "block", "B L D", "model", "causal depthwise conv + bias, before SiLU"),
    HookSpec("mixer.hook_u", "block", "B L D", "model", "u = SiLU(conv), read by the three below"),
    HookSpec("mixer.hook_u_select", "block", "B L D", "model", "u as x_proj reads it (it selects delta, B, C)"),
    HookSpec("mixer.hook_u_write", "block", "B L D", "model", "u as the recurrence writes it into the state"),
    HookSpec("mixer.hook_u_skip", "block", "B L D", "model", "u as the skip D*u reads it"),
    HookSpec("mixer.hook_dt_low", "block", "B L R", "model", "low-rank input of delta (after Falcon-Mamba's norm)"),
    HookSpec("mixer.hook_B", "block", "B L N", "model", "input matrix (after Falcon-Mamba's norm)"),
    HookSpec("mixer.hook_C", "block", "B L N", "model", "output matrix (after Falcon-Mamba's norm)"),
    HookSpec("mixer.hook_delta_raw", "block", "B L D", "model", "dt_proj(dt_low) + bias, before softplus"),
    HookSpec("mixer.hook_delta", "block", "B L D", "compute", "step size, softplus(delta_raw); 0 at padding"),
    HookSpec("mixer.hook_A_bar", "block", "B L D N", "compute", "decay exp(delta*A), zero-order hold", lazy=True),
    HookSpec("mixer.hook_B_bar", "block", "B L D N", "compute", "input gain delta*B, Euler", lazy=True),
    HookSpec("mixer.hook_write", "block", "B L D N", "compute", "what is added to the state, B_bar*u", lazy=True),
    HookSpec("mixer.hook_h", "block", "B L D N", "compute", "state after the step, A_bar*h + write", lazy=True),
    HookSpec("mixer.hook_y", "block", "B L D", "compute", "y = C h, before skip and gate"),
    HookSpec("mixer.hook_skip", "block", "B L D", "compute", "skip term D*u"),
    HookSpec("mixer.hook_gated", "block", "B L D", "model", "(y + skip) * SiLU(z), out_proj's input"),
    HookSpec("hook_mixer_out", "block", "B L M", "model", "what the block adds to the residual stream"),
    HookSpec("hook_resid_post", "block", "B L M", "residual", "residual stream leaving the block"),
    HookSpec("ln_final.hook_scale", "model", "B L 1", "compute", "root mean square before the unembedding"),
    HookSpec("ln_final.hook_normalized", "model", "B L M", "model", "final residual / scale, before the norm's weight"),
)

LAZY = frozenset(spec.name for spec in HOOK_POINTS if spec.lazy)

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
    "hook_attn_out": "hook_mixer_out",
}


def hook_names(n_layers: int) -> list[str]:
    """Every hook point's full name in a model of ``n_layers`` blocks, in the order they fire."""
    names: list[str] = []
    first = next(i for i, spec in enumerate(HOOK_POINTS) if spec.scope == "block")
    last = max(i for i, spec in enumerate(HOOK_POINTS) if spec.scope == "block")
    names += [spec.name for spec in HOOK_POINTS[:first]]
    for layer in range(n_layers):
        names += [f"blocks.{layer}.{spec.name}" for spec in HOOK_POINTS[first : last + 1]]
    return names + [spec.name for spec in HOOK_POINTS[last + 1 :]]


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
    raise UnknownNameError(f"no hook point is called {name!r}{nearest(candidate, known) or nearest(name, known)}")

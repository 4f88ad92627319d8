"""Freezing what selects: delta, B, C, the conv's SiLU factor or the gate, taken from another run.

    y[t] = Σ_s alpha[t, s] u[s],   alpha from delta, B, C (2312.00752, equation 2; 2403.01590)

With delta, B, C of another run in place, y is linear in u. With the SiLU factor g = SiLU(c)/c of the conv's output c
in place as well, u = g·c is linear in the block's input, and with the gate z the whole block is.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mambascope.errors import HookError
from mambascope.hooks.cache import MambaCache
from mambascope.hooks.effective_path import activation_factor
from mambascope.hooks.interventions.base import Edit, Intervention, Target, kind
from mambascope.hooks.interventions.given import layers_of
from mambascope.hooks.interventions.held import cached, check_cache, lengths_of, match, origin_of
from mambascope.hooks.points import scan_layers
from mambascope.hooks.positions import Site

__all__ = ["FROZEN", "activation_factor", "freeze"]

FROZEN = {
    "delta": "mixer.hook_delta",
    "B": "mixer.hook_B",
    "C": "mixer.hook_C",
    "silu": "mixer.hook_u",
    "gate": "mixer.hook_gate_in",
}
"""What :func:`freeze` can freeze, and the point where it does."""


def freeze(
    cache: MambaCache,
    what: str | Sequence[str] = ("delta", "B", "C"),
    layers: int | Sequence[int] | None = None,
    *,
    channels: Any = None,
) -> Intervention:
    """Take some of delta, B, C, the SiLU factor ("silu") and the gate z ("gate") from another run, at every token.

    ``layers``: default all Mamba layers. ``channels`` restricts delta, silu and gate; B and C have no channels, so name
    them apart from it. Held: ``B L D`` or ``B L N`` for each layer and name. The other run's texts must have as many
    tokens as this one's; in ``generate`` the text may not grow past it.

    Raises
    ------
    HookError: an unknown name; channels with B or C. When it runs: another model or length, rows that do not fit.
    """
    check_cache(cache)
    names = [what] if isinstance(what, str) else list(what)
    unknown = [n for n in names if n not in FROZEN]
    if unknown or not names:
        raise HookError(f"freeze knows {', '.join(FROZEN)}; got {names}")
    if channels is not None and {"B", "C"} & set(names):
        raise HookError(
            "freeze: B and C have no channels; freeze delta, silu or gate by channel in a call of their own"
        )
    lengths = set(lengths_of(cache))
    if len(lengths) > 1:
        raise HookError("freeze needs a cache whose rows have one length")
    chosen = scan_layers(cache.model.cfg, "freeze") if layers is None else layers_of("freeze", layers)
    sites, held = [], {}
    for i in chosen:
        for name in names:
            held[f"value{len(sites)}"] = _frozen(cache, i, name)
            sites.append(Site(f"blocks.{i}.{FROZEN[name]}"))
    options = {"what": names, "length": lengths.pop()}
    return Intervention("freeze", tuple(sites), options, held, channels, None, origin_of(cache, "freeze"))


def _frozen(cache: MambaCache, layer: int, name: str) -> Tensor:
    if name != "silu":
        return cached(cache, f"blocks.{layer}.{FROZEN[name]}", None)
    conv = cached(cache, f"blocks.{layer}.mixer.hook_conv", None)
    return activation_factor(conv, cache.model.cfg.activation)


@kind("freeze", overwrites=True)
def _place_freeze(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    pairs: list[tuple[Site, Edit]] = []
    for i, site in enumerate(iv.sites):
        held = iv.tensors[f"value{i}"]
        if site.name.endswith("hook_u"):
            pairs += _silu(iv, site, held)
        else:
            pairs.append((site, _put(iv, site, held)))
    return pairs


def _put(iv: Intervention, site: Site, held: Tensor) -> Edit:
    return lambda value, hook: match(held, value, hook, site.index, iv.options["length"], str(iv))


def _silu(iv: Intervention, site: Site, held: Tensor) -> list[tuple[Site, Edit]]:
    """Note the conv's output, then put factor·conv in u's place."""
    noted: list[Tensor] = []

    def note(value: Tensor, hook: Any) -> None:
        noted[:] = [value]

    def edit(value: Tensor, hook: Any) -> Tensor:
        return match(held, value, hook, site.index, iv.options["length"], str(iv)) * noted.pop().to(value.dtype)

    note.reads = True  # type: ignore[attr-defined]
    return [(Site(site.name.replace("hook_u", "hook_conv")), note), (site, edit)]

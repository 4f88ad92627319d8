"""What a sweep goes over: sites, layers, positions and channels, and every edit that this makes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import HookError, InputError, UnknownNameError, nearest
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.points import LAZY, resolve_name, spec_of, widths
from mambascope.hooks.sweeps.texts import Pairs

__all__ = ["STATE", "Edit", "Grid", "block_site", "grid_of", "width_of"]

STATE = "mixer.hook_h"


@dataclass(frozen=True)
class Edit:
    """One patched run: the site's name within its block, layer, position and number of the channel group."""

    site: str
    layer: int
    position: int
    group: int


@dataclass(frozen=True)
class Grid:
    """A sweep's axes, in the order of its results: sites × layers × positions × channel groups.

    ``channels``: what each group holds of the site's last axis (of D at ``hook_h``); None: all of it, one group.
    """

    sites: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    channels: tuple[tuple[int, ...], ...] | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        groups = 1 if self.channels is None else len(self.channels)
        return len(self.sites), len(self.layers), len(self.positions), groups

    @property
    def size(self) -> int:
        a, b, c, d = self.shape
        return a * b * c * d

    def edit(self, i: int) -> Edit:
        """The i-th edit."""
        _, layers, positions, groups = self.shape
        i, g = divmod(i, groups)
        i, p = divmod(i, positions)
        s, k = divmod(i, layers)
        return Edit(self.sites[s], self.layers[k], self.positions[p], g)

    def in_order(self) -> list[int]:
        """The numbers of all edits: by position, at each by layer."""
        sites, layers, positions, groups = self.shape
        first = sorted(range(positions), key=self.positions.__getitem__)
        return [
            ((s * layers + k) * positions + p) * groups + g
            for p in first
            for k in range(layers)
            for s in range(sites)
            for g in range(groups)
        ]

    def position(self, i: int) -> int:
        """The i-th edit's."""
        _, _, positions, groups = self.shape
        return self.positions[i // groups % positions]

    def masks(self, site: str, model: Runnable) -> Tensor | None:
        """Which channels each group replaces, bool ``groups width``; None: all."""
        if self.channels is None:
            return None
        mask = torch.zeros(len(self.channels), width_of(model, site), dtype=torch.bool, device=model.device)
        for g, which in enumerate(self.channels):
            mask[g, list(which)] = True
        return mask


def width_of(model: Runnable, site: str) -> int:
    """The size of the axis that ``channels`` counts at a site: the last, at ``hook_h`` the channels D."""
    sizes = widths(model.cfg)
    return sizes["D"] if site == STATE else sizes[spec_of(f"blocks.0.{site}").shape.split()[-1]]


def block_site(model: Runnable, site: str) -> str:
    """A short or full name as the hook point's name within a block; HookError where it has no value to put in."""
    if not isinstance(site, str):
        raise HookError(f"a site of a sweep is the name of a hook point within a block, got {type(site).__name__}")
    if site.startswith(("blocks.", "hook_embed", "ln_final.")):
        raise HookError(
            f"{site!r}: name the point within a block ('resid_pre', 'delta', 'h'); the layers to sweep go in layers="
        )
    if site in ("embed", "hook_embed"):
        raise HookError("'embed' is the stream that enters block 0: sweep 'resid_pre' with layers=[0]")
    short = site if "hook_" in site else f"hook_{site}"
    full, missing = "", UnknownNameError(site)
    for letter in dict.fromkeys(model.cfg.layers):  # of the layers, the first that has such a point says its name
        try:
            full = full or resolve_name(f"blocks.{model.cfg.layers.index(letter)}.{short}", model.hook_dict)
        except UnknownNameError as error:
            missing = error
    if not full:
        raise missing
    tail = full.split(".", 2)[2]
    if spec_of(full).axis != 1:
        raise HookError(f"{tail}: its values depend on the keys of their text; patch 'q', 'k', 'v' or 'z' instead")
    if tail in LAZY and tail != STATE:
        raise HookError(
            f"{tail} has no single value a position to put in; patch 'delta', 'B', 'u_write' or 'h' instead"
        )
    return tail


def grid_of(model: Runnable, pairs: Pairs, over: Any) -> Grid:
    """``over`` (see :func:`~mambascope.hooks.sweeps.sweep`), checked against the model and the texts."""
    if isinstance(over, str):
        over = {"sites": [over]}
    elif isinstance(over, Sequence):
        over = {"sites": list(over)}
    if not isinstance(over, Mapping):
        raise InputError(
            f"over must be a site, a list of sites, or a dict of sites, layers, positions and channels, got {over!r}"
        )
    known = ("sites", "layers", "positions", "channels")
    for key in over:
        if key not in known:
            raise InputError(f"over has no {key!r}{nearest(str(key), known)} (known: {', '.join(known)})")
    named = over.get("sites", "resid_pre")
    sites = tuple(block_site(model, s) for s in ([named] if isinstance(named, str) else named))
    if not sites or len(set(sites)) < len(sites):
        raise InputError(f"sites must name at least one site and none twice, got {named!r}")
    positions = pairs.positions(over.get("positions"))
    layers = _layers(model, sites, over.get("layers"))
    return Grid(sites, layers, positions, _channels(model, sites, over.get("channels")))


def _layers(model: Runnable, sites: Sequence[str], wanted: Any) -> tuple[int, ...]:
    """The layers to sweep: those named, else all that have the sites; a named one that lacks a site is refused."""
    n = model.cfg.n_layers
    if wanted is None:
        wanted = [i for i in range(n) if all(f"blocks.{i}.{site}" in model.hook_dict for site in sites)]
        if not wanted:
            raise HookError(f"no layer has all of {', '.join(sites)}; sweep them one at a time")
    elif isinstance(wanted, int):
        wanted = [wanted]
    elif isinstance(wanted, slice):
        wanted = range(n)[wanted]
    found = []
    for i in wanted:
        if isinstance(i, bool) or not isinstance(i, int) or not -n <= i < n:
            raise InputError(f"layer {i!r} is outside the model's {n} layers ({-n}…{n - 1})")
        found.append(i % n)
        for site in sites:
            resolve_name(f"blocks.{i % n}.{site}", model.hook_dict)
    if not found or len(set(found)) < len(found):
        raise InputError(f"layers must name at least one layer and none twice, got {wanted!r}")
    return tuple(sorted(found))


def _channels(model: Runnable, sites: Sequence[str], wanted: Any) -> tuple[tuple[int, ...], ...] | None:
    if wanted is None:
        return None
    widths = {site: width_of(model, site) for site in sites}
    least = min(widths.values())
    groups: list[tuple[int, ...]] = []
    for group in wanted:
        if isinstance(group, slice):
            group = range(least)[group]
        which = (group,) if isinstance(group, int) else tuple(group)
        for c in which:
            if isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < least:
                raise InputError(f"channel {c!r} is outside 0…{least - 1}, what the sites have ({widths})")
        if not which:
            raise InputError("a group of channels is empty")
        groups.append(which)
    if not groups:
        raise InputError("channels must hold at least one channel or group of channels")
    return tuple(groups)

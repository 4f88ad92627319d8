"""Edits of values: patch, zero, mean, resample, steer, clamp, scale, swap; and of states: erase, decay."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import HookError
from mambascope.hooks.cache import MambaCache
from mambascope.hooks.interventions.base import Edit, Intervention, Target, kind
from mambascope.hooks.interventions.given import layers_of, number, sites_of
from mambascope.hooks.interventions.held import cached, cached_mean, check_cache, lengths_of, match, origin_of
from mambascope.hooks.points import spec_of, widths
from mambascope.hooks.positions import Index, PerRow, Site, at

__all__ = ["clamp", "decay", "erase", "mean", "patch", "resample", "scale", "state", "steer", "swap", "zero"]

Where = str | Site | Sequence[str | Site]


def state(layer: int | Sequence[int], position: Any = None) -> list[Site]:
    """The site of the state after a token (``hook_h``) in one or several layers.

    ``position``: an int, a slice, numbers of their own for every row (see ``ms.at``), or None: every token.
    """
    names = [f"blocks.{i}.mixer.hook_h" for i in layers_of("state", layer)]
    return [Site(name) if position is None else at(name, position) for name in names]


# ---- patch


def patch(
    site: Where,
    cache: MambaCache,
    source: Any = None,
    *,
    rows: Sequence[int] | None = None,
    channels: Any = None,
    dims: Any = None,
) -> Intervention:
    """Put the activation of another run in the place of this one's (activation patching).

    ``site``: where, with positions (``"blocks.3.mixer.hook_h[10]"``, ``ms.at(…)``); several are patched each from its
    own point. ``source``: the positions in the cached run, if they are others (an int, a slice, numbers for every row,
    as many as the site has). ``rows``: which cached row goes into each row of the run (default: row b into row b, or
    a cache of one row into all).

    What is held: the values at the positions, ``B k …``.

    Raises
    ------
    HookError: here: no cache, positions outside it. When it runs: a cache of a model with other weights; other
    numbers of rows or positions; without ``source`` also texts of another length.
    """
    check_cache(cache)
    sites, held, length = sites_of(site), {}, _one_length(cache)
    for i, s in enumerate(sites):
        index: Index = s.index if source is None else at(s.name, source).index
        if _single(index) != _single(s.index):
            raise HookError(f"patch at {s}: source={source!r} names another number of positions than the site")
        held[f"value{i}"] = cached(cache, s.name, index, rows)
    options = {"length": length if source is None else None}
    return Intervention("patch", sites, options, held, channels, dims, origin_of(cache, "patch"))


def _single(index: Index) -> bool:
    return isinstance(index, int) or (isinstance(index, PerRow) and index.one_each)


def _one_length(cache: MambaCache) -> int | None:
    lengths = set(lengths_of(cache))
    return lengths.pop() if len(lengths) == 1 else None


@kind("patch", overwrites=True)
def _place_held(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    def put(site: Site, held: Tensor) -> Edit:
        def edit(value: Tensor, hook: Any) -> Tensor:
            return match(held, value, hook, site.index, iv.options.get("length"), str(iv))

        return edit

    return [(site, put(site, iv.tensors[f"value{i}"])) for i, site in enumerate(iv.sites)]


# ---- ablations


def zero(site: Where, *, channels: Any = None, dims: Any = None) -> Intervention:
    """Zero ablation: the activation becomes 0 at the site's positions."""
    return Intervention("zero", sites_of(site), channels=channels, dims=dims)


@kind("zero", overwrites=True)
def _place_zero(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    return [(site, lambda value, hook: torch.zeros_like(value)) for site in iv.sites]


def mean(site: Where, cache: MambaCache, over: str = "text", *, channels: Any = None, dims: Any = None) -> Intervention:
    """Mean ablation: the activation becomes its mean over a reference batch, which is held.

    ``over="text"``: one mean over all real tokens of all rows; ``over="batch"``: at every position the mean over the
    rows (all of one length). For ``hook_h`` "text" walks through all states in windows.
    """
    check_cache(cache)
    if over not in ("text", "batch"):
        raise HookError(f"mean(over=) is 'text' or 'batch', got {over!r}")
    sites, length = sites_of(site), _one_length(cache)
    if over == "batch" and length is None:
        raise HookError("mean(over='batch') needs reference rows of one length; take over='text'")
    held = {}
    for i, s in enumerate(sites):
        if over == "text":
            held[f"value{i}"] = cached_mean(cache, s.name)
        else:
            held[f"value{i}"] = cached(cache, s.name, s.index).double().mean(0, keepdim=True).to(cache.compute_dtype)
    return Intervention("mean", sites, {"over": over, "length": length}, held, channels, dims, origin_of(cache, "mean"))


@kind("mean", overwrites=True)
def _place_mean(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    if iv.options["over"] == "batch":
        return _place_held(iv, model)

    def put(held: Tensor) -> Edit:
        return lambda value, hook: held.to(value).expand_as(value)

    return [(site, put(iv.tensors[f"value{i}"])) for i, site in enumerate(iv.sites)]


def resample(site: Where, cache: MambaCache, seed: int = 0, *, channels: Any = None, dims: Any = None) -> Intervention:
    """Resample ablation: each row gets the activation of a row of the reference cache, drawn with ``seed``.

    The same draw at every site, so that what belongs together stays together. All reference rows are held.
    """
    check_cache(cache)
    sites = sites_of(site)
    held = {f"value{i}": cached(cache, s.name, s.index) for i, s in enumerate(sites)}
    options = {"seed": int(seed), "length": _one_length(cache)}
    return Intervention("resample", sites, options, held, channels, dims, origin_of(cache, "resample"))


@kind("resample", overwrites=True)
def _place_resample(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    def put(site: Site, held: Tensor) -> Edit:
        def edit(value: Tensor, hook: Any) -> Tensor:
            generator = torch.Generator().manual_seed(iv.options["seed"])
            drawn = torch.randint(0, held.shape[0], (value.shape[0],), generator=generator)
            return match(held[drawn.to(held.device)], value, hook, site.index, iv.options["length"], str(iv))

        return edit

    return [(site, put(site, iv.tensors[f"value{i}"])) for i, site in enumerate(iv.sites)]


# ---- changes of what is there


def steer(
    site: Where, direction: Tensor, scale: float = 1.0, *, channels: Any = None, dims: Any = None
) -> Intervention:
    """Add ``scale * direction``; a direction has the shape of the point's last axes (``M``, ``D``, ``D N``)."""
    sites = sites_of(site)
    if not isinstance(direction, Tensor) or not direction.is_floating_point():
        got = str(direction.dtype) if isinstance(direction, Tensor) else type(direction).__name__
        raise HookError(f"steer needs a float tensor as direction, got {got}")
    if bool(direction.isnan().any()):
        raise HookError("steer: the direction has NaN in it")
    options = {"scale": number("steer: scale", scale)}
    return Intervention("steer", sites, options, {"direction": direction.detach().clone()}, channels, dims)


@kind("steer", overwrites=False)
def _place_steer(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    direction, factor = iv.tensors["direction"], iv.options["scale"]
    for site in iv.sites:
        letters, sizes = spec_of(site.name).shape.split()[2:], widths(model.cfg)
        if not set(letters) <= sizes.keys():
            raise HookError(f"steer at {site}: how wide values are there depends on the text; patch or scale them")
        want = tuple(sizes[letter] for letter in letters)
        if tuple(direction.shape) != want:
            raise HookError(
                f"steer at {site}: the direction has shape {tuple(direction.shape)}, values there are "
                f"{' '.join(letters)} = {want}"
            )
    return [(site, lambda value, hook: value + (factor * direction).to(value)) for site in iv.sites]


def clamp(
    site: Where, low: float | None = None, high: float | None = None, *, channels: Any = None, dims: Any = None
) -> Intervention:
    """Keep values between ``low`` and ``high`` (one may be left out)."""
    if low is None and high is None:
        raise HookError("clamp needs low, high or both")
    low = None if low is None else number("clamp: low", low)
    high = None if high is None else number("clamp: high", high)
    if low is not None and high is not None and low > high:
        raise HookError(f"clamp: low={low} is above high={high}")
    options = {"low": low, "high": high}
    return Intervention("clamp", sites_of(site), options, channels=channels, dims=dims)


@kind("clamp", overwrites=False)
def _place_clamp(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    low, high = iv.options["low"], iv.options["high"]
    return [(site, lambda value, hook: value.clamp(low, high)) for site in iv.sites]


def scale(site: Where, factor: float, *, channels: Any = None, dims: Any = None) -> Intervention:
    """Multiply by a number."""
    return Intervention(
        "scale", sites_of(site), {"factor": number("scale: factor", factor)}, channels=channels, dims=dims
    )


@kind("scale", overwrites=False)
def _place_scale(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    return [(site, lambda value, hook: value * iv.options["factor"]) for site in iv.sites]


def swap(site: Where, rows: tuple[int, int] = (0, 1), *, channels: Any = None, dims: Any = None) -> Intervention:
    """Exchange the activations of two rows of the batch: at ``hook_h[t]`` the states of two prompts.

    The position must be the same token number in both rows (an int or slice that is not negative where rows differ in
    length). To bring in a state from another position, :func:`patch` it from a cache with ``source``.
    """
    first, second = (int(r) for r in rows)
    if first == second or min(first, second) < 0:
        raise HookError(f"swap needs two different rows, numbered from 0; got {tuple(rows)}")
    sites = sites_of(site)
    for s in sites:
        if isinstance(s.index, PerRow):
            raise HookError(f"swap at {s}: both rows are exchanged at one position; use patch(…, source=) for others")
    return Intervention("swap", sites, {"rows": [first, second]}, channels=channels, dims=dims)


@kind("swap", overwrites=False)
def _place_swap(iv: Intervention, model: Target) -> list[tuple[Site, Edit]]:
    first, second = iv.options["rows"]

    def edit(value: Tensor, hook: Any) -> Tensor:
        if max(first, second) >= value.shape[0]:
            raise HookError(f"{iv}: the run has {value.shape[0]} rows")
        if hook.rows is not None and not bool(hook.rows[first] & hook.rows[second]):
            raise HookError(f"{iv}: position {hook.pos} is not addressed in both rows; give one that both have")
        order = list(range(value.shape[0]))
        order[first], order[second] = second, first
        return value[order]

    return [(site, edit) for site in iv.sites]


# ---- states


def erase(layer: int | Sequence[int], position: Any, *, channels: Any = None, dims: Any = None) -> Intervention:
    """Set the state after ``position`` to 0: what was read before is forgotten, but for what the conv still holds."""
    return Intervention("zero", tuple(state(layer, position)), channels=channels, dims=dims)


def decay(
    layer: int | Sequence[int], position: Any, factor: float, *, channels: Any = None, dims: Any = None
) -> Intervention:
    """Multiply the state after ``position`` by ``factor`` (between 0 and 1: forget in part)."""
    factor = number("decay: factor", factor)
    if not 0 <= factor <= 1:
        raise HookError(f"decay: the factor lies between 0 and 1, got {factor}; use scale() for others")
    sites = tuple(state(layer, position))
    return Intervention("scale", sites, {"factor": factor}, channels=channels, dims=dims)

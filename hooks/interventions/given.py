"""What users give an intervention: sites, layers, channels, numbers; anything else is an error when it is made."""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import HookError
from mambascope.hooks.positions import Site, parse_site

__all__ = ["choice", "layers_of", "number", "sites_of"]


def sites_of(site: str | Site | Sequence[str | Site]) -> tuple[Site, ...]:
    """One site or several, strings or ``ms.at(…)``, as Sites; HookError if there is none, or something else."""
    given = [site] if isinstance(site, (str, Site)) or not isinstance(site, Sequence) else list(site)
    if not given:
        raise HookError("an intervention needs a site; none was given")
    for s in given:
        if not isinstance(s, (str, Site)):
            raise HookError(f"a site is a string like 'blocks.3.mixer.hook_h[10]', or ms.at(…); got {s!r}")
    return tuple(s if isinstance(s, Site) else Site(*parse_site(s)) for s in given)


def layers_of(what: str, layers: int | Sequence[int]) -> list[int]:
    """One layer or several as a list of integers; HookError if there is none, or something else."""
    chosen: list[Any] = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    for i in chosen:
        if isinstance(i, bool) or not hasattr(i, "__index__"):
            raise HookError(f"{what}: layers are integers, got {i!r}")
    if not chosen:
        raise HookError(f"{what}: layers is empty")
    return [operator.index(i) for i in chosen]


def number(what: str, value: Any) -> float:
    """A number that is not NaN, as a float; HookError for anything else."""
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise HookError(f"{what} must be a number, got {value!r}") from None
    if math.isnan(found):
        raise HookError(f"{what} is NaN, which would spread over everything after it")
    return found


def choice(name: str, chosen: Any) -> tuple[int, ...] | None:
    """Channels or dimensions as sorted numbers; None means all."""
    if chosen is None:
        return None
    if isinstance(chosen, Tensor):
        chosen = chosen.nonzero()[:, 0].tolist() if chosen.dtype == torch.bool else chosen.tolist()
    if isinstance(chosen, slice):
        if chosen.stop is None or min(chosen.start or 0, chosen.stop) < 0:
            raise HookError(f"{name}: a slice needs an end, and neither end negative; got {chosen}")
        chosen = range(chosen.start or 0, chosen.stop, chosen.step or 1)
    numbers = [chosen] if isinstance(chosen, int) else list(chosen)
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise HookError(f"{name} must be numbers ≥ 0, at least one; got {chosen!r}")
    if len(set(numbers)) < len(numbers):
        raise HookError(f"{name} names {sorted(n for n in set(numbers) if numbers.count(n) > 1)[0]} twice")
    return tuple(sorted(numbers))

"""What a sweep of patches, or its prediction by attribution, looks like: layer × token maps.

The computing is :func:`mambascope.sweep`'s and :func:`mambascope.attribute`'s; ``.table()`` of what they return is the
same as numbers.
"""

from typing import TYPE_CHECKING, Literal

from mambascope.errors import InputError, nearest
from mambascope.hooks.sweeps import Sweep

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = ["sweep_figure"]


def sweep_figure(
    result: Sweep, site: str | None = None, *, show: Literal["score", "change", "value"] = "score", group: int = 0
) -> "go.Figure":
    """A layer × token map of one site of a sweep, plotly; places that are not done yet stay empty.

    ``site``: by its short name, as in ``result.sites``; needed where there are several. ``show``: the normalised score,
    the change of the metric, or the metric. ``group``: the number of the channel group. Raises InputError for a site or
    group that the sweep has not.
    """
    from mambascope.analyses.plots import token_map

    if site is None and len(result.sites) > 1:
        raise InputError(f"this sweep has {len(result.sites)} sites ({', '.join(result.sites)}); say which, site=")
    site = next(iter(result.sites)) if site is None else site
    if site not in result.sites:
        raise InputError(f"this sweep has no site {site!r}{nearest(site, result.sites)} ({', '.join(result.sites)})")
    if show not in ("score", "change", "value"):
        raise InputError(f"show must be 'score', 'change' or 'value', got {show!r}")
    groups = result.values.shape[3]
    if isinstance(group, bool) or not isinstance(group, int) or not 0 <= group < groups:
        raise InputError(f"group {group!r} is outside the sweep's {groups} groups of channels (0…{groups - 1})")
    values = getattr(result, show)[result.sites.index(site), :, :, group]
    places = result.grid.positions
    together = list(places) == list(range(places[0], places[0] + len(places)))
    labels = result.tokens if together else tuple(f"{p} {t}" for p, t in zip(places, result.tokens, strict=True))
    name = result.metric["metric"]
    unit = {"score": "score", "change": f"change of {name}", "value": name}[show]
    title = f"clean {site} put into the corrupted run: {name} {result.corrupted:.3g} → {result.clean:.3g}"
    rows = [str(i) for i in result.grid.layers]
    return token_map(values, labels, title, unit, rows=rows, signed=show != "value", start=places[0] if together else 0)

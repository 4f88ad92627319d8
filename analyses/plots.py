"""Figures: layer × token maps, bars over tokens, pair maps, profiles and curves, all labelled by token.

Texts of thousands of tokens stay readable: beyond ``MOST`` columns neighbouring tokens share a cell that shows
their largest value (by magnitude where values are signed), and the figure says so. Every text is escaped,
because plotly reads a small HTML in labels.
"""

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from torch import Tensor

from mambascope.analyses.labels import short, visible

if TYPE_CHECKING:
    from mambascope.analyses.capacity import Capacity

Numbers = npt.NDArray[np.float64]

__all__ = [
    "DIVERGING",
    "MOST",
    "SEQUENTIAL",
    "capacity_curves",
    "pair_map",
    "profiles",
    "signed_log_scale",
    "token_bars",
    "token_map",
]

MOST = 1000
"""Columns beyond which tokens share cells."""

_NAMED = 48  # tick labels that fit side by side
_WRITTEN = 24  # columns up to which cells carry text

SEQUENTIAL = [[0.0, "#f4f6fb"], [0.25, "#c3d2ee"], [0.5, "#7c9bd8"], [0.75, "#3d63b3"], [1.0, "#16306b"]]
DIVERGING = [[0.0, "#a33a2a"], [0.25, "#e0a596"], [0.5, "#f6f5f3"], [0.75, "#94b3dd"], [1.0, "#1f4f9e"]]
LINES = ("#3d63b3", "#c2622d", "#2f8a6b", "#8a5aa8", "#b08a1e", "#5b6b7b")


def escaped(text: str) -> str:
    """Text for plotly, which reads ``<b>``, ``<a href>`` and entities in every label."""
    return html.escape(text, quote=False)


def array(values: Any) -> Numbers:
    """A float64 array of a tensor or list, on the CPU."""
    return values.detach().double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)


def decimate(values: Numbers, most: int = MOST) -> tuple[Numbers, npt.NDArray[np.int64], int]:
    """Columns of ``rows L`` joined to at most ``most``: the values kept, the column each came from, columns a cell.

    The value of largest magnitude wins; a cell of NaNs stays NaN.
    """
    rows, length = values.shape
    per = max(1, math.ceil(length / most))
    cells = math.ceil(length / per)
    padded = np.full((rows, cells * per), np.nan)
    padded[:, :length] = values
    grouped = padded.reshape(rows, cells, per)
    size = np.where(np.isnan(grouped), -1.0, np.abs(grouped))
    pick = size.argmax(-1)  # rows cells
    kept = np.take_along_axis(grouped, pick[..., None], -1)[..., 0]
    column = np.minimum(pick + np.arange(cells) * per, length - 1)
    return kept, column, per


def centres(cells: int, per: int, start: int) -> list[float]:
    """The middle of each cell on the axis of positions."""
    return [start + i * per + (per - 1) / 2 for i in range(cells)]


def ticks(labels: Sequence[str], start: int = 0) -> dict[str, Any]:
    """Tick positions and texts of a token axis: every token if they fit, else some, each with its position."""
    length = len(labels)
    step = max(1, math.ceil(length / _NAMED))
    if step == 1:
        at = list(range(length))
        texts = [escaped(short(label)) for label in labels]
    else:
        step = math.ceil(length / 16)
        at = list(range(0, length, step))
        texts = [f"{start + i:,} {escaped(short(labels[i], 10))}" for i in at]
    return {"tickmode": "array", "tickvals": [start + i for i in at], "ticktext": texts, "tickangle": -60}


def note(per: int, where: str = "") -> str:
    """What a title adds where tokens share cells."""
    return "" if per == 1 else f"<br><sub>each cell: the largest of {per} neighbouring tokens{where}</sub>"


def cell_names(labels: Sequence[str], start: int, per: int) -> list[str]:
    """Position and token of each cell of an axis, of several tokens the span and the first."""
    found = []
    for first in range(0, len(labels), per):
        last = min(first + per, len(labels)) - 1
        span = f"{start + first:,}" if last == first else f"{start + first:,}–{start + last:,}"
        found.append(f"{span} {escaped(short(labels[first]))}")
    return found


def log_scale(values: Numbers) -> tuple[Numbers, dict[str, Any]]:
    """log10 of positive values (0 becomes NaN), and a colour bar that shows the values themselves."""
    z = np.log10(np.where(values > 0, values, np.nan))
    if not np.isfinite(z).any():
        return z, {}
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    if high - low < 0.5:  # less than a factor of 3: round numbers are too far apart
        inside = [10**x for x in np.linspace(low, high, 4)]
    else:
        steps = (1, 2, 5) if high - low < 2 else (1,)
        marks = [s * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for s in steps]
        inside = [m for m in marks if low <= math.log10(m) <= high]
    return z, {"tickvals": [math.log10(m) for m in inside], "ticktext": [f"{m:.3g}" for m in inside]}


DECADES = 3
"""Orders of magnitude that a signed logarithmic scale tells apart on either side of 0."""


def signed_log_scale(values: Numbers) -> tuple[Numbers, dict[str, Any]]:
    """-1 … 1: the sign, and the logarithm of the size down to a thousandth of the largest; what is smaller becomes 0.
    Also a colour bar that shows the values themselves."""
    size = np.abs(values)
    top = float(np.nanmax(size)) if np.isfinite(size).any() else 0.0
    if top == 0:
        return np.where(np.isnan(values), np.nan, 0.0), {}
    with np.errstate(divide="ignore"):
        z = np.sign(values) * np.clip(1 + np.log10(size / top) / DECADES, 0, 1)
    marks = [(1 - j / DECADES, top / 10**j) for j in range(DECADES)]
    at = [(-a, -v) for a, v in marks] + [(0.0, 0.0)] + marks[::-1]
    return z, {"tickvals": [a for a, _ in at], "ticktext": [f"{v:.2g}" for _, v in at]}


def layout(figure: go.Figure, title: str, height: int) -> go.Figure:
    """The look that all figures share."""
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0, "xref": "paper", "xanchor": "left"},
        height=height,
        margin={"l": 60, "r": 20, "t": 60, "b": 90},
        template="plotly_white",
        font={"size": 12},
    )
    return figure


def token_map(
    values: Tensor | Numbers,
    labels: Sequence[str],
    title: str,
    unit: str,
    *,
    rows: Sequence[str] | None = None,
    hover: Sequence[Sequence[str]] | None = None,
    cells: Sequence[Sequence[str]] | None = None,
    log: bool = False,
    signed: bool = False,
    start: int = 0,
    most: int = MOST,
) -> go.Figure:
    """A heat map of ``rows L`` values, first row at the bottom, one column a token.

    ``hover`` adds a text to each value, ``cells`` is written into them while few columns show. ``log`` colours by
    the logarithm, ``signed`` around zero; both: by the logarithm of the size on either side of zero.
    """
    z, column, per = decimate(array(values), most)
    names = [str(i) for i in range(z.shape[0])] if rows is None else list(rows)
    shown = np.char.mod("%.4g", z)

    def about(i: int, j: int) -> str:
        c = int(column[i, j])
        return _about(labels, start, c, shown[i, j], "" if hover is None else hover[i][c])

    text = [[about(i, j) for j in range(z.shape[1])] for i in range(z.shape[0])]
    z, bar = _scaled(z, log, signed)
    heat = _colours(z, unit, signed, bar)
    if cells is not None and per == 1:
        heat["text"] = [[escaped(cell) for cell in line] for line in cells]
        if len(labels) <= _WRITTEN:
            heat["texttemplate"] = "%{text}"
    x = centres(z.shape[1], per, start)
    trace = go.Heatmap(
        z=z, x=x, y=list(range(len(names))), customdata=text, hovertemplate="%{customdata}<extra></extra>", **heat
    )
    figure = layout(go.Figure(trace), title + note(per), 170 + 22 * min(max(len(names), 6), 40))
    figure.update_xaxes(**ticks(labels, start), showgrid=False)
    step = max(1, math.ceil(len(names) / 24))
    some = list(range(0, len(names), step))
    figure.update_yaxes(title="layer", tickvals=some, ticktext=[names[i] for i in some], showgrid=False, zeroline=False)
    return figure


def _scaled(z: Numbers, log: bool, signed: bool) -> tuple[Numbers, dict[str, Any]]:
    if not log:
        return z, {}
    return signed_log_scale(z) if signed else log_scale(z)


def _colours(z: Numbers, unit: str, signed: bool, bar: dict[str, Any]) -> dict[str, Any]:
    heat: dict[str, Any] = {"colorscale": DIVERGING if signed else SEQUENTIAL}
    heat["colorbar"] = {"title": {"text": unit}, **bar}
    if signed:
        bound = float(np.nanmax(np.abs(z))) if np.isfinite(z).any() else 1.0
        heat |= {"zmin": -bound, "zmax": bound}
    return heat


def _about(labels: Sequence[str], start: int, column: int, value: str, extra: str) -> str:
    head = f"<b>{escaped(visible(labels[column]))}</b> at {start + column}: {value}"
    return f"{head}<br>{escaped(extra)}" if extra else head


def token_bars(
    values: Tensor | Numbers,
    labels: Sequence[str],
    title: str,
    unit: str,
    *,
    start: int = 0,
    most: int = MOST,
) -> go.Figure:
    """One bar a token."""
    kept, column, per = decimate(array(values)[None], most)
    text = [_about(labels, start, int(c), f"{v:.4g}", "") for c, v in zip(column[0], kept[0], strict=True)]
    x = centres(kept.shape[1], per, start)
    bars = go.Bar(x=x, y=kept[0], customdata=text, hovertemplate="%{customdata}<extra></extra>", marker_color=LINES[0])
    bars.update(marker_line_width=0)
    figure = layout(go.Figure(bars), title + note(per), 320).update_layout(bargap=0.2 if kept.shape[1] <= 200 else 0)
    figure.update_xaxes(**ticks(labels, start), showgrid=False)
    figure.update_yaxes(title=unit)
    return figure


def pair_map(
    values: Tensor | Numbers,
    labels: Sequence[str],
    title: str,
    unit: str,
    *,
    log: bool = False,
    signed: bool = False,
    start: int = 0,
    most: int = 500,
) -> go.Figure:
    """Queries down, sources across; ``log`` colours three decades below the largest value, ``signed`` around zero."""
    across, _, per = decimate(array(values), most)
    down, _, _ = decimate(across.T, most)
    shown = np.char.mod("%.4g", down.T)
    z, bar = signed_log_scale(down.T) if log else (down.T, {})
    heat = _colours(z, unit, signed, bar)
    if log and not signed:
        heat |= {"zmin": 0, "zmax": 1}
    names = cell_names(labels, start, per)
    about = "query %{y}<br>source %{x}<br>%{customdata}<extra></extra>"
    trace = go.Heatmap(z=z, x=names, y=names, customdata=shown, hovertemplate=about, **heat)
    figure = layout(go.Figure(trace), title + note(per, " on either axis"), 640)
    marks = ticks(labels, start)
    marks["tickvals"] = [names[(at - start) // per] for at in marks["tickvals"]]
    marks |= {"type": "category", "constrain": "domain"}
    figure.update_xaxes(**marks, title="source", showgrid=False)
    figure.update_yaxes(**marks, title="query", autorange="reversed", scaleanchor="x")
    figure.update_yaxes(tickangle=0, showgrid=False)
    return figure


def profiles(values: Tensor | Numbers, x: Sequence[float | int], title: str, x_title: str, y_title: str) -> go.Figure:
    """One line a row of ``rows points`` values."""
    figure = go.Figure()
    for i, line in enumerate(array(values)):
        colour = LINES[i % len(LINES)]
        figure.add_scatter(x=list(x), y=line, name=f"layer {i}", mode="lines", line={"color": colour, "width": 1.8})
    layout(figure, title, 380)
    figure.update_xaxes(title=x_title)
    figure.update_yaxes(title=y_title)
    return figure


def capacity_curves(result: "Capacity") -> go.Figure:
    """Accuracy (left axis) and losses (right axis) against N on a logarithmic axis."""
    figure = go.Figure()
    errors = {"type": "data", "array": array(result.accuracy_error), "visible": True}
    x = list(result.n)
    figure.add_scatter(x=x, y=array(result.accuracy), error_y=errors, name="accuracy", line={"color": LINES[0]})
    for name, values, colour in (("first", result.first_loss, LINES[5]), ("second", result.second_loss, LINES[1])):
        line = {"color": colour, "dash": "dot"}
        figure.add_scatter(x=x, y=array(values), name=f"loss, {name} copy", yaxis="y2", line=line)
    knee = result.knee
    if knee is not None and math.isfinite(knee):
        figure.add_vline(x=knee, line={"color": LINES[1], "width": 1}, annotation_text=f"knee at {knee:.0f}")
    layout(figure, "N random tokens, repeated once: recall of the second copy", 380)
    figure.update_xaxes(title="N", type="log", tickvals=x, ticktext=[str(n) for n in x])
    figure.update_yaxes(title="accuracy", range=[0, 1.02])
    figure.update_layout(yaxis2={"title": "loss, nats", "overlaying": "y", "side": "right", "showgrid": False})
    return figure

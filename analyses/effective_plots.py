"""Figures of the analyses on effective kernels: timescales, kernel curves, spectra, costs by layer, and flow.

They share the look and the decimation of :mod:`mambascope.analyses.plots`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from torch import Tensor

from mambascope.analyses.plots import LINES, SEQUENTIAL, array, layout, profiles

if TYPE_CHECKING:
    from mambascope.analyses.timescales import Timescales

__all__ = ["channel_curves", "layer_bars", "timescale_map"]


def timescale_map(result: "Timescales") -> go.Figure:
    """Layers up, half-life across on a logarithmic axis; the last column is what the text is too short to show."""
    shares, edges = result.spectrum()
    last = len(edges) - 1
    names = [f"{edges[i]:.3g}–{edges[i + 1]:.3g} tokens" for i in range(last - 1)]
    names += [f"{edges[last - 1]:.3g} tokens and more", "longer than the text shows from half of its tokens or more"]
    about = [[f"layer {layer}, {name}: {share:.1%}" for name, share in zip(names, row, strict=True)]
             for layer, row in zip(result.layers, shares.tolist(), strict=True)]  # fmt: skip
    heat = go.Heatmap(
        z=array(shares), x=list(range(last + 1)), y=list(range(len(result.layers))), customdata=about,
        hovertemplate="%{customdata}<extra></extra>", colorscale=SEQUENTIAL, colorbar={"title": {"text": "share"}},
    )  # fmt: skip
    title = f"half-lives of the state dimensions, median over {result.length:,} tokens"
    if bool(shares[:, -1].any()):
        title += "<br><sub>∞: from half of the tokens or more, the text ends before the state has halved</sub>"
    figure = layout(go.Figure(heat), title, 170 + 22 * min(len(result.layers), 40))
    at = [i for i in range(last) if math.log2(edges[i]).is_integer()]
    texts = [f"{edges[i]:.0f}" for i in at]
    figure.update_xaxes(title="half-life, tokens", tickvals=[*at, last], ticktext=[*texts, "∞"], showgrid=False)
    step = max(1, math.ceil(len(result.layers) / 24))
    some = list(range(0, len(result.layers), step))
    figure.update_yaxes(title="layer", tickvals=some, ticktext=[str(result.layers[i]) for i in some], showgrid=False)
    return figure


def channel_curves(
    values: Tensor, channels: Sequence[int], x: Sequence[float], title: str, x_title: str, y_title: str, *,
    log_y: bool = False,
) -> go.Figure:  # fmt: skip
    """One line a channel of ``points channels`` values."""
    figure = profiles(values.T, x, title, x_title, y_title)
    for trace, channel in zip(figure.data, channels, strict=True):
        trace.update(name=f"channel {channel}")  # type: ignore[attr-defined]
    return figure.update_yaxes(type="log") if log_y else figure


def layer_bars(
    values: Tensor, layers: Sequence[int], names: Sequence[str], title: str, unit: str, *, errors: Tensor | None = None
) -> go.Figure:
    """Groups of bars, a group a layer, a colour a name, of ``layers names`` values (with their standard errors)."""
    figure = go.Figure()
    for j, name in enumerate(names):
        bars: dict[str, Any] = {"x": [str(i) for i in layers], "y": array(values[:, j]), "name": name}
        if errors is not None:
            bars["error_y"] = {"type": "data", "array": array(errors[:, j]), "visible": True, "thickness": 1}
        figure.add_bar(**bars, marker_color=LINES[j % len(LINES)])
    layout(figure, title, 380).update_layout(barmode="group")
    figure.update_xaxes(title="layer", type="category")
    return figure.update_yaxes(title=unit)

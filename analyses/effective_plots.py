"""Figures of the analyses on effective kernels: timescales, kernel curves, spectra, costs by layer, and flow.

They share the look and the decimation of :mod:`mambascope.analyses.plots`.
"""

import math
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from mambascope.analyses.plots import SEQUENTIAL, array, layout

if TYPE_CHECKING:
    from mambascope.analyses.timescales import Timescales

__all__ = ["timescale_map"]


def timescale_map(result: "Timescales") -> go.Figure:
    """Layers up, half-life across on a logarithmic axis; the last column is what the text is too short to show."""
    shares, edges = result.spectrum()
    last = len(edges) - 1
    names = [f"{edges[i]:.3g}–{edges[i + 1]:.3g} tokens" for i in range(last - 1)]
    names += [f"{edges[last - 1]:.3g} tokens and more", "longer than the text shows"]
    about = [[f"layer {layer}, {name}: {share:.1%}" for name, share in zip(names, row, strict=True)]
             for layer, row in zip(result.layers, shares.tolist(), strict=True)]  # fmt: skip
    heat = go.Heatmap(
        z=array(shares), x=list(range(last + 1)), y=list(range(len(result.layers))), customdata=about,
        hovertemplate="%{customdata}<extra></extra>", colorscale=SEQUENTIAL, colorbar={"title": {"text": "share"}},
    )  # fmt: skip
    title = f"half-lives of the state dimensions, median over {result.length:,} tokens"
    figure = layout(go.Figure(heat), title, 170 + 22 * min(len(result.layers), 40))
    at = [i for i in range(last) if math.log2(edges[i]).is_integer()]
    texts = [f"{edges[i]:.0f}" for i in at]
    figure.update_xaxes(title="half-life, tokens", tickvals=[*at, last], ticktext=[*texts, "∞"], showgrid=False)
    step = max(1, math.ceil(len(result.layers) / 24))
    some = list(range(0, len(result.layers), step))
    figure.update_yaxes(title="layer", tickvals=some, ticktext=[str(result.layers[i]) for i in some], showgrid=False)
    return figure

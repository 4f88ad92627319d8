"""Figures of the analyses on effective kernels: readable at 2,000 tokens, labelled, and true to their numbers."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from mambascope.analyses.contributions import LogitContributions, Target
from mambascope.analyses.effective_plots import layer_bars
from mambascope.analyses.kernels import AttentionMap
from mambascope.analyses.lti import LTILayer
from mambascope.analyses.plots import MOST, signed_log_scale
from mambascope.analyses.relevance import Relevance
from mambascope.analyses.rollout import Flow
from mambascope.analyses.timescales import Timescales

L = 2000
LABELS = tuple(f" <b>{i}" for i in range(L))  # markup in a token must stay text
TARGET = Target(L - 1, "logit of 'x'", torch.ones(4), 1.0)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def contributions() -> Any:
    zeros = torch.zeros(3, dtype=torch.float64)
    return LogitContributions(TARGET, values(3, L), zeros, zeros, zeros, 0.0, LABELS, start=50)


def relevance() -> Any:
    zeros = torch.zeros(2, dtype=torch.float64)
    return Relevance(TARGET, "half", values(3, L), torch.zeros(2, L, dtype=torch.float64), zeros, LABELS, start=50)


def some_flow() -> Any:
    at = (L - 1, 7, 900)
    return Flow("gradients", "frozen", "rest", at, values(3, L), values(3), LABELS, start=50)


@pytest.mark.parametrize("make", [contributions, relevance, some_flow])
def test_maps_over_the_text_at_2000_tokens(make: Any) -> None:
    result = make()
    figure = result.figure()
    heat = figure.data[0]
    assert heat.z.shape == (3, MOST)
    assert "the largest of 2 neighbouring tokens" in figure.layout.title.text
    signed = getattr(result, {"contributions": "scan", "relevance": "stream", "some_flow": "weights"}[make.__name__])
    pairs = signed.view(3, MOST, 2)
    largest = pairs.gather(-1, pairs.abs().argmax(-1, keepdim=True))[..., 0]
    assert np.allclose(heat.z, signed_log_scale(largest.numpy())[0])  # by magnitude, the sign kept
    assert (heat.zmin, heat.zmax) == (-1, 1)
    assert heat.colorbar.ticktext[-1] == f"{float(signed.abs().max()):.2g}"
    assert 10 <= len(figure.layout.xaxis.ticktext) <= 48
    assert figure.layout.xaxis.ticktext[0] == "50 ·&lt;b&gt;0"  # position and token, escaped
    assert "&lt;b&gt;" in heat.customdata[0][0] and "<b>·&lt;b&gt;" in heat.customdata[0][0]
    assert len(json.dumps(json.loads(figure.to_json()))) < 3_000_000


@pytest.mark.parametrize("kind", ["flow", "attention"])
def test_pair_maps_at_2000_tokens(kind: str) -> None:
    weights = values(L, L).tril()
    if kind == "flow":
        figure = Flow("shares", "frozen", "rest", tuple(range(L)), weights, values(L), LABELS).figure()
    else:
        figure = AttentionMap(3, "signed", weights.float(), LABELS).figure()
    heat = figure.data[0]
    assert heat.z.shape == (500, 500)
    assert "the largest of 4 neighbouring tokens on either axis" in figure.layout.title.text
    cell = weights[800:804, 40:44].flatten()
    want = float(cell[cell.abs().argmax()])
    want = float(np.sign(want) * (1 + math.log10(abs(want) / float(weights.abs().max())) / 3))
    assert heat.z[200, 10] == pytest.approx(want, rel=1e-6)
    assert not np.triu(heat.z, 1).any()
    assert figure.layout.yaxis.autorange == "reversed"  # the first query on top
    assert heat.x[10] == "40–43 ·&lt;b&gt;40"  # positions and the first token, escaped: what hovering shows
    assert set(figure.layout.xaxis.tickvals) <= set(heat.x)


def test_a_map_of_magnitudes_has_logarithmic_colours() -> None:
    weights = torch.tensor([[1.0, 0.0], [1e-2, 1e-7]])
    heat = AttentionMap(3, "mean_abs", weights, ("a", "b")).figure().data[0]
    assert heat.z.tolist() == [[1, 0], [pytest.approx(1 / 3), 0]]  # nothing below a thousandth of the largest
    assert (heat.zmin, heat.zmax) == (0, 1)
    assert list(heat.x) == ["0 a", "1 b"]


def test_a_signed_logarithm() -> None:
    z, bar = signed_log_scale(np.array([[100.0, -10.0, 1.0, -0.05, 0.0, np.nan]]))
    assert z[0, :5].tolist() == pytest.approx([1, -2 / 3, 1 / 3, 0, 0])
    assert np.isnan(z[0, 5])
    assert bar["ticktext"] == ["-1e+02", "-10", "-1", "0", "1", "10", "1e+02"]
    assert bar["tickvals"] == pytest.approx([-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1])
    assert signed_log_scale(np.zeros((2, 2)))[0].tolist() == [[0, 0], [0, 0]]


def test_a_short_text_names_every_token() -> None:
    labels = ("a", "\n", " b")
    figure = Flow("shares", "frozen", "rest", (0, 1, 2), values(3, 3).tril(), values(3), labels).figure()
    assert list(figure.layout.xaxis.ticktext) == ["a", "⏎", "·b"]
    assert "neighbouring" not in figure.layout.title.text


def test_the_timescale_map_is_its_spectrum() -> None:
    half_life = torch.tensor([[[1.0, 3.0]], [[40.0, float("inf")]]], dtype=torch.float64)
    result = Timescales((2, 5), half_life, torch.zeros_like(half_life), 64)
    figure = result.figure()
    heat = figure.data[0]
    shares, edges = result.spectrum()
    assert np.array_equal(heat.z, shares.numpy())
    assert heat.z[0].sum() == heat.z[1].sum() == 1
    assert heat.z[1, -1] == 0.5  # the infinite one, in the last column
    assert heat.z[0, 0] == 0.5
    assert [i for i in range(len(edges)) if heat.z[1, i]] == [
        edges.index(max(e for e in edges if e <= 40)),
        len(edges) - 1,
    ]
    assert list(figure.layout.yaxis.ticktext) == ["2", "5"]
    assert heat.customdata[1][-1] == "layer 5, longer than the text shows from half of its tokens or more: 50.0%"
    assert "the text ends before the state has halved" in figure.layout.title.text
    seen = Timescales((2,), half_life[:1], torch.zeros(1, 1, 2), 64).figure()
    assert "∞" not in seen.layout.title.text  # nothing to explain
    assert list(figure.layout.xaxis.ticktext) == ["1", "2", "4", "8", "16", "32", "64", "∞"]


def test_kernel_curves_and_spectra() -> None:
    D, N = 9, 3
    layer = LTILayer(
        1, values(D).exp() / 10, -values(D, N).exp(), values(N), values(N), values(D).abs(), values(D) * 0, 2000
    )
    curves = layer.figure()
    most = layer.energy.argsort(descending=True)[:6].tolist()
    assert [trace.name for trace in curves.data] == [f"channel {c}" for c in most]
    assert len(curves.data[0].x) == 128
    assert np.allclose(curves.data[0].y, layer.kernel(128)[:, most[0]])
    spectrum = layer.spectrum_figure([2], points=5)
    assert np.allclose(spectrum.data[0].y, layer.response(torch.linspace(0, 0.5, 5)).abs()[:, 2])


def test_bars_by_layer() -> None:
    figure = layer_bars(values(2, 3), (4, 7), ("delta", "B", "C"), "t", "nats", errors=values(2, 3).abs())
    assert [bar.name for bar in figure.data] == ["delta", "B", "C"]
    assert list(figure.data[1].x) == ["4", "7"]
    assert np.array_equal(figure.data[1].y, values(2, 3)[:, 1])
    assert np.array_equal(figure.data[1].error_y.array, values(2, 3)[:, 1].abs())
    plain = layer_bars(values(2, 3), (4, 7), ("delta", "B", "C"), "t", "nats")
    assert plain.data[0].error_y.array is None

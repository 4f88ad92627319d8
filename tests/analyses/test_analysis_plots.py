"""Figures: every analysis has one, labelled by token, escaped, and readable when long."""

import json
import warnings

import numpy as np
import pytest
import torch
from hand_built import byte_tokenizer, random_model

from mambascope.analyses import (
    copy_capacity,
    effective_kernel,
    gates,
    hidden_attention,
    induction_score,
    logit_lens,
    patch,
    predictions,
    scope,
    sources,
    state_norms,
)
from mambascope.analyses.plots import decimate, log_scale, ticks, token_bars, token_map

HOSTILE = "<b>&\"'\0\u202e"


def test_every_result_has_a_figure(speaking) -> None:
    text = "some <b>text</b>"
    results = [
        gates(speaking, text),
        effective_kernel(speaking, text, 1),
        sources(speaking, text),
        hidden_attention(speaking, text, 0, reduce="signed"),
        state_norms(speaking, text),
        predictions(speaking, text),
        logit_lens(speaking, text),
        induction_score(speaking, 4, rows=1),
        copy_capacity(speaking, (2, 4), rows=2),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        results.append(patch(speaking, text, text.replace("some", "sofe"), ("a", "b")))
    for result in results:
        drawn = result.figure().to_json()
        assert len(json.loads(drawn)["data"]) >= 1
        labels = json.dumps(
            [a.get("ticktext", []) for a in json.loads(drawn)["layout"].values() if isinstance(a, dict)]
        )
        assert "<b>" not in labels
    assert set(scope(speaking, text).figures()) == {"delta", "state norm", "logit lens", "sources", "relevance"}


def test_values_and_labels_are_where_they_belong() -> None:
    values = torch.arange(6.0).view(2, 3)
    figure = token_map(values, ["a", " b", HOSTILE], "t", "unit", start=10)
    heat = figure.data[0]
    assert np.array_equal(np.asarray(heat.z), values.numpy())
    assert list(heat.x) == [10, 11, 12]
    assert list(figure.layout.xaxis.ticktext) == ["a", "·b", "&lt;b&gt;&amp;\"'␀\\u202e"]
    assert heat.customdata[1][2] == "<b>&lt;b&gt;&amp;\"'␀\\u202e</b> at 12: 5"


def test_long_texts_are_decimated_by_maximum_and_say_so() -> None:
    values = np.zeros((2, 2000))
    values[0, 777], values[1, 1999] = 3.0, -5.0
    kept, column, per = decimate(values)
    assert (kept.shape, per) == ((2, 1000), 2)
    assert (kept[0].max(), kept[1].min()) == (3.0, -5.0)  # neither spike is lost
    assert (column[0, 388], column[1, 999]) == (777, 1999)
    labels = [f"t{i}" for i in range(2000)]
    figure = token_map(values, labels, "title", "unit", signed=True)
    assert "largest of 2 neighbouring tokens" in figure.layout.title.text
    assert figure.data[0].customdata[0][388] == "<b>t777</b> at 777: 3"
    assert list(figure.data[0].x[:2]) == [0.5, 2.5]
    assert len(figure.layout.xaxis.ticktext) <= 17
    short = token_map(values[:, :1000], labels[:1000], "title", "unit")
    assert "neighbouring" not in short.layout.title.text
    bars = token_bars(values[0], labels, "title", "unit")
    assert max(bars.data[0].y) == 3.0
    assert "largest of 2" in bars.layout.title.text


def test_odd_lengths_and_gaps() -> None:
    kept, column, per = decimate(np.array([[1.0, np.nan, np.nan, np.nan, -2.0]]), most=2)
    assert per == 3
    assert kept.tolist() == [[1.0, -2.0]]
    assert column.tolist() == [[0, 4]]
    assert np.isnan(decimate(np.full((1, 4), np.nan), most=2)[0]).all()


def test_logarithmic_colours_show_the_values() -> None:
    z, bar = log_scale(np.array([[0.0, 0.001, 10.0]]))
    assert np.isnan(z[0, 0])
    assert z[0, 1:].tolist() == pytest.approx([-3, 1])
    assert bar["ticktext"] == ["0.001", "0.01", "0.1", "1", "10"]
    assert log_scale(np.zeros((1, 2)))[1] == {}
    narrow = log_scale(np.array([[0.1, 0.12]]))[1]
    assert len(narrow["ticktext"]) == 4


def test_ticks_name_every_token_or_some() -> None:
    few = ticks(["a", "b"], start=5)
    assert (few["tickvals"], few["ticktext"]) == ([5, 6], ["a", "b"])
    many = ticks(["x"] * 500, start=1000)
    assert many["ticktext"][1] == "1,032 x"


def test_cells_are_written_only_where_they_fit() -> None:
    model = random_model(tokenizer=byte_tokenizer())
    assert logit_lens(model, "short").figure().data[0].texttemplate == "%{text}"
    assert logit_lens(model, "x" * 60).figure().data[0].texttemplate is None

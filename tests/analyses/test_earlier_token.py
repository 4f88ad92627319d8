"""The worked example runs again to its committed record, and says what docs/sweeps.md says of it."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("earlier_token", ROOT / "docs/examples/earlier_token.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(name: str) -> list[list[str]]:
    with (ROOT / "docs/results/earlier_token.csv").open(encoding="utf-8") as lines:
        assert next(lines).startswith("# python docs/examples/earlier_token.py")
        return [row for row in csv.reader(lines) if row[0] == name]


def compare(found: list[list[str]], name: str) -> None:
    kept = record(name)
    assert [row[:5] for row in found] == [row[:5] for row in kept]
    for now, then in zip(found, kept, strict=True):
        for a, b in zip(now[5:], then[5:], strict=True):
            assert abs(float(a) - float(b)) < 2e-3, now


def test_two_layers_keep_it_in_the_second_state_after_two_tokens(example: Any) -> None:
    measured, predicted = example.induction()
    compare(example.rows("induction-2l", measured, predicted), "induction-2l")
    resid, u, h = measured.score[..., 0]
    assert float(h[1, 13:].min()) > 0.98  # from two tokens after it to the end
    assert float(h[1, :13].abs().max()) < 0.02
    assert float(h[0].abs().max()) < 0.02  # the first layer's state knows nothing of it
    assert float(resid[:, 11].min()) > 0.98  # where it stands
    assert float(u[1, 13]) > 0.98  # and where it is written


def test_a_language_model_keeps_it_in_one_layer_s_state(example: Any) -> None:
    measured, predicted = example.towns()
    compare(example.rows("lm-mini", measured, predicted), "lm-mini")
    h = measured.score[2, :, :, 0]
    assert float(h[7, 4:].min()) > 0.8
    others = h[[i for i in range(13) if i != 7]]
    assert float(others.abs().max()) < 0.05
    x, y = measured.change[2].flatten(), predicted.change[2].flatten()
    assert float((x - y).norm() / x.norm()) < 0.05  # one forward and backward says the same


def test_the_pictures_are_there() -> None:
    page = (ROOT / "docs/sweeps.md").read_text(encoding="utf-8")
    for name in ("induction-2l", "lm-mini"):
        link = f"results/earlier_token_{name}.png"
        assert f"]({link})" in page
        assert (ROOT / "docs" / link).read_bytes().startswith(b"\x89PNG")

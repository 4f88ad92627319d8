"""docs/sweeps.md runs as it stands, and names what there is."""

import re
from pathlib import Path
from typing import Any

import pytest

from mambascope.hooks import metrics

PAGE = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")


def test_the_page_runs_in_order(capsys: Any) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "docs/sweeps.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "the state of layer 7 after" in shown
    assert float(names["apart"]) < 0.1
    assert float(names["exact"].change[0, 0].sum()) == pytest.approx(
        names["exact"].clean - names["exact"].corrupted, rel=0.02
    )
    assert names["figure"].data[0].z.shape == (13, 12)


def test_it_names_every_metric() -> None:
    for name in set(metrics.__all__) - {"Bound", "Metric", "bind"}:
        assert f"`ms.{name}(" in PAGE, name


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target

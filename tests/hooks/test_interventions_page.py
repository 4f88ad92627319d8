"""docs/interventions.md runs as it stands, and names what there is."""

import re
from pathlib import Path
from typing import Any

import torch

import mambascope as ms

PAGE = (Path(__file__).parents[2] / "docs" / "interventions.md").read_text(encoding="utf-8")


def test_the_page_runs_in_order(capsys: Any) -> None:
    names: dict[str, Any] = {}
    with torch.no_grad():
        blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
        assert len(blocks) == 7
        for block in blocks:
            exec(compile(block, "docs/interventions.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "would overwrite" in shown
    assert "form='split'" in shown
    assert names["by_token"].shape[0] == names["length"]
    assert names["by_token"].std(0).max() > 0


def test_it_names_every_intervention() -> None:
    for name in set(ms.interventions.__all__) - {"Intervention", "Pair", "Record", "load", "save", "state"}:
        assert f"{name}(" in PAGE or f"`{name}" in PAGE, name

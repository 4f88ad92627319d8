"""The page about effective kernels runs, from its first block to its last, and its claims hold."""

import re
from pathlib import Path
from typing import Any

from mambascope.analyses.plots import MOST

PAGE = Path(__file__).parents[2] / "docs" / "effective.md"


def test_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 9
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    whole = float((names["share"].added - names["share"].total).abs().max())
    assert whole < 1e-4
    assert MOST == 1000  # the page says so

"""The attacks start from whole checkpoints, which the loading tests know how to write."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "loading"))

from checkpoints import write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint in transformers' format, for an attack to break."""
    write_checkpoint(tmp_path / "model")
    return tmp_path / "model"

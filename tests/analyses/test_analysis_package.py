"""The package's public names, and that importing it costs nothing."""

import subprocess
import sys

import pytest

import mambascope.analyses as analyses


def test_every_public_name_is_there() -> None:
    assert sorted(analyses.__all__) == list(analyses.__all__)
    for name in analyses.__all__:
        assert getattr(analyses, name).__doc__
    with pytest.raises(AttributeError, match=r"no attribute .gatez.; public names: .*gates"):
        _ = analyses.gatez  # type: ignore[attr-defined]


def test_no_public_name_is_a_module_s() -> None:
    """A function named as its file would be hidden by it as soon as the file is imported."""
    assert not set(analyses.__all__) & set(analyses._HOME.values())


def test_importing_is_light() -> None:
    heavy = ["torch", "numba", "transformers", "transformer_lens", "nnsight", "plotly", "pandas", "triton"]
    code = f"import sys, mambascope.analyses, mambascope.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

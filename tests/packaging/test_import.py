"""`import mambascope` is cheap, and every public name is there on purpose."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mambascope

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "numba",
    "transformers",
    "transformer_lens",
    "nnsight",
    "plotly",
    "triton",
    "pandas",
    "safetensors",
    "rich",
)


NEEDS = {"mambascope.ops.step": "triton"}
"""Packages of kernels that exist only where an extra is installed."""


def in_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_is_cheap_and_loads_nothing_heavy() -> None:
    code = (
        "import time, sys, json\nstart = time.perf_counter()\nimport mambascope\ntook = time.perf_counter() - start\n"
        f"print(json.dumps([took, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    runs = [json.loads(in_fresh_process(code)) for _ in range(3)]
    assert all(loaded == [] for _, loaded in runs)
    assert min(took for took, _ in runs) <= 0.3


def test_the_check_above_can_fail() -> None:
    loaded = json.loads(
        in_fresh_process("import sys, json, mambascope.model; print(json.dumps('torch' in sys.modules))")
    )
    assert loaded is True


@pytest.mark.parametrize("name", mambascope.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(mambascope, name) is not None


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(AttributeError, match="public names: HOOK_POINTS, HookedMamba"):
        mambascope.nonsense


def packages() -> list[str]:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def test_every_folder_with_code_is_packaged() -> None:
    found = set()
    for top in ("mambascope", "hooks", "analyses"):
        for file in (ROOT / top).rglob("*.py"):
            inside = file.relative_to(ROOT)
            if "hooks" in inside.parts[1:] or "analyses" in inside.parts[1:]:
                continue  # the tracked links
            folder = inside.parent.parts
            found.add(".".join(folder if top == "mambascope" else ("mambascope", *folder)))
    assert found == set(packages())


@pytest.mark.parametrize("name", packages())
def test_all_lists_only_what_exists(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} holds kernels for {NEEDS[name]}, which is not installed")
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        assert getattr(module, public) is not None, f"{name}.{public}"


def test_links_point_inside_the_repository() -> None:
    for link, target in (("mambascope/hooks", "../hooks"), ("mambascope/analyses", "../analyses")):
        assert (ROOT / link).is_symlink()
        assert str((ROOT / link).readlink()) == target

"""Everything a package needs at run time is listed for the wheel, shards of weights and their index too."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
CODE = (".py", ".pyc")


def missing(package: str, names: list[str]) -> list[str]:
    """Files of a package's folder that no pattern lets into the wheel; as in setuptools, ``*`` stops at a slash."""
    patterns = SETUP["package-data"][package]

    def fits(name: str) -> bool:
        return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)

    return [name for name in names if not fits(name)]


@pytest.mark.parametrize("package", ["mambascope.zoo", "mambascope.training"])
def test_every_file_that_is_no_code_is_package_data(package: str) -> None:
    folder = ROOT / package.replace(".", "/")
    names = [str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.suffix not in CODE]
    assert names
    assert missing(package, names) == []


def test_what_a_language_model_in_shards_needs_is_package_data() -> None:
    files = ("model-00001-of-00003.safetensors", "model.safetensors.index.json", "config.json", "curve.csv")
    files += ("tokenizer.json", "tokenizer_config.json", "card.json", "card.md")
    assert missing("mambascope.zoo", [f"lm-next/{name}" for name in files]) == []
    assert missing("mambascope.zoo", ["lm-next/model.bin"]) == ["lm-next/model.bin"], "the check can fail"


def test_every_package_is_listed() -> None:
    where = {"mambascope": ROOT / "mambascope", "mambascope.hooks": ROOT / "hooks"}
    where["mambascope.analyses"] = ROOT / "analyses"
    found = {
        ".".join((name, *file.parent.relative_to(folder).parts))
        for name, folder in where.items()
        for file in folder.rglob("__init__.py")
        if not any(parent.is_symlink() for parent in file.parents if parent != folder)
    }
    assert found == set(SETUP["packages"])

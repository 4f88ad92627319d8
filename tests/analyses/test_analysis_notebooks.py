"""The notebooks run from top to bottom, on public names alone: on a tiny random model, and on the embedded one."""

import ast
import os
from pathlib import Path

import nbformat
import pytest
from hand_built import byte_tokenizer, random_model
from nbclient import NotebookClient

import mambascope
from mambascope.loading import save_model

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SHIPPED = [info.name for info in mambascope.list_models() if info.embedded and info.name == "lm-mini"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(random_model(tokenizer=byte_tokenizer()), folder)
    return str(folder)


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS][:1] == ["01_first_look.ipynb"]


@pytest.mark.parametrize("name", ["tiny", *SHIPPED])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # jupyter's sockets
def test_a_notebook_runs(path: Path, name: str, tiny: str, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert 'MODEL = "lm-mini"' in first.source
    if name == "tiny":
        first.source = first.source.replace('"lm-mini"', repr(tiny))
    client = NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})  # an exception in a cell is raised here
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_and_carries_no_output(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert cell.outputs == []
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                assert node.module.split(".")[0] != "mambascope" or node.module.count(".") <= 1
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_")
                if isinstance(node.value, ast.Name) and node.value.id == "analyses":
                    assert node.attr in mambascope.analyses.__all__

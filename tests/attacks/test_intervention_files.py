"""Damaged and hostile records of interventions: refused by name, never half used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mambascope as ms
from mambascope.errors import MambascopeError
from tests.conftest import make_model

iv = ms.interventions
CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "kind": lambda d: d.update(kind="__import__"),
    "kind of a list": lambda d: d.update(kind=["patch"]),
    "no sites": lambda d: d.pop("sites"),
    "site without index": lambda d: d["sites"][0].pop("index"),
    "site of a number": lambda d: d.update(sites=[3]),
    "index of text": lambda d: d["sites"][0].update(index="3"),
    "index of a list": lambda d: d["sites"][0].update(index=[3]),
    "slice of text": lambda d: d["sites"][0].update(index={"slice": ["a", 2, 3, 4]}),
    "rows of text": lambda d: d["sites"][0].update(index={"rows": "abc", "on": None}),
    "rows of floats": lambda d: d["sites"][0].update(index={"rows": [0.5], "on": None}),
    "rows too large": lambda d: d["sites"][0].update(index={"rows": [1 << 80], "on": None}),
    "position far away": lambda d: d["sites"][0].update(index=1 << 60),
    "unknown point": lambda d: d["sites"][0].update(name="blocks.0.forward"),
    "channels of text": lambda d: d.update(channels="all"),
    "channels far away": lambda d: d.update(channels=[1 << 40]),
    "missing tensor": lambda d: d.update(tensors=["value0", "value7"]),
    "no tensors": lambda d: d.update(tensors=[]),
    "options of a list": lambda d: d.update(options=[1]),
    "another model": lambda d: d.update(source="0" * 64),
    "source of a list": lambda d: d.update(source=[1]),
}


@pytest.fixture
def record(tmp_path: Path) -> tuple[Any, torch.Tensor, Path]:
    model, tokens = make_model(backend="torch"), torch.arange(10)[None]
    with torch.no_grad():
        cache = model.run_with_cache(tokens)[1]
    path = tmp_path / "run.safetensors"
    iv.record(model, tokens, [iv.patch("blocks.1.hook_resid_pre[3]", cache)]).save(path)
    return model, tokens, path


def rewritten(path: Path, change: Callable[[dict[str, str], dict[str, torch.Tensor]], None]) -> Path:
    with safe_open(str(path), framework="pt") as file:
        meta, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(meta, tensors)
    save_file(tensors, str(path), meta)
    return path


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_record_is_refused(record: tuple[Any, torch.Tensor, Path], what: str) -> None:
    model, _, path = record

    def change(meta: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        data = json.loads(meta["interventions"])
        CHANGES[what](data[0])
        meta["interventions"] = json.dumps(data)

    rewritten(path, change)
    with torch.no_grad(), pytest.raises(MambascopeError):
        iv.load_record(path).run(model)


@pytest.mark.parametrize("text", ["", "{", "3", "[3]", "null", '"patch"'])
def test_what_is_no_json_list_is_refused(record: tuple[Any, torch.Tensor, Path], text: str) -> None:
    path = rewritten(record[2], lambda meta, tensors: meta.update(interventions=text))
    with pytest.raises(MambascopeError):
        iv.load_record(path)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(1, 24, dtype=torch.long)[:, :7], torch.zeros(5, 24), torch.zeros(1, 3, 24)]
)
def test_tensors_of_other_shapes_are_refused(record: tuple[Any, torch.Tensor, Path], tensor: torch.Tensor) -> None:
    model, _, path = record
    rewritten(path, lambda meta, tensors: tensors.update({"edit/0/value0": tensor.contiguous()}))
    with torch.no_grad(), pytest.raises(MambascopeError):
        iv.load_record(path).run(model)


def test_a_sound_record_runs(record: tuple[Any, torch.Tensor, Path]) -> None:
    model, tokens, path = record
    with torch.no_grad():
        assert torch.equal(iv.load_record(rewritten(path, lambda meta, tensors: None)).run(model), model(tokens))


def test_a_file_cut_off_is_refused(record: tuple[Any, torch.Tensor, Path]) -> None:
    path = record[2]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(MambascopeError, match="cannot be read"):
        iv.load_record(path)

"""Pickles that carry code are refused, not run; broken ones are named."""

import collections
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TINY, random_weights, to_theirs, write_pickle

import mambascope as ms
from mambascope.errors import LoadError
from mambascope.loading.pickle_file import PickleFile


class Payload:
    """Unpickling this calls a function of the attacker's choice."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def tensors() -> dict[str, Any]:
    return {to_theirs(name): t for name, t in random_weights(TINY).items()}


@pytest.fixture
def pickled(folder: Path) -> Path:
    """The checkpoint as a pickle; returns the pickle's path."""
    (folder / "model.safetensors").unlink()
    write_pickle(folder, tensors())
    return folder / "pytorch_model.bin"


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(LoadError, match=rf"(?s){match}"):
        ms.load(folder, device="cpu")


def test_the_checkpoint_is_sound_before_it_is_attacked(pickled: Path) -> None:
    assert ms.load(pickled.parent, device="cpu").cfg.n_layers == 2


PAYLOADS = {
    "system": lambda mark: Payload(os.system, f"touch {mark}"),
    "eval": lambda mark: Payload(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
    "exec": lambda mark: Payload(exec, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
    "copy": lambda mark: Payload(shutil.copy, __file__, str(mark)),
    "torch.load": lambda mark: Payload(torch.load, str(mark)),
    "torch.hub": lambda mark: Payload(torch.hub.load, "x/y", "z"),
    "partial": lambda mark: Payload(__import__("functools").partial, os.system, f"touch {mark}"),
}


@pytest.mark.parametrize("kind", ["system", "eval", "exec", "copy"])
def test_the_payloads_do_run_where_nobody_stops_them(tmp_path: Path, kind: str) -> None:
    pickle.loads(pickle.dumps(PAYLOADS[kind](tmp_path / "it-ran")))
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("kind", PAYLOADS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "key", "whole"])
def test_code_is_refused_and_not_run(pickled: Path, tmp_path: Path, kind: str, legacy: bool, place: str) -> None:
    mark = tmp_path / "it-ran"
    payload = PAYLOADS[kind](mark)
    content: Any = tensors()
    if place == "value":
        content["backbone.layers.0.mixer.D"] = payload
    elif place == "key":
        content[payload] = torch.ones(1)
    else:
        content = payload
    torch.save(content, pickled, _use_new_zipfile_serialization=not legacy)
    refuse(pickled.parent, r"pytorch_model\.bin' is refused: .*plain tensors are accepted and nothing of it was run")
    assert not mark.exists()


def test_bare_pickle_with_code(pickled: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    pickled.write_bytes(pickle.dumps(Payload(os.system, f"touch {mark}")))
    refuse(pickled.parent, r"pytorch_model\.bin' is (refused|truncated or corrupt)")
    assert not mark.exists()


def test_code_in_one_of_the_shards(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_pickle(folder, tensors(), 3)
    mark = tmp_path / "it-ran"
    torch.save({"x": Payload(os.system, f"touch {mark}")}, folder / "pytorch_model-00003-of-00003.bin")
    refuse(folder, r"pytorch_model-00003-of-00003\.bin' is refused")
    assert not mark.exists()


def test_a_hostile_pickle_beside_safetensors_is_not_opened(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-ran"
    torch.save(Payload(os.system, f"touch {mark}"), folder / "pytorch_model.bin")
    assert ms.load(folder, device="cpu").cfg.n_layers == 2
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([torch.ones(1)], "holds a list, expected a dict"),
        (torch.ones(1), "holds a Tensor, expected a dict"),
        ({1: torch.ones(1)}, "has a key that is no text: 1"),
        ({"state_dict": {"x": torch.ones(1)}}, "'state_dict' is a dict, expected a tensor; if the weights are nested"),
        ({"x": 5}, "'x' is a int, expected a tensor"),
        (collections.OrderedDict(x=None), "'x' is a NoneType, expected a tensor"),
    ],
)
def test_pickles_that_hold_something_else(pickled: Path, content: Any, match: str) -> None:
    torch.save(content, pickled)
    refuse(pickled.parent, match)


@pytest.mark.parametrize("keep", [0, 1, 2, 10, 1000, -1])
def test_truncated_pickles(pickled: Path, keep: int) -> None:
    data = pickled.read_bytes()
    pickled.write_bytes(data[:keep])
    refuse(pickled.parent, r"pytorch_model\.bin' is (refused|truncated or corrupt)")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(20, 6).to_sparse(),
        torch.ones(20, 6, dtype=torch.int32),
        torch.ones(20, 6, device="meta"),
        torch.ones(20, 6, dtype=torch.complex64),
    ],
    ids=["sparse", "int", "meta", "complex"],
)
def test_special_tensors_are_named(pickled: Path, tensor: torch.Tensor) -> None:
    name = "backbone.layers.0.mixer.in_proj.weight"
    torch.save(tensors() | {name: tensor}, pickled)
    refuse(pickled.parent, f"'{name}'.*is stored as .*; only float64, float32, bfloat16 and float16 are read")


def test_a_tiny_storage_seen_as_a_huge_tensor(pickled: Path) -> None:
    """Stride 0 makes an exabyte out of four bytes; the shape is compared before anything is copied."""
    name = "backbone.layers.0.mixer.in_proj.weight"
    torch.save(tensors() | {name: torch.ones(1).expand(2**58)}, pickled)
    refuse(pickled.parent, rf"'{name}'.*has shape \(288230376151711744,\)")
    torch.save(tensors() | {name: torch.ones(1).expand(20, 6)}, pickled)  # honest size: it is simply copied
    weight = ms.load(pickled.parent, device="cpu").blocks[0].mixer.in_proj.weight  # type: ignore[union-attr]
    assert weight.is_contiguous()  # type: ignore[operator, union-attr]


def test_compressed_archives_are_refused(pickled: Path) -> None:
    """torch.save never compresses; a bomb would."""
    with zipfile.ZipFile(pickled) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(pickled, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    refuse(pickled.parent, "is refused: its entry '.*' is compressed")


def test_tensors_that_overlap_in_one_storage_are_copied_apart(tmp_path: Path) -> None:
    base = torch.arange(8.0)
    torch.save({"a": base[:6], "b": base[2:], "c": base.view(2, 4).T}, tmp_path / "x.bin")
    with PickleFile(tmp_path / "x.bin", "x.bin") as source:
        got = {name: source.read(name, torch.float32, torch.device("cpu")) for name in "abc"}
    got["a"].zero_()
    assert torch.equal(got["b"], base[2:])
    assert torch.equal(got["c"], base.view(2, 4).T)
    assert got["c"].is_contiguous()

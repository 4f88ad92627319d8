"""Hostile and broken safetensors files: each is refused with its reason, quickly, and before any data is read."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import mambascope as ms
from mambascope.errors import LoadError
from mambascope.loading.safetensors_file import HEADER_BYTES, SafetensorsFile

FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (JSON value or bytes), these data, and optionally a wrong header length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def refuse(path: Path, match: str) -> None:
    """Our reader says why, names the file, and takes no time over it."""
    began = time.perf_counter()
    with pytest.raises(LoadError, match=rf"(?s)'shown.safetensors'.*{match}"):
        SafetensorsFile(path, "shown.safetensors")
    assert time.perf_counter() - began < 3


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {key: value for key, value in (FLOATS | changes).items() if value is not ...}}


# ---- the header's length -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, HEADER_BYTES + 1, 10_000])
def test_header_length_beyond_file_or_limit(tmp_path: Path, length: int) -> None:
    refuse(file(tmp_path / "x", entry(), bytes(8), length), f"claims {length:,} bytes, but the file has")


def test_sparse_file_that_is_all_header(tmp_path: Path) -> None:
    """A terabyte that occupies nothing on disk: the limit holds, not the file's size."""
    path = file(tmp_path / "x", entry(), length=2**39)
    with open(path, "r+b") as f:
        f.truncate(2**40)
    refuse(path, "limit")


@pytest.mark.parametrize("size", range(9))
def test_almost_empty_files(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(size))
    refuse(path, "fewer than the 8" if size < 8 else r"does not start with '\{'")


# ---- the header's JSON -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[" * 100_000, r"does not start with '\{'"),
        (b'{"x":' * 200_000, "nested too deeply"),
        (b'{"__metadata__":' + b"[" * 500_000 + b"]" * 500_000 + b"}", "nested too deeply"),
        (b'{"x": {}', "not valid JSON"),
        (b'{"x": \xff}', "not valid JSON"),
        (b'{"x": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"x": 1, "x": 2}', "'x' appears twice"),
        (b" {}", r"does not start with '\{'"),
        (b'{"x": 5}', "not described by dtype, shape and data_offsets"),
        (b'{"__metadata__": {"a": 1}}', "not a map from text to text"),
        (b'{"__metadata__": []}', "not a map from text to text"),
    ],
)
def test_header_json(tmp_path: Path, header: bytes, match: str) -> None:
    path = file(tmp_path / "x", header)
    began = time.perf_counter()
    with pytest.raises(LoadError, match=match):
        SafetensorsFile(path, "shown.safetensors")
    assert time.perf_counter() - began < 3


def test_duplicate_tensor_names_are_refused(tmp_path: Path) -> None:
    """Two entries of one name: parsers disagree on which one counts, so a checked file could show another face."""
    one = json.dumps(FLOATS)
    refuse_twice = file(tmp_path / "x", f'{{"x": {one}, "x": {one}}}'.encode(), bytes(8))
    with pytest.raises(LoadError, match=r"'x' appears twice, so its meaning is ambiguous"):
        SafetensorsFile(refuse_twice, "shown.safetensors")


# ---- entries that lie --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dtype": "F31"}, "unknown dtype 'F31'"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"shape": [-2]}, "impossible shape"),
        ({"shape": [True, 2]}, "impossible shape"),
        ({"shape": [2.0]}, "impossible shape"),
        ({"shape": "2"}, "impossible shape"),
        ({"shape": [1] * 17 + [2]}, "impossible shape"),
        ({"shape": [2**62, 4]}, "needs 73,786,976,294,838,206,464 bytes"),
        ({"shape": [2**32, 2**32]}, "needs"),
        ({"shape": [3]}, "needs 12 bytes, its data_offsets give 8"),
        ({"shape": []}, "needs 4 bytes"),
        ({"data_offsets": [8, 0]}, "impossible data_offsets"),
        ({"data_offsets": [-8, 0]}, "impossible data_offsets"),
        ({"data_offsets": [0]}, "impossible data_offsets"),
        ({"data_offsets": [0, 8, 16]}, "impossible data_offsets"),
        ({"data_offsets": [0, 8.0]}, "impossible data_offsets"),
        ({"data_offsets": None}, "impossible data_offsets"),
        ({"data_offsets": [8, 16]}, "'x' leaves a hole after the header"),
        ({"data_offsets": ...}, "not described by"),
        ({"extra": 1}, "not described by"),
        ({"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}, "needs 2 bytes"),
    ],
)
def test_entries_that_lie(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    refuse(file(tmp_path / "x", entry(**changes), bytes(8)), match)


def two(first: list[int], second: list[int]) -> dict[str, Any]:
    return {"a": FLOATS | {"data_offsets": first}, "b": FLOATS | {"data_offsets": second}}


def test_overlapping_and_scattered_tensors(tmp_path: Path) -> None:
    refuse(file(tmp_path / "x", two([0, 8], [4, 12]), bytes(12)), "'b' overlaps 'a'")
    refuse(file(tmp_path / "x", two([0, 8], [0, 8]), bytes(8)), "overlaps")
    refuse(file(tmp_path / "x", two([0, 8], [12, 20]), bytes(20)), "'b' leaves a hole after 'a'")


def test_truncated_and_padded_files(tmp_path: Path) -> None:
    refuse(file(tmp_path / "x", entry(), bytes(7)), "truncated: the header describes")
    refuse(file(tmp_path / "x", entry(), bytes(9)), "bytes that belong to no tensor")
    refuse(file(tmp_path / "x", {}, bytes(1)), "bytes that belong to no tensor")


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """A memory map would end the process with a bus error here."""
    path = file(tmp_path / "x", entry(), bytes(8))
    with SafetensorsFile(path, "shown.safetensors") as reader:
        with open(path, "r+b") as f:
            f.truncate(path.stat().st_size - 4)
        with pytest.raises(LoadError, match=r"ended early"):
            reader.read("x", torch.float32, torch.device("cpu"))


# ---- against the reference parser ----------------------------------------------------------------------


def theirs_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as f:
            list(f.keys())
        return True
    except SafetensorError:
        return False


SOUND = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, {"format": "pt"})


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_are_refused_wherever_safetensors_refuses(tmp_path: Path, data: st.DataObject) -> None:
    """Random edits: never any other error than LoadError, and never more lenient than the reference parser."""
    raw = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 4))]
        else:
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        if not raw:
            break
    path = tmp_path / "x"
    path.write_bytes(raw)
    try:
        with SafetensorsFile(path, "x") as reader:
            for name, found in reader.entries.items():
                if found.dtype is not None:
                    assert reader.read(name, found.dtype, torch.device("cpu")).shape == found.shape
    except LoadError:
        return
    assert theirs_accepts(path)


def test_the_reference_parser_agrees_that_the_sound_file_is_sound(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(SOUND)
    assert theirs_accepts(tmp_path / "x")
    with SafetensorsFile(tmp_path / "x", "x") as reader:
        assert set(reader.entries) == {"a", "b"}


# ---- through load --------------------------------------------------------------------------------------


def test_load_names_the_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LoadError, match=r"model/model\.safetensors' is not a whole safetensors file: it is truncated"):
        ms.load(folder, device="cpu")


def test_config_with_two_billion_layers_is_refused_at_once(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 2000000000'))
    began = time.perf_counter()
    with pytest.raises(LoadError, match=r"says 2000000000 layers, its weights hold 2"):
        ms.load(folder, device="cpu")
    assert time.perf_counter() - began < 3

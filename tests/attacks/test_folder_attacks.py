"""Folders that reach outside themselves, and JSON that is built to hurt."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TINY, random_weights, to_theirs, write_json, write_safetensors

import mambascope as ms
from mambascope.errors import LoadError
from mambascope.loading.files import CONFIG_BYTES, ModelFolder, plain_name

INDEX = "model.safetensors.index.json"


def refuse(folder: Path, match: str) -> None:
    began = time.perf_counter()
    with pytest.raises(LoadError, match=rf"(?s){match}"):
        ms.load(folder, device="cpu")
    assert time.perf_counter() - began < 5


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    write_safetensors(folder, {to_theirs(n): t for n, t in random_weights(TINY).items()}, 3)
    return folder


def edit_index(folder: Path, change: Any) -> None:
    values = json.loads((folder / INDEX).read_text())
    change(values)
    write_json(folder / INDEX, values)


# ---- the index -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "C:\\x.safetensors",
        "..\\x.safetensors", "c:x.safetensors", "x\0.safetensors", "x\n.safetensors", "a" * 300, "file:///etc/passwd",
        5, None, ["x"], True,
    ],
)  # fmt: skip
def test_weight_map_may_only_name_files_of_the_folder(sharded: Path, name: Any) -> None:
    edit_index(sharded, lambda values: values["weight_map"].update({"backbone.norm_f.weight": name}))
    refuse(sharded, "entry 'backbone.norm_f.weight': .* is not a plain file name")


def test_shards_of_another_kind(sharded: Path) -> None:
    edit_index(sharded, lambda values: values["weight_map"].update({"backbone.norm_f.weight": "x.bin"}))
    refuse(sharded, r"the shard 'x\.bin' should end in '\.safetensors'")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 5])
def test_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    edit_index(sharded, lambda values: values.update(weight_map=weight_map))
    refuse(sharded, "has no 'weight_map'")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuse(sharded, r"the shard 'model-00002-of-00003\.safetensors' named by .* is missing")


def test_duplicate_shards(sharded: Path) -> None:
    """One tensor in two shards: which one counts would depend on the order of reading."""
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "model-00002-of-00003.safetensors")
    refuse(sharded, r"the tensor '.*' is in the shard 'model-00002-of-00003\.safetensors', but the index puts it in")


def test_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    edit_index(sharded, lambda values: values["weight_map"].pop("backbone.embeddings.weight"))
    refuse(sharded, "the tensor 'backbone.embeddings.weight' is in the shard .*, but the index does not list it")


def test_tensor_that_its_shard_lacks(sharded: Path) -> None:
    edit_index(sharded, lambda values: values["weight_map"].update({"backbone.x": "model-00001-of-00003.safetensors"}))
    refuse(sharded, r"puts the tensor 'backbone\.x' in the shard 'model-00001-of-00003\.safetensors', which lacks it")


def test_one_tensor_listed_twice_in_the_index(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    twice = text.replace(
        '"weight_map": {', '"weight_map": {"backbone.norm_f.weight": "model-00001-of-00003.safetensors", '
    )
    (sharded / INDEX).write_text(twice)
    refuse(sharded, "'backbone.norm_f.weight' appears twice")


# ---- links and special files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / f"secret-{name}"
    (folder / name).rename(outside)
    for target in (outside, Path("..") / outside.name):
        (folder / name).symlink_to(target)
        refuse(folder, f"'{name}' is a link that leads out of the folder")
        (folder / name).unlink()


def test_shard_that_is_a_link_out_of_the_folder(sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.rename(tmp_path / "outside")
    shard.symlink_to(tmp_path / "outside")
    refuse(sharded, "is a link that leads out of the folder")


def test_link_through_a_linked_subfolder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "away" / "model.safetensors")
    (folder / "sub").symlink_to(tmp_path / "away")
    (folder / "model.safetensors").symlink_to("sub/model.safetensors")
    refuse(folder, "is a link that leads out of the folder")


def test_links_that_stay_inside_and_a_linked_folder_are_fine(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "alias").symlink_to(folder)
    assert ms.load(tmp_path / "alias", device="cpu").cfg.n_layers == 2


def hub_layout(folder: Path, root: Path, shared: bool = False) -> Path:
    """The hub cache's layout: snapshots of links into blobs (or, newer, into a store that all models share)."""
    repo = root / "models--me--tiny"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (root / "blobs" / "aa").mkdir(parents=True)
    for path in list(folder.iterdir()):
        blob = repo / "blobs" / f"hash-{path.name}"
        if shared:
            shutil.move(path, root / "blobs" / "aa" / path.name)
            blob.symlink_to(Path("../../blobs/aa") / path.name)
        else:
            shutil.move(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_the_hub_caches_own_links_work(folder: Path, tmp_path: Path, shared: bool) -> None:
    assert ms.load(hub_layout(folder, tmp_path / "cache", shared), device="cpu").cfg.n_layers == 2


def test_a_folder_that_only_looks_like_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    snapshot = hub_layout(folder, tmp_path / "cache")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "secret")
    refuse(snapshot, r"'config\.json' is a link that leads out of the folder")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/../../../secret")
    refuse(snapshot, r"'config\.json' is a link that leads out of the folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_loops_and_broken_links(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    refuse(folder, f"the file '{name}' cannot be opened")
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    refuse(folder, f"the file '{name}' cannot be opened")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_and_folders_do_not_hang(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refuse(folder, f"'{name}' is not a regular file")
    (folder / name).unlink()
    (folder / name).mkdir()
    refuse(folder, f"'{name}' is not a regular file")


# ---- JSON ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not valid JSON"),
        (b"[]", "holds a JSON list, expected an object"),
        (b"null", "holds a JSON NoneType"),
        (b"[" * 300_000, "nested too deeply"),
        (b'{"a":' * 150_000, "nested too deeply"),
        (b'{"hidden_size": 6, "hidden_size": 8}', "'hidden_size' appears twice"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b" " * (CONFIG_BYTES + 1), "larger than 1,048,576 bytes"),
        (b'{"model_type": "mamba", "hidden_size": 1e999}', "hidden_size is inf"),
        (b'{"model_type": "mamba", "hidden_size": NaN}', "hidden_size is nan"),
    ],
)
def test_config_json(folder: Path, content: bytes, match: str) -> None:
    (folder / "config.json").write_bytes(content)
    began = time.perf_counter()
    with pytest.raises((LoadError, ms.errors.ConfigError), match=match):
        ms.load(folder, device="cpu")
    assert time.perf_counter() - began < 5


def test_sparse_giant_files_are_not_read(folder: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        with open(folder / name, "r+b") as f:
            f.truncate(2**40)
        refuse(folder, f"'{name}' in .* is larger than")


def test_byte_order_mark_is_no_attack(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert ms.load(folder, device="cpu").cfg.n_layers == 2


def test_plain_names_and_missing_files(folder: Path) -> None:
    assert plain_name("model-00001-of-00002.safetensors", "here") == "model-00001-of-00002.safetensors"
    with pytest.raises(LoadError, match=r"the file 'nothing' is missing from"):
        ModelFolder(folder).file("nothing")
    with pytest.raises(LoadError, match=r"'\.\./x' is not a plain file name"):
        ModelFolder(folder).read_bytes("../x", 10)


def test_hostile_names_do_not_flood_the_error(folder: Path) -> None:
    """An error text stays readable, whatever the file calls its tensors."""
    theirs = {to_theirs(n): t for n, t in random_weights(TINY).items()}
    extra = {f"\x1b[31m{'x' * 100}{i}": t.clone() for i, t in enumerate(theirs.values())}
    write_safetensors(folder, theirs | extra)
    with pytest.raises(LoadError) as caught:
        ms.load(folder, device="cpu")
    text = str(caught.value)
    assert "\x1b" not in text
    assert "and 19 more" in text
    assert len(text) < 1000
    write_safetensors(folder, theirs | {"x" * 100_000: next(iter(theirs.values())).clone()})
    refuse(folder, "a tensor's name has 100,000 characters")

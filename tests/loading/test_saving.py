"""``save_model``: what it writes can be loaded, and a failure leaves the old model whole."""

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TINY, small_bpe

import mambascope as ms
from mambascope.errors import ConfigError, LoadError
from mambascope.loading import save_model
from mambascope.loading.files import atomic_write, write_text
from mambascope.loading.tokenizer import Tokenizer

UNTIED = dataclasses.replace(
    TINY, tie_embeddings=False, proj_bias=True, name="untied", prepend_bos=True, bos_token_id=0
)


def make(cfg: ms.MambaConfig = TINY, seed: int = 0, tokenizer: bool = False) -> ms.HookedMamba:
    torch.manual_seed(seed)
    return ms.HookedMamba(cfg, Tokenizer(small_bpe(), eos_token="<|endoftext|>") if tokenizer else None)


def assert_same(a: ms.HookedMamba, b: ms.HookedMamba) -> None:
    assert a.cfg == b.cfg
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other
        assert p.dtype == q.dtype, name
        assert torch.equal(p, q), name


def load(folder: Path, **options: Any) -> ms.HookedMamba:
    return ms.load(folder, device="cpu", **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("cfg", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("limit", [1 << 30, 2000, 1])
def test_round_trip(tmp_path: Path, cfg: ms.MambaConfig, tokenizer: bool, limit: int) -> None:
    model = make(cfg, tokenizer=tokenizer)
    save_model(model, tmp_path / "a" / "b", max_shard_bytes=limit)
    again = load(tmp_path / "a" / "b")
    assert_same(model, again)
    assert (again.tokenizer is None) == (not tokenizer)
    ids = torch.arange(12)[None]
    assert torch.equal(model.eval()(ids), again(ids))


def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    save_model(make(), tmp_path, max_shard_bytes=8000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in (1, 2)]
    assert all(path.stat().st_size <= 8000 + 4096 for path in shards)  # the header comes on top
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 2558
    with pytest.raises(ConfigError, match=r"max_shard_bytes must be positive, got 0"):
        save_model(make(), tmp_path, max_shard_bytes=0)


def test_stored_type(tmp_path: Path) -> None:
    model = make()
    save_model(model, tmp_path, dtype=torch.float16)
    again = load(tmp_path, dtype="auto")
    assert again.dtype == torch.float16
    assert torch.equal(again.blocks[0].mixer.A_log, model.blocks[0].mixer.A_log)  # type: ignore[union-attr]
    assert torch.equal(load(tmp_path).W_E, model.W_E.half().float())
    save_model(make().to(torch.bfloat16), tmp_path)
    assert load(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_saving_again_leaves_nothing_stale(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    save_model(make(tokenizer=True), tmp_path, max_shard_bytes=2000, card={"licence": "CC0"})
    assert "tokenizer.json" in names(tmp_path)
    second = make(seed=1)
    save_model(second, tmp_path)
    assert names(tmp_path) == ["card.json", "config.json", "model.safetensors", "notes.md"]
    assert_same(second, load(tmp_path))
    third = make(seed=2)
    save_model(third, tmp_path, max_shard_bytes=8000)
    assert "model.safetensors" not in names(tmp_path)
    assert_same(third, load(tmp_path))


def test_card_is_listed(tmp_path: Path) -> None:
    save_model(make(), tmp_path, card={"licence": "CC BY-SA 4.0", "summary": "ünïcode"})
    assert json.loads((tmp_path / "card.json").read_text("utf-8"))["summary"] == "ünïcode"


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        save_model(make(), tmp_path)
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o644}


@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_leaves_the_old_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The disk fills at the n-th flush: every file that was there is still whole, and no debris is left."""
    old = make()
    save_model(old, tmp_path, max_shard_bytes=8000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = 0
    real = os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += not stat.S_ISDIR(os.fstat(handle).st_mode)  # folders are flushed where the system can
        if calls == at + 1:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoadError, match=r"cannot write .*No space left on device.*is unchanged"):
        save_model(old, tmp_path, max_shard_bytes=8000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoadError, match=r"cannot make the folder"):
        save_model(make(), tmp_path / "file" / "x")


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the refusal is simulated where the system would give it."""
    save_model(make(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    real = Path.open

    def refuse(part: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "xb":
            raise PermissionError(13, "Permission denied", str(part))
        return real(part, mode, *args, **kwargs)

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(LoadError, match=r"cannot write .*model\.safetensors.*Permission denied.*is unchanged"):
        save_model(make(seed=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_atomic_write_cleans_up_after_anything(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    write_text(target, "old")

    def interrupted(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, interrupted)
    assert names(tmp_path) == ["x.txt"]
    assert target.read_text() == "old"


def test_a_model_whose_parameters_are_not_those_of_its_config(tmp_path: Path) -> None:
    model = make()
    model.embed.weight = torch.nn.Parameter(torch.zeros(299, 6))
    model.unembed.weight = model.embed.weight
    with pytest.raises(ConfigError, match=r"'embed\.weight' differs"):
        save_model(model, tmp_path)
    assert names(tmp_path) == []

"""Loading through the hub library, against a hub on this machine."""

import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoints import TINY, random_weights, small_bpe, to_theirs, write_checkpoint, write_json, write_safetensors
from fake_hub import FakeHub
from huggingface_hub import constants

from mambascope.errors import LoadError
from mambascope.loading import hub as hub_module
from mambascope.loading.files import ModelFolder
from mambascope.loading.hub import fetch_file, fetch_model, fetch_tokenizer, is_hub_id


def fetch(repo: str, tokenizer: bool = True, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fetch_model(repo, **({"revision": None, "local_files_only": False} | options), tokenizer=tokenizer)


def test_one_file(hub: FakeHub) -> None:
    write_checkpoint(hub.folder("me/tiny"))
    (hub.folder("me/tiny") / "README.md").write_text("not needed")
    (hub.folder("me/tiny") / "optimizer.bin").write_bytes(b"x" * 1000)
    folder = fetch("me/tiny")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(hub.files()) == ["me/tiny/config.json", "me/tiny/model.safetensors", "me/tiny/tokenizer.json"]
    # The cache's files are links into its blobs, which the reader has to accept.
    assert (folder / "model.safetensors").is_symlink()
    assert ModelFolder(folder).file("model.safetensors").parent.name == "blobs"


def test_shards_and_only_those_of_the_index(hub: FakeHub) -> None:
    folder = hub.folder("me/sharded")
    write_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    write_safetensors(folder, {to_theirs(n): t for n, t in random_weights(TINY).items()}, shards=3)
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"stale")
    names = {path.name for path in fetch("me/sharded", tokenizer=False).iterdir()}
    assert names == {"config.json", "model.safetensors.index.json"} | {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }


def test_the_second_time_nothing_is_downloaded(hub: FakeHub) -> None:
    write_checkpoint(hub.folder("me/tiny"))
    first = fetch("me/tiny")
    hub.asked.clear()
    assert fetch("me/tiny", local_files_only=True) == first
    assert hub.asked == []
    assert fetch("me/tiny") == first
    assert hub.files("GET") == []
    assert not any("tokenizer_config" in name for name in hub.files("HEAD")), "a known absence is asked for again"
    # A hub that is gone is no trouble for what is already here, weights and tokenizer included.
    hub.status = 503
    assert fetch("me/tiny") == first


def test_all_files_come_from_one_commit(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json's commit is pinned for the rest: a push in between cannot mix two models."""
    write_checkpoint(hub.folder("me/tiny"), seed=0)
    asked: list[str | None] = []
    real = huggingface_hub.hf_hub_download

    def spy(repo: str, name: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append(revision)
        return real(repo, name, revision=revision, local_files_only=local_files_only)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", spy)
    fetch("me/tiny")
    assert asked[0] is None
    assert set(asked[1:]) == {hub.commit("me/tiny", "main")}


def test_revisions(hub: FakeHub) -> None:
    write_checkpoint(hub.folder("me/tiny", "main"), seed=0)
    write_checkpoint(hub.folder("me/tiny", "v1"), seed=1)
    main, old = fetch("me/tiny"), fetch("me/tiny", revision="v1")
    assert main != old
    assert old.name == hub.commit("me/tiny", "v1")
    assert fetch("me/tiny", revision=old.name, local_files_only=True) == old
    with pytest.raises(LoadError, match=r"'me/tiny' has no revision 'v2'; give a branch, tag or commit"):
        fetch("me/tiny", revision="v2")


def test_the_token_is_taken_from_its_own_environment(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(hub.folder("me/tiny"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    fetch("me/tiny")
    assert hub.tokens == {"Bearer hf_test"}


def test_unknown_repository_and_missing_files(hub: FakeHub) -> None:
    with pytest.raises(
        LoadError, match=r"no folder 'me/none' here, and the hub has no repository of that name.*auth login"
    ):
        fetch("me/none")
    hub.folder("me/empty")
    with pytest.raises(LoadError, match=r"'me/empty' has no file 'config.json'"):
        fetch("me/empty")
    write_json(hub.folder("me/empty") / "config.json", {})
    with pytest.raises(LoadError, match=r"'me/empty' has no weights.*model.safetensors, .*pytorch_model.bin"):
        fetch("me/empty")


def test_unreachable_hub(hub: FakeHub) -> None:
    hub.status = 503
    with pytest.raises(
        LoadError, match=r"'config.json' of 'me/tiny' is not in the local hub cache.*cannot be reached.*give its path"
    ):
        fetch("me/tiny")
    hub.close()
    with pytest.raises(LoadError, match=r"cannot be reached"):
        fetch("me/tiny")


def test_local_files_only_and_offline_switch(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(hub.folder("me/tiny"))
    with pytest.raises(LoadError, match=r"local_files_only=True forbids a download"):
        fetch("me/tiny", local_files_only=True)
    assert hub.asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"not in the local hub cache"):
        fetch("me/tiny")
    assert hub.asked == []


def test_other_failures_are_explained(hub: FakeHub) -> None:
    write_checkpoint(hub.folder("me/tiny"))
    hub.status, hub.broken_methods = 418, ("GET",)
    with pytest.raises(LoadError, match=r"(?s)'config.json' of 'me/tiny' could not be downloaded: .*418.*try again"):
        fetch("me/tiny")


def test_gated_repositories_say_what_to_do(hub: FakeHub) -> None:
    hub.status, hub.error_code = 403, "GatedRepo"
    with pytest.raises(LoadError, match=r"'me/tiny' is gated: accept its terms on the hub, then log in"):
        fetch("me/tiny")


def test_an_index_that_names_a_path_downloads_nothing_more(hub: FakeHub) -> None:
    folder = hub.folder("me/evil")
    write_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"x": "../../secret.safetensors"}})
    with pytest.raises(LoadError, match=r"'../../secret.safetensors' is not a plain file name"):
        fetch("me/evil")
    assert not any("secret" in name for _, name in hub.asked)


def test_tokenizer_of_another_repository(hub: FakeHub) -> None:
    folder = hub.folder("me/words")
    small_bpe().save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", {"eos_token": "<|endoftext|>"})
    found = fetch_tokenizer("me/words", local_files_only=False)
    assert sorted(path.name for path in found.iterdir()) == ["special_tokens_map.json", "tokenizer.json"]


def test_optional_files_that_cannot_be_asked_for_are_said_aloud(hub: FakeHub) -> None:
    write_checkpoint(hub.folder("me/tiny"))
    config = fetch_file("me/tiny", "config.json", revision=None, local_files_only=False)
    assert config is not None
    hub.status = 503
    with pytest.warns(UserWarning, match=r"cannot be reached to ask 'me/tiny' for 'tokenizer_config.json'"):
        found = fetch_file(
            "me/tiny", "tokenizer_config.json", revision=config.parent.name, local_files_only=False, optional=True
        )
    assert found is None


@pytest.mark.parametrize("name", ["a/b", "state-spaces/mamba-2.8b", "A_b/c.d"])
def test_hub_ids(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "/a/b", "./a", "../b", "a/..", "a/b ", "a//b", "a/b--c", "ä/b", "a/b\n", ""]
)
def test_no_hub_ids(name: str) -> None:
    assert not is_hub_id(name)


def test_the_hub_library_is_imported_late() -> None:
    assert not hasattr(hub_module, "huggingface_hub")

"""Files from the Hugging Face hub: only the needed ones, of one commit, through the hub library's own cache."""

import re
import warnings
from pathlib import Path
from typing import Any

from mambascope.errors import LoadError
from mambascope.loading.files import INDEX_BYTES, ModelFolder
from mambascope.loading.shards import SINGLE_FILES, index_shards

__all__ = ["fetch_file", "fetch_model", "fetch_tokenizer", "is_hub_id"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json")


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form ``owner/name``."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def fetch_file(
    repo: str, name: str, *, revision: str | None, local_files_only: bool, optional: bool = False
) -> Path | None:
    """One file of a hub repository, downloaded unless the cache has it; the token is the hub library's own business.

    Returns its path in the cache, or None if it is ``optional`` and the repository does not have it.

    Raises
    ------
    LoadError: the hub, the repository, the revision or the file cannot be had; the text says what to do.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if optional and _known_absent(repo, name, revision):
        return None  # without asking: a hub that is gone would cost half a minute of retries
    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=local_files_only))
    except LocalEntryNotFoundError as error:
        # Offline, a file that the repository lacks and one that was never downloaded look the same.
        if not optional:
            raise _unreachable(repo, name, revision, local_files_only, error) from error
        if not (local_files_only or constants.HF_HUB_OFFLINE):
            warnings.warn(f"the hub cannot be reached to ask {repo!r} for {name!r}; going on without it", stacklevel=2)
        return None
    except EntryNotFoundError as error:
        if optional:
            return None
        raise LoadError(f"the hub repository {_at(repo, revision)} has no file {name!r}") from error
    except Exception as error:  # the network library's many errors, none of which may pass unexplained
        raise _explain(repo, name, revision, error) from error


def fetch_model(repo: str, *, revision: str | None, local_files_only: bool, tokenizer: bool) -> Path:
    """config.json, the weights and (``tokenizer``) the tokenizer files of a hub model; returns their folder.

    All files come from the commit that config.json came from, so a push during the download cannot mix two models.

    Raises
    ------
    LoadError: something needed is not there or not reachable.
    """
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    config = fetch_file(repo, "config.json", **options)
    assert config is not None
    folder = config.parent
    options["revision"] = folder.name
    _fetch_weights(repo, folder, options)
    if tokenizer:
        for name in ("tokenizer.json", *_TOKENIZER_EXTRAS):
            fetch_file(repo, name, optional=True, **options)
    return folder


def fetch_tokenizer(repo: str, *, local_files_only: bool) -> Path:
    """The tokenizer files of a hub repository, all of one commit; returns their folder."""
    found = fetch_file(repo, "tokenizer.json", revision=None, local_files_only=local_files_only)
    assert found is not None
    for name in _TOKENIZER_EXTRAS:
        fetch_file(repo, name, revision=found.parent.name, local_files_only=local_files_only, optional=True)
    return found.parent


def _fetch_weights(repo: str, folder: Path, options: dict[str, Any]) -> None:
    candidates = [name for single in SINGLE_FILES for name in (single, f"{single}.index.json")]
    # What this commit's folder already holds needs no question to the hub.
    for name in sorted(candidates, key=lambda name: not (folder / name).is_file()):
        if fetch_file(repo, name, optional=True, **options) is None:
            continue
        if name.endswith(".index.json"):
            values = ModelFolder(folder).read_json(name, INDEX_BYTES)
            for shard in dict.fromkeys(index_shards(values, name).values()):
                fetch_file(repo, shard, **options)
        return
    where = "the local cache holds" if options["local_files_only"] else "it has"
    raise LoadError(f"{repo!r} has no weights that mambascope reads: {where} none of {', '.join(candidates)}")


def _known_absent(repo: str, name: str, revision: str | None) -> bool:
    """Whether the cache remembers that this commit has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    return try_to_load_from_cache(repo, name, revision=revision) is _CACHED_NO_EXIST


def _at(repo: str, revision: str | None) -> str:
    return repr(repo) if revision is None else f"{repo!r} at revision {revision!r}"


def _unreachable(repo: str, name: str, revision: str | None, local_only: bool, error: Exception) -> LoadError:
    what = f"{name!r} of {_at(repo, revision)} is not in the local hub cache"
    if local_only:
        return LoadError(f"{what}, and local_files_only=True forbids a download; load it once without that")
    cause = str(error.__cause__ or error).splitlines()[0]
    return LoadError(
        f"{what}, and the hub cannot be reached ({cause}). Connect once to download it, or copy "
        f"the model's folder here and give its path (there is no folder {repo!r}), or use an embedded model of "
        "mambascope.list_models()"
    )


def _explain(repo: str, name: str, revision: str | None, error: Exception) -> LoadError:
    from huggingface_hub import errors as hub

    where = _at(repo, revision)
    if isinstance(error, hub.GatedRepoError):
        return LoadError(f"{where} is gated: accept its terms on the hub, then log in with 'hf auth login'")
    if isinstance(error, hub.RevisionNotFoundError):
        return LoadError(f"the hub repository {repo!r} has no revision {revision!r}; give a branch, tag or commit")
    if isinstance(error, hub.RepositoryNotFoundError):
        return LoadError(
            f"there is no folder {repo!r} here, and the hub has no repository of that name that you may read; "
            "check the spelling, and log in with 'hf auth login' if it is private"
        )
    if isinstance(error, hub.HFValidationError):
        return LoadError(f"{repo!r} is not a valid hub id: {error}")
    if isinstance(error, hub.OfflineModeIsEnabled):
        return LoadError(f"{name!r} of {where} is not in the local hub cache and HF_HUB_OFFLINE is set; unset it")
    return LoadError(f"{name!r} of {where} could not be downloaded: {type(error).__name__}: {error}; try again later")

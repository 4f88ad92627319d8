"""Opening models: ``load`` finds a model by name, checks everything about it, and brings it onto the device.

torch and the model are imported when something is loaded, not before: ``list_models`` needs neither.
"""

import dataclasses
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mambascope.errors import InputError, LoadError
from mambascope.loading import registry
from mambascope.loading.registry import ModelInfo, list_models

if TYPE_CHECKING:
    import torch

    from mambascope.config import MambaConfig
    from mambascope.loading.files import ModelFolder
    from mambascope.loading.saving import save_model
    from mambascope.loading.tokenizer import Tokenizer
    from mambascope.model import HookedMamba
    from mambascope.ops import Backend

__all__ = ["ModelInfo", "list_models", "load", "save_model", "usable_device"]

_DTYPES = ("float32", "float64", "bfloat16", "float16")


def load(
    name: str | os.PathLike[str],
    *,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    revision: str | None = None,
    local_files_only: bool = False,
    backend: "Backend" = "auto",
    tokenizer: "str | os.PathLike[str] | Tokenizer | Literal[False] | None" = None,
) -> "HookedMamba":
    """Open a Mamba-1 language model.

    Parameters
    ----------
    name: an embedded or official model of :func:`list_models`, a local folder, or a hub id ``"owner/name"``. The
        network is used only for the last two kinds of name that are not on this machine.
    device: ``"cuda"`` if there is one, else ``"cpu"``, by default.
    dtype: float32 by default, whatever the checkpoint stores; ``"auto"`` keeps the stored type. A_log and D are
        never below float32.
    revision: branch, tag or commit of a hub model.
    local_files_only: never use the network; what is not in the hub cache is an error.
    backend: which compute path runs the model (see ``HookedMamba``).
    tokenizer: instead of the checkpoint's own: a folder, a tokenizer.json, a hub id, a ``Tokenizer``; False for none.

    Returns the model, in evaluation mode. Peak host memory: the weights plus one shard.

    Raises
    ------
    UnknownNameError: no such model (the nearest names are offered).
    LoadError: hub unreachable, files missing, truncated, corrupt or refused; tensors that do not fit the config.
    ConfigError: another architecture, or an option that cannot be honoured.
    BackendError: the compute path that was asked for cannot run here.
    InputError: a device, dtype or tokenizer that is not what the text above allows.
    """
    import torch

    from mambascope.loading.files import ModelFolder
    from mambascope.loading.formats import read_config
    from mambascope.loading.weights import stored_dtype
    from mambascope.ops.dispatch import resolve_backend

    where = usable_device(device)
    wanted = _dtype(dtype)
    if backend != "auto":  # before anything is downloaded
        resolve_backend(backend, where, wanted or torch.float32)
    path, label, info = _locate(name, revision, local_files_only, own_tokenizer=tokenizer is None)
    folder = ModelFolder(path)
    if not folder.has("config.json"):
        raise LoadError(f"{str(path)!r} has no config.json, so it is not a model folder")
    raw = folder.read_json("config.json")
    cfg = read_config(raw, f"config.json of {label!r}", label)
    found = _tokenizer(tokenizer, folder, raw, info, local_files_only)
    if found is not None:
        cfg = _fit_to_tokenizer(cfg, found, own=raw.get("format") == "mambascope")
    wanted = wanted or stored_dtype(folder)
    resolve_backend(backend, where, wanted, d_state=cfg.d_state, d_conv=cfg.d_conv)
    return _build(cfg, found, folder, where, wanted, backend)


def usable_device(device: "str | torch.device | None") -> "torch.device":
    """The device asked for, proven to be there; by default a GPU if there is one."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: a torch without CUDA
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(f"device {device!r} cannot be used here ({reason}); use 'cpu', or leave it out") from None
    if found.type == "meta":
        raise InputError("device 'meta' holds no weights; use 'cpu' or a GPU")
    return found


def _dtype(dtype: "str | torch.dtype | None") -> "torch.dtype | None":
    """The dtype asked for; None means as stored."""
    import torch

    if dtype is None:
        return torch.float32
    if isinstance(dtype, str):
        if dtype == "auto":
            return None
        if dtype.removeprefix("torch.") in _DTYPES:
            return getattr(torch, dtype.removeprefix("torch."))
    elif isinstance(dtype, torch.dtype) and str(dtype).removeprefix("torch.") in _DTYPES:
        return dtype
    raise InputError(f"dtype {dtype!r} is not supported; use one of {', '.join(_DTYPES)}, or 'auto' for the stored one")


def _locate(
    name: str | os.PathLike[str], revision: str | None, local_files_only: bool, own_tokenizer: bool
) -> tuple[Path, str, ModelInfo | None]:
    """The folder of a model, the name to call it by, and its line in the registry if it has one."""
    from mambascope.loading.hub import fetch_model, is_hub_id

    text = os.fspath(name) if isinstance(name, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise InputError(f"a model's name is a text or a path, got {name!r}")
    info = registry.find(text) if isinstance(name, str) else None
    embedded = registry.embedded_folder(text) if info is not None and info.embedded else None
    local = _existing(text)
    if info is not None and local is not None:
        warnings.warn(f"{text!r} names a known model; the folder of that name here needs './{text}'", stacklevel=3)
    if local is None and not isinstance(name, str):
        local = Path(text)  # a path is never a hub id: opening it says what is wrong
    if embedded is not None or (info is None and local is not None):
        if revision is not None:
            raise InputError(f"revision={revision!r} is for hub models, but {text!r} is on this machine")
        if embedded is not None:
            return embedded, text, info
        assert local is not None
        return local, local.resolve().name or text, None
    if info is None:
        if not is_hub_id(text):
            raise registry.unknown_name(text)
        info = registry.by_hub_id(text)
    repo = info.hub_id if info is not None and info.hub_id else text
    own = own_tokenizer and not (info is not None and info.tokenizer)
    folder = fetch_model(repo, revision=revision, local_files_only=local_files_only, tokenizer=own)
    return folder, text, info


def _existing(text: str) -> Path | None:
    """The file or folder of this path, or None if there is none."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name too long for a path; a home that cannot be found
        return None


def _tokenizer(
    asked: Any, folder: "ModelFolder", raw: dict[str, Any], info: ModelInfo | None, local_files_only: bool
) -> "Tokenizer | None":
    from mambascope.loading.hub import fetch_file, fetch_tokenizer, is_hub_id
    from mambascope.loading.tokenizer import Tokenizer

    if asked is False or (asked is None and raw.get("format") == "mambascope" and raw.get("tokenizer", 0) is None):
        return None
    if isinstance(asked, Tokenizer):
        return asked
    if asked is None and not (info is not None and info.tokenizer):
        return Tokenizer.from_folder(folder.path)
    if asked is None:
        assert info is not None
        assert info.tokenizer is not None
        path = fetch_file(info.tokenizer, "tokenizer.json", revision=None, local_files_only=local_files_only)
        assert path is not None
        end = "<|endoftext|>"  # begins and ends a text of the Pile
        return Tokenizer.from_file(path, bos_token=end, eos_token=end)
    if not isinstance(asked, (str, os.PathLike)):
        raise InputError(f"tokenizer={asked!r}: expected a folder, a tokenizer.json, a hub id, a Tokenizer, or False")
    path = _existing(os.fspath(asked))
    if path is not None:
        return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_file(path)
    if not is_hub_id(str(asked)):
        raise LoadError(f"tokenizer={str(asked)!r} is neither a folder, nor a tokenizer.json, nor a hub id")
    return Tokenizer.from_folder(fetch_tokenizer(str(asked), local_files_only=local_files_only))


def _fit_to_tokenizer(cfg: "MambaConfig", tokenizer: "Tokenizer", own: bool) -> "MambaConfig":
    """Fill in what only the tokenizer knows: the real vocabulary, bos, eos, and whether texts start with BOS."""
    if tokenizer.vocab_size > cfg.d_vocab:
        warnings.warn(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but {cfg.name!r} has {cfg.d_vocab} embeddings; "
            "texts that need the others will be refused",
            stacklevel=3,
        )
    if own:  # our own config says it all
        return cfg
    changes: dict[str, Any] = {}
    if cfg.n_tokens == cfg.d_vocab and tokenizer.vocab_size < cfg.d_vocab:
        changes["n_tokens"] = tokenizer.vocab_size
    limit = changes.get("n_tokens", cfg.n_tokens)
    for field in ("bos_token_id", "eos_token_id"):
        known = getattr(tokenizer, field)
        if getattr(cfg, field) is None and known is not None and known < limit:
            changes[field] = known
        elif getattr(cfg, field) is not None and getattr(cfg, field) >= limit:
            raise LoadError(
                f"{field}={getattr(cfg, field)} of {cfg.name!r} is not in its tokenizer of {limit} tokens; "
                "config and tokenizer belong to different models"
            )
    if tokenizer.adds_bos and changes.get("bos_token_id", cfg.bos_token_id) is not None:
        changes["prepend_bos"] = True
    return dataclasses.replace(cfg, **changes)


def _build(
    cfg: "MambaConfig",
    tokenizer: "Tokenizer | None",
    folder: "ModelFolder",
    device: "torch.device",
    dtype: "torch.dtype",
    backend: "Backend",
) -> "HookedMamba":
    """A model without memory of its own, into which the weights are then put one by one."""
    from torch import nn

    from mambascope.loading.hollow import hollow_model
    from mambascope.loading.weights import keep_fp32, stream_weights

    stream = stream_weights(folder, cfg, lambda name: keep_fp32(name, dtype), device)
    first = next(stream)  # all checks are done before the first tensor comes, and before a module is made
    model = hollow_model(cfg, tokenizer, backend)
    modules = dict(model.named_modules())
    missing = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}

    def put(name: str, tensor: "torch.Tensor") -> None:
        owner, _, leaf = name.rpartition(".")
        modules[owner].register_parameter(leaf, nn.Parameter(tensor))
        missing.discard(name)

    put(*first)
    del first
    for name, tensor in stream:
        put(name, tensor)
    if cfg.tie_embeddings:
        model.unembed.weight = model.embed.weight
    assert not missing, f"no weights for {missing}: names.parameter_shapes and HookedMamba disagree"
    return model.eval()


def __getattr__(name: str) -> Any:
    if name == "save_model":
        from mambascope.loading.saving import save_model

        return save_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

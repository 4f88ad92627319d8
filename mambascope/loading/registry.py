"""The models that have a name: those that ship with the package and the official checkpoints of the hub."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from mambascope.config import MambaConfig
from mambascope.errors import UnknownNameError, nearest
from mambascope.loading.names import count_parameters

__all__ = ["NEOX_TOKENIZER", "ModelInfo", "by_hub_id", "embedded_folder", "find", "list_models", "unknown_name"]

NEOX_TOKENIZER = "EleutherAI/gpt-neox-20b"
"""Where the tokenizer of the authors' checkpoints lives; their repositories hold none."""

_FALCON_LICENCE = "TII Falcon-Mamba License 2.0"


@dataclass(frozen=True)
class ModelInfo:
    """One line of :func:`list_models`: what ``load(name)`` would open."""

    name: str
    size: str
    """Parameters, rounded for reading (``"129M"``)."""
    licence: str
    embedded: bool
    """True: ships with the package, needs no network."""
    parameters: int = 0
    """Parameters, a tied head counted once; 0 if an embedded model's config cannot be read."""
    hub_id: str | None = None
    tokenizer: str | None = field(default=None, repr=False)
    """Hub id of the tokenizer where the checkpoint itself holds none."""
    summary: str = field(default="", repr=False)


def _size(parameters: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if parameters >= scale:
            return f"{parameters / scale:.3g}{unit}"
    return str(parameters)


def _official() -> dict[str, ModelInfo]:
    models: dict[str, ModelInfo] = {}

    def add(name: str, hub_id: str, cfg: MambaConfig, licence: str, tokenizer: str | None, summary: str) -> None:
        n = count_parameters(cfg)
        models[name] = ModelInfo(name, _size(n), licence, False, n, hub_id, tokenizer, summary)

    shapes = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
    for size, (d_model, n_layers) in [*shapes.items(), ("2.8b-slimpj", shapes["2.8b"])]:
        cfg = MambaConfig(d_model=d_model, n_layers=n_layers, d_vocab=50280)
        data = "SlimPajama, 600B tokens" if size.endswith("slimpj") else "the Pile, 300B tokens"
        name = f"mamba-{size}"
        add(name, f"state-spaces/{name}", cfg, "Apache-2.0", NEOX_TOKENIZER, f"authors' checkpoint, {data}")
        twin = f"authors' weights in transformers' format, {data}"
        add(f"{name}-hf", f"state-spaces/{name}-hf", cfg, "Apache-2.0", None, twin)
    falcon = MambaConfig(
        d_model=4096, n_layers=64, d_vocab=65024, d_inner=8192, dt_rank=256, mixer_norm_eps=1e-6, tie_embeddings=False
    )
    for suffix, summary in (
        ("", "base model"),
        ("-instruct", "tuned to follow instructions"),
        ("-pre-decay", "base model before the learning-rate decay stage"),
    ):
        name = f"falcon-mamba-7b{suffix}"
        add(name, f"tiiuae/{name}", falcon, _FALCON_LICENCE, None, f"Falcon-Mamba, {summary}")
    return models


_OFFICIAL = _official()


def _zoo() -> Path | None:
    """The folder of the embedded models (a real folder: wheels are unpacked when they are installed)."""
    folder = resources.files("mambascope") / "zoo"
    return folder if isinstance(folder, Path) and folder.is_dir() else None


def embedded_folder(name: str) -> Path | None:
    """The folder of an embedded model, or None if none has this name."""
    zoo = _zoo()
    return next((path.parent for path in zoo.glob("*/config.json") if path.parent.name == name), None) if zoo else None


def _embedded() -> dict[str, ModelInfo]:
    zoo = _zoo()
    found: dict[str, ModelInfo] = {}
    for config in sorted(zoo.glob("*/config.json")) if zoo else []:
        name = config.parent.name
        values = json.loads(config.read_text("utf-8"))
        known = {key: values[key] for key in MambaConfig.__dataclass_fields__ if key in values}
        parameters = count_parameters(MambaConfig.from_dict(known))
        card_path = config.parent / "card.json"
        card = json.loads(card_path.read_text("utf-8")) if card_path.is_file() else {}
        licence = str(card.get("licence", "see card.md"))
        summary = str(card.get("summary", ""))
        found[name] = ModelInfo(name, _size(parameters), licence, True, parameters, summary=summary)
    return found


def list_models() -> list[ModelInfo]:
    """Every model that :func:`mambascope.load` knows by name: the embedded ones first, then the official ones.

    Any other hub id (``"owner/name"``) or local folder can be loaded as well. Needs neither network nor torch.
    """
    return [*_embedded().values(), *_OFFICIAL.values()]


def find(name: str) -> ModelInfo | None:
    """The official or embedded model of this name, or None."""
    if name in _OFFICIAL:
        return _OFFICIAL[name]
    return _embedded().get(name) if embedded_folder(name) else None


def by_hub_id(hub_id: str) -> ModelInfo | None:
    """The official model that lives at this hub id, or None."""
    return next((info for info in _OFFICIAL.values() if info.hub_id == hub_id), None)


def unknown_name(name: str, names: Iterable[str] | None = None) -> UnknownNameError:
    """The error for a name that is neither a model nor a folder nor a hub id; it offers the nearest names."""
    known = [info.name for info in list_models()] if names is None else list(names)
    return UnknownNameError(
        f"no model is called {name!r}{nearest(name, known) or '.'} Give a name of mambascope.list_models(), "
        "the path of a model folder, or a hub id like 'owner/name'"
    )

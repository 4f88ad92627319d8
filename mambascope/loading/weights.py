"""From the weight files of a folder to named tensors on a device: everything checked first, then streamed.

1. Read each file's list of tensors (names, shapes, stored types; no data).
2. Translate the names, and account for every tensor: missing, unexpected, twice, or of another shape is an error
   that names it. A config that lies is caught here, before anything is allocated.
3. Bring in one tensor at a time, cast and move it. Peak host memory: the weights that stay on the host, plus one
   tensor (safetensors) or one file (pickles).
"""

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mambascope.config import MambaConfig
from mambascope.errors import LoadError, nearest
from mambascope.loading.files import ModelFolder
from mambascope.loading.names import TIED_HEAD, layer_count, parameter_shapes, to_our_name
from mambascope.loading.pickle_file import PickleFile
from mambascope.loading.safetensors_file import Entry, SafetensorsFile
from mambascope.loading.shards import find_weights

__all__ = ["DtypeRule", "keep_fp32", "stored_dtype", "stream_weights"]

DtypeRule = Callable[[str], torch.dtype]
"""From a parameter's name to the dtype it is wanted in."""


@dataclass(frozen=True)
class _Place:
    file: str
    name: str
    """The tensor's name in the file."""
    entry: Entry


def keep_fp32(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameter ``name`` in a model of ``dtype``: A_log and D, and the parameters of the recurrences of
    LSTM, S4D and H3, are never below float32."""
    inside = name.endswith((".A_log", ".mixer.D")) or ".mixer.ssm." in name or ".mixer.lstm." in name
    if inside and dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return dtype


def _open(folder: ModelFolder, file: str) -> SafetensorsFile | PickleFile:
    shown = os.path.join(str(folder), file)
    opener = SafetensorsFile if file.endswith(".safetensors") else PickleFile
    return opener(folder.file(file), shown)


def stream_weights(
    folder: ModelFolder, cfg: MambaConfig, dtype: DtypeRule, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yields every parameter of a model of ``cfg`` as (our name, tensor), exactly once, a tied head not at all.

    Warns of NaN and infinite weights, with the tensor's name.

    Raises
    ------
    LoadError: files or tensors that are missing, unexpected, corrupt, or of another shape than ``cfg`` says.
    """
    files, weight_map = find_weights(folder)
    places = _catalogue(folder, files, weight_map)
    wanted = _account(places, cfg, str(folder))
    if cfg.tie_embeddings and TIED_HEAD in places:
        _check_tied(folder, places)
    for file in files:
        here = [name for name, place in wanted.items() if place.file == file]
        if not here:
            continue
        with _open(folder, file) as source:
            for name in here:
                place = wanted[name]
                tensor = _read(source, place, dtype(name), device)
                _warn_if_not_finite(tensor, name, place, dtype(name), source)
                yield name, tensor
                del tensor  # the caller decides how long it lives


def stored_dtype(folder: ModelFolder) -> torch.dtype:
    """The dtype that most of the stored weights have (by bytes of the embedding, the one tensor every format has).

    Raises
    ------
    LoadError: the folder has no readable weights or no embedding.
    """
    files, weight_map = find_weights(folder)
    place = _catalogue(folder, files, weight_map).get("embed.weight")
    if place is None:
        raise LoadError(f"{str(folder)!r} holds no embedding, so this is not a Mamba language model's checkpoint")
    return _float_type(place)


def _catalogue(folder: ModelFolder, files: list[str], weight_map: dict[str, str] | None) -> dict[str, _Place]:
    """Our names of all tensors in all files; a name that appears twice, or not where the index says, is an error."""
    places: dict[str, _Place] = {}
    for file in files:
        with _open(folder, file) as source:
            entries = source.entries
        for theirs, entry in entries.items():
            if weight_map is not None and weight_map.get(theirs) != file:
                says = weight_map.get(theirs)
                says = f"puts it in {says!r}" if says else "does not list it"
                raise LoadError(f"the tensor {theirs!r} is in the shard {file!r}, but the index {says}")
            ours = _own_or_translated(theirs)
            if ours in places:
                other = places[ours]
                raise LoadError(
                    f"the tensors {other.name!r} (in {other.file!r}) and {theirs!r} (in {file!r}) are both {ours!r}; "
                    "one of them has to go"
                )
            places[ours] = _Place(file, theirs, entry)
        if weight_map is not None:
            for theirs, listed in weight_map.items():
                if listed == file and theirs not in entries:
                    raise LoadError(f"the index puts the tensor {theirs!r} in the shard {file!r}, which lacks it")
    return places


def _own_or_translated(name: str) -> str:
    return name if name.startswith(("blocks.", "embed.", "unembed.", "ln_final.")) else to_our_name(name)


def _account(places: dict[str, _Place], cfg: MambaConfig, shown: str) -> dict[str, _Place]:
    """The places of exactly the parameters that ``cfg`` asks for."""
    found = layer_count(places)
    if found != cfg.n_layers:
        raise LoadError(f"the config of {shown!r} says {cfg.n_layers} layers, its weights hold {found}")
    shapes = parameter_shapes(cfg)
    extra = [name for name in places if name not in shapes and not _is_copy_of_embedding(name, places[name], cfg)]
    missing = [name for name in shapes if name not in places]
    if missing:
        hint = f"; there is an unexpected {places[extra[0]].name!r}" if extra else ""
        raise LoadError(f"{shown!r} lacks {_some(missing)}, which its config asks for{hint}")
    if extra:
        offered = nearest(extra[0], shapes, 1)
        raise LoadError(f"{shown!r} holds {_some([places[n].name for n in extra])}, unknown to its config{offered}")
    for name, shape in shapes.items():
        place = places[name]
        if place.entry.shape != shape:
            raise LoadError(
                f"the tensor {place.name!r} in {place.file!r} has shape {place.entry.shape}, "
                f"but the config asks for {shape}; config and weights belong to different models"
            )
        _float_type(place)
    return {name: places[name] for name in shapes}


def _is_copy_of_embedding(name: str, place: _Place, cfg: MambaConfig) -> bool:
    """Whether this is the head of a tied model, stored although it need not be (its values are compared later)."""
    if name != TIED_HEAD or not cfg.tie_embeddings:
        return False
    if place.entry.shape != (cfg.d_vocab, cfg.d_model):
        raise LoadError(
            f"the tensor {place.name!r} has shape {place.entry.shape}, but the config ties it to the embedding "
            f"of shape {(cfg.d_vocab, cfg.d_model)}"
        )
    return True


def _float_type(place: _Place) -> torch.dtype:
    if place.entry.dtype is None:
        raise LoadError(
            f"the tensor {place.name!r} in {place.file!r} is stored as {place.entry.stored}; "
            "only float64, float32, bfloat16 and float16 are read (quantised weights have to be converted first)"
        )
    return place.entry.dtype


def _read(source: SafetensorsFile | PickleFile, place: _Place, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return source.read(place.name, dtype, device)
    except RuntimeError as error:
        if isinstance(error, LoadError):
            raise
        size = torch.Size(place.entry.shape).numel() * dtype.itemsize
        raise LoadError(f"no room on {device} for the tensor {place.name!r} of {size:,} bytes: {error}") from error


def _warn_if_not_finite(
    tensor: Tensor, name: str, place: _Place, dtype: torch.dtype, source: SafetensorsFile | PickleFile
) -> None:
    # NaN and infinities survive a sum, which costs a tenth of looking at every value.
    if bool(torch.isfinite(tensor.sum(dtype=torch.float64 if dtype == torch.float64 else torch.float32))):
        return
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    bad = tensor.numel() - int(finite.sum())
    stored = place.entry.dtype
    assert stored is not None
    before = torch.isfinite(source.read(place.name, stored, torch.device("cpu")))
    if bool(before.all()):
        cause = f"too large for {str(dtype).removeprefix('torch.')}; load with dtype='float32'"
    else:
        cause = "NaN or infinite in the file; every output that they reach is meaningless"
    warnings.warn(f"{bad} of {tensor.numel()} values of {name!r} ({place.name!r}) are {cause}", stacklevel=4)


def _check_tied(folder: ModelFolder, places: dict[str, _Place]) -> None:
    """A config that ties the head to the embedding must not hide a different head."""
    head, embed = places[TIED_HEAD], places["embed.weight"]
    cpu = torch.device("cpu")
    with _open(folder, head.file) as source:
        stored_head = source.read(head.name, _float_type(head), cpu)
    with _open(folder, embed.file) as source:
        stored_embed = source.read(embed.name, _float_type(embed), cpu)
    if not torch.equal(stored_head.view(-1).view(torch.uint8), stored_embed.view(-1).view(torch.uint8)):
        raise LoadError(
            f"the config ties the output head to the embedding, but {head.name!r} and {embed.name!r} differ; "
            "set tie_word_embeddings (tie_embeddings in the authors' format) to false to load both"
        )


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"the tensor{'s' if len(names) > 1 else ''} {shown}{more}"

"""Which files of a folder hold the weights, and which tensor is in which of them."""

from typing import Any

from mambascope.errors import LoadError
from mambascope.loading.files import INDEX_BYTES, ModelFolder, plain_name

__all__ = ["SINGLE_FILES", "find_weights", "index_shards"]

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of a checkpoint in one file, preferred first; with ``.index.json`` appended, of a sharded one's index."""


def index_shards(values: dict[str, Any], index: str) -> dict[str, str]:
    """The ``weight_map`` of a sharded checkpoint's index: tensor name to shard, every shard a plain file name.

    Raises
    ------
    LoadError: no ``weight_map``, an entry that is no plain name, or a shard of another kind than the index.
    """
    where = f"the index {index!r}"
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{where} has no 'weight_map' from tensor names to files; download the model again")
    suffix = ".safetensors" if ".safetensors" in index else ".bin"
    for tensor, shard in weight_map.items():
        if not plain_name(shard, f"{where}, entry {tensor!r}").endswith(suffix):
            raise LoadError(f"{where}, entry {tensor!r}: the shard {shard!r} should end in {suffix!r}")
    return weight_map


def find_weights(folder: ModelFolder) -> tuple[list[str], dict[str, str] | None]:
    """The weight files of a folder, and the map from tensor to file if they are shards.

    Safetensors win over pickles, one file over shards, as in transformers.

    Raises
    ------
    LoadError: the folder has no weights, or a shard is missing.
    """
    for single in SINGLE_FILES:
        if folder.has(single):
            return [single], None
        index = f"{single}.index.json"
        if folder.has(index):
            weight_map = index_shards(folder.read_json(index, INDEX_BYTES), index)
            shards = list(dict.fromkeys(weight_map.values()))
            for shard in shards:
                if not folder.has(shard):
                    raise LoadError(f"the shard {shard!r} named by {index!r} is missing from {str(folder)!r}")
            return shards, weight_map
    wanted = ", ".join(name for single in SINGLE_FILES for name in (single, f"{single}.index.json"))
    raise LoadError(f"{str(folder)!r} has no weights: none of {wanted}")

"""Weight files to named tensors: every format gives the same tensors, and every tensor is accounted for."""

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TINY, random_weights, to_theirs, write_pickle, write_safetensors
from torch import Tensor

from mambascope.config import MambaConfig
from mambascope.errors import LoadError
from mambascope.loading.files import ModelFolder
from mambascope.loading.names import count_parameters, layer_count, parameter_shapes, to_our_name
from mambascope.loading.safetensors_file import SafetensorsFile
from mambascope.loading.weights import keep_fp32, stored_dtype, stream_weights

CPU = torch.device("cpu")
UNTIED = dataclasses.replace(TINY, tie_embeddings=False, proj_bias=True)


def stream(folder: Path, cfg: MambaConfig = TINY, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = list(stream_weights(ModelFolder(folder), cfg, lambda name: keep_fp32(name, dtype), CPU))
    out = dict(pairs)
    assert len(out) == len(pairs), "a parameter came twice"
    return out


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert sorted(got) == sorted(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, check_dtype=False, msg=name)


@pytest.mark.parametrize("prefix", ["backbone.", "", "model.", "model.backbone.", "module.backbone."])
@pytest.mark.parametrize("embedding", ["embedding", "embeddings"])
@pytest.mark.parametrize("cfg", [TINY, UNTIED], ids=["tied", "untied"])
def test_names(tmp_path: Path, prefix: str, embedding: str, cfg: MambaConfig) -> None:
    weights = random_weights(cfg)
    write_safetensors(tmp_path, {to_theirs(name, prefix, embedding): t for name, t in weights.items()})
    assert_same(stream(tmp_path, cfg), weights)


@pytest.mark.parametrize("write", [write_safetensors, write_pickle])
@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_formats_shards_and_stored_types(tmp_path: Path, write: Any, shards: int, stored: torch.dtype) -> None:
    weights = random_weights(TINY, dtype=stored)
    write(tmp_path, {to_theirs(name): t for name, t in weights.items()}, shards)
    got = stream(tmp_path)
    assert all(t.dtype == torch.float32 for t in got.values())
    assert_same(got, {name: t.float() for name, t in weights.items()})
    assert stored_dtype(ModelFolder(tmp_path)) == stored


def test_our_own_names_are_read_as_they_are(tmp_path: Path) -> None:
    weights = random_weights(UNTIED)
    write_safetensors(tmp_path, weights)
    assert_same(stream(tmp_path, UNTIED), weights)


def test_decay_and_skip_stay_float32_in_a_half_model(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    write_safetensors(tmp_path, weights)
    got = stream(tmp_path, dtype=torch.bfloat16)
    for name, tensor in got.items():
        full = name.endswith(("mixer.A_log", "mixer.D"))
        assert tensor.dtype == (torch.float32 if full else torch.bfloat16), name
    double = stream(tmp_path, dtype=torch.float64)
    assert {t.dtype for t in double.values()} == {torch.float64}


def test_tensors_own_their_memory(tmp_path: Path) -> None:
    """Overwriting the file after loading changes nothing (a memory map would)."""
    for write, file in ((write_safetensors, "model.safetensors"), (write_pickle, "pytorch_model.bin")):
        folder = tmp_path / file
        weights = random_weights(TINY)
        write(folder, {to_theirs(name): t for name, t in weights.items()})
        got = stream(folder)
        path = folder / file
        with open(path, "r+b") as f:
            f.write(b"\xff" * path.stat().st_size)
        assert_same(got, weights)


def test_safetensors_are_preferred_to_pickles_and_one_file_to_shards(tmp_path: Path) -> None:
    weights, other = random_weights(TINY, 0), random_weights(TINY, 1)
    write_pickle(tmp_path, {to_theirs(name): t for name, t in other.items()})
    write_safetensors(tmp_path, {to_theirs(name): t for name, t in other.items()}, shards=2)
    write_safetensors(tmp_path, {to_theirs(name): t for name, t in weights.items()})
    assert_same(stream(tmp_path), weights)


# ---- the head --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_safetensors, write_pickle])
def test_a_tied_head_may_be_stored_if_it_is_equal(tmp_path: Path, write: Any) -> None:
    weights = random_weights(TINY)
    theirs = {to_theirs(name): t for name, t in weights.items()}
    write(tmp_path, theirs | {"lm_head.weight": weights["embed.weight"].clone()})
    assert_same(stream(tmp_path), weights)


def test_a_tied_pickle_with_shared_memory(tmp_path: Path) -> None:
    """The authors' files: one storage under two names."""
    weights = random_weights(TINY)
    theirs = {to_theirs(name, embedding="embedding"): t for name, t in weights.items()}
    write_pickle(tmp_path, theirs | {"lm_head.weight": weights["embed.weight"]})
    assert_same(stream(tmp_path), weights)


def test_a_head_that_differs_is_refused_where_the_config_ties_it(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    theirs = {to_theirs(name): t for name, t in weights.items()}
    write_safetensors(tmp_path, theirs | {"lm_head.weight": weights["embed.weight"] + 1e-6})
    with pytest.raises(
        LoadError, match=r"'lm_head.weight' and 'backbone.embeddings.weight' differ.*tie_word_embeddings"
    ):
        stream(tmp_path)
    write_safetensors(tmp_path, theirs | {"lm_head.weight": weights["embed.weight"][:5].clone()})
    with pytest.raises(LoadError, match=r"'lm_head.weight' has shape \(5, 6\)"):
        stream(tmp_path)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    weights = random_weights(UNTIED)
    del weights["unembed.weight"]
    write_safetensors(tmp_path, {to_theirs(name): t for name, t in weights.items()})
    with pytest.raises(LoadError, match=r"lacks the tensor 'unembed.weight'"):
        stream(tmp_path, UNTIED)


# ---- a config that lies, and files that do not fit --------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"d_state": 4}, r"'backbone.layers.0.mixer.x_proj.weight'.*shape \(8, 10\).*asks for \(10, 10\)"),
        ({"d_conv": 4}, r"'backbone.layers.0.mixer.conv1d.weight'.*shape \(10, 1, 3\).*asks for \(10, 1, 4\)"),
        ({"d_vocab": 301, "n_tokens": 301}, r"'backbone.embeddings.weight'.*shape \(300, 6\).*asks for \(301, 6\)"),
        ({"dt_rank": 1, "d_state": 3}, r"'backbone.layers.0.mixer.x_proj.weight'"),
        ({"n_layers": 1}, "says 1 layers, its weights hold 2"),
        ({"n_layers": 2_000_000_000}, "says 2000000000 layers, its weights hold 2"),
        ({"d_model": 2_000_000_000}, r"asks for \(300, 2000000000\)"),
        ({"conv_bias": False}, "holds the tensors 'backbone.layers.0.mixer.conv1d.bias'.*unknown to its config"),
        ({"proj_bias": True}, "lacks the tensors 'blocks.0.mixer.in_proj.bias', 'blocks.0.mixer.out_proj.bias'"),
        ({"tie_embeddings": False}, "lacks the tensor 'unembed.weight'"),
    ],
)
def test_a_config_that_lies_is_named_before_anything_is_allocated(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    write_safetensors(tmp_path, {to_theirs(name): t for name, t in random_weights(TINY).items()})
    with pytest.raises(LoadError, match=rf"(?s){named}"):
        stream(tmp_path, dataclasses.replace(TINY, **change))


def edited(tmp_path: Path, **changes: Tensor | None) -> Path:
    theirs = {to_theirs(name): t for name, t in random_weights(TINY).items()}
    for name, tensor in changes.items():
        theirs.pop(name, None)
        if tensor is not None:
            theirs[name] = tensor
    write_safetensors(tmp_path, theirs)
    return tmp_path


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    gone = {"backbone.layers.1.mixer.D": None}
    with pytest.raises(LoadError, match=r"lacks the tensor 'blocks.1.mixer.D'"):
        stream(edited(tmp_path, **gone))
    with pytest.raises(
        LoadError, match=r"lacks the tensor 'blocks.1.mixer.D'.*unexpected 'backbone.layers.1.mixer.DD'"
    ):
        stream(edited(tmp_path, **gone, **{"backbone.layers.1.mixer.DD": torch.ones(10)}))
    with pytest.raises(LoadError, match=r"holds the tensor 'backbone.layers.0.norm.bias', unknown to its config"):
        stream(edited(tmp_path, **{"backbone.layers.0.norm.bias": torch.ones(6)}))
    with pytest.raises(LoadError, match=r"holds the tensor 'score.weight'"):
        stream(edited(tmp_path, **{"score.weight": torch.ones(6)}))


def test_two_names_for_one_parameter(tmp_path: Path) -> None:
    with pytest.raises(
        LoadError, match=r"'backbone.embedding.weight'.*'backbone.embeddings.weight'.*both 'embed.weight'"
    ):
        stream(edited(tmp_path, **{"backbone.embedding.weight": torch.ones(300, 6)}))


def test_stored_types_that_are_no_floats_are_named(tmp_path: Path) -> None:
    name = "backbone.layers.0.mixer.in_proj.weight"
    for tensor, stored in (
        (torch.ones(20, 6, dtype=torch.int8), "I8"),
        (torch.ones(20, 6).to(torch.float8_e4m3fn), "F8"),
    ):
        with pytest.raises(LoadError, match=rf"'{name}'.*stored as {stored}.*quantised"):
            stream(edited(tmp_path, **{name: tensor}))


def test_not_finite_weights_are_warned_of_with_their_name(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    weights["blocks.1.mixer.D"][3] = float("nan")
    weights["embed.weight"][2, 1] = float("inf")
    write_safetensors(tmp_path, {to_theirs(name): t for name, t in weights.items()})
    with pytest.warns(UserWarning, match=r"NaN or infinite") as caught:
        got = dict(stream_weights(ModelFolder(tmp_path), TINY, lambda _: torch.float32, CPU))
    texts = sorted(str(w.message) for w in caught)
    assert len(texts) == 2
    assert (
        "1 of 10 values of 'blocks.1.mixer.D' ('backbone.layers.1.mixer.D') are NaN or infinite in the file" in texts[0]
    )
    assert "1 of 1800 values of 'embed.weight'" in texts[1]
    assert bool(torch.isnan(got["blocks.1.mixer.D"][3]))


def test_overflow_in_the_cast_is_told_apart(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    weights["embed.weight"][2, 1] = 1e6
    write_safetensors(tmp_path, weights)
    with pytest.warns(UserWarning, match=r"1 of 1800 values of 'embed.weight'.*too large for float16; load with"):
        list(stream_weights(ModelFolder(tmp_path), TINY, lambda name: keep_fp32(name, torch.float16), CPU))


# ---- shards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_safetensors, write_pickle])
def test_missing_shard(tmp_path: Path, write: Any) -> None:
    write(tmp_path, {to_theirs(name): t for name, t in random_weights(TINY).items()}, 3)
    gone = next(iter(sorted(tmp_path.glob("*-00002-of-*"))))
    gone.unlink()
    with pytest.raises(LoadError, match=rf"the shard '{gone.name}' named by .*index.json' is missing"):
        stream(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no weights: none of model.safetensors, .*pytorch_model.bin.index.json"):
        stream(tmp_path)


# ---- names and shapes ------------------------------------------------------------------------------


def test_names_that_only_look_like_parameters_are_left_alone() -> None:
    for odd in ("backbone.layers.01.mixer.D", "layers.-1.mixer.D", "backbone.layers.0.attn.D", "lm_head.bias", ""):
        assert to_our_name(odd) == odd
    assert to_our_name("backbone.layers.12.mixer.dt_proj.bias") == "blocks.12.mixer.dt_proj.bias"
    assert layer_count([]) == 0
    assert layer_count(["blocks.3.norm.weight", "embed.weight", "blocks.11.mixer.D"]) == 12


@pytest.mark.parametrize("cfg", [TINY, UNTIED, dataclasses.replace(TINY, conv_bias=False, mixer_norm_eps=1e-6)])
def test_shapes_are_those_of_the_model(cfg: MambaConfig) -> None:
    from mambascope.model import HookedMamba

    model = HookedMamba(cfg)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == parameter_shapes(cfg)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(cfg)


def test_our_reader_equals_safetensors_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 2, 2, dtype=torch.float64),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"any": "thing"})
    with SafetensorsFile(path, "x") as ours:
        assert set(ours.entries) == set(tensors)
        for name, want in load_file(path).items():
            got = ours.read(name, want.dtype, CPU)
            assert got.shape == want.shape, name
            assert torch.equal(got, want), name


PEAK = """
import resource, sys, torch
from mambascope.loading.files import ModelFolder
from mambascope.loading.weights import stream_weights
from mambascope.config import MambaConfig
cfg = MambaConfig(**eval(sys.argv[2]))
torch.randn(64, 64) @ torch.randn(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held = dict(stream_weights(ModelFolder(sys.argv[1]), cfg, lambda name: torch.float32, torch.device("cpu")))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024, sum(t.nbytes for t in held.values()))
"""


@pytest.mark.parametrize("write", [write_safetensors, write_pickle])
def test_peak_memory_is_the_weights_and_one_shard(tmp_path: Path, write: Any) -> None:
    shape = {"d_model": 256, "n_layers": 16, "d_vocab": 8000, "d_inner": 1024}
    cfg = MambaConfig(**shape)
    weights = random_weights(cfg, dtype=torch.float16)
    write(tmp_path, {to_theirs(name): t for name, t in weights.items()}, 8)
    del weights
    shard = max(path.stat().st_size for path in tmp_path.iterdir())
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), repr(shape)], capture_output=True, text=True, check=True
    )
    rise, kept = map(int, out.stdout.split())
    assert kept == 4 * count_parameters(cfg) > 60e6
    assert rise <= kept + shard + 16e6, f"{rise / 1e6:.0f} MB for {kept / 1e6:.0f} MB, shard {shard / 1e6:.0f} MB"


def test_stored_dtype_needs_an_embedding(tmp_path: Path) -> None:
    write_safetensors(tmp_path, {"x": torch.ones(1)})
    with pytest.raises(LoadError, match=r"holds no embedding"):
        stored_dtype(ModelFolder(tmp_path))

"""Tiny checkpoints in every format, written by the tests themselves (no transformers needed)."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from mambascope.config import MambaConfig
from mambascope.loading.names import parameter_shapes

TINY = MambaConfig(d_model=6, n_layers=2, d_vocab=300, d_inner=10, d_state=3, d_conv=3, dt_rank=2)


def random_weights(cfg: MambaConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random parameters by our names; A_log as in S4D-real so that a model of them is sane."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in parameter_shapes(cfg).items():
        weights[name] = 0.3 * torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            weights[name] = torch.log(torch.arange(1.0, shape[1] + 1)).repeat(shape[0], 1)
        if name.endswith("norm.weight") or name == "ln_final.weight":
            weights[name] += 1
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def to_theirs(name: str, prefix: str = "backbone.", embedding: str = "embeddings") -> str:
    """Our name to transformers' (``embeddings``) or the authors' (``embedding``)."""
    top = {"embed.weight": f"{prefix}{embedding}.weight", "ln_final.weight": f"{prefix}norm_f.weight"}
    if name == "unembed.weight":
        return "lm_head.weight"
    return top.get(name) or prefix + name.replace("blocks.", "layers.", 1)


def transformers_config(cfg: MambaConfig, **changes: Any) -> dict[str, Any]:
    """What transformers' save_pretrained writes for this shape."""
    falcon = cfg.mixer_norm_eps is not None
    values: dict[str, Any] = {
        "architectures": ["FalconMambaForCausalLM" if falcon else "MambaForCausalLM"],
        "model_type": "falcon_mamba" if falcon else "mamba",
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "vocab_size": cfg.d_vocab,
        "intermediate_size": cfg.d_inner,
        "state_size": cfg.d_state,
        "conv_kernel": cfg.d_conv,
        "time_step_rank": cfg.dt_rank,
        "use_conv_bias": cfg.conv_bias,
        "use_bias": cfg.proj_bias,
        "tie_word_embeddings": cfg.tie_embeddings,
        "layer_norm_epsilon": cfg.norm_eps,
        "torch_dtype": "float32",
    }
    if falcon:
        values["mixer_rms_eps"] = cfg.mixer_norm_eps
    return {key: value for key, value in (values | changes).items() if value is not ...}


def authors_config(cfg: MambaConfig, **changes: Any) -> dict[str, Any]:
    """The authors' config.json for this shape."""
    ssm = {"d_state": cfg.d_state, "d_conv": cfg.d_conv, "dt_rank": cfg.dt_rank, "expand": cfg.d_inner / cfg.d_model}
    values: dict[str, Any] = {
        "d_model": cfg.d_model,
        "n_layer": cfg.n_layers,
        "vocab_size": cfg.n_tokens,
        "ssm_cfg": ssm | {"conv_bias": cfg.conv_bias, "bias": cfg.proj_bias},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1 if cfg.d_vocab == cfg.n_tokens else 8,
        "tie_embeddings": cfg.tie_embeddings,
    }
    return {key: value for key, value in (values | changes).items() if value is not ...}


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def write_safetensors(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """One model.safetensors, or shards with an index."""
    _write(folder, tensors, shards, "model", "safetensors", lambda part, path: save_file(part, path, {"format": "pt"}))


def write_pickle(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """One pytorch_model.bin, or shards with an index."""
    _write(folder, tensors, shards, "pytorch_model", "bin", torch.save)


def _write(folder: Path, tensors: dict[str, Tensor], shards: int, stem: str, suffix: str, save: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save(tensors, folder / f"{stem}.{suffix}")
        return
    names, weight_map = list(tensors), {}
    step = math.ceil(len(names) / shards)
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: tensors[name] for name in names[i * step : (i + 1) * step]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": weight_map})


def write_checkpoint(
    folder: Path, cfg: MambaConfig = TINY, seed: int = 0, *, prefix: str = "backbone.", tokenizer: bool = True
) -> dict[str, Tensor]:
    """A whole folder in transformers' format; returns its weights by our names."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(cfg, seed)
    write_json(folder / "config.json", transformers_config(cfg))
    write_safetensors(folder, {to_theirs(name, prefix): tensor for name, tensor in weights.items()})
    if tokenizer:
        small_bpe().save(str(folder / "tokenizer.json"))
    return weights


def small_bpe(vocab_size: int = 290, special: tuple[str, ...] = ("<|endoftext|>",)) -> Backend:
    """A byte-level BPE trained on a few words; special tokens get the first ids."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 20, trainer)
    return backend

"""config.json of every kind: what is honoured, what is refused, and that nothing is dropped in silence."""

import math
import warnings
from typing import Any

import pytest
from checkpoints import TINY, authors_config, transformers_config

from mambascope.config import MambaConfig
from mambascope.errors import ConfigError
from mambascope.loading.formats import read_config
from mambascope.loading.names import count_parameters
from mambascope.loading.registry import find

# As state-spaces/mamba-130m-hf stores it: transformers' keys and the authors' side by side.
MAMBA_130M_HF: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "d_inner": 1536, "d_model": 768,
    "eos_token_id": 0, "expand": 2, "fused_add_norm": True, "hidden_act": "silu", "hidden_size": 768,
    "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05, "model_type": "mamba",
    "n_layer": 24, "num_hidden_layers": 24, "pad_token_id": 0, "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False, "residual_in_fp32": True, "rms_norm": True, "ssm_cfg": {}, "state_size": 16,
    "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
    "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32", "transformers_version": "4.39.0.dev0",
    "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 50280,
}  # fmt: skip
MAMBA_130M = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip


def read(values: dict[str, Any]) -> MambaConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_config(values, "config.json", "test")


def test_official_config_in_both_formats() -> None:
    theirs, authors = read(MAMBA_130M_HF), read(MAMBA_130M)
    for cfg in (theirs, authors):
        assert (cfg.d_model, cfg.n_layers, cfg.d_vocab, cfg.d_inner) == (768, 24, 50280, 1536)
        assert (cfg.d_state, cfg.d_conv, cfg.dt_rank, cfg.norm_eps) == (16, 4, 48, 1e-5)
        assert cfg.tie_embeddings
        assert cfg.residual_in_fp32
        assert cfg.conv_bias
        assert not cfg.proj_bias
        assert cfg.mixer_norm_eps is None
        assert not cfg.prepend_bos
        assert cfg.name == "test"
    assert authors.n_tokens == 50277  # the other three rows are padding
    assert theirs.initializer_range == 0.1
    assert authors.initializer_range == 0.02


def test_every_option_of_transformers_is_honoured() -> None:
    changes = {
        "state_size": 7, "conv_kernel": 1, "time_step_rank": 5, "use_conv_bias": False, "use_bias": True,
        "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "residual_in_fp32": False, "hidden_act": "swish",
        "time_step_min": 0.002, "time_step_max": 0.2, "time_step_floor": 0.003, "time_step_scale": 2.0,
        "time_step_init_scheme": "constant", "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": [2],
        "intermediate_size": ..., "expand": 1.5,
    }  # fmt: skip
    cfg = read(transformers_config(TINY, **changes))
    assert (cfg.d_state, cfg.d_conv, cfg.dt_rank, cfg.conv_bias, cfg.proj_bias) == (7, 1, 5, False, True)
    assert (cfg.tie_embeddings, cfg.norm_eps, cfg.residual_in_fp32, cfg.activation) == (False, 1e-3, False, "silu")
    assert (cfg.dt_min, cfg.dt_max, cfg.dt_floor, cfg.dt_scale, cfg.dt_init) == (0.002, 0.2, 0.003, 2.0, "constant")
    assert (cfg.initializer_range, cfg.bos_token_id, cfg.eos_token_id, cfg.d_inner) == (0.3, 1, 2, 9)


def test_every_option_of_the_authors_is_honoured() -> None:
    ssm = {
        "layer": "Mamba1", "d_state": 7, "d_conv": 1, "expand": 3, "dt_rank": "auto", "dt_min": 0.002, "dt_max": 0.2,
        "dt_init": "constant", "dt_scale": 2.0, "dt_init_floor": 0.003, "conv_bias": False, "bias": True,
        "use_fast_path": False,
    }  # fmt: skip
    values = authors_config(TINY, ssm_cfg=ssm, norm_epsilon=1e-3, residual_in_fp32=False, tie_embeddings=False)
    values |= {"vocab_size": 41, "pad_vocab_size_multiple": 16, "initializer_cfg": {"initializer_range": 0.3}}
    values |= {"attn_layer_idx": [], "attn_cfg": {}, "d_intermediate": 0, "fused_add_norm": False}
    cfg = read(values)
    assert (cfg.d_state, cfg.d_conv, cfg.d_inner, cfg.dt_rank) == (7, 1, 18, 1)
    assert (cfg.dt_min, cfg.dt_max, cfg.dt_floor, cfg.dt_scale, cfg.dt_init) == (0.002, 0.2, 0.003, 2.0, "constant")
    assert (cfg.conv_bias, cfg.proj_bias, cfg.norm_eps, cfg.initializer_range) == (False, True, 1e-3, 0.3)
    assert (cfg.residual_in_fp32, cfg.tie_embeddings, cfg.n_tokens, cfg.d_vocab) == (False, False, 41, 48)


def test_authors_vocabulary_is_padded_to_eight_by_default() -> None:
    cfg = read(authors_config(TINY, vocab_size=41, pad_vocab_size_multiple=...))
    assert (cfg.n_tokens, cfg.d_vocab) == (41, 48)


def test_falcon_mamba_and_its_contradicting_expand() -> None:
    values = transformers_config(MambaConfig(d_model=8, n_layers=1, d_vocab=40, d_inner=16, mixer_norm_eps=1e-3))
    cfg = read(values | {"expand": 16})
    assert cfg.mixer_norm_eps == 1e-3
    assert cfg.d_inner == 16
    del values["mixer_rms_eps"]
    assert read(values).mixer_norm_eps == 1e-6  # transformers' default


def test_falcon_mamba_7b() -> None:
    values = {
        "architectures": ["FalconMambaForCausalLM"], "bos_token_id": 0, "conv_kernel": 4, "eos_token_id": 11,
        "expand": 16, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1, "intermediate_size": 8192,
        "layer_norm_epsilon": 1e-05, "model_type": "falcon_mamba", "num_hidden_layers": 64, "pad_token_id": 11,
        "rescale_prenorm_residual": False, "residual_in_fp32": True, "state_size": 16, "tie_word_embeddings": False,
        "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
        "time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype": "bfloat16", "transformers_version": "4.43.0",
        "use_bias": False, "use_cache": True, "use_conv_bias": True, "use_falcon_mambapy": False, "vocab_size": 65024,
    }  # fmt: skip
    cfg = read(values)
    assert (cfg.d_inner, cfg.dt_rank, cfg.mixer_norm_eps, cfg.eos_token_id) == (8192, 256, 1e-6, 11)
    assert not cfg.tie_embeddings
    info = find("falcon-mamba-7b")
    assert info is not None
    assert info.parameters == count_parameters(cfg)


def test_ours_round_trips_and_checks_its_version() -> None:
    ours = {"format": "mambascope", "format_version": 1, "tokenizer": None, **TINY.to_dict()}
    assert read(ours) == TINY
    with pytest.raises(ConfigError, match=r"format_version is 2.*reads 1 to 1"):
        read(ours | {"format_version": 2})
    with pytest.raises(ConfigError, match=r"unknown field 'd_stat'.*'d_state'"):
        read(ours | {"d_stat": 3})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba2"}, "'mamba2' is Mamba-2"),
        ({"model_type": "jamba"}, "'jamba' is Jamba, a hybrid"),
        ({"model_type": "zamba2"}, "'zamba2' is Zamba2, a hybrid"),
        ({"model_type": "falcon_h1"}, "'falcon_h1' is Falcon-H1"),
        ({"model_type": "llama"}, "'llama'.*not the config of a Mamba-1"),
        ({"model_type": ["mamba"]}, "not the config of a Mamba-1"),
        ({"model_type": ...}, "not the config of a Mamba-1"),
        ({"architectures": ["MambaForSequenceClassification"]}, "architectures.*MambaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.*quantised"),
        ({"time_step_limit": [0.0, 1.0]}, "time_step_limit.*Mamba-2"),
        ({"attn_layer_idx": [3]}, "attn_layer_idx.*hybrid"),
        ({"n_groups": 8}, "n_groups.*Mamba-2"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map.*own model code"),
        ({"rms_norm": False}, "rms_norm is False.*LayerNorm"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer 'Mamba2'"),
        ({"ssm_cfg": {"d_state": 4}}, "d_state is 4, expected 3"),
        ({"ssm_cfg": {"expand": 4}}, "expand is 4.*d_inner 10"),
        ({"ssm_cfg": {"dt_rank": 1}}, "dt_rank is 1, expected 2"),
        ({"d_model": 7}, "d_model is 7, expected 6"),
        ({"d_inner": 7}, "d_inner is 7, expected 10"),
        ({"tie_embeddings": False}, "tie_embeddings is False, expected True"),
        ({"hidden_size": "6"}, "hidden_size is '6', expected an integer"),
        ({"hidden_size": True}, "hidden_size is True, expected an integer"),
        ({"hidden_size": 6.0}, "hidden_size is 6.0, expected an integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": ...}, "lacks 'num_hidden_layers'"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"vocab_size": 2**40}, "vocab_size is 1099511627776"),
        ({"use_bias": 1}, "use_bias is 1, expected true or false"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon is nan"),
        ({"time_step_rank": "big"}, "time_step_rank is 'big'"),
        ({"intermediate_size": ..., "expand": 1e-9}, "expand is 1e-09"),
        ({"intermediate_size": ..., "expand": 1e30}, "expand is 1e\\+30"),
        ({"eos_token_id": 300}, "eos_token_id is 300, expected an id below vocab_size=300"),
        ({"time_step_init_scheme": "zero"}, "time_step_init_scheme is 'zero'"),
    ],
)
def test_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){named}"):
        read(transformers_config(TINY, **change))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer 'Mamba2' is not Mamba-1"),
        ({"ssm_cfg": {"headdim": 64}}, "ssm_cfg.headdim is no option"),
        ({"ssm_cfg": {"d_stat": 4}}, "ssm_cfg.d_stat is no option.*'d_state'"),
        ({"ssm_cfg": []}, "ssm_cfg is \\[\\], expected an object"),
        ({"ssm_cfg": {"dt_init": "zero"}}, "dt_init is 'zero'"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx.*hybrid"),
        ({"attn_cfg": {"num_heads": 4}}, "attn_cfg.*hybrid"),
        ({"d_intermediate": 64}, "d_intermediate.*MLP"),
        ({"rms_norm": False}, "rms_norm is False.*LayerNorm"),
        ({"bidirectional": True}, "bidirectional"),
        ({"drop_path": 0.1}, "unknown option 'drop_path'"),
        ({"n_layer": ...}, "lacks 'n_layer'"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
        ({"model_type": "mamba2"}, "'mamba2' is Mamba-2"),
    ],
)
def test_authors_format_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){named}"):
        read(authors_config(TINY, **change))


def test_unknown_options_and_extra_eos_are_said_aloud() -> None:
    with pytest.warns(UserWarning, match=r"have no effect: flux, zeal"):
        read_config(transformers_config(TINY, zeal=1, flux=2), "config.json", "test")
    with pytest.warns(UserWarning, match=r"eos_token_id lists \[3, 4\]; only 3 is used"):
        cfg = read_config(transformers_config(TINY, eos_token_id=[3, 4]), "config.json", "test")
    assert cfg.eos_token_id == 3


def test_transformers_own_configs_are_understood() -> None:
    """Whatever transformers itself writes is read without a warning, every field of it."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MambaConfig(vocab_size=40, hidden_size=12, num_hidden_layers=2, state_size=7, expand=3)
    cfg = read(theirs.to_dict() | {"architectures": ["MambaForCausalLM"]})
    assert (cfg.d_model, cfg.d_inner, cfg.dt_rank, cfg.d_state) == (12, 36, 1, 7)
    falcon = transformers.FalconMambaConfig(hidden_size=12, num_hidden_layers=2, mixer_rms_eps=1e-4)
    assert read(falcon.to_dict()).mixer_norm_eps == 1e-4

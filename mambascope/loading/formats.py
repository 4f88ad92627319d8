"""config.json of four kinds to one ``MambaConfig``.

transformers' ``MambaConfig`` and ``FalconMambaConfig`` (``model_type`` "mamba", "falcon_mamba"), the authors' format
(``d_model``, ``n_layer``, ``ssm_cfg``), and our own (``"format": "mambascope"``). An option that changes the numbers
is honoured or refused by name. Other architectures are refused by name.
"""

import math
import warnings
from typing import Any

from mambascope.config import MambaConfig
from mambascope.errors import ConfigError, nearest
from mambascope.loading.fields import Fields

__all__ = ["OUR_FORMAT", "OUR_VERSION", "read_config"]

OUR_FORMAT = "mambascope"
OUR_VERSION = 1

_ARCHITECTURES = {
    "mamba": ("MambaForCausalLM", "MambaModel", "MambaLMHeadModel"),
    "falcon_mamba": ("FalconMambaForCausalLM", "FalconMambaModel"),
}
_FOREIGN = {
    "mamba2": "Mamba-2, whose state has another shape and recurrence",
    "jamba": "Jamba, a hybrid of Mamba and attention",
    "zamba": "Zamba, a hybrid of Mamba and attention",
    "zamba2": "Zamba2, a hybrid of Mamba-2 and attention",
    "bamba": "Bamba, a hybrid of Mamba-2 and attention",
    "falcon_h1": "Falcon-H1, a hybrid of Mamba-2 and attention",
    "nemotron_h": "Nemotron-H, a hybrid of Mamba-2 and attention",
    "granitemoehybrid": "Granite 4, a hybrid of Mamba-2 and attention",
    "plamo2": "PLaMo 2, a hybrid of Mamba and attention",
    "hymba": "Hymba, a hybrid of Mamba and attention",
    "mambavision": "MambaVision, an image model",
}
_REFUSED = {
    "quantization_config": "the weights are quantised; load the unquantised checkpoint",
    "time_step_limit": "clamping delta is an option of Mamba-2",
    "attn_layer_idx": "attention layers make it a hybrid",
    "attn_cfg": "attention layers make it a hybrid",
    "num_attention_heads": "attention layers make it a hybrid",
    "attn_layer_period": "attention layers make it a hybrid",
    "n_groups": "it is an option of Mamba-2",
    "num_heads": "it is an option of Mamba-2",
    "head_dim": "it is an option of Mamba-2",
    "num_experts": "a mixture of experts is not a Mamba-1 block",
    "d_intermediate": "MLP layers are not part of a Mamba-1 block",
    "bidirectional": "a bidirectional model is no language model",
    "auto_map": "the checkpoint brings its own model code, which is not run, so its numbers may differ",
}
# Read by transformers' Mamba for speed, bookkeeping, fresh weights or generation only.
_NO_EFFECT = (
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path",
    "_commit_hash", "use_cache", "use_mambapy", "use_falcon_mambapy", "use_associative_scan", "pad_token_id",
    "rescale_prenorm_residual", "fused_add_norm", "pad_vocab_size_multiple", "return_dict", "output_hidden_states",
    "output_attentions", "torchscript", "pruned_heads", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder",
    "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "id2label", "label2id",
    "problem_type", "finetuning_task", "task_specific_params", "tokenizer_class", "prefix", "sep_token_id",
    "decoder_start_token_id", "use_bfloat16", "tf_legacy_loss", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def read_config(values: dict[str, Any], where: str, name: str) -> MambaConfig:
    """The ``MambaConfig`` of a parsed config.json (``where`` it came from, for error texts; the model's ``name``).

    Raises
    ------
    ConfigError: another architecture, an option that cannot be honoured, or a value of the wrong type; names it.
    """
    if values.get("format") == OUR_FORMAT:
        return _ours(values, where)
    fields = Fields(values, where)
    _refuse_foreign(fields)
    model_type = fields.raw("model_type")
    if "hidden_size" in fields and isinstance(model_type, str) and model_type in _ARCHITECTURES:
        return _transformers(fields, model_type, name)
    if "d_model" in fields and model_type in (None, "mamba"):
        return _authors(fields, name)
    shown = f"model_type {model_type!r}" if model_type else "no model_type, hidden_size or d_model"
    raise ConfigError(
        f"{where} has {shown}: this is not the config of a Mamba-1 language model. mambascope opens "
        "'mamba' and 'falcon_mamba' (transformers), and the authors' format with d_model, n_layer and ssm_cfg"
    )


def _ours(values: dict[str, Any], where: str) -> MambaConfig:
    values = dict(values)
    version = values.pop("format_version", None)
    if type(version) is not int or not 1 <= version <= OUR_VERSION:
        raise ConfigError(
            f"{where}: format_version is {version!r}, this mambascope reads 1 to {OUR_VERSION}; update it"
        )
    del values["format"]
    values.pop("tokenizer", None)
    try:
        return MambaConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _refuse_foreign(fields: Fields) -> None:
    model_type = fields.raw("model_type")
    if isinstance(model_type, str) and model_type in _FOREIGN:
        raise ConfigError(
            f"{fields.where}: model_type {model_type!r} is {_FOREIGN[model_type]}; mambascope reads Mamba-1"
        )
    for key, why in _REFUSED.items():
        value = fields.raw(key)
        harmless = value in (None, False, 0) or value == {} or value == []
        if key == "time_step_limit":
            harmless = value is None or value == [0.0, math.inf]
        if not harmless:
            raise ConfigError(f"{fields.where}: {key}={str(value)[:60]} cannot be honoured: {why}")


def _token_id(fields: Fields, key: str, n_tokens: int) -> int | None:
    """A special token's id; of several (transformers allows a list for eos) the first, with a warning."""
    value = fields.raw(key)
    if isinstance(value, list) and value:
        if len(value) > 1:
            warnings.warn(f"{fields.where}: {key} lists {value}; only {value[0]} is used", stacklevel=5)
        value = value[0]
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < n_tokens:
        raise fields.error(key, f"an id below vocab_size={n_tokens}")
    return value


def _dt_rank(fields: Fields, key: str, d_model: int) -> int:
    return math.ceil(d_model / 16) if fields.raw(key, "auto") == "auto" else fields.integer(key)


def _d_inner(fields: Fields, d_model: int) -> int:
    """``int(expand * d_model)``, as transformers and the authors compute it."""
    d_inner = int(fields.number("expand", 2) * d_model)
    if not 1 <= d_inner < 2**31:
        raise fields.error("expand", f"a factor that makes d_inner = int(expand * {d_model}) at least 1")
    return d_inner


def _transformers(fields: Fields, model_type: str, name: str) -> MambaConfig:
    _check_architectures(fields, model_type)
    d_model, n_layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
    d_vocab = fields.integer("vocab_size")
    d_inner = _d_inner(fields, d_model)
    if "intermediate_size" in fields:  # wins in transformers too; falcon-mamba-7b's own expand contradicts it
        d_inner = fields.integer("intermediate_size")
    why = "; the gate's activation differs between versions of transformers for any other"
    fields.one_of("hidden_act", "silu", ("silu", "swish"), why)
    cfg = MambaConfig(
        d_model=d_model,
        n_layers=n_layers,
        d_vocab=d_vocab,
        d_inner=d_inner,
        d_state=fields.integer("state_size", 16),
        d_conv=fields.integer("conv_kernel", 4),
        dt_rank=_dt_rank(fields, "time_step_rank", d_model),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        mixer_norm_eps=fields.number("mixer_rms_eps", 1e-6) if model_type == "falcon_mamba" else None,
        conv_bias=fields.flag("use_conv_bias", True),
        proj_bias=fields.flag("use_bias", False),
        residual_in_fp32=fields.flag("residual_in_fp32", True),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        bos_token_id=_token_id(fields, "bos_token_id", d_vocab),
        eos_token_id=_token_id(fields, "eos_token_id", d_vocab),
        dt_min=fields.number("time_step_min", 1e-3),
        dt_max=fields.number("time_step_max", 0.1),
        dt_floor=fields.number("time_step_floor", 1e-4),
        dt_scale=fields.number("time_step_scale", 1.0),
        dt_init=fields.one_of("time_step_init_scheme", "random", ("random", "constant")),
        initializer_range=fields.number("initializer_range", 0.1),
        name=name,
    )
    _check_leftovers(fields, cfg)
    return cfg


def _check_architectures(fields: Fields, model_type: str) -> None:
    known = _ARCHITECTURES[model_type]
    listed = fields.raw("architectures", [])
    if not isinstance(listed, list) or any(item not in known for item in listed):
        raise fields.error("architectures", f"one of {', '.join(known)}")


def _check_leftovers(fields: Fields, cfg: MambaConfig) -> None:
    """Keys of the authors' format that converted checkpoints repeat must agree; unknown keys are named."""
    fields.same("d_model", cfg.d_model)
    fields.same("n_layer", cfg.n_layers)
    fields.same("d_inner", cfg.d_inner)
    fields.same("tie_embeddings", cfg.tie_embeddings)
    fields.same("norm_epsilon", cfg.norm_eps)
    fields.must_be("rms_norm", (True,), "LayerNorm is not supported")
    _ssm_options(fields, cfg)
    fields.skip(*_NO_EFFECT)
    unknown = [key for key in fields.unread() if not key.startswith("_")]
    if unknown:
        warnings.warn(
            f"{fields.where}: options that neither transformers' Mamba nor mambascope knows have no effect: "
            f"{', '.join(sorted(unknown))}",
            stacklevel=5,
        )


_SSM_OPTIONS = (
    "layer", "d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor",
    "conv_bias", "bias", "use_fast_path",
)  # fmt: skip


def _ssm_fields(fields: Fields) -> Fields:
    values = fields.raw("ssm_cfg", {})
    if not isinstance(values, dict):
        raise fields.error("ssm_cfg", "an object")
    layer = values.get("layer", "Mamba1")
    if layer != "Mamba1":
        raise ConfigError(f"{fields.where}: ssm_cfg.layer {layer!r} is not Mamba-1; mambascope reads Mamba-1 only")
    for key in values:
        if key not in _SSM_OPTIONS:
            offered = nearest(key, _SSM_OPTIONS, 1)
            raise ConfigError(f"{fields.where}: ssm_cfg.{key} is no option of the authors' Mamba-1 block{offered}")
    return Fields(values, f"{fields.where}, ssm_cfg")


def _ssm_options(fields: Fields, cfg: MambaConfig) -> None:
    """In a converted checkpoint, ssm_cfg must say what transformers' own options say."""
    ssm = _ssm_fields(fields)
    ssm.same("d_state", cfg.d_state)
    ssm.same("d_conv", cfg.d_conv)
    ssm.same("conv_bias", cfg.conv_bias)
    ssm.same("bias", cfg.proj_bias)
    if "dt_rank" in ssm and _dt_rank(ssm, "dt_rank", cfg.d_model) != cfg.dt_rank:
        raise ssm.error("dt_rank", f"{cfg.dt_rank}, as time_step_rank says")
    if "expand" in ssm and _d_inner(ssm, cfg.d_model) != cfg.d_inner:
        raise ssm.error("expand", f"what makes d_inner {cfg.d_inner}, as intermediate_size says")


def _authors(fields: Fields, name: str) -> MambaConfig:
    d_model, n_layers = fields.integer("d_model"), fields.integer("n_layer")
    n_tokens = fields.integer("vocab_size")
    multiple = fields.integer("pad_vocab_size_multiple", 8)
    ssm = _ssm_fields(fields)
    fields.must_be("rms_norm", (True,), "LayerNorm is not supported")
    fields.flag("fused_add_norm", True)  # the same numbers by another kernel
    ssm.flag("use_fast_path", True)  # likewise
    init = fields.raw("initializer_cfg", {})
    if not isinstance(init, dict):
        raise fields.error("initializer_cfg", "an object")
    ssm.skip("layer")
    cfg = MambaConfig(
        d_model=d_model,
        n_layers=n_layers,
        d_vocab=-(-n_tokens // multiple) * multiple,
        n_tokens=n_tokens,
        d_inner=_d_inner(ssm, d_model),
        d_state=ssm.integer("d_state", 16),
        d_conv=ssm.integer("d_conv", 4),
        dt_rank=_dt_rank(ssm, "dt_rank", d_model),
        norm_eps=fields.number("norm_epsilon", 1e-5),
        conv_bias=ssm.flag("conv_bias", True),
        proj_bias=ssm.flag("bias", False),
        residual_in_fp32=fields.flag("residual_in_fp32", True),
        tie_embeddings=fields.flag("tie_embeddings", True),
        bos_token_id=_token_id(fields, "bos_token_id", n_tokens),
        eos_token_id=_token_id(fields, "eos_token_id", n_tokens),
        dt_min=ssm.number("dt_min", 1e-3),
        dt_max=ssm.number("dt_max", 0.1),
        dt_floor=ssm.number("dt_init_floor", 1e-4),
        dt_scale=ssm.number("dt_scale", 1.0),
        dt_init=ssm.one_of("dt_init", "random", ("random", "constant")),
        initializer_range=Fields(init, f"{fields.where}, initializer_cfg").number("initializer_range", 0.02),
        name=name,
    )
    fields.skip("architectures", "torch_dtype", "dtype", "transformers_version", "pad_token_id", "_name_or_path")
    unknown = list(fields.unread())
    if unknown:
        raise ConfigError(
            f"{fields.where}: unknown option{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, sorted(unknown)))}; "
            "remove what is not an option of the authors' MambaConfig if it means nothing"
        )
    return cfg

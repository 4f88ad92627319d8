"""Checkpoints written by transformers give transformers' logits and gradients, on every path and in every format.

transformers' plain PyTorch path in float32 is the comparison; its sequential scan is independent of ours. It runs for
every shape here (conv width 1 too, without its cache). Errors are max|a - b| / max|b| per tensor.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import to_theirs, write_json, write_pickle
from torch import Tensor, nn

import mambascope as ms
from mambascope.loading.names import to_our_name

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BACKENDS = ("reference", "torch", "cpu")
LOGITS, GRADIENTS = 2e-5, 1e-4


@dataclass(frozen=True)
class Case:
    """A tiny model: options of transformers' config that differ from the base below."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    falcon: bool = False

    def config(self) -> Any:
        base = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3}
        kind = transformers.FalconMambaConfig if self.falcon else transformers.MambaConfig
        return kind(**(base | self.options))


CASES = [
    Case("plain"),
    Case("d_state-1", {"state_size": 1}),
    Case("d_state-7", {"state_size": 7}),
    Case("d_state-33", {"state_size": 33}),
    Case("conv-1", {"conv_kernel": 1}),
    Case("conv-2", {"conv_kernel": 2}),
    Case("conv-3", {"conv_kernel": 3, "use_conv_bias": False}),
    Case("conv-8", {"conv_kernel": 8}),
    Case("dt_rank-1", {"time_step_rank": 1}),
    Case("dt_rank-auto", {"time_step_rank": "auto", "hidden_size": 36}),
    Case("expand-1", {"expand": 1}),
    Case("expand-3", {"expand": 3}),
    Case("bias-both", {"use_bias": True, "use_conv_bias": True}),
    Case("bias-proj", {"use_bias": True, "use_conv_bias": False}),
    Case("bias-none", {"use_bias": False, "use_conv_bias": False}),
    Case("untied", {"tie_word_embeddings": False}),
    Case("epsilon", {"layer_norm_epsilon": 0.3, "residual_in_fp32": False}),
    Case("one-layer-wide", {"num_hidden_layers": 1, "hidden_size": 33, "expand": 3}),
    Case("falcon", falcon=True),
    Case("falcon-odd", {"state_size": 1, "conv_kernel": 1, "time_step_rank": 1, "expand": 1}, falcon=True),
    Case("falcon-untied", {"tie_word_embeddings": False, "mixer_rms_eps": 0.2, "use_bias": True}, falcon=True),
    Case("falcon-wide", {"state_size": 33, "conv_kernel": 8, "expand": 3, "use_conv_bias": False}, falcon=True),
]


def build(case: Case, seed: int = 0) -> nn.Module:
    """transformers' model of this case, every parameter made large enough to matter."""
    torch.manual_seed(seed)
    kind = transformers.FalconMambaForCausalLM if case.falcon else transformers.MambaForCausalLM
    model = kind(case.config()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "norm.weight", "norm_f.weight", ".D", "A_log")):
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.copy_(
                    torch.randn_like(p) * (0.5 if "embeddings" in name or "lm_head" in name else p.shape[-1] ** -0.5)
                )
    return model


def load(folder: Path, **options: Any) -> ms.HookedMamba:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ms.load(folder, **({"device": "cpu", "tokenizer": False} | options))


def ids(length: int = 37, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(0, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def their_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients by our parameter names of a loss that weighs every logit differently."""
    model.zero_grad()
    logits = forward(ids(length=19))
    weigh = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weigh).mean().backward()
    grads = {to_our_name(name): p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return grads  # type: ignore[return-value]


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_and_gradients(tmp_path: Path, case: Case) -> None:
    theirs = build(case)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        want, short = their_logits(theirs, ids()), their_logits(theirs, ids(length=1))
    want_grads = gradients(theirs, lambda tokens: their_logits(theirs, tokens))
    for backend in BACKENDS:
        ours = load(tmp_path, backend=backend)
        with torch.no_grad():
            assert error(ours(ids()), want) < LOGITS, backend
            assert error(ours(ids(length=1)), short) < LOGITS, backend
        grads = gradients(ours, ours)
        assert sorted(grads) == sorted(want_grads)
        for name, grad in want_grads.items():
            assert error(grads[name], grad) < GRADIENTS, f"{backend}, {name}"


@pytest.mark.parametrize("option", ["layer_norm_epsilon", "mixer_rms_eps", "weight"])
def test_the_comparison_can_fail(tmp_path: Path, option: str) -> None:
    """An option that is ignored, or one weight that is a little off, is far above the bar."""
    theirs = build(Case("falcon", falcon=True))
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", values | ({option: 1e-2} if option != "weight" else {}))
    ours = load(tmp_path)
    if option == "weight":
        with torch.no_grad():
            ours.blocks[1].mixer.D[3] += 1e-2  # type: ignore[union-attr, index, operator]
    assert error(ours(ids()), their_logits(theirs, ids())) > LOGITS


@pytest.mark.parametrize("falcon", [False, True], ids=["mamba", "falcon"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sharded_and_without_prefix(tmp_path: Path, falcon: bool, tied: bool) -> None:
    theirs = build(Case("x", {"tie_word_embeddings": tied}, falcon))
    want = their_logits(theirs, ids())
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="6KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert error(load(tmp_path / "sharded")(ids()), want) < LOGITS
    if tied:  # the bare backbone has no head of its own
        theirs.backbone.save_pretrained(tmp_path / "bare")  # type: ignore[operator, union-attr]
        assert error(load(tmp_path / "bare")(ids()), want) < LOGITS


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_on_disk(tmp_path: Path, stored: torch.dtype) -> None:
    """Stored half, computed in float32: as transformers does it from the same file."""
    build(Case("plain")).to(stored).save_pretrained(tmp_path)
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for backend in BACKENDS:
        assert error(load(tmp_path, backend=backend)(ids()), their_logits(theirs, ids())) < LOGITS, backend


@pytest.mark.parametrize("falcon", [False, True], ids=["mamba", "falcon"])
def test_bf16_model_is_as_near_to_the_truth_as_theirs(tmp_path: Path, falcon: bool) -> None:
    """Run in bf16: our distance from the float32 logits of the same weights is at most 1.5 times transformers'."""
    kind = transformers.FalconMambaForCausalLM if falcon else transformers.MambaForCausalLM
    build(Case("plain", falcon=falcon)).to(torch.bfloat16).save_pretrained(tmp_path)
    truth = load(tmp_path, backend="reference", dtype=torch.float64)(ids())
    theirs = kind.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    bar = 1.5 * error(their_logits(theirs, ids()), truth)
    assert 1e-3 < bar < 0.2
    for backend in BACKENDS:
        assert error(load(tmp_path, backend=backend, dtype="auto")(ids()), truth) < bar, backend


SSM_CASES = [case for case in CASES if not case.falcon]


@pytest.mark.parametrize("case", SSM_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("shards", [1, 3])
def test_authors_format_gives_the_same_bits(tmp_path: Path, case: Case, shards: int) -> None:
    """The same weights in the authors' format (ssm_cfg, pickle, shared head, padded vocabulary)."""
    theirs = build(case)
    theirs.save_pretrained(tmp_path / "theirs")
    want = load(tmp_path / "theirs")
    options = case.config()
    tensors = {to_theirs(n, embedding="embedding"): p.detach().clone() for n, p in want.named_parameters()}
    if options.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    write_pickle(tmp_path / "authors", tensors, shards)
    write_json(
        tmp_path / "authors" / "config.json",
        {
            "d_model": options.hidden_size,
            "n_layer": options.num_hidden_layers,
            "vocab_size": 37,
            "pad_vocab_size_multiple": 8,
            "ssm_cfg": {
                "d_state": options.state_size,
                "d_conv": options.conv_kernel,
                "expand": options.expand,
                "dt_rank": options.time_step_rank,
                "conv_bias": options.use_conv_bias,
                "bias": options.use_bias,
            },
            "rms_norm": True,
            "norm_epsilon": options.layer_norm_epsilon,
            "residual_in_fp32": options.residual_in_fp32,
            "fused_add_norm": True,
            "tie_embeddings": options.tie_word_embeddings,
        },
    )
    ours = load(tmp_path / "authors")
    assert (ours.cfg.d_vocab, ours.cfg.n_tokens) == (40, 37)
    tokens = ids() % 37
    assert torch.equal(ours(tokens), want(tokens))

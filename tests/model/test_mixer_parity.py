"""Attention and a whole Transformer against plain formulas and transformers' Llama, on random weights."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mambascope.config import MambaConfig
from mambascope.hooks.run import Run
from mambascope.model import HookedMamba
from mambascope.model.mixers.attention import AttentionMixer, WindowAttentionMixer
from mambascope.model.mixers.feed_forward import FeedForwardMixer

V = 29


def by_hand(mixer: AttentionMixer, r: Tensor) -> Tensor:
    """One query at a time, complex numbers for the rotation."""
    cfg = mixer.cfg
    B, L, M = r.shape
    H, E = cfg.n_heads, M // cfg.n_heads
    q, k, v = (x.view(B, L, H, E) for x in (r @ mixer.in_proj.weight.T).chunk(3, -1))
    rates = cfg.rotary_base ** (-torch.arange(0, E, 2, dtype=torch.float64) / E)
    turn = torch.exp(1j * torch.arange(L)[:, None] * rates)[:, None]  # L 1 E/2

    def turned(x: Tensor) -> Tensor:
        z = torch.complex(x[..., : E // 2], x[..., E // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    q, k, out = turned(q), turned(k), torch.zeros(B, L, H, E, dtype=r.dtype)
    for t in range(L):
        first = 0 if mixer.window is None else max(0, t - mixer.window + 1)
        scores = torch.einsum("bhe,bshe->bhs", q[:, t], k[:, first : t + 1]) / math.sqrt(E)
        out[:, t] = torch.einsum("bhs,bshe->bhe", scores.softmax(-1), v[:, first : t + 1])
    return out.flatten(2) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("kind", [AttentionMixer, WindowAttentionMixer])
@pytest.mark.parametrize("length", [1, 63, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_attention_is_the_formula(kind: Any, length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    letter = kind.letter
    cfg = MambaConfig(d_model=24, n_layers=1, d_vocab=V, pattern=letter, n_heads=2, window=9 if letter == "w" else 0)
    mixer = kind(cfg).double()
    r = torch.randn(2, length, 24, dtype=torch.float64)
    want = by_hand(mixer, r)
    mixer = mixer.to(dtype)
    got, _ = mixer(r.to(dtype), Run("torch"))
    assert mixer.path.form == "sdpa"
    mixer.hook_pattern.add_hook(lambda value, hook: None)
    explicit, _ = mixer(r.to(dtype), Run("torch"))
    assert mixer.path.form == "explicit"
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for out in (got, explicit):
        assert (out.double() - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("kind", [AttentionMixer, WindowAttentionMixer])
def test_gradients_of_both_paths_are_those_of_the_formula(kind: Any) -> None:
    torch.manual_seed(0)
    cfg = MambaConfig(d_model=8, n_layers=1, d_vocab=V, pattern=kind.letter, n_heads=2, window=3 * (kind.letter == "w"))
    mixer = kind(cfg).double()
    r, g = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 7, 8, dtype=torch.float64)
    wrt = [r, *mixer.parameters()]
    want = torch.autograd.grad(by_hand(mixer, r), wrt, g)
    for hooked in (False, True):
        if hooked:
            mixer.hook_attn_scores.add_hook(lambda value, hook: None)
        for a, b in zip(torch.autograd.grad(mixer(r, Run("torch"))[0], wrt, g), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_flow_through_the_key_value_cache() -> None:
    torch.manual_seed(0)
    cfg = MambaConfig(d_model=8, n_layers=2, d_vocab=V, pattern="aw", n_heads=2, window=4)
    model, ids = HookedMamba(cfg, dtype=torch.float64), torch.randint(0, V, (1, 9))
    whole = model(ids)[:, -1].sum()
    _, state = model(ids[:, :5], return_state=True)
    split = model(ids[:, 5:], state=state)[:, -1].sum()
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(split, weights), torch.autograd.grad(whole, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_swiglu_is_the_formula() -> None:
    torch.manual_seed(0)
    mixer = FeedForwardMixer(MambaConfig(d_model=8, n_layers=1, d_vocab=V, pattern="f", d_ff=12)).double()
    r = torch.randn(2, 5, 8, dtype=torch.float64)
    gate, up = r @ mixer.in_proj.weight[:12].T, r @ mixer.in_proj.weight[12:].T
    want = (gate / (1 + torch.exp(-gate)) * up) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(r, Run("torch"))[0], want, rtol=0, atol=1e-12)


def test_a_transformer_is_transformers_llama() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    M, F = 32, 48
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=M, intermediate_size=F, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, rms_norm_eps=1e-5, rope_theta=10_000.0, tie_word_embeddings=False,
            max_position_embeddings=512, attn_implementation="eager",
        )
    ).double().eval()  # fmt: skip
    cfg = MambaConfig(d_model=M, n_layers=4, d_vocab=V, pattern="af", n_heads=4, d_ff=F, tie_embeddings=False)
    ours, source = HookedMamba(cfg, dtype=torch.float64), theirs.state_dict()
    names = {"embed.weight": "model.embed_tokens.weight", "ln_final.weight": "model.norm.weight"}
    weights = {a: source[b] for a, b in names.items()} | {"unembed.weight": source["lm_head.weight"]}
    for i in range(2):
        old, attention, mlp = f"model.layers.{i}", f"blocks.{2 * i}", f"blocks.{2 * i + 1}"
        weights[f"{attention}.norm.weight"] = source[f"{old}.input_layernorm.weight"]
        weights[f"{mlp}.norm.weight"] = source[f"{old}.post_attention_layernorm.weight"]
        qkv = [source[f"{old}.self_attn.{n}_proj.weight"] for n in "qkv"]
        weights[f"{attention}.mixer.in_proj.weight"] = torch.cat(qkv)
        weights[f"{attention}.mixer.out_proj.weight"] = source[f"{old}.self_attn.o_proj.weight"]
        both = [source[f"{old}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
        weights[f"{mlp}.mixer.in_proj.weight"] = torch.cat(both)
        weights[f"{mlp}.mixer.out_proj.weight"] = source[f"{old}.mlp.down_proj.weight"]
    ours.load_state_dict(weights)
    ids = torch.randint(0, V, (2, 77))
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids)
        _, cache = ours.run_with_cache(ids, names_filter="blocks.2.mixer.hook_pattern")
        pattern = theirs(ids, output_attentions=True).attentions[1]
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()  # theirs turns by float32 angles
    torch.testing.assert_close(cache["pattern", 2], pattern, rtol=0, atol=1e-6)


def test_bfloat16_stays_at_its_rounding() -> None:
    torch.manual_seed(0)
    cfg = MambaConfig(d_model=64, n_layers=4, d_vocab=V, pattern="mafw", n_heads=2, window=16)
    model, ids = HookedMamba(cfg), torch.randint(0, V, (2, 65))
    with torch.no_grad():
        want = model(ids)
        rounded = model.to(torch.bfloat16)
        floor = 4 * torch.finfo(torch.bfloat16).eps * want.abs().max()
        assert (rounded(ids).float() - want).abs().max() <= floor
        out, state = rounded(ids[:, :40], return_state=True)
        assert state.layers[1].k.dtype == torch.bfloat16
        rest = rounded(ids[:, 40:], state=state)
        assert (torch.cat([out, rest], 1).float() - want).abs().max() <= floor
        rounded.add_hook("blocks.1.mixer.hook_pattern", lambda v, hook: None)
        assert (rounded(ids).float() - want).abs().max() <= floor


def test_far_positions_keep_their_angle() -> None:
    """A million tokens in, attention to near keys depends on distances alone."""
    torch.manual_seed(0)
    cfg = MambaConfig(d_model=32, n_layers=1, d_vocab=V, pattern="w", n_heads=2, window=8)
    model, ids = HookedMamba(cfg), torch.randint(0, V, (1, 20))
    state = model.initial_state(1)
    state.layers[0].read += 1_000_000
    state.position = 1_000_000
    far = model(ids, state=state)
    near = model(ids)
    assert (far - near).abs().max() <= 1e-5 * near.abs().max()

"""The model against its equations, written out once more in float64, step by step."""

import pytest
import torch
from torch.nn import functional as F

from mambascope.model import HookedMamba
from tests.conftest import BACKENDS, error, make_model


def by_the_book(model: HookedMamba, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """2312.00752, algorithm 2, one token at a time, float64; every hook point's value by name."""
    out: dict[str, torch.Tensor] = {}
    cfg = model.cfg

    def w(p: torch.Tensor) -> torch.Tensor:
        return p.detach().double()

    x = w(model.embed.weight)[tokens]
    out["hook_embed"] = x
    for i, block in enumerate(model.blocks):
        m, pre = block.mixer, f"blocks.{i}."
        out[pre + "hook_resid_pre"] = x
        scale = (x.pow(2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt()
        out[pre + "norm.hook_scale"] = scale
        out[pre + "norm.hook_normalized"] = x / scale
        r = x / scale * w(block.norm.weight)
        xz = r @ w(m.in_proj.weight).T + (w(m.in_proj.bias) if m.in_proj.bias is not None else 0)
        xs, z = xz.chunk(2, -1)
        out[pre + "mixer.hook_x"], out[pre + "mixer.hook_gate_in"] = xs, z
        padded = F.pad(xs, (0, 0, cfg.d_conv - 1, 0))
        kernel = w(m.conv1d.weight)[:, 0]
        conv = sum(padded[:, k : k + xs.shape[1]] * kernel[:, k] for k in range(cfg.d_conv))
        conv = conv + (w(m.conv1d.bias) if m.conv1d.bias is not None else 0)
        out[pre + "mixer.hook_conv"] = conv
        u = F.silu(conv)
        for name in ("u", "u_select", "u_write", "u_skip"):
            out[pre + f"mixer.hook_{name}"] = u
        low, B, C = (u @ w(m.x_proj.weight).T).split([cfg.dt_rank, cfg.d_state, cfg.d_state], -1)
        if cfg.mixer_norm_eps is not None:
            low, B, C = (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + cfg.mixer_norm_eps) for v in (low, B, C))
        out[pre + "mixer.hook_dt_low"], out[pre + "mixer.hook_B"], out[pre + "mixer.hook_C"] = low, B, C
        raw = low @ w(m.dt_proj.weight).T + w(m.dt_proj.bias)
        delta = torch.where(raw > 30, raw, torch.log1p(torch.exp(raw)))
        out[pre + "mixer.hook_delta_raw"], out[pre + "mixer.hook_delta"] = raw, delta
        A = -torch.exp(w(m.A_log))
        A_bar = torch.exp(delta[..., None] * A)
        B_bar = delta[..., None] * B[:, :, None]
        write = B_bar * u[..., None]
        h, hs = torch.zeros_like(write[:, 0]), []
        for t in range(u.shape[1]):
            h = A_bar[:, t] * h + write[:, t]
            hs.append(h)
        hs = torch.stack(hs, 1)
        for name, value in (("A_bar", A_bar), ("B_bar", B_bar), ("write", write), ("h", hs)):
            out[pre + f"mixer.hook_{name}"] = value
        y, skip = (hs * C[:, :, None]).sum(-1), w(m.D) * u
        out[pre + "mixer.hook_y"], out[pre + "mixer.hook_skip"] = y, skip
        gated = (y + skip) * F.silu(z)
        out[pre + "mixer.hook_gated"] = gated
        mixed = gated @ w(m.out_proj.weight).T + (w(m.out_proj.bias) if m.out_proj.bias is not None else 0)
        out[pre + "hook_mixer_in"], out[pre + "hook_mixer_out"] = x, mixed
        x = x + mixed
        out[pre + "hook_resid_post"] = x
    scale = (x.pow(2).mean(-1, keepdim=True) + cfg.norm_eps).sqrt()
    out["ln_final.hook_scale"], out["ln_final.hook_normalized"] = scale, x / scale
    out["logits"] = x / scale * w(model.ln_final.weight) @ w(model.unembed.weight).T
    return out


SHAPES = [
    {},
    {"d_state": 1, "d_conv": 1, "dt_rank": 1, "proj_bias": True, "conv_bias": False},
    {"d_state": 16, "d_conv": 8, "d_inner": 40, "tie_embeddings": False},
    {"d_state": 7, "mixer_norm_eps": 1e-6, "d_conv": 2},
]


@pytest.mark.parametrize("options", SHAPES)
def test_every_hook_point_holds_its_equation(backend: str, options: dict[str, object], tokens: torch.Tensor) -> None:
    model = make_model(backend=backend, **options)
    book = by_the_book(model, tokens)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    assert error(logits, book["logits"]) < 5e-6
    assert set(cache.keys()) == set(book) - {"logits"}
    for name in cache:
        value = cache[name] if isinstance(cache[name], torch.Tensor) else cache[name].full()
        assert value.shape == book[name].shape, name
        assert error(value, book[name]) < 2e-5, name


def test_float64_model_agrees_to_its_own_precision(tokens: torch.Tensor) -> None:
    for backend in ("reference", "torch"):
        model = make_model(backend=backend, dtype=torch.float64)
        assert error(model(tokens), by_the_book(model, tokens)["logits"]) < 1e-12


@pytest.mark.parametrize("activation", ["gelu", "relu", "identity"])
def test_other_activations_agree_on_every_path(activation: str, tokens: torch.Tensor) -> None:
    logits = [make_model(backend=b, activation=activation)(tokens) for b in BACKENDS]
    assert error(logits[1], logits[0]) < 5e-6
    assert error(logits[2], logits[0]) < 5e-6
    assert error(make_model(backend="torch")(tokens), logits[0]) > 1e-3  # silu differs: the option is not ignored


def test_gradients_agree_with_the_reference_path(tokens: torch.Tensor) -> None:
    def gradients(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = make_model(backend=backend, dtype=dtype)
        model(tokens, return_type="loss").backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients("reference", torch.float64)
    for backend in BACKENDS:
        got = gradients(backend, torch.float32)
        assert got.keys() == exact.keys()
        for name, grad in got.items():
            assert error(grad, exact[name]) < 1e-4, (backend, name)


def test_residual_is_the_sum_of_its_writers_to_the_bit(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for i in range(model.cfg.n_layers):
        assert torch.equal(cache["resid_post", i], cache["resid_pre", i] + cache["mixer_out", i])


def test_bf16_keeps_states_and_decay_in_float32(backend: str, tokens: torch.Tensor) -> None:
    exact = make_model(backend=backend)
    model = make_model(backend=backend, dtype=torch.bfloat16)
    assert model.blocks[0].mixer.A_log.dtype == torch.float32
    assert model.blocks[0].mixer.in_proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        logits, state = model(tokens, return_state=True)
        _, cache = model.run_with_cache(tokens)
    assert state.ssm.dtype == torch.float32
    assert cache["delta", 0].dtype == torch.float32
    assert cache["resid_pre", 1].dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    assert error(logits, exact(tokens)) < 0.05

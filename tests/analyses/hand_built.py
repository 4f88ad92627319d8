"""Models whose insides are known: one layer built by hand that recalls what followed a token, and random ones."""

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from mambascope.config import MambaConfig
from mambascope.loading.tokenizer import Tokenizer
from mambascope.model import HookedMamba


def byte_tokenizer() -> Tokenizer:
    """A token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def random_model(seed: int = 0, tokenizer: Tokenizer | None = None, **options: object) -> HookedMamba:
    """Random weights, with a wider delta than at initialisation, so that no quantity is degenerate."""
    base: dict[str, object] = {"d_model": 16, "n_layers": 3, "d_vocab": 40, "d_state": 5, "dt_max": 0.8}
    if tokenizer is not None:
        base |= {"d_vocab": 264, "n_tokens": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(seed)
    model = HookedMamba(MambaConfig(**{**base, **options}), tokenizer)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.add_(0.2 * torch.randn_like(p))
            elif name.endswith(("in_proj.weight", "x_proj.weight")):
                p.mul_(8)
            elif name.endswith("embed.weight"):
                p.mul_(4)
    return model.eval()


def recall_model(vocabulary: int = 20, back: int = 1, slots: int | None = None) -> HookedMamba:
    """One layer that predicts the token which followed the last occurrence of the present one.

    Channels [0, V) hold the token ``back`` steps ago (through the conv), [V, 2V) the present one. B is the old token
    as a one-hot, C the present one, delta is 1 and nothing decays: alpha[t, s] = 1 iff token[t] = token[s - back],
    so that a second copy of N tokens looks at s = t - N + back. ``slots`` state dimensions: token v is kept in
    dimension v mod slots, and tokens that share one are confused.
    """
    V, N, K = vocabulary, slots or vocabulary, back + 1
    cfg = MambaConfig(
        d_model=2 * V, n_layers=1, d_vocab=V, d_inner=2 * V, d_state=N, d_conv=K, dt_rank=1,
        conv_bias=False, proj_bias=True, tie_embeddings=False, name="recall",
    )  # fmt: skip
    model = HookedMamba(cfg).eval()
    block = model.blocks[0]
    mixer, eye = block.mixer, torch.eye(V)
    share = torch.zeros(N, V)
    share[torch.arange(V) % N, torch.arange(V)] = 1
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        block.norm.weight.fill_(1)
        model.ln_final.weight.fill_(1)
        model.embed.weight[:, :V] = eye
        gain = 10 / (2 * V) ** 0.5  # the norm makes a one-hot sqrt(2V): x becomes 10, and SiLU(10) = 10
        mixer.in_proj.weight[:V, :V] = gain * eye
        mixer.in_proj.weight[V : 2 * V, :V] = gain * eye
        mixer.in_proj.bias[2 * V :] = 10
        mixer.conv1d.weight[:V, 0, 0] = 1  # the oldest tap
        mixer.conv1d.weight[V:, 0, -1] = 1
        mixer.x_proj.weight[1 : 1 + N, :V] = share / 10
        mixer.x_proj.weight[1 + N :, V:] = share / 10
        mixer.dt_proj.bias.fill_(torch.tensor(1.0).expm1().log())  # softplus of it is 1
        mixer.A_log.fill_(-14)
        mixer.out_proj.weight[V:, V:] = eye / 10
        model.unembed.weight[:, V:] = 4 * eye
    return model

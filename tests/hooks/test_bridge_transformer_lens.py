"""TransformerLens' own functions on our model, row by row of docs/bridges.md; and what SAE tools call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mambascope.errors import CacheError, HookError, UnknownNameError
from mambascope.hooks.transformer_lens_bridge import caching_hooks
from mambascope.model import HookedMamba
from tests.conftest import BACKENDS, error, make_model
from tests.hooks.lens_rows import DOC, ROWS, Case, filled, public, table
from tests.hooks.letters import LETTERS, letter_tokenizer


@pytest.fixture(scope="module", params=BACKENDS)
def case(request: pytest.FixtureRequest) -> Case:
    model = make_model(backend=request.param, n_layers=2)
    clean = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, 2] = (corrupted[:, 2] + 1) % 50
    with torch.no_grad():
        logits, cache = model.run_with_cache(clean)
    return Case(model, clean, corrupted, logits, cache)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.owner}.{row.name}")
def test_row(case: Case, row) -> None:
    with torch.no_grad():
        row.check(case)
        assert not case.model.list_hooks()
        assert torch.equal(case.model(case.clean), case.logits)  # it left nothing behind


@pytest.mark.parametrize("owner", ["HookedRootModule", "ActivationCache", "patching"])
def test_every_public_function_has_a_row(owner: str) -> None:
    rows = [row.name for row in ROWS if row.owner == owner]
    assert len(rows) == len(set(rows))
    assert set(rows) == set(public(owner))


def test_the_document_is_the_table() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert filled(text) == text, "run python -m tests.hooks.lens_rows"
    drifted = text.replace("| setup | yes |", "| setup | no |")
    assert drifted != text
    assert filled(drifted) == text
    assert "| compute_head_results | no |" in table("ActivationCache")


@pytest.mark.parametrize("side", ["left", "right"])
def test_caching_hooks_of_a_padded_batch_hold_what_the_cache_shows(backend: str, side: str) -> None:
    model = make_model(backend=backend, n_layers=2)
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, :1] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, attention_mask=mask)
        found, forward, _ = model.get_caching_hooks(["h1", "A_bar1", "delta0"])
        model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=forward)
    for name, value in found.items():
        assert error(value, cache[name][:]) < 2e-6, name
    with torch.enable_grad():
        found, forward, backward = model.get_caching_hooks(["h1"], incl_bwd=True)
        out = model.run_with_hooks(
            tokens, attention_mask=mask, return_type="loss", fwd_hooks=forward, bwd_hooks=backward
        )
        out.backward()
    grad = found["blocks.1.mixer.hook_h_grad"]
    assert not grad[mask == 0].any()
    alone = tokens[1][mask[1] == 1][None]
    single, forward, backward = model.get_caching_hooks(["h1"], incl_bwd=True)
    with torch.enable_grad():
        model.run_with_hooks(alone, return_type="loss", fwd_hooks=forward, bwd_hooks=backward).backward()
    weight = (alone.shape[1] - 1) / (int(mask.sum()) - 3)  # the batch's loss is a mean over more tokens
    assert error(grad[1][mask[1] == 1], weight * single["blocks.1.mixer.hook_h_grad"][0]) < 1e-4


READS = {
    "accumulated_resid": lambda c: c.accumulated_resid(apply_ln=True),
    "decompose_resid": lambda c: c.decompose_resid(apply_ln=True),
    "channels": lambda c: c.get_full_resid_decomposition(expand_neurons=True, apply_ln=True),
    "stack_neuron_results": lambda c: c.stack_neuron_results(-1, incl_remainder=True, apply_ln=True),
    "get_neuron_results": lambda c: c.get_neuron_results(1),
    "states": lambda c: c.compute_ssm_state(),
    "state": lambda c: c.compute_ssm_state(1, 2),
    "effective attention": lambda c: c.compute_ssm_effective_attention(),
    "logit_lens": lambda c: c.logit_lens(positions=None).values,
    "logit_attrs": lambda c: c.logit_attrs(c.decompose_resid(), 5, has_batch_dim=c.has_batch_dim),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_helpers_give_the_same_without_a_batch_axis(read: Callable[[Any], Tensor]) -> None:
    model = make_model(backend="cpu", n_layers=2, proj_bias=True)
    tokens = torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        batch = read(model.run_with_cache(tokens)[1])
        alone = read(model.run_with_cache(tokens, remove_batch_dim=True)[1])
    assert batch.ndim == alone.ndim + 1
    assert torch.equal(batch.reshape(alone.shape), alone)


def test_caching_hooks_say_what_they_cannot_find_or_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(n_layers=1)
    with pytest.raises(UnknownNameError, match="hook_detla"):
        model.get_caching_hooks("blocks.0.mixer.hook_detla")
    with pytest.raises(HookError, match="matches no hook point"):
        model.add_caching_hooks(lambda name: False)
    monkeypatch.setattr("mambascope.memory.available_bytes", lambda device: 1_000_000)
    _, forward, _ = caching_hooks(model, ["h0"], False, None, False, None, None)
    with pytest.raises(CacheError, match=r"all 70000 states of blocks\.0\.mixer\.hook_h would take .* names_filter"):
        model.run_with_hooks(torch.zeros(1, 70_000, dtype=torch.long), fwd_hooks=forward)


class SparseAutoencoderTraining:
    """What a sparse-autoencoder library does with a model it was handed (``override_model=``): ours, from its calls."""

    def __init__(self, model: HookedMamba, hook_name: str, context: int) -> None:
        self.model, self.hook_name, self.context = model, hook_name, context
        assert hook_name in model.hook_dict
        self.layer = int(hook_name.split(".")[1])
        self.width = model.cfg.d_model
        self.bos = model.tokenizer.bos_token_id

    def token_rows(self, texts: list[str]) -> Tensor:
        pieces = [self.model.to_tokens(t, truncate=False, move_to_device=False, prepend_bos=False)[0] for t in texts]
        joined = torch.cat(pieces)
        return joined[: len(joined) // self.context * self.context].view(-1, self.context)

    @torch.no_grad()
    def activations(self, rows: Tensor) -> Tensor:
        out, cache = self.model.run_with_cache(
            rows, names_filter=[self.hook_name], stop_at_layer=self.layer + 1, prepend_bos=False
        )
        assert out.shape == (*rows.shape, self.width)
        return cache[self.hook_name].reshape(-1, self.width)

    @torch.no_grad()
    def losses(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, plain = self.model(rows, return_type="both", loss_per_token=True, prepend_bos=False)
        assert logits.shape == (*rows.shape, self.model.cfg.d_vocab_out)

        def zero(value: Tensor, hook: object) -> Tensor:
            return torch.zeros_like(value)

        hooks = [(self.hook_name, zero)]
        ablated = self.model.run_with_hooks(rows, return_type="loss", loss_per_token=True, fwd_hooks=hooks)
        with self.model.hooks(fwd_hooks=[(self.hook_name, lambda value, hook: value)]):
            same = self.model(rows, return_type="loss", loss_per_token=True)
        return plain, same, ablated


@pytest.fixture
def texts() -> list[str]:
    return ["ab cd", "abcabc", "d dd c"]


def test_a_sparse_autoencoder_library_finds_what_it_calls(backend: str, texts: list[str]) -> None:
    model = make_model(backend=backend, n_layers=2)
    model.tokenizer = letter_tokenizer()
    tool = SparseAutoencoderTraining(model, "blocks.1.hook_resid_pre", context=4)
    rows = tool.token_rows(texts)
    assert rows.shape == (4, 4)
    _, cache = model.run_with_cache(rows)
    assert torch.equal(tool.activations(rows), cache["resid_pre", 1].reshape(-1, 24).detach())
    plain, same, ablated = tool.losses(rows)
    assert plain.shape == (4, 3)
    assert torch.equal(plain, same)
    assert error(ablated, plain) > 1e-3
    assert error(plain.mean(), model(rows, return_type="loss").detach()) < 1e-6


@pytest.mark.parametrize("hook_name", ["blocks.0.hook_mixer_out", "blocks.1.mixer.hook_u", "blocks.1.hook_resid_post"])
def test_no_hook_name_is_taken_for_a_head(hook_name: str) -> None:
    """SAELens and TransformerLens reshape points with these substrings."""
    model = make_model(n_layers=2)
    assert hook_name in model.hook_dict
    assert not [n for n in model.hook_dict for part in ("hook_q", "hook_k", "hook_v", "hook_z") if part in n]


def test_loss_of_text_with_and_without_bos() -> None:
    model = make_model(n_layers=1, bos_token_id=len(LETTERS))
    model.tokenizer = letter_tokenizer()
    with_bos = model.to_tokens("abc", prepend_bos=True)
    assert with_bos.tolist()[0][0] == len(LETTERS)
    assert torch.equal(model.to_tokens("abc", prepend_bos=False), with_bos[:, 1:])
    assert torch.equal(model("abc", prepend_bos=True), model(with_bos))
    both = model("abc", return_type="both", prepend_bos=True)
    assert torch.equal(both.logits, model(with_bos))
    assert torch.equal(both.loss, model(with_bos, return_type="loss"))
    stopped = model("abc", stop_at_layer=0)
    assert torch.equal(stopped, model.W_E[model.to_tokens("abc")[0]][None])

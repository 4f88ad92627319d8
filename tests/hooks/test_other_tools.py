"""The model in other people's hands: inference mode, copies, compilers, TransformerLens' patchers, nnsight."""

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mambascope.model import HookedMamba
from tests.conftest import error, make_model


def test_inference_mode_has_the_same_bits_and_sees_edits_in_place(model: HookedMamba, tokens: torch.Tensor) -> None:
    def double(value: torch.Tensor, hook: object) -> None:
        value.mul_(2)

    with torch.no_grad():
        plain = model(tokens)
        edited = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_h[3]", lambda h, hook: h * 2)])
    with torch.inference_mode():
        assert torch.equal(model(tokens), plain)
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(lambda n: True, lambda v, hook: None)]), plain)
        assert error(model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_h[3]", double)]), edited) < 1e-6
        _, cache = model.run_with_cache(tokens)
        assert cache["delta", 1].shape == (2, 70, 48)


def test_a_deep_copy_is_a_model_of_its_own(model: HookedMamba, tokens: torch.Tensor) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(tokens), model(tokens))
        twin.run_with_hooks(tokens[:, :9], fwd_hooks=[("blocks.1.mixer.hook_h[8]", lambda h, hook: h * 0)])
        twin.blocks[0].mixer.in_proj.weight.zero_()
        assert error(twin(tokens), model(tokens)) > 1e-3
    assert not any(point.live for point in model.hook_dict.values())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_model_gives_the_same_numbers(tokens: torch.Tensor) -> None:
    model = make_model(backend="cpu", n_layers=1)
    with torch.no_grad():
        assert error(torch.compile(model)(tokens), model(tokens)) < 5e-6


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
def test_compiled_code_notices_hooks_that_come_later() -> None:
    """Past its limit of recompilations torch compiles inner functions apart, for points that had no hooks then."""
    ids, others = torch.arange(7)[None], []
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(5):
            others.append(make_model(backend="torch"))
            torch.compile(others[-1], backend="eager")(ids)
        for site in ("blocks.1.mixer.hook_delta", "blocks.1.hook_resid_pre"):
            model = make_model(backend="torch")
            others.append(model)
            with model.hooks([(site, lambda v, hook: v * 0.5)]):
                assert error(torch.compile(model, backend="eager")(ids), model(ids)) < 1e-6, site


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_model_is_compiled_once_and_takes_other_lengths() -> None:
    model, counter = make_model(backend="torch", n_layers=1), CompileCounter()
    compiled = torch.compile(model, backend=counter, dynamic=True)
    with torch.no_grad():
        for length in (7, 7, 7, 11, 30):
            ids = torch.arange(length)[None]
            assert error(compiled(ids), model(ids)) < 1e-6
    assert counter.frame_count == 1


def test_nnsight_reads_and_sets_what_hooks_do(model: HookedMamba, tokens: torch.Tensor) -> None:
    from nnsight import NNsight

    with torch.no_grad():
        plain, cache = model.run_with_cache(tokens)
        hooked = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_delta", lambda v, hook: v * 1.5)])
        wrapped = NNsight(model)
        with wrapped.trace(tokens):
            delta = wrapped.blocks[1].mixer.hook_delta.output.save()
            logits = wrapped.output.save()
        assert torch.equal(delta, cache["delta", 1])
        assert torch.equal(logits, plain)
        with wrapped.trace(tokens):
            wrapped.blocks[1].mixer.hook_delta.output = wrapped.blocks[1].mixer.hook_delta.output * 1.5
            logits = wrapped.output.save()
        assert torch.equal(logits, hooked)
        assert torch.equal(model(tokens), plain)


def test_transformer_lens_generic_patchers_run_unchanged(tokens: torch.Tensor) -> None:
    from transformer_lens import patching

    model = make_model(backend="cpu")
    short = tokens[:1, :6]
    corrupted = short.clone()
    corrupted[0, 2] = (corrupted[0, 2] + 1) % 50
    with torch.no_grad():
        clean_logits, cache = model.run_with_cache(short)

        def metric(logits: torch.Tensor) -> torch.Tensor:
            return logits[0, -1, 7] - logits[0, -1, 8]

        result = patching.get_act_patch_resid_pre(model, corrupted, cache, metric)
        assert result.shape == (3, 6)
        by_hand = model.run_with_hooks(
            corrupted, fwd_hooks=[("blocks.1.hook_resid_pre[2]", lambda v, hook: cache["resid_pre", 1][:, 2])]
        )
        assert error(result[1, 2], metric(by_hand)) < 1e-5
        assert error(result[0, 2], metric(clean_logits)) < 1e-5  # the only changed token, restored at the start

"""``accelerate``: transformers' models on our operators say what they said, and what they should have said.

Three comparisons: transformers' own forward where it is right; one full run of the unpadded text where it is not
(cached continuations of several tokens, padding); and bits, where the model must be exactly as it was.
"""

import copy
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mambascope as ms
from mambascope.errors import BackendError, InputError, StateError
from mambascope.loading import accelerate as module
from mambascope.loading.accelerate import Acceleration, restore

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LOGITS, GRADIENTS = 2e-5, 1e-4
FAMILIES = ("mamba", "falcon")


def build(family: str, *, head: bool = True, seed: int = 0, **options: Any) -> Any:
    """A tiny model, every parameter made large enough to matter."""
    base = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 3, "state_size": 5, "time_step_rank": 3}
    names = {"mamba": "Mamba", "falcon": "FalconMamba"}
    config = getattr(transformers, names[family] + "Config")(**(base | options))
    torch.manual_seed(seed)
    model = getattr(transformers, names[family] + ("ForCausalLM" if head else "Model"))(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "norm.weight", "norm_f.weight", ".D", "A_log")):
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.copy_(
                    torch.randn_like(p) * (0.5 if "embeddings" in name or "lm_head" in name else p.shape[-1] ** -0.5)
                )
    return model


def pair(family: str, **options: Any) -> tuple[Any, Any]:
    """The same model twice, the first accelerated."""
    backend = options.pop("backend", "auto")
    ours, theirs = build(family, **options), build(family, **options)
    ms.accelerate(ours, backend=backend)
    return ours, theirs


def ids(batch: int = 3, length: int = 37, seed: int = 1) -> Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def states(cache: Any) -> list[Tensor]:
    return [t for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"state_size": 2, "conv_kernel": 1, "time_step_rank": 2, "expand": 1},  # Falcon's norm of 1 number is its sign
    {"state_size": 33, "conv_kernel": 8, "expand": 3, "use_conv_bias": False},
    {"use_bias": True, "tie_word_embeddings": False, "residual_in_fp32": False},
    {"hidden_act": "gelu", "conv_kernel": 2},
    {"hidden_act": "swish", "use_cache": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_states_gradients_and_tokens(family: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(family, **options)
    x = ids()
    with torch.no_grad():
        for length in (1, 2, 37):
            got, want = (m(x[:, :length], use_cache=True) for m in (ours, theirs))
            assert error(got.logits, want.logits) < LOGITS
            for mine, other in zip(states(got.cache_params), states(want.cache_params), strict=True):
                assert mine.dtype == other.dtype and error(mine, other) < LOGITS
        hidden = [m(x, output_hidden_states=True, return_dict=True).hidden_states for m in (ours, theirs)]
        assert all(error(a, b) < LOGITS for a, b in zip(*hidden, strict=True))
        quiet = {"max_new_tokens": 12, "pad_token_id": 0}
        for how in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "use_cache": False}):
            got, want = (m.generate(x[:, :9], **how, **quiet) for m in (ours, theirs))
            assert torch.equal(got, want), how
    grads = []
    for model in (ours.train(), theirs.train()):
        loss = model(x, labels=x).loss
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), a, b in zip(ours.named_parameters(), *grads, strict=True):
        assert error(a, b) < GRADIENTS, name


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_and_the_model_without_a_head(family: str, backend: str) -> None:
    try:
        ours, theirs = pair(family, head=False, backend=backend)
    except BackendError as reason:
        pytest.skip(str(reason))
    with torch.no_grad():
        assert error(ours(ids()).last_hidden_state, theirs(ids()).last_hidden_state) < LOGITS
    assert f"backend='{backend}'" in repr(ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_is_no_worse_than_theirs(family: str) -> None:
    ours, theirs = pair(family, num_hidden_layers=2)
    for dtype in (torch.bfloat16, torch.float16):
        ours.to(dtype), theirs.to(dtype)
        with torch.no_grad():
            exact = copy.deepcopy(theirs).float()(ids()).logits
            got = ours(ids(), use_cache=True)
            assert error(got.logits, exact) < 1.3 * error(theirs(ids()).logits, exact)
        conv, ssm = states(got.cache_params)[:2]
        assert conv.dtype == dtype and ssm.dtype == torch.float32


def test_double_precision_is_double() -> None:
    ours, _ = pair("mamba")
    single = build("mamba").double()  # transformers rounds A and B to float32 even there
    with torch.no_grad():
        got = ours.double()(ids()).logits
        assert 1e-10 < error(single(ids()).logits, got) < LOGITS


def test_autocast() -> None:
    ours, theirs = pair("mamba")
    with torch.no_grad():
        exact = theirs(ids()).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert error(ours(ids()).logits, exact) < 1.5 * error(theirs(ids()).logits, exact)


# --- where transformers is wrong: against one full run ---


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_continuations_of_any_length_equal_one_run(family: str) -> None:
    ours, theirs = pair(family)
    x = ids()
    with torch.no_grad():
        want = theirs(x, use_cache=True)
        for cuts in ((1, 2, 3, 5, 37), (10, 37), (36, 37), (2, 20, 21, 37)):
            cache, parts, begin = None, [], 0
            for end in cuts:
                out = ours(x[:, begin:end], cache_params=cache, use_cache=True)
                cache, begin = out.cache_params, end
                parts.append(out.logits)
            assert error(torch.cat(parts, 1), want.logits) < LOGITS, cuts
            assert all(error(a, b) < LOGITS for a, b in zip(states(cache), states(want.cache_params), strict=True))
        # That is not what transformers does: it starts the scan from zeros again.
        first = theirs(x[:, :10], use_cache=True)
        rest = theirs(x[:, 10:], cache_params=first.cache_params, use_cache=True).logits
        assert error(rest, want.logits[:, 10:]) > 1e-3


def padded(lengths: tuple[int, ...], width: int, side: str, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens with arbitrary ones as padding, and the mask."""
    x, mask = ids(len(lengths), width, seed), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        begin = {"left": width - n, "right": 0, "both": (width - n) // 2}[side]
        row[begin : begin + n] = 1
    return x, mask


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("options", [{}, {"use_bias": True}, {"conv_kernel": 1}, {"hidden_act": "gelu"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_for_the_real_tokens(family: str, options: dict[str, Any], side: str) -> None:
    ours, _ = pair(family, **options)
    (x, mask), (more, more_mask) = padded((20, 9, 2), 20, side, 2), padded((0, 7, 1), 7, side, 3)
    with torch.no_grad():
        first = ours(x, attention_mask=mask, use_cache=True)
        after_first = [t.clone() for t in states(first.cache_params)]
        second = ours(more, attention_mask=more_mask, cache_params=first.cache_params, use_cache=True)
        for b in range(3):
            real, later = x[b][mask[b] > 0], more[b][more_mask[b] > 0]
            alone = ours(real[None], use_cache=True)
            assert error(first.logits[b][mask[b] > 0], alone.logits[0]) < LOGITS
            for mine, other in zip(after_first, states(alone.cache_params), strict=True):
                assert error(mine[b], other[0]) < LOGITS
            whole = ours(torch.cat((real, later))[None], use_cache=True)
            if len(later):
                assert error(second.logits[b][more_mask[b] > 0], whole.logits[0, len(real) :]) < LOGITS
            for mine, other in zip(states(second.cache_params), states(whole.cache_params), strict=True):
                assert error(mine[b], other[0]) < LOGITS


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_logits_are_theirs_where_theirs_are_right(family: str, side: str) -> None:
    ours, theirs = pair(family)
    x, mask = padded((20, 9, 2), 20, side, 2)
    with torch.no_grad():
        assert error(ours(x, attention_mask=mask).logits, theirs(x, attention_mask=mask).logits) < LOGITS
        assert torch.equal(ours(x, attention_mask=torch.ones_like(mask)).logits, ours(x).logits)
        if side == "left":
            got, want = (
                m.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
                for m in (ours, theirs)
            )
            assert torch.equal(got, want)


def test_masks_of_all_tokens_so_far_and_masks_changed_in_place() -> None:
    ours, _ = pair("mamba")
    x, mask = padded((20, 9, 2), 20, "left", 2)
    with torch.no_grad():
        a, b = (ours(x, attention_mask=mask, use_cache=True) for _ in range(2))
        more, last = ids(3, 4, seed=5), torch.ones(3, 4, dtype=torch.long)
        full = ours(more, attention_mask=torch.cat((mask, last), 1), cache_params=a.cache_params).logits
        assert torch.equal(full, ours(more, attention_mask=last, cache_params=b.cache_params).logits)
        mask[2, :18] = 1
        assert torch.equal(ours(x, attention_mask=mask).logits, ours(x, attention_mask=mask.clone()).logits)
        assert torch.equal(ours(x, attention_mask=mask.bool()).logits, ours(x, attention_mask=mask.float()).logits)


def test_gradients_flow_through_a_cache_and_through_padding() -> None:
    ours, _ = pair("mamba")
    x, parameters = ids(1), list(ours.parameters())
    first = ours(x[:, :20], use_cache=True)
    second = ours(x[:, 20:], cache_params=first.cache_params, use_cache=True)
    weights = torch.randn(1, 17, 40)
    split = torch.autograd.grad((second.logits * weights).sum(), parameters)
    whole = torch.autograd.grad((ours(x, use_cache=False).logits[:, 20:] * weights).sum(), parameters)
    mask = torch.tensor([[0] * 3 + [1] * 37 + [0] * 2])
    wide = torch.cat((ids(1, 3), x, ids(1, 2)), 1)
    logits = ours(wide, attention_mask=mask, use_cache=False).logits[:, 3:-2]
    spread = torch.autograd.grad((logits[:, 20:] * weights).sum(), parameters)
    for a, b, c in zip(split, spread, whole, strict=True):
        assert error(a, c) < GRADIENTS and error(b, c) < GRADIENTS


# --- undoing ---


def fail_inside(again: Acceleration) -> None:
    assert again.active
    raise KeyError


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_restores_the_original_exactly(family: str) -> None:
    model = build(family)
    mixers = [block.mixer for block in getattr(model, "backbone", model).layers]
    before, names, keys = repr(model), [*vars(mixers[0])], [*model.state_dict()]
    with torch.no_grad():
        want = model(ids()).logits
        undo = ms.accelerate(model)
        assert undo.active and repr(model) != before and [*model.state_dict()] == keys
        assert not torch.equal(model(ids()).logits, want)
        undo()
        assert not undo.active and repr(model) == before and [*vars(mixers[0])] == names
        assert torch.equal(model(ids()).logits, want)
        undo()  # once more is nothing
        with pytest.raises(KeyError), ms.accelerate(model) as again:
            fail_inside(again)
        assert repr(model) == before and torch.equal(model(ids()).logits, want)


def test_a_cache_may_be_handed_over_between_the_two() -> None:
    model = build("mamba")
    x = ids()
    with torch.no_grad():
        want = model(x).logits
        with ms.accelerate(model):
            cache = model(x[:, :30], use_cache=True).cache_params
        parts = [model(x[:, t : t + 1], cache_params=cache, use_cache=True).logits for t in range(30, 33)]
        with ms.accelerate(model):
            parts.append(model(x[:, 33:], cache_params=cache, use_cache=True).logits)
    assert error(torch.cat(parts, 1), want[:, 30:]) < LOGITS


def test_copies_and_pickles_stay_accelerated_and_are_restored_by_name() -> None:
    model = build("falcon")
    undo = ms.accelerate(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(twin(ids()).logits, model(ids()).logits)
        with pytest.raises(InputError, match="accelerated already"):
            ms.accelerate(twin)
        restore(twin)
        assert type(twin.backbone.layers[0].mixer) is type(build("falcon").backbone.layers[0].mixer)
        assert undo.active
    with pytest.raises(AttributeError, match="has no attribute 'MambaMixer_gpu'"):
        module.MambaMixer_gpu


def test_saved_weights_are_the_originals(tmp_path: Any) -> None:
    model = build("mamba")
    with ms.accelerate(model):
        model.save_pretrained(tmp_path)
    again = transformers.MambaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_hooks_on_the_mixer_and_its_projections_still_fire() -> None:
    model = build("mamba")
    seen: list[str] = []
    mixer = model.backbone.layers[1].mixer
    for name in ("", "in_proj", "x_proj", "out_proj"):
        mixer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    ms.accelerate(model)
    with torch.no_grad():
        model(ids())
    assert seen == ["in_proj", "x_proj", "out_proj", ""]


def test_compiled_whole() -> None:
    ours, theirs = pair("mamba", num_hidden_layers=1)
    x, mask = padded((20, 9, 2), 20, "left", 2)
    compiled = torch.compile(
        lambda x, mask: ours(x, attention_mask=mask, use_cache=False).logits, backend="eager", fullgraph=True
    )
    with torch.no_grad():
        assert error(compiled(x, mask)[mask > 0], theirs(x, attention_mask=mask).logits[mask > 0]) < LOGITS


# --- what is refused ---


def subclassed() -> nn.Module:
    model = build("mamba")
    mixer = model.backbone.layers[1].mixer
    mixer.__class__ = type("OwnMixer", (type(mixer),), {})
    return model


def with_own_forward() -> nn.Module:
    model = build("mamba")
    model.backbone.layers[0].mixer.forward = lambda *a, **k: None
    return model


def dispatched() -> nn.Module:
    model = build("mamba")
    model.backbone.layers[0]._hf_hook = object()  # what the accelerate library leaves
    return model


def accelerated() -> nn.Module:
    model = build("mamba")
    ms.accelerate(model)
    return model


def mamba2() -> nn.Module:
    small = {"num_heads": 4, "head_dim": 8, "n_groups": 1, "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**small))


REFUSED: list[tuple[Any, str]] = [
    (mamba2, "got Mamba2ForCausalLM (model_type 'mamba2'): MambaForCausalLM, MambaModel, FalconMambaForCausalLM and"),
    (lambda: nn.Linear(2, 2), "got Linear: MambaForCausalLM"),
    (lambda: nn.Sequential(build("falcon")), "got Sequential, which has one inside: give it that one"),
    (lambda: build("mamba").backbone.layers[0].mixer, "got MambaMixer (model_type 'mamba'): MambaForCausalLM"),
    (lambda: "state-spaces/mamba-130m", "got str; give it the model itself"),
    (lambda: ms.HookedMamba(ms.MambaConfig(d_model=8, n_layers=1, d_vocab=5)), "runs on these operators already"),
    (lambda: build("mamba", num_hidden_layers=0), "holds no MambaMixer: there is nothing to accelerate"),
    (accelerated, "this model is accelerated already; call what accelerate returned"),
    (subclassed, "mixer 1 is a OwnMixer, not transformers' MambaMixer itself"),
    (with_own_forward, "mixer 0 has a forward of its own"),
    (dispatched, "is moved between devices by the accelerate library"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:34] for _, message in REFUSED])
def test_other_models_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ms.accelerate(make())


def test_a_refused_model_is_not_half_accelerated() -> None:
    model = subclassed()
    with pytest.raises(InputError):
        ms.accelerate(model)
    assert not any(hasattr(type(m), "_mambascope_original") for m in model.modules())


def test_other_releases_and_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        ms.accelerate(build("mamba"), backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="its kernels compute in float32"):
        ms.accelerate(build("mamba").double(), backend="cpu")
    monkeypatch.delattr(transformers.cache_utils.Cache, "get_recurrent_state")
    with pytest.raises(BackendError, match=r"transformers \d.*Cache.get_recurrent_state is missing"):
        ms.accelerate(build("mamba"))


MASKS = [
    ([[1, 0, 1, 1]], "attention_mask has holes"),
    ([[0, 1, 0, 1]], "attention_mask has holes"),
    ([[0, 2, 1, 1]], "must hold 1 for real tokens and 0 for padding"),
    ([[1, 1, 1]], "attention_mask must be B L = (1, 4), got shape (1, 3)"),
    ([[1, 1, 1, 1, 1]], "attention_mask must be B L = (1, 4), got shape (1, 5)"),
    ([[1, 1, 1, 1]] * 2, "attention_mask must be B L = (1, 4), got shape (2, 4)"),
    ([[[1, 1, 1, 1]]], "attention_mask must be B L = (1, 4), got shape (1, 1, 4)"),
]


@pytest.mark.parametrize(("mask", "message"), MASKS, ids=[str(mask) for mask, _ in MASKS])
def test_masks_that_do_not_say_what_is_real_are_refused(mask: Any, message: str) -> None:
    ours, _ = pair("mamba")
    with pytest.raises(InputError, match=re.escape(message)):
        ours(ids(1, 4), attention_mask=torch.tensor(mask))


def test_caches_that_do_not_fit_are_refused() -> None:
    ours, _ = pair("mamba")
    x, mask = padded((4, 2), 4, "right", 2)
    with torch.no_grad():
        cache = ours(ids(3, 4), use_cache=True).cache_params
        with pytest.raises(StateError, match="holds the states of 3 rows, the batch has 2"):
            ours(x, cache_params=cache)
        recording = transformers.DynamicCache(config=ours.config)
        recording.activate_past_recording()
        with pytest.raises(StateError, match="a cache that records its past cannot take a padded batch"):
            ours(x, attention_mask=mask, cache_params=recording)
        cache.layers[0].recurrent_states[0] = None
        with pytest.raises(StateError, match="the cache of layer 0 holds only one of its two states"):
            ours(ids(3, 1), cache_params=cache)
    with pytest.raises(InputError, match="an accelerated mixer takes no seq_idx"):
        ours.backbone.layers[0].mixer(torch.randn(1, 4, 12), seq_idx=torch.zeros(1, 4))


def test_recording_caches_keep_every_input() -> None:
    ours, theirs = pair("mamba")
    kept = []
    for model in (ours, theirs):
        cache = transformers.DynamicCache(config=model.config)
        cache.activate_past_recording()
        with torch.no_grad():
            model(ids(2, 9), cache_params=cache, use_cache=True)
            model(ids(2, 1), cache_params=cache, use_cache=True)
        kept.append(cache.layers[0].conv_states[0])
    assert kept[0].shape == kept[1].shape == (2, 24, 10) and error(*kept) < LOGITS


def test_reset_caches_start_anew() -> None:
    ours, _ = pair("mamba")
    with torch.no_grad():
        cache = ours(ids(3, 9), use_cache=True).cache_params
        cache.reset()
        again = ours(ids(), cache_params=cache, use_cache=True).logits
        assert torch.equal(again, ours(ids()).logits)


def test_nothing_is_imported_before_a_transformers_model_is_there() -> None:
    code = (
        "import sys, torch, mambascope as ms\ntry: ms.accelerate(torch.nn.Linear(1, 1))\n"
        "except ms.MambascopeError: print('transformers.models' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_page_about_it_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
    assert names["out"].shape == (2, 64, 100) and names["last_state"].shape == (2, 64, 16)

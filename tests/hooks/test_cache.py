"""The cache: little stored, everything readable, never stale, never anything but what happened."""

import itertools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.errors import CacheError, HookError, InputError, UnknownNameError
from mambascope.hooks.lazy import LazyActivation
from mambascope.hooks.points import LAZY, tail_of
from mambascope.hooks.run import Anchors
from mambascope.model import HookedMamba
from tests.conftest import error, make_model


def plain_names(model: HookedMamba) -> list[str]:
    return [n for n in model.hook_dict if tail_of(n)[1] not in LAZY]


def test_lazy_reads_have_the_bits_of_an_eager_run(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        _, lazy = model.run_with_cache(tokens)
        _, eager = model.run_with_cache(tokens, names_filter=lambda name: True)
    assert lazy.nbytes < eager.nbytes / 4
    assert list(lazy.keys()) == list(model.hook_dict)
    for name in plain_names(model):
        assert torch.equal(lazy[name], eager[name]), name


def test_windows_of_h_equal_the_recurrence(model: HookedMamba, tokens: torch.Tensor) -> None:
    steps: list[torch.Tensor] = []
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.mixer.hook_h", lambda h, hook: steps.append(h.clone()))])
    h, lazy = torch.stack(steps, 1), cache["h", 2]
    assert isinstance(lazy, LazyActivation)
    assert lazy.shape == h.shape
    keys = [slice(0, 1), slice(63, 66), slice(60, 70), slice(None), 5, -1, slice(-3, None), slice(0, 70, 7), [3, 68, 1]]
    for key in keys:
        assert error(lazy[:, key], h[:, key]) < 2e-6, key
    assert error(lazy[1, 10:12, 3:9, 2], h[1, 10:12, 3:9, 2]) < 2e-6
    assert error(lazy[..., 0], h[..., 0]) < 2e-6
    assert error(torch.linalg.vector_norm(lazy, dim=(2, 3)), torch.linalg.vector_norm(h, dim=(2, 3))) < 2e-6
    for name in ("A_bar", "B_bar", "write"):
        full = cache[name, 2].full()
        assert torch.equal(cache[name, 2][:, 7:9], full[:, 7:9])
    with pytest.raises(CacheError, match="index 70 is out of range on axis 1 of size 70"):
        lazy[:, 70]
    with pytest.raises(CacheError, match="4 axes"):
        lazy[0, 0, 0, 0, 0]


@pytest.mark.parametrize("start", [1, 30, 64])
def test_windows_with_a_state_at_entry(model: HookedMamba, tokens: torch.Tensor, start: int) -> None:
    with torch.no_grad():
        _, whole = model.run_with_cache(tokens)
        _, state = model(tokens[:, :start], return_state=True)
        _, cache = model.run_with_cache(tokens[:, start:], state=state)
    for window in (slice(0, 2), slice(2, 5), slice(0, None)):
        absolute = slice(start + window.start, None if window.stop is None else start + window.stop)
        assert error(cache["h", 1][:, window], whole["h", 1][:, absolute]) < 5e-6
        assert error(cache["delta", 1][:, window], whole["delta", 1][:, absolute]) < 5e-6


def test_padded_batches_read_as_their_rows(model: HookedMamba, tokens: torch.Tensor) -> None:
    batch, mask = torch.zeros(2, 75, dtype=torch.long), torch.zeros(2, 75)
    batch[0, 5:75], mask[0, 5:75] = tokens[0], 1
    batch[1, 0:68], mask[1, 0:68] = tokens[1, :68], 1
    with torch.no_grad():
        _, padded = model.run_with_cache(batch, attention_mask=mask)
        _, plain = model.run_with_cache(tokens)
    for name in (n for n in plain if n.startswith("blocks.1")):
        a, b = padded[name][:, 5:], plain[name][:, :]
        assert error(a[0], b[0]) < 5e-6, name
        assert error(padded[name][:, :68][1], b[1][:68]) < 5e-6, name


def test_an_edited_block_shows_what_happened(model: HookedMamba, tokens: torch.Tensor) -> None:
    def double(h: torch.Tensor, hook: object) -> torch.Tensor:
        return h * 2

    steps: list[torch.Tensor] = []
    edit = ("blocks.1.mixer.hook_h[20]", double)
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[edit]):
            _, cache = model.run_with_cache(tokens)
        model.run_with_hooks(
            tokens, fwd_hooks=[edit, ("blocks.1.mixer.hook_h", lambda h, hook: steps.append(h.clone()))]
        )
    h = torch.stack(steps, 1)
    assert error(cache["h", 1][:, 20], clean["h", 1][:, 20] * 2) < 2e-6
    assert error(cache["h", 1].full(), h) < 5e-6
    for window in (slice(18, 23), slice(20, 21), slice(21, 30), slice(60, 70)):
        assert error(cache["h", 1][:, window], h[:, window]) < 5e-6
    for name in plain_names(model):
        if tail_of(name)[0] == 0:
            assert torch.equal(cache[name], clean[name]), name
    assert error(cache["y", 1], clean["y", 1]) > 1e-3


def test_an_exposed_block_shows_its_edited_decay(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        _, clean = model.run_with_cache(tokens)
        with model.hooks(fwd_hooks=[("blocks.1.mixer.hook_A_bar[10:12]", lambda v, hook: v * 0)]):
            _, cache = model.run_with_cache(tokens)
    assert cache["A_bar", 1][:, 10:12].abs().max() == 0
    assert torch.equal(cache["A_bar", 1][:, :10], clean["A_bar", 1][:, :10])
    assert error(cache["h", 1][:, 11], cache["write", 1][:, 11]) < 1e-6  # nothing was carried over
    y = (cache["h", 1].full() * cache["C", 1][:, :, None]).sum(-1)
    assert error(y, cache["y", 1]) < 2e-6


def test_filters_take_names_lists_functions_and_short_forms(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        for names_filter in ("blocks.1.mixer.hook_delta", "delta1", "blocks.1.hook_delta"):
            assert list(model.run_with_cache(tokens, names_filter=names_filter)[1]) == ["blocks.1.mixer.hook_delta"]
        _, cache = model.run_with_cache(tokens, names_filter=["delta1", "blocks.2.mixer.hook_h"])
        assert list(cache) == ["blocks.1.mixer.hook_delta", "blocks.2.mixer.hook_h"]
        assert cache["h", 2][:, 3].shape == (2, model.cfg.d_inner, model.cfg.d_state)
        assert torch.equal(cache["delta", 1], cache["delta1"])
        assert torch.equal(cache["delta", -2], cache["delta1"])
        with pytest.raises(CacheError, match="was not cached; name it in names_filter"):
            cache["delta", 2]
        with pytest.raises(UnknownNameError, match="outside the model's 3 blocks"):
            cache["delta", 3]
        with pytest.raises(UnknownNameError, match="did you mean"):
            cache["blocks.1.mixer.hook_dleta"]
        with pytest.raises(UnknownNameError):
            model.run_with_cache(tokens, names_filter="nonsense")
        with pytest.raises(HookError, match="matches no hook point"):
            model.run_with_cache(tokens, names_filter=lambda name: False)
        with pytest.raises(HookError, match="got int"):
            model.run_with_cache(tokens, names_filter=3)
        _, part = model.run_with_cache(tokens, stop_at_layer=2, return_type=None)
        assert {tail_of(n)[0] for n in part} == {None, 0, 1}
        with pytest.raises(CacheError, match="was not reached"):
            model.run_with_cache(tokens, names_filter="delta2", stop_at_layer=1)


def test_gradients_are_kept_with_incl_bwd(backend: str, tokens: torch.Tensor) -> None:
    model = make_model(backend=backend)
    loss, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    name = "blocks.1.hook_resid_pre"
    captured: list[torch.Tensor] = []
    model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[(name, lambda g, hook: captured.append(g))]).backward()
    assert error(cache[f"{name}_grad"], captured[0]) < 1e-5
    assert {n for n in cache if n.endswith("_grad")} == {f"{n}_grad" for n in plain_names(model)}
    assert not loss.isnan()
    with pytest.raises(InputError, match="scalar"):
        model.run_with_cache(tokens, incl_bwd=True)
    assert not any(point.live for point in model.hook_dict.values())


def test_a_stale_cache_refuses_and_names_the_weight(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        stored = cache["resid_pre", 1].clone()
        model.blocks[1].mixer.in_proj.weight.mul_(1.1)
    assert torch.equal(cache["resid_pre", 1], stored)  # stored, so still true
    assert cache["delta", 0].shape  # another block's weights
    for read in (lambda: cache["delta", 1], lambda: cache["h", 1][:, 3]):
        with pytest.raises(CacheError, match=r"blocks\.1\.mixer\.in_proj\.weight has changed"):
            read()


def test_recomputation_runs_without_the_users_hooks(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        clean = cache["delta", 1]
        cache._replays.clear()
        with model.hooks(fwd_hooks=[(lambda name: True, lambda v, hook: v * 0)]):
            assert torch.equal(cache["delta", 1], clean)


def test_save_and_load_give_the_same_reads(model: HookedMamba, tokens: torch.Tensor, tmp_path: Path) -> None:
    file = tmp_path / "cache.safetensors"
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
        for options in ({}, {"names_filter": ["delta1", "h2"]}, {"state": state}):
            _, cache = model.run_with_cache(tokens, **options)
            cache.save(file)
            again = ms.load_cache(file, model)
            assert list(again) == list(cache)
            assert torch.equal(again.recording.tokens, tokens)
            for name in cache:
                a, b = (c[name] if isinstance(c[name], torch.Tensor) else c[name].full() for c in (again, cache))
                assert torch.equal(a, b), name
        with model.hooks(fwd_hooks=[("blocks.1.mixer.hook_h[20]", lambda h, hook: h * 2)]):
            _, cache = model.run_with_cache(tokens)
        cache.save(file)
        assert torch.equal(ms.load_cache(file, model)["h", 1].full(), cache["h", 1].full())
    with pytest.raises(CacheError, match="other weights"):
        ms.load_cache(file, make_model(seed=1))
    with pytest.raises(CacheError, match="does not exist"):
        ms.load_cache(tmp_path / "none", model)
    (tmp_path / "junk").write_bytes(b"\xff" * 100)
    with pytest.raises(CacheError, match="cannot be read"):
        ms.load_cache(tmp_path / "junk", model)
    model.initial_state().save(tmp_path / "state", model)
    with pytest.raises(CacheError, match="no cache file"):
        ms.load_cache(tmp_path / "state", model)


def test_a_failed_save_leaves_the_old_file(
    tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    _, cache = model.run_with_cache(tokens)
    file = tmp_path / "cache.safetensors"
    cache.save(file)
    before = file.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        cache.save(file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["cache.safetensors"]
    assert stat.S_IMODE(file.stat().st_mode) & 0o400


def test_what_would_not_fit_says_so_first(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(d_model=256, d_state=64)
    long = tokens.repeat(1, 30)
    _, cache = model.run_with_cache(long)
    monkeypatch.setattr("mambascope.memory.available_bytes", lambda device: 100_000_000)
    with pytest.raises(
        CacheError, match=r"2,100 steps of .* would take .* GB on cpu, where 100.0 MB .* index a window"
    ):
        cache["h", 1].full()
    assert cache["h", 1][:, 2000:2003].shape == (2, 3, 512, 64)
    with pytest.raises(CacheError, match="name fewer activations"):
        model.run_with_cache(long, names_filter=lambda name: True)


def test_batch_slices_devices_and_stacks(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        row = cache.apply_slice_to_batch_dim(1)
        assert torch.allclose(row["delta", 1], cache["delta", 1][1], atol=1e-6)
        assert row["h", 1].shape == cache["h", 1].shape[1:]
        assert error(row["h", 1][10:12], cache["h", 1][1, 10:12]) < 2e-6
        assert cache.apply_slice_to_batch_dim(slice(0, 1))["delta", 1].shape[0] == 1
        one = model.run_with_cache(tokens[:1], remove_batch_dim=True)[1]
        assert one["resid_pre", 0].shape == (70, model.cfg.d_model)
        with pytest.raises(CacheError, match="2 rows"):
            cache.remove_batch_dim()
        assert cache.to("cpu")["delta", 1].device.type == "cpu"
        assert cache.stack_activation("delta").shape == (3, 2, 70, model.cfg.d_inner)
        cut = model.run_with_cache(tokens, pos_slice=-1)[1]
        assert torch.equal(cut["resid_post", 2], cache["resid_post", 2][:, -1:])


def test_residual_decompositions_add_up_to_the_logits(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        stack, labels = cache.decompose_resid(return_labels=True)
        assert labels == ["embed", "0_mixer_out", "1_mixer_out", "2_mixer_out"]
        assert error(stack.sum(0), cache["resid_post", 2]) < 2e-6
        attrs = cache.logit_attrs(stack, tokens)
        wanted = logits.gather(-1, tokens[..., None])[..., 0]
        assert error(attrs.sum(0), wanted) < 1e-5
        right, wrong = tokens[:, -1], tokens[:, 0]
        last = cache.logit_attrs(stack[:, :, -1], right, incorrect_tokens=wrong, pos_slice=-1)
        difference = logits[:, -1].gather(1, right[:, None]) - logits[:, -1].gather(1, wrong[:, None])
        assert ((last.sum(0) - difference[:, 0]).abs().max() / logits.abs().max()) < 1e-5
        accumulated, names = cache.accumulated_resid(apply_ln=True, return_labels=True)
        assert names[-1] == "final_post"
        assert error(accumulated[-1] @ model.W_U, logits) < 1e-5
        full, names = cache.get_full_resid_decomposition(expand_neurons=True, apply_ln=True, return_labels=True)
        assert full.shape[0] == len(names) == 3 * model.cfg.d_inner + 2
        assert error(full.sum(0) @ model.W_U, logits) < 1e-5
        direction = model.tokens_to_residual_directions(7)
        onto = cache.get_full_resid_decomposition(expand_neurons=True, apply_ln=True, project_output_onto=direction)
        assert error(onto.sum(0), logits[..., 7]) < 1e-5
        assert error(cache.get_full_resid_decomposition().sum(0), cache["resid_post", 2]) < 2e-6
        with pytest.raises(CacheError, match="no MLP"):
            cache.decompose_resid(mode="mlp")


def test_out_proj_bias_is_its_own_component(tokens: torch.Tensor) -> None:
    model = make_model(proj_bias=True)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.bias.normal_()
        _, cache = model.run_with_cache(tokens)
        full, names = cache.get_full_resid_decomposition(expand_neurons=True, return_labels=True)
        assert names[-1] == "bias"
        assert full[-1].abs().max() > 0.1
        assert error(full.sum(0), cache["resid_post", 2]) < 2e-6


def test_short_forms_of_transformer_lens_resolve(model: HookedMamba, tokens: torch.Tensor) -> None:
    from transformer_lens.utilities import get_act_name

    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for short, name in {
        get_act_name("delta", 1): "blocks.1.mixer.hook_delta",
        get_act_name("resid_post", 2): "blocks.2.hook_resid_post",
        get_act_name("scale", 0): "blocks.0.norm.hook_scale",
        get_act_name("normalized", 1, "ln1"): "blocks.1.norm.hook_normalized",
        get_act_name("scale"): "ln_final.hook_scale",
        "resid_pre1": "blocks.1.hook_resid_pre",
        "embed": "hook_embed",
    }.items():
        assert torch.equal(cache[short], cache[name]), short
    substrings = ("hook_q", "hook_k", "hook_v", "hook_z")
    assert not [pair for pair in itertools.product(model.hook_dict, substrings) if pair[1] in pair[0]]


def test_a_tampered_file_is_refused(tokens: torch.Tensor, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    model = make_model(backend="cpu")
    file = tmp_path / "cache"
    with torch.no_grad():
        model.run_with_cache(tokens)[1].save(file)

    def tampered(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> None:
        with safe_open(file, "pt") as source:
            meta, tensors = dict(source.metadata()), {name: source.get_tensor(name) for name in source.keys()}  # noqa: SIM118
        change(tensors, meta)
        save_file(tensors, tmp_path / "other", meta)
        ms.load_cache(tmp_path / "other", model)

    def columns(new: list[int]) -> Callable[[dict[str, torch.Tensor], dict[str, str]], object]:
        def change(_: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
            about = json.loads(meta["blocks"])
            about["1"]["columns"] = new
            meta["blocks"] = json.dumps(about)

        return change

    tampered(lambda tensors, meta: None)
    for change in (
        columns([-1, 10**9, 10**9 + 1]),
        columns([-1]),
        columns([5, 6, 7]),
        columns([-1, 60, 50]),
        lambda tensors, meta: meta.update(backend="evil"),
        lambda tensors, meta: meta.update(shape="[1000000000, 70]"),
        lambda tensors, meta: meta.update(blocks="nonsense"),
        lambda tensors, meta: meta.pop("names"),
        lambda tensors, meta: tensors.update({"block/1/x": tensors["block/1/x"][:, :5].contiguous()}),
    ):
        with pytest.raises(CacheError, match="is damaged"):
            tampered(change)


def test_windows_of_even_chunks_are_what_each_chunk_alone_gives(
    model: HookedMamba, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edited states stand at boundaries, too, and windows begin and end everywhere around them."""
    tokens = torch.randint(0, 50, (2, 192), generator=torch.Generator().manual_seed(5))
    caches = []
    with torch.no_grad():
        for sites in ([], ["blocks.1.mixer.hook_h[63]"], ["blocks.1.mixer.hook_h[63]", "blocks.1.mixer.hook_h[70]"]):
            with model.hooks(fwd_hooks=[(site, lambda h, hook: h + 1) for site in sites]):
                caches.append(model.run_with_cache(tokens)[1])
    spans = [(a, min(a + n, 192)) for a in (0, 1, 62, 63, 64, 65, 127, 128, 191) for n in (1, 2, 40, 64, 65, 128, 192)]
    keys: list[Any] = [(slice(None), slice(*span)) for span in spans]
    keys += [(slice(1, 2), slice(10, 120)), (slice(None), slice(10, 120), slice(3, 7)), (slice(None), slice(5, 5))]
    for cache in caches:
        got = [cache["h", 1][key] for key in keys]
        with monkeypatch.context() as patch:
            patch.setattr(Anchors, "chunks", lambda self, start, stop: None)
            for key, h in zip(keys, got, strict=True):
                want = cache["h", 1][key]
                assert h.shape == want.shape
                assert not h.numel() or error(h, want) < 1e-6, key

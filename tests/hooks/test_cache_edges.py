"""What a cache must survive: weights changed behind its back, modules hooked, odd indices, autocast."""

import copy
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from mambascope.errors import CacheError, HookError
from mambascope.model import HookedMamba
from tests.conftest import make_model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 50, (2, 70), generator=torch.Generator().manual_seed(1))


def test_an_optimizer_step_is_noticed_whatever_it_does_to_versions(ids: torch.Tensor) -> None:
    for fused in (False, True):
        model = make_model()
        _, cache = model.run_with_cache(ids)
        model(ids, return_type="loss").backward()
        torch.optim.AdamW(model.parameters(), fused=fused).step()
        with pytest.raises(CacheError, match=r"has changed since this cache was recorded"):
            cache["delta", 1]
        with pytest.raises(CacheError, match=r"has changed since"):
            cache["h", 1][:, 3]


@pytest.mark.parametrize("name", ["A_log", "D", "in_proj.weight", "out_proj.weight"])
@pytest.mark.parametrize("layer", [1, 2])
def test_an_edit_through_data_is_noticed_when_a_block_runs_again(name: str, layer: int, ids: torch.Tensor) -> None:
    model = make_model()
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
        model.blocks[layer].mixer.get_parameter(name).data.mul_(1.5)
        assert cache["delta", 0].isfinite().all()
        with pytest.raises(CacheError, match="changed"):
            cache["delta", layer]


@pytest.mark.parametrize(
    ("edited", "refused", "sound"),
    [
        (("resid_pre", 1), [("delta", 1), ("h", 1), ("resid_pre", 1), ("resid_post", 0), ("u", 0)], [("delta", 2)]),
        (("resid_post", 2), [("delta", 2), ("resid_post", 2)], [("delta", 1), ("ln_final.hook_normalized",)]),
        (("delta", 1), [("delta", 1), ("h", 1), ("A_bar", 1)], [("u", 1), ("resid_post", 1), ("h", 0)]),
        (("hook_embed",), [("hook_embed",), ("delta", 0), ("resid_pre", 0)], [("delta", 1)]),
    ],
)
def test_what_a_cache_handed_out_and_was_edited_in_place_is_not_read_again(
    edited: tuple[object, ...], refused: list[tuple[object, ...]], sound: list[tuple[object, ...]], ids: torch.Tensor
) -> None:
    model = make_model()
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
        _, other = model.run_with_cache(ids)

        def read(mine: object, key: tuple[object, ...]) -> torch.Tensor:
            value = mine[key[0] if len(key) == 1 else key]  # type: ignore[index]
            return value[:, 3:9]

        base = cache[edited[0] if len(edited) == 1 else edited]
        base[:, 4].add_(1e-6)  # far less than a replay's own check could tell
        for key in refused:
            with pytest.raises(CacheError, match=r"was edited in place after this cache was recorded.*\.clone\(\)"):
                read(cache, key)
        for key in sound:
            assert torch.equal(read(cache, key), read(other, key))
        for copied in (
            cache.check_unedited,
            lambda: cache.apply_slice_to_batch_dim(slice(0, 1)),
            lambda: cache.to("cpu"),
        ):
            if edited != ("delta", 1):  # that was computed for the reader, and is not stored
                with pytest.raises(CacheError, match="edited in place"):
                    copied()


def test_a_cache_of_other_weights_is_not_saved_under_the_present_ones(ids: torch.Tensor, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
        cache.save(tmp_path / "a")
        model.blocks[2].mixer.out_proj.weight.mul_(1.5)
        with pytest.raises(CacheError, match=r"blocks.2.mixer.out_proj.weight has changed since"):
            cache.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_copy_reads_as_the_cache_does(ids: torch.Tensor) -> None:
    with torch.no_grad():
        _, cache = make_model().run_with_cache(ids)
    for twin in (copy.copy(cache), copy.deepcopy(cache)):
        assert torch.equal(twin["delta", 1], cache["delta", 1])


def test_a_forward_hook_on_a_module_is_part_of_what_happened(ids: torch.Tensor) -> None:
    model = make_model()
    with torch.no_grad():
        handle = model.blocks[1].mixer.in_proj.register_forward_hook(lambda m, i, out: out * 1.1)
        _, cache = model.run_with_cache(ids)
        _, eager = model.run_with_cache(ids, names_filter=lambda n: True)
        handle.remove()
        assert torch.equal(cache["delta", 1], eager["delta", 1])
        assert not torch.equal(cache["delta", 1], model.run_with_cache(ids)[1]["delta", 1])


def test_lazy_values_behave_as_arrays(model: HookedMamba, ids: torch.Tensor) -> None:
    with torch.no_grad():
        h = model.run_with_cache(ids)[1]["h", 0]
        full = h[:]
        assert np.array_equal(np.asarray(h), full.numpy())
        assert all(torch.equal(a, b) for a, b in zip(h, full, strict=True))
        assert torch.equal(h[1, [-1, 3]], full[1, [-1, 3]])
        assert torch.equal(h[..., 2], full[..., 2])
        for bad, words in ((np.s_[:, ::-1], "run forward"), (np.s_[:, 70], "out of range"), (np.s_[:, True], "index")):
            with pytest.raises(CacheError, match=words):
                h[bad]


def test_a_dropped_cache_is_freed_at_once(ids: torch.Tensor) -> None:
    with torch.no_grad():
        _, cache = make_model().run_with_cache(ids)
    gc.collect()
    gc.disable()
    try:
        seen = weakref.ref(cache)
        del cache
        assert seen() is None
    finally:
        gc.enable()


def test_a_replay_computes_as_the_run_did_under_autocast(ids: torch.Tensor) -> None:
    model = make_model()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, cache = model.run_with_cache(ids)
        _, eager = model.run_with_cache(ids, names_filter=lambda n: True)
    assert torch.equal(cache["u", 2], eager["u", 2])


def test_pos_slice_outside_the_text_is_named(ids: torch.Tensor) -> None:
    with torch.no_grad(), pytest.raises(CacheError, match=r"pos_slice=\[99\] is outside the 70 tokens"):
        make_model().run_with_cache(ids, pos_slice=[99])


def test_an_exchanged_projection_is_called(ids: torch.Tensor) -> None:
    class Adapted(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) + 0.1

    model = make_model()
    with torch.no_grad():
        plain = model.run_with_cache(ids)[1]["gate_in", 0]
        model.blocks[0].mixer.in_proj = Adapted(model.blocks[0].mixer.in_proj)
        assert torch.allclose(model.run_with_cache(ids)[1]["gate_in", 0], plain + 0.1)


def test_a_torch_hook_on_the_convolution_is_refused(ids: torch.Tensor) -> None:
    model = make_model()
    model.blocks[2].mixer.conv1d.register_forward_hook(lambda m, i, out: out)
    with pytest.raises(HookError, match=r"blocks\.2\.mixer\.hook_conv: .* hook hook_x .* or hook_conv"):
        model(ids)

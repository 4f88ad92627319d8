"""State norms and delta: against the plain tensors, at chance on random weights, and refused where wrong."""

import pytest
import torch
from hand_built import random_model
from torch import Tensor

from mambascope.analyses import gates, read, state_norms
from mambascope.analyses.states import layer_norms
from mambascope.config import MambaConfig
from mambascope.errors import InputError
from mambascope.model import HookedMamba


def test_norms_are_those_of_h(random, ids: Tensor) -> None:
    _, cache = random.run_with_cache(ids)
    found = state_norms(random, cache)
    for layer in range(3):
        h = cache["h", layer].full()[0].double()
        assert torch.allclose(found.norm[layer].double(), h.pow(2).sum((1, 2)).sqrt(), rtol=1e-5)
    table = found.table()
    assert list(table.columns) == ["position", "token", "mean", "layer 0", "layer 1", "layer 2"]
    assert table["layer 1"].tolist() == found.norm[1].tolist()


def test_norms_come_in_windows(random, ids: Tensor) -> None:
    reading = read(random, ids)
    whole = layer_norms(reading, 1)
    size = random.cfg.d_inner * random.cfg.d_state
    seen: list[int] = []
    original = type(reading).window

    def watched(self: object, name: str, layer: int, start: int, stop: int) -> Tensor:
        seen.append(stop - start)
        return original(reading, name, layer, start, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(reading), "window", watched)
        pieces = layer_norms(reading, 1, window=7 * size)
    assert torch.allclose(pieces, whole, rtol=1e-5)
    assert max(seen) <= 7
    assert sum(seen) == 75


def test_norms_of_an_edited_state(random, ids: Tensor) -> None:
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_h[30]", lambda h, hook: torch.zeros_like(h))]):
        _, cache = random.run_with_cache(ids)
    found = state_norms(random, cache).norm[1]
    assert found[30] == 0
    assert bool((found[31:] > 0).all())


def test_a_nan_state_is_located(random, ids: Tensor) -> None:
    with random.hooks(fwd_hooks=[("blocks.1.mixer.hook_h[30]", lambda h, hook: h * float("nan"))]):
        _, cache = random.run_with_cache(ids)
    with pytest.raises(InputError, match="state of layer 1 is NaN or infinite from position 30"):
        state_norms(random, cache)


def test_gates_are_delta(random, ids: Tensor) -> None:
    _, cache = random.run_with_cache(ids)
    found = gates(random, cache, open_above=0.3, closed_below=0.05)
    for layer in range(3):
        delta = cache["delta", layer][0]
        gate = 1 - torch.exp(-delta)
        assert torch.allclose(found.delta[layer], delta.mean(1))
        assert torch.allclose(found.open_share[layer], (gate > 0.3).float().mean(1))
        assert torch.allclose(found.closed_share[layer], (gate < 0.05).float().mean(1))
        assert torch.equal(found.opens_at[layer], delta.argmax(0))
    channels = found.channels(0)
    best = int(found.gate[0].argmax())
    assert channels["channel"][0] == best
    assert channels["token"][0] == found.labels[int(found.opens_at[0, best])]


def test_gates_of_known_values(random, ids: Tensor) -> None:
    def set_delta(value: Tensor, hook: object) -> Tensor:
        value = torch.full_like(value, 1e-3)
        value[:, 10] = 5.0
        return value

    with random.hooks(fwd_hooks=[("blocks.0.mixer.hook_delta", set_delta)]):
        _, cache = random.run_with_cache(ids)
    found = gates(random, cache)
    assert found.open_share[0].tolist() == [float(t == 10) for t in range(75)]
    assert found.closed_share[0].tolist() == [float(t != 10) for t in range(75)]
    assert float(found.selectivity[0]) == pytest.approx(1.0)  # channels are alike, tokens are not


def test_an_untrained_gate_is_hardly_selective(ids: Tensor) -> None:
    torch.manual_seed(0)
    fresh = HookedMamba(MambaConfig(d_model=32, n_layers=2, d_vocab=40))
    found = gates(fresh, ids)
    assert float(found.selectivity.max()) < 0.02  # channels differ, tokens do not
    assert not found.open_share.any()  # delta was drawn from 0.001…0.1
    assert 0.3 < float(found.closed_share.mean()) < 0.7  # log-uniform: half lies below 0.01
    with torch.no_grad():
        for block in fresh.blocks:
            block.mixer.dt_proj.weight.zero_()
    assert gates(fresh, ids).selectivity.tolist() == [0.0, 0.0]
    wide = random_model()  # the measure can rise
    assert float(gates(wide, ids).selectivity.max()) > 0.05


def test_bad_thresholds(random, ids: Tensor) -> None:
    with pytest.raises(InputError, match=r"closed_below < open_above, got|thresholds need"):
        gates(random, ids, open_above=0.1, closed_below=0.2)
    with pytest.raises(InputError, match="layer 9 is outside"):
        gates(random, ids).channels(9)

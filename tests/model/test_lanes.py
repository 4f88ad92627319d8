"""A block for batches of different lengths, and for runs with other states put in, is the block run by itself."""

from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.config import MambaConfig
from mambascope.model import HookedMamba
from tests.conftest import error, make_model

SHAPES = [(3, 7), (1, 4), (2, 1)]


def streams(width: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(rows, length, width, generator=g) for rows, length in SHAPES]


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"d_conv": 1, "mixer_norm_eps": 1e-6}])
def test_lanes_are_batches_by_themselves(options: dict[str, Any]) -> None:
    model = make_model(backend="torch", **options)
    mixer: Any = model.blocks[1].mixer
    g = torch.Generator().manual_seed(4)
    states = [None] + [
        mixer.initial_state(rows).map(lambda x: x + torch.randn(x.shape, generator=g)) for rows, _ in SHAPES[1:]
    ]
    parts = streams(model.cfg.d_model)
    got = model.replay_lanes(1, torch.cat([x.flatten(0, 1) for x in parts]), SHAPES, states, "torch")
    want = [model.replay(1, x, s, None, "torch", None) for x, s in zip(parts, states, strict=True)]
    assert error(got, torch.cat([x.flatten(0, 1) for x in want])) < 1e-6
    for keep in (1, 2, 5, 9):
        few = model.replay_lanes(1, torch.cat([x.flatten(0, 1) for x in parts]), SHAPES, states, "torch", keep)
        assert error(few, torch.cat([x[:, -keep:].flatten(0, 1) for x in want])) < 1e-6
    other = model.replay_lanes(1, torch.cat([x.flatten(0, 1) for x in parts]), SHAPES, [None] * 3, "torch")
    assert error(other, got) > 1e-3


def test_other_mixers_run_lane_by_lane() -> None:
    torch.manual_seed(5)
    model = HookedMamba(MambaConfig(d_model=32, n_layers=3, d_vocab=23, d_state=4, pattern="maf", n_heads=4))
    parts = streams(32)
    for layer in range(3):
        got = model.replay_lanes(layer, torch.cat([x.flatten(0, 1) for x in parts]), SHAPES, [None] * 3, "torch")
        want = [model.replay(layer, x, None, None, "torch", None).flatten(0, 1) for x in parts]
        assert error(got, torch.cat(want)) < 1e-6


def test_a_state_put_in_is_a_state_edited(backend: str) -> None:
    """At the first, a middle and the last step, of two texts; what came before stays."""
    model = make_model(backend=backend)
    resid = torch.randn(2, 9, model.cfg.d_model, generator=torch.Generator().manual_seed(1))
    h = torch.randn(3, 2, model.cfg.d_inner, model.cfg.d_state, generator=torch.Generator().manual_seed(2))
    steps = [0, 4, 8]
    got = model.put_states(1, resid, None, torch.tensor(steps), h, backend)
    for p, t in enumerate(steps):
        span = {"start_at_layer": 1, "stop_at_layer": 2}
        hooks = [(f"blocks.1.mixer.hook_h[{t}]", lambda old, hook, p=p: h[p])]
        with torch.no_grad():
            want = model.run_with_hooks(resid, fwd_hooks=hooks, **span)
            plain = model(resid, **span)
        assert error(got[p], want) < 1e-5
        assert t == 0 or error(got[p][:, :t], plain[:, :t]) < 1e-6
        assert float((got[p][:, t:] - plain[:, t:]).abs().max()) > 1e-2


def test_only_mamba_has_states_to_put_in() -> None:
    torch.manual_seed(5)
    model = HookedMamba(MambaConfig(d_model=32, n_layers=2, d_vocab=23, d_state=4, pattern="ma", n_heads=4))
    resid, h = torch.randn(1, 3, 32), torch.randn(1, 1, model.cfg.d_inner, 4)
    with pytest.raises(ms.errors.InputError, match="layer 1 is .*: it has no state h"):
        model.put_states(1, resid, None, torch.tensor([0]), h, "torch")

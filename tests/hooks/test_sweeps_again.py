"""Sweeps and attributions that are recorded: the second of a shape is, and later ones replay it on their own values.

CUDA graphs need a GPU (``tests/bench/bench_sweeps.py`` compares there). Here a recording is played by calling the
recorded function again on the recorded memory.
"""

import copy
from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.model import HookedMamba, graphs, recording
from tests.conftest import make_model
from tests.hooks.test_sweeps import METRIC, pair
from tests.model.test_graphs import Again

pytestmark = pytest.mark.filterwarnings("ignore:.*mostly noise")


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(function: Any, device: torch.device, pool: Any = None) -> Any:
        graph = Again(function)
        return graph, graph.result, 100

    Again.made, Again.failure = 0, None
    monkeypatch.setattr(recording, "record", record)
    monkeypatch.setattr(recording, "new_pool", lambda device: object())
    monkeypatch.setattr(recording, "follow", lambda device, last: None)
    monkeypatch.setattr(graphs, "_undisturbed", lambda device: True)
    monkeypatch.setattr(graphs, "_limit", lambda device: 1 << 30)
    monkeypatch.setattr(graphs, "RECORDED_BACKENDS", ("torch",))
    monkeypatch.setattr(graphs.Graphs, "claim", lambda self, model, run: None)  # of the passes themselves: not here


def swept(model: HookedMamba, seed: int, over: Any = ("resid_pre", "h", "resid_post", "mixer_out")) -> torch.Tensor:
    over = list(over) if isinstance(over, tuple) else over
    return ms.sweep(model, *pair(seed=seed), METRIC, over).values


def test_the_second_sweep_is_recorded_and_others_replay_it_on_their_own_texts() -> None:
    model, plain = make_model(backend="torch"), make_model(backend="torch")
    plain.graphs.enabled = False
    for n, seed in enumerate((1, 2, 3, 4, 1)):
        assert torch.equal(swept(model, seed), swept(plain, seed))
        assert Again.made == (n > 0)
    with torch.no_grad():
        for m in (model, plain):
            m.blocks[1].mixer.D.mul_(1.5)  # read where it lies
    assert torch.equal(swept(model, 3), swept(plain, 3))
    assert Again.made == 1


def test_other_places_channels_and_weights_are_recorded_for_themselves() -> None:
    model, plain = make_model(backend="torch"), make_model(backend="torch")
    plain.graphs.enabled = False
    overs: list[Any] = [
        {"sites": "h", "channels": [[0, 3], range(4, 9)]},
        {"sites": "h", "channels": [[1, 3], range(4, 9)]},
        {"sites": "h", "positions": [3, 9]},
        {"sites": "resid_pre", "positions": [3, 9]},
    ]
    for over in overs * 3:
        assert torch.equal(swept(model, 1, over), swept(plain, 1, over))
    assert Again.made == len(overs)
    for m in (model, plain):
        m.blocks[0].mixer.A_log.data = m.blocks[0].mixer.A_log.data * 0.5
    assert torch.equal(swept(model, 1, overs[0]), swept(plain, 1, overs[0]))
    assert Again.made == len(overs)  # that was the first of its kind


def test_it_runs_as_ever_where_it_cannot_be_recorded() -> None:
    model, plain = make_model(backend="torch"), make_model(backend="torch")
    plain.graphs.enabled = False
    for seed in (1, 2, 3):  # a site that needs hooks on the way
        assert torch.equal(swept(model, seed, "u"), swept(plain, seed, "u"))
    assert Again.made == 0
    Again.failure = RuntimeError("no such luck")
    swept(model, 1)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph.*no such luck"):
        swept(model, 1)
    assert torch.equal(swept(model, 2), swept(plain, 2))
    Again.failure = None
    assert torch.equal(swept(model, 3), swept(plain, 3))  # it is not tried again
    assert Again.made == 0


def test_a_recording_that_gives_something_else_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = make_model(backend="torch"), make_model(backend="torch")
    plain.graphs.enabled = False
    replay = Again.replay

    def wrong(self: Again) -> None:
        replay(self)
        self.result[0][0] += 1e-2

    monkeypatch.setattr(Again, "replay", wrong)
    assert torch.equal(swept(model, 1), swept(plain, 1))
    with pytest.warns(UserWarning, match="gives other values than the work itself"):
        assert torch.equal(swept(model, 1), swept(plain, 1))
    assert torch.equal(swept(model, 2), swept(plain, 2))
    assert len(model.repeats) == 0


@pytest.mark.parametrize("steps", [1, 2])
def test_attribution_is_recorded_span_by_span(steps: int) -> None:
    sites = ["resid_pre", "u", "delta", "B", "C", "h"]
    model, plain = make_model(backend="torch"), make_model(backend="torch")
    plain.graphs.enabled = False
    for n, seed in enumerate((1, 2, 3, 1)):
        found, want = (ms.attribute(m, *pair(seed=seed), METRIC, sites, steps=steps) for m in (model, plain))
        assert torch.equal(found.values, want.values)
        assert Again.made == 2 * (n > 0)  # three layers in spans of two
    assert float((want.values - want.corrupted).abs().max()) > 1e-3
    other = [ms.attribute(m, *pair(seed=2), METRIC, ["mixer_in", "u_select"]) for m in (plain, model, model, model)]
    assert all(torch.equal(x.values, other[0].values) for x in other)
    assert Again.made == 4
    hooks = [("blocks.1.hook_resid_pre[5]", lambda old, hook: old * 2)]
    with model.hooks(fwd_hooks=hooks), plain.hooks(fwd_hooks=hooks):
        found, want = (ms.attribute(m, *pair(seed=3), METRIC, sites, steps=steps) for m in (model, plain))
    assert torch.equal(found.values, want.values)
    assert Again.made == 4


def test_memory_that_recordings_hold_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(backend="torch")
    swept(model, 1), swept(model, 1)
    assert Again.made == 1
    monkeypatch.setattr(graphs, "_limit", lambda device: 1)
    for _ in range(3):
        swept(model, 1, "resid_pre")  # recording this drops the first
    assert Again.made == 2
    swept(model, 1)
    assert Again.made == 2  # it came as the first of its kind
    model.repeats.clear()
    assert len(model.repeats) == 0


def test_copies_record_for_themselves() -> None:
    model = make_model(backend="torch")
    for _ in range(2):
        swept(model, 1)
    twin = copy.deepcopy(model)
    assert (len(model.repeats), len(twin.repeats)) == (1, 0)
    assert torch.equal(swept(twin, 2), swept(model, 2))

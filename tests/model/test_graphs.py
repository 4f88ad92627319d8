"""Recordings of the block stack: when they are made, what they give, what makes them stale or impossible.

CUDA graphs need a GPU (``tests/bench/bench_gpu_model.py`` checks them there, bit for bit). Here a recording is played
by calling the recorded function again on the recorded memory, so that everything around it is tested: static inputs,
copies, keys, limits.
"""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mambascope.model import HookedMamba, graphs, recording
from mambascope.model.keeping import Addresses, Kept
from tests.conftest import make_model


class Again:
    """Stands for a CUDA graph: the function's results are written into the memory that the first call gave."""

    made = 0
    failure: Exception | None = None

    def __init__(self, function: Callable[[], Any]) -> None:
        if Again.failure is not None:
            raise Again.failure
        Again.made += 1
        self.function, self.result = function, function()
        for x in tensors(self.result):
            x.fill_(float("nan"))  # undefined until the first replay

    def replay(self) -> None:
        for own, new in zip(tensors(self.result), tensors(self.function()), strict=True):
            own.copy_(new)


def tensors(x: Any) -> list[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, (tuple, list)):
        return [t for v in x for t in tensors(v)]
    return tensors(list(vars(x).values())) if x is not None and hasattr(x, "__dict__") else []


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings without a GPU, on the torch backend."""

    def record(function: Callable[[], Any], device: torch.device, pool: Any = None) -> Any:
        graph = Again(function)
        return graph, graph.result, 100

    Again.made, Again.failure = 0, None
    monkeypatch.setattr(recording, "record", record)
    monkeypatch.setattr(recording, "new_pool", lambda device: object())
    monkeypatch.setattr(recording, "follow", lambda device, last: None)
    monkeypatch.setattr(graphs, "_undisturbed", lambda device: True)
    monkeypatch.setattr(graphs, "_limit", lambda device: 1000)
    monkeypatch.setattr(graphs, "RECORDED_BACKENDS", ("torch",))


def frozen(**options: Any) -> HookedMamba:
    return make_model(backend="torch", **options).requires_grad_(False)


def eager(model: HookedMamba, *args: Any, **options: Any) -> Any:
    model.graphs.enabled = False
    try:
        return model(*args, **options)
    finally:
        model.graphs.enabled = True


def forms(model: HookedMamba) -> set[str]:
    return {path.form for path in model.explain_path()}


def ids(batch: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_second_pass_of_a_shape_is_recorded_and_gives_the_same_bits() -> None:
    model = frozen()
    want = [eager(model, ids(seed=s), return_state=True) for s in range(4)]
    for s in (0, 1, 2, 3, 1):
        logits, state = model(ids(seed=s), return_state=True)
        assert forms(model) == ({"fused"} if s == 0 else {"graph"})
        assert torch.equal(logits, want[s][0])
        assert torch.equal(state.ssm, want[s][1].ssm)
        assert torch.equal(state.conv, want[s][1].conv)
        assert state.position == 11
    assert Again.made == 1
    assert "graph" not in {p.form for p in frozen().explain_path()}


def test_nothing_that_comes_out_changes_with_the_next_replay() -> None:
    model = frozen()
    model(ids(), return_state=True)
    kept, state = model(ids(), return_state=True)
    before = kept.clone(), state.ssm, state.conv
    model(ids(seed=5), return_state=True)
    assert forms(model) == {"graph"}
    assert all(torch.equal(a, b) for a, b in zip(before, (kept, state.ssm, state.conv), strict=True))


def test_states_losses_and_last_logits() -> None:
    model = frozen()
    _, state = eager(model, ids(), return_state=True)
    for options in ({"return_type": "loss"}, {"return_type": "both"}, {"logits_to_keep": 2}, {"loss_per_token": True}):
        options = {"return_type": "loss", **options} if "loss_per_token" in options else options
        want = eager(model, ids(seed=1), state=state, **options)
        for _ in range(3):
            got = model(ids(seed=1), state=state, **options)
        assert forms(model) == {"graph"}
        assert all(torch.equal(a, b) for a, b in zip(tensors(want), tensors(got), strict=True))
    assert model(ids(), return_type=None) is None


def test_long_texts_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_PIECE", 16)
    monkeypatch.setattr(graphs, "_PIECE_WIDTH", 1)
    model = frozen()
    x = ids(1, 75)
    with torch.no_grad():
        want, state = eager(model, x, logits_to_keep=20, return_state=True)
        for _ in range(2):
            got, after = model(x, logits_to_keep=20, return_state=True)
    assert forms(model) == {"graph"}
    assert torch.equal(got, want)
    assert torch.equal(after.ssm, state.ssm)
    assert after.position == 75


def test_weights_edited_in_place_are_seen_and_reassigned_ones_recorded_anew() -> None:
    model = frozen()
    for _ in range(2):
        model(ids())
    with torch.no_grad():
        model.blocks[1].mixer.in_proj.weight.mul_(1.5)
        model.blocks[0].mixer.A_log.data.add_(0.3)
    got = model(ids())
    assert Again.made == 1
    assert torch.equal(got, eager(model, ids()))
    changes: list[Callable[[], Any]] = [
        lambda: setattr(model.blocks[1].mixer.out_proj.weight, "data", model.blocks[1].mixer.out_proj.weight.data * 2),
        lambda: setattr(model.blocks[0].norm, "weight", nn.Parameter(torch.rand(24), requires_grad=False)),
        lambda: setattr(model.blocks[0].norm, "eps", 0.5),
        lambda: setattr(model.blocks[2].mixer, "x_proj", copy.deepcopy(model.blocks[2].mixer.x_proj)),
        lambda: model.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()}, assign=True),
    ]
    for i, change in enumerate(changes):
        model(ids()), change()
        assert torch.equal(model(ids()), eager(model, ids()))
        assert forms(model) == {"fused"}, i
        assert torch.equal(model(ids()), eager(model, ids()))
        assert len(model.graphs) == 1


@pytest.mark.parametrize(
    "point", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.2.mixer.hook_h", "ln_final.hook_scale"]
)
def test_hooks_keep_everything_eager(point: str) -> None:
    model = frozen()
    for _ in range(2):
        plain = model(ids())
    seen: list[Any] = []
    got = model.run_with_hooks(ids(), fwd_hooks=[(point, lambda value, hook: seen.append(hook.name))])
    assert set(seen) == {point}
    assert torch.equal(got, plain)
    assert "graph" not in forms(model)
    model(ids())
    assert forms(model) == {"graph"}


def test_whatever_else_sits_in_the_model_keeps_it_eager() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = frozen()
    for _ in range(2):
        plain = model(ids())
    mixer = model.blocks[1].mixer
    handle = mixer.out_proj.register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.equal(model(ids()), plain)
    handle.remove()
    assert torch.equal(model(ids()), plain)
    assert forms(model) == {"graph"}
    mixer.hook_x.forward = lambda x: 2 * x
    assert not torch.equal(model(ids()), plain)
    del mixer.hook_x.forward
    assert torch.equal(model(ids()), plain)
    old, mixer.out_proj = mixer.out_proj, Doubled(48, 24, bias=False)
    with torch.no_grad():
        mixer.out_proj.weight.copy_(old.weight)
    for _ in range(2):
        assert not torch.equal(model(ids()), plain)
    mixer.out_proj = old
    for _ in range(3):
        assert torch.equal(model(ids()), plain)
    assert forms(model) == {"graph"}
    calls: list[Any] = []
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, args, out: calls.append(module))
    model(ids())
    everywhere.remove()
    assert mixer.hook_x in calls


def test_gradients_padding_and_the_switch_keep_it_eager() -> None:
    model = frozen()
    for _ in range(2):
        model(ids())
    mask = torch.ones(2, 11)
    mask[0, -3:] = 0
    model(ids(), attention_mask=mask)
    assert "graph" not in forms(model)
    model.graphs.enabled = False
    model(ids())
    assert "graph" not in forms(model)
    model.graphs.enabled = True
    model(ids())
    assert forms(model) == {"graph"}
    model.blocks[0].mixer.D.requires_grad_()
    model(ids(), return_type="loss").backward()
    assert model.blocks[0].mixer.D.grad is not None
    with torch.no_grad():
        model(ids())
    assert forms(model) == {"graph"}


def test_a_copy_records_for_itself() -> None:
    model = frozen()
    for _ in range(2):
        model(ids())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(other.graphs) == 0
        with torch.no_grad():
            other.blocks[0].mixer.D.mul_(3)
            for _ in range(3):
                got = other(ids())
        assert torch.equal(got, eager(other, ids()))
    assert torch.equal(model(ids()), eager(model, ids()))


def test_another_thread_does_not_wait() -> None:
    model = frozen()
    for _ in range(2):
        plain = model(ids())
    found: list[Any] = []

    def other() -> None:
        with torch.no_grad():
            found.append((model(ids()), forms(model)))

    with model.graphs._lock:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found[0][1] == {"fused"}
    assert torch.equal(found[0][0], plain)


def test_what_cannot_be_recorded_says_so_once_and_runs() -> None:
    model = frozen()
    plain = model(ids())
    Again.failure = torch.OutOfMemoryError("no room")
    with pytest.warns(UserWarning, match="2 x 11 tokens cannot be recorded as a CUDA graph.*no room"):
        got = model(ids())
    assert torch.equal(got, plain)
    assert torch.equal(model(ids()), plain)  # silent now: warnings are errors here
    assert forms(model) == {"fused"}
    Again.failure = None
    model.graphs.clear()
    model(ids()), model(ids())
    assert forms(model) == {"graph"}


def test_recordings_are_few_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 3)
    model = frozen(n_layers=1)
    for length in range(1, 6):
        for _ in range(2):
            model(ids(1, length))
    assert len(model.graphs) == 3
    monkeypatch.setattr(graphs, "_limit", lambda device: 150)  # the three hold more: all go before the next
    for _ in range(2):
        model(ids(1, 9))
    assert len(model.graphs) == 1
    monkeypatch.setattr(graphs, "_PIECE", 8)
    monkeypatch.setattr(graphs, "_PIECE_WIDTH", 1)
    mask_free = torch.zeros(1, 10, dtype=torch.long)
    for _ in range(3):
        model.run_with_cache(mask_free)  # a cache is not cut in pieces
    assert forms(model) == {"fused"}


def test_a_pass_after_a_quiet_one_replays_first_and_looks_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = frozen(), []
    replay, look = Again.replay, model.graphs.watch.why_not
    monkeypatch.setattr(Again, "replay", lambda self: (done.append("replay"), replay(self))[1])
    monkeypatch.setattr(model.graphs.watch, "why_not", lambda m: (done.append("look"), look(m))[1])
    want = eager(model, ids())
    model(ids()), model(ids())
    done.clear()
    assert torch.equal(model(ids()), want)
    assert done == ["replay", "look"]
    model.run_with_hooks(ids(), fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: None)])
    done.clear()
    assert torch.equal(model(ids()), want)
    assert done == ["look", "replay"], "hooks came and went: nothing is presumed"
    embed, in_proj = model.embed.weight, vars(model.blocks[1].mixer.in_proj)

    def exchange() -> None:
        in_proj["forward"] = lambda x: x.new_zeros(*x.shape[:-1], 2 * model.cfg.d_inner)

    def reassign() -> None:
        embed.data = -embed.data

    for spoil in (exchange, reassign):
        model(ids())
        done.clear()
        spoil()
        found = model(ids())
        assert done[:2] == ["replay", "look"]
        assert forms(model) != {"graph"}
        assert not torch.equal(found, want)
        assert torch.equal(found, eager(model, ids()))
        in_proj.pop("forward", None)
        model(ids())


def test_weights_that_are_about_to_move_are_let_go() -> None:
    model = frozen()
    for _ in range(3):
        model(ids())
    assert model.graphs._weights
    model.double()
    assert not model.graphs._weights, "recordings would keep the old ones in memory"
    assert torch.equal(model(ids()), eager(model, ids()))
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert not model.graphs._weights
    assert torch.equal(model(ids()), eager(model, ids()))


@pytest.mark.parametrize("wide", [True, False])
def test_where_a_replay_keeps_what_a_cache_reads(wide: bool) -> None:
    model = make_model(residual_in_fp32=wide).bfloat16()
    for length in (1, 63, 64, 65, 200):
        at = Addresses.on(model, (2, length), 64)
        kept = Kept(model, at)
        assert kept.columns == [*(64 * c - 1 for c in range(-(-length // 64))), length - 1]
        assert kept.resid.shape == (len(model.blocks) + 1, 2, length, model.cfg.d_model)
        assert kept.states.shape[:3] == (len(model.blocks), 2, len(kept.columns))
        assert kept.resid.data_ptr() == at.memory.item()
        assert kept.states.data_ptr() - kept.resid.data_ptr() == 4 * at.states_at
        kept.states.fill_(1.0)
        versions = kept.states._version, kept.resid._version
        kept.resid.zero_()
        assert (kept.states == 1).all()
        assert (kept.states._version, kept.resid._version) == (versions[0], versions[1] + 1)

"""One token by the step kernels, and generation with them: under Triton's interpreter on a CPU, as they are on a GPU.

The recordings around them are played by calling the recorded function again; ``tests/bench/bench_gpu_model.py`` repeats
the comparisons on a GPU, with the overlapping launches that the interpreter cannot do.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from mambascope.errors import InputError, StateError
from mambascope.hooks.weights import small_norms
from mambascope.model import HookedMamba, State, graphs, recording
from mambascope.model.decode import Decoder
from mambascope.model.sampling import Sampler
from mambascope.ops import step
from tests.conftest import error, make_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, or there is a GPU (see tests/bench)",
)


class Again:
    def __init__(self, function: Callable[[], None]) -> None:
        self.replay = function


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Recordings without a GPU; the step kernels for models that otherwise run on the torch backend."""
    play = lambda function, device, pool=None, generator=None: (Again(function), None, 0)  # noqa: E731
    monkeypatch.setattr(recording, "record", play)
    monkeypatch.setattr(recording, "follow", lambda device, last: None)
    monkeypatch.setattr(graphs, "_undisturbed", lambda device: True)
    monkeypatch.setattr(graphs, "resolve_backend", lambda *args: ("triton", "in a test"))
    monkeypatch.setattr(step, "_ENTER", 16)  # fewer programs: each costs the interpreter milliseconds
    monkeypatch.setattr(step, "_LEAVE", 16)
    monkeypatch.setattr(step, "_LOGITS", 64)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN: what is not written is seen
    yield
    torch.use_deterministic_algorithms(before)


def frozen(**options: Any) -> HookedMamba:
    return make_model(backend="torch", **{"n_layers": 2, "d_model": 8, **options}).requires_grad_(False)


def ids(batch: int = 2, length: int = 5, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def eager(model: HookedMamba, fn: Callable[[], Any]) -> Any:
    model.graphs.enabled = False
    try:
        return fn()
    finally:
        model.graphs.enabled = True


def form(model: HookedMamba) -> str:
    return model.explain_path()[0].form


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"d_model": 12},
    "odd": {"d_model": 20, "d_inner": 37, "d_state": 7, "dt_rank": 3, "d_conv": 3, "conv_bias": False},
    "biases": {"proj_bias": True, "d_conv": 1},
    "falcon": {"mixer_norm_eps": 1e-6, "d_state": 4},
    "untied": {"tie_embeddings": False, "residual_in_fp32": False, "d_vocab": 61},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_as_near_to_the_truth_as_the_whole_text(shape: str) -> None:
    model, x = frozen(**SHAPES[shape]), ids(2, 4)
    exact = copy.deepcopy(model).double()
    exact.backend = "reference"
    with torch.no_grad():
        want, after = exact(x, return_state=True)
        state = None
        for t in range(x.shape[1]):
            logits, state = model.step(x[:, t], state)
            assert form(model) == "step"
            assert error(logits, want[:, t]) < 2e-6
    assert state is not None
    assert state.position == 4
    assert error(state.ssm, after.ssm) < 1e-6
    assert not state.conv.numel() or error(state.conv, after.conv) < 1e-6


def test_wide_layers_take_several_tiles_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = frozen(d_model=20, n_layers=1), ids(1, 3)
    with torch.no_grad():
        want = eager(model, lambda: model(x))
        monkeypatch.setattr(step, "_COLUMNS", 16)
        monkeypatch.setattr(step, "_TILE", 2)
        assert step._columns(40) == {"BK": 8, "PRE": 2}  # five tiles, two of them loaded ahead
        state = None
        for t in range(3):
            logits, state = model.step(x[:, t], state)
            assert error(logits, want[:, t]) < 2e-6


def test_half_precision_is_as_near_to_the_truth_as_the_whole_text() -> None:
    stepped, whole = [], []
    with torch.no_grad():
        for seed in range(2):
            model, x, state = frozen(seed=seed).to(torch.float16), ids(2, 3), None
            exact = copy.deepcopy(model).double()
            exact.backend = "reference"
            want, at_once = exact(x), eager(model, lambda model=model, x=x: model(x))
            for t in range(3):
                logits, state = model.step(x[:, t], state)
                stepped.append(error(logits, want[:, t]))
                whole.append(error(at_once[:, t], want[:, t]))
            assert state is not None
            assert state.ssm.dtype == torch.float32
            assert state.conv.dtype == torch.float16
    assert sum(stepped) <= 1.1 * sum(whole)


def test_a_step_leaves_its_input_alone_and_repeats_to_the_bit() -> None:
    model, x = frozen(), ids()
    with torch.no_grad():
        _, state = model(x, return_state=True)
        before = state.ssm, state.conv
        first, second = (model.step(x[:, 0], state) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1].ssm, second[1].ssm)
        assert torch.equal(state.ssm, before[0])
        assert torch.equal(state.conv, before[1])
        rows = model.step(x[1:, 0], state.rows([1]))
        assert error(rows[0], first[0][1:]) < 2e-6
    with pytest.raises(InputError, match="outside the vocabulary"):
        model.step(torch.tensor([1, 50]), state)
    with pytest.raises(StateError, match="shape"):
        model.step(x[:, 0], state.rows([1]))


def test_hooks_gradients_and_many_rows_take_the_ordinary_way() -> None:
    model, x = frozen(), ids()
    with torch.no_grad():
        want, state = model.step(x[:, 0])
        seen: list[int] = []
        with model.hooks(fwd_hooks=[("blocks.0.mixer.hook_h[6]", lambda h, hook: seen.append(hook.pos))]):
            got, _ = model.step(x[:, 0], State(state.layers, 6, state.model_id))
            assert form(model) == "split" or form(model) == "open"
        assert seen == [6]
        assert got.shape == want.shape
        model.step(torch.zeros(9, dtype=torch.long))
        assert form(model) == "fused"
    model.blocks[1].mixer.D.requires_grad_()
    logits, _ = model.step(x[:, 0])
    logits.sum().backward()
    assert model.blocks[1].mixer.D.grad is not None


def test_greedy_generation_is_the_ordinary_one() -> None:
    model, x = frozen(n_layers=1), ids()
    want = eager(model, lambda: model.generate(x, 9))
    assert form(model) == "fused"
    assert torch.equal(model.generate(x, 9), want)
    assert form(model) == "step"
    assert [new.tolist() for new in model.stream(x, 4)] == want[:, 5:9].T.tolist()
    stop = int(want[0, 8])
    first = want[0, 5:].tolist().index(stop)
    short = eager(model, lambda: model.generate(x, 9, stop_tokens=[stop]))
    assert torch.equal(model.generate(x, 9, stop_tokens=[stop]), short)
    many = [stop, *(t for t in range(40) if t != stop)]
    assert torch.equal(
        model.generate(x, 4, stop_tokens=many), eager(model, lambda: model.generate(x, 4, stop_tokens=many))
    )
    one = eager(model, lambda: model.generate(x[:1], 9, stop_tokens=[stop]))
    assert one.shape[1] == 5 + first + 1  # ends at once where the only row has met its stop token
    assert torch.equal(model.generate(x[:1], 9, stop_tokens=[stop]), one)


def fails_to_draw(prepare: Callable[..., None]) -> Callable[..., None]:
    def fails(model: HookedMamba, sampler: Sampler | None) -> None:
        if sampler is not None and sampler.temperature == 0.3:
            raise RuntimeError("no room")
        prepare(model, sampler)

    return fails


def test_sampled_generation_draws_the_ordinary_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = frozen(), ids()
    for options in ({"temperature": 0.7}, {"temperature": 1.5, "top_k": 5}, {"temperature": 1.0, "top_p": 0.8}):
        want = eager(model, lambda options=options: model.generate(x, 4, seed=4, **options))
        assert torch.equal(model.generate(x, 4, seed=4, **options), want)
        decoder = model.graphs._decoders[2]
        assert isinstance(decoder, Decoder)
        assert decoder.chooses(Sampler(**options))
    torch.manual_seed(7)
    want = eager(model, lambda: (model.generate(x, 3, 1.0), torch.rand(1)))
    torch.manual_seed(7)
    got = model.generate(x, 3, 1.0), torch.rand(1)  # and whoever draws next goes on from there
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    monkeypatch.setattr(decoder, "prepare", fails_to_draw(decoder.prepare))
    with pytest.warns(UserWarning, match="temperature=0.3.* cannot be recorded"):
        got = model.generate(x, 4, 0.3, seed=1)
    assert form(model) == "step"
    assert torch.equal(got, eager(model, lambda: model.generate(x, 4, 0.3, seed=1)))
    with torch.no_grad():
        model.unembed.weight[3, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        model.generate(x, 3, temperature=1.0)


def test_generations_that_take_turns_keep_their_own_states() -> None:
    model, x, y = frozen(n_layers=1), ids(seed=1), ids(seed=2)
    want = [eager(model, lambda v=v: model.generate(v, 7))[:, 5:].T.tolist() for v in (x, y)]
    streams = model.stream(x, 7), model.stream(y, 7)
    got: list[list[Any]] = [[], []]
    for turn in (0, 1, 0, 0, 1, 1, 1, 0, 0):
        got[turn].append(next(streams[turn]).tolist())
        with torch.no_grad():
            model.step(x[:, 0])  # somebody else in between
    assert got == [want[0][:5], want[1][:4]]


def test_a_hook_or_an_edit_in_the_middle_of_a_stream_counts() -> None:
    def run(model: HookedMamba) -> list[Any]:
        out, positions = [], []
        for i, new in enumerate(model.stream(ids(), 9)):
            out.append(new.tolist())
            if i == 2:
                model.add_hook("blocks.1.mixer.hook_y", lambda y, hook: 3 * y)
                model.add_hook("blocks.0.hook_resid_pre[8]", lambda r, hook: positions.append(hook.pos))
            if i == 4:
                model.reset_hooks()
            if i == 5:
                model.blocks[0].mixer.D.data = model.blocks[0].mixer.D.data * 2
        return [*out, positions]

    model = frozen()
    got = run(copy.deepcopy(model))
    assert got == eager(model, lambda: run(model))
    assert got[-1] == [8]


def test_a_decoder_serves_what_it_can() -> None:
    model = frozen(activation="relu")
    with torch.no_grad():
        model.step(ids()[:, 0])
    assert form(model) != "step"
    strided = frozen()
    strided.blocks[0].mixer.out_proj.weight.data = strided.blocks[0].mixer.out_proj.weight.data.T.contiguous().T
    with torch.no_grad():
        strided.step(ids()[:, 0])
    assert form(strided) == "fused"
    assert isinstance(strided.graphs._decoders[2], str)
    assert isinstance(Decoder(frozen(), 1), Decoder)


@pytest.mark.parametrize("options", [{}, {"residual_in_fp32": False, "d_model": 7, "d_inner": 9}])
def test_a_recorded_pass_keeps_what_a_cache_keeps(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    def record(function: Callable[[], None], device: torch.device, pool: Any = None) -> Any:
        return Again(function), (None, None, small_norms(model)), 0

    monkeypatch.setattr(recording, "record", record)
    monkeypatch.setattr(recording, "new_pool", lambda device: None)
    monkeypatch.setattr(graphs, "_limit", lambda device: 1)
    monkeypatch.setattr(graphs, "RECORDED_BACKENDS", ("torch",))
    model, x = frozen(**options), ids(2, 70)
    with torch.no_grad():
        _, state = eager(model, lambda: model(ids(2, 3), return_state=True))
        for start in (None, state):
            want, cache = eager(model, lambda start=start: model.run_with_cache(x, state=start))
            assert form(model) == "fused"
            results = [model.run_with_cache(x, state=start) for _ in range(3)]
            assert form(model) == "graph"
            first, second, third = (kept.recording for _, kept in results)
            assert second.blocks[0].x.data_ptr() != third.blocks[0].x.data_ptr()
            for logits, kept in results[1:]:
                assert error(logits, want) < 2e-6
                assert kept.recording.names == first.names
                for name, value in cache.recording.top.items():
                    assert error(kept.recording.top[name], value) < 2e-6
                for i, block in cache.recording.blocks.items():
                    mine = kept.recording.blocks[i]
                    assert error(mine.x, block.x) < 2e-6
                    assert mine.x.dtype == block.x.dtype
                    assert mine.anchors.columns == block.anchors.columns
                    assert error(mine.anchors.states, block.anchors.states) < 2e-6
                    assert (mine.state is None) == (start is None)
                for name in ("blocks.1.hook_resid_post", "blocks.1.mixer.hook_y"):
                    assert error(kept[name], cache[name]) < 5e-6
                states = (c["blocks.1.mixer.hook_h"][:, 60:70] for c in (kept, cache))
                assert error(*states) < 5e-6

"""Other mixers in the same backbone: hook points, states, padding, continuation, generation."""

import pytest
import torch
from torch import Tensor

from mambascope.config import MIXERS as NOUNS
from mambascope.config import MambaConfig
from mambascope.errors import ConfigError, StateError, UnknownNameError
from mambascope.hooks.points import hook_names, spec_of, widths
from mambascope.model import HookedMamba, State
from mambascope.model.mixers.registry import MIXERS

V, LENGTH = 23, 13
PATTERNS = ["mmam", "mwfa", "af", "w", "f", "l", "g", "s", "p", "h", "mlsh"]


def model_of(pattern: str, **options: object) -> HookedMamba:
    torch.manual_seed(3)
    options |= {"window": 5} if "w" in pattern else {}
    options |= {"n_heads": 4} if {"a", "w"} & set(pattern) else {}
    cfg = MambaConfig(d_model=32, n_layers=4, d_vocab=V, d_state=4, pattern=pattern, **options)  # type: ignore[arg-type]
    return HookedMamba(cfg, dtype=torch.float64)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, V, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def test_every_letter_has_a_class_and_every_class_a_letter() -> None:
    assert MIXERS.keys() == NOUNS.keys()
    assert all(kind.letter == letter for letter, kind in MIXERS.items())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_hook_fires_once_in_order_with_the_tables_shape_and_changes_nothing(pattern: str, ids: Tensor) -> None:
    model, seen = model_of(pattern), []
    plain = model(ids)
    assert list(model.hook_dict) == hook_names(model.cfg.layers)
    sizes = widths(model.cfg) | {"B": 2, "L": LENGTH, "T": LENGTH, "S": LENGTH}

    def look(value: Tensor, hook: object) -> None:
        seen.append((hook.name, tuple(value.shape)))  # type: ignore[attr-defined]

    names = [n for n in model.hook_dict if not spec_of(n).stepwise]
    out = model.run_with_hooks(ids, fwd_hooks=[(n, look) for n in names])
    assert sorted(n for n, _ in seen) == sorted(names)
    for name, shape in seen:
        assert shape == tuple(sizes[letter] for letter in spec_of(name).shape.split()), name
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_hook_that_only_looks_changes_no_bit(pattern: str, grad: bool, ids: Tensor) -> None:
    """But at scores and pattern, for which attention is spelled out (docs/models.md)."""
    model, seen = model_of(pattern).to(torch.float32), []
    explicit = ("hook_attn_scores", "hook_pattern")
    with torch.set_grad_enabled(grad):
        plain = model(ids)
        for name in (n for n in model.hook_dict if not n.endswith(explicit)):
            out = model.run_with_hooks(ids, fwd_hooks=[(name, lambda v, hook: seen.append(hook.name))])
            assert torch.equal(out, plain), name
            assert seen and set(seen) == {name}
            seen.clear()
        edited = model.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_resid_pre", lambda v, hook: v + 1e-3)])
        assert not torch.equal(edited, plain)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_split_is_one_run_and_a_step_a_time_too(pattern: str, ids: Tensor) -> None:
    model = model_of(pattern)
    whole, last = model(ids, return_state=True)
    for k in (1, 4, 5, 6, LENGTH - 1):
        first, state = model(ids[:, :k], return_state=True)
        rest, after = model(ids[:, k:], state=state, return_state=True)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=0, atol=1e-12)
        for mine, theirs in zip(after.layers, last.layers, strict=True):
            for name, value in theirs.tensors().items():
                torch.testing.assert_close(mine.tensors()[name], value, rtol=0, atol=1e-12)
    state = model.initial_state(2)
    for t in range(LENGTH):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], rtol=0, atol=1e-12)
    assert state.position == LENGTH


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_on_either_side_changes_nothing_also_in_what_continues_it(pattern: str, ids: Tensor) -> None:
    model = model_of(pattern)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :4], mask[1, 9:] = 0, 0
    out, state = model(ids, attention_mask=mask, return_state=True)
    rows = [ids[:1, 4:], ids[1:, :9]]
    for got, row in zip((out[0, 4:], out[1, :9]), rows, strict=True):
        torch.testing.assert_close(got, model(row)[0], rtol=0, atol=1e-12)
    more, mask = ids[:, :6], torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:], mask[1, :3] = 0, 0
    out, state = model(more, attention_mask=mask, state=state, return_state=True)
    rows = [torch.cat([rows[0], more[:1, :4]], 1), torch.cat([rows[1], more[1:, 3:]], 1)]
    for got, row, n in zip((out[0, :4], out[1, 3:]), rows, (4, 3), strict=True):
        torch.testing.assert_close(got, model(row)[0, -n:], rtol=0, atol=1e-12)
    out, _ = model(ids[:, :2], state=state, return_state=True)  # rows that have read different numbers of tokens
    for b, row in enumerate(rows):
        torch.testing.assert_close(out[b], model(torch.cat([row, ids[b : b + 1, :2]], 1))[0, -2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generate_is_reading_what_was_written(pattern: str, ids: Tensor) -> None:
    model = model_of(pattern)
    text = model.generate(ids[:, :5], max_new_tokens=8)
    assert torch.equal(text[:, 5:], model(text)[:, 4:-1].argmax(-1))
    again, cache = model.generate(ids[:, :5], max_new_tokens=8, return_cache=True)
    assert torch.equal(again, text)
    _, whole = model.run_with_cache(text[:, :-1])
    for name in (n for n in whole if "hook_h" not in n and not n.endswith(("A_bar", "B_bar", "write"))):
        torch.testing.assert_close(cache[name], whole[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_states_round_trip_by_layer_and_rows(pattern: str, ids: Tensor, tmp_path: object) -> None:
    model = model_of(pattern)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :4] = 0
    _, state = model(ids, attention_mask=mask, return_state=True)
    state.save(f"{tmp_path}/s.safetensors", model)
    loaded = State.load(f"{tmp_path}/s.safetensors", model)
    more = ids[:, :3]
    assert torch.equal(model(more, state=loaded), model(more, state=state))
    alone = model(more[1:], state=state.rows([1]))
    torch.testing.assert_close(alone, model(more, state=state)[1:], rtol=0, atol=1e-12)
    assert state.batch_size == 2 and state.nbytes == loaded.nbytes


def test_stacked_states_and_foreign_states_are_refused_by_layer(ids: Tensor) -> None:
    model = model_of("mmam")
    _, state = model(ids, return_state=True)
    with pytest.raises(StateError, match="layer 2 is attention"):
        _ = state.ssm
    state.layers[2] = state.layers[1]
    with pytest.raises(StateError, match="layer 2 is attention, its state must be AttentionState, got MambaState"):
        model(ids, state=state)


def test_a_point_of_another_mixer_is_refused_with_what_the_layer_has() -> None:
    model = model_of("mmam")
    with pytest.raises(UnknownNameError, match=r"layer 2 is attention and has no mixer.hook_delta.*hook_pattern"):
        model.add_hook("blocks.2.mixer.hook_delta", lambda v, hook: None)
    with pytest.raises(UnknownNameError, match=r"layer 0 is Mamba and has no mixer.hook_pattern"):
        model.add_hook("blocks.0.attn.hook_pattern", lambda v, hook: None)
    model.add_hook("blocks.2.attn.hook_pattern", lambda v, hook: None)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"pattern": "mxm"}, "unknown letter 'x'; known: m .Mamba., a .attention."),
        ({"pattern": "mam"}, "3 letters does not fill n_layers=4"),
        ({"pattern": "mmaw"}, "give window="),
        ({"pattern": "af", "window": 3}, "window=3 is an option of sliding-window attention"),
        ({"n_heads": 4}, "n_heads=4 is an option of attention and sliding-window attention .a, w., which pattern 'm'"),
        ({"pattern": "a", "n_heads": 3}, "n_heads=3 must divide d_model=32"),
        ({"pattern": "a", "n_heads": 32}, "even width"),
        ({"pattern": "m", "d_ff": 8}, "d_ff=8"),
        ({"pattern": "f", "d_ff": -1}, "d_ff must be a positive number"),
        ({"pattern": 3}, "pattern must be a string"),
    ],
)
def test_contradictory_patterns_are_refused_by_name(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        MambaConfig(d_model=32, n_layers=4, d_vocab=V, **fields)  # type: ignore[arg-type]


def test_configs_round_trip_and_mamba_alone_stays_what_it_was() -> None:
    plain = MambaConfig(d_model=32, n_layers=4, d_vocab=V)
    assert plain == MambaConfig(d_model=32, n_layers=4, d_vocab=V, pattern="mm") and plain.layers == "mmmm"
    assert not {"pattern", "n_heads", "window", "d_ff", "rotary_base"} & plain.to_dict().keys()
    for cfg in (plain, model_of("mwfa").cfg, plain.with_pattern("af", d_ff=40)):
        assert MambaConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize("pattern", ["mmam", "amma", "mlmm", "mwfa"])
def test_mamba_layers_of_a_hybrid_run_straight_to_the_same_bits(
    pattern: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(pattern).float()
    calls: list[tuple[int, int]] = []
    from mambascope.model import straight

    plain = straight.through

    def counted(model: HookedMamba, resid: Tensor, layers: list, run: object, i: int, stop: int) -> object:
        calls.append((i, stop))
        return plain(model, resid, layers, run, i, stop)  # type: ignore[arg-type]

    monkeypatch.setattr(straight, "through", counted)
    with torch.no_grad():
        straight_out, state = model(ids, return_state=True)
        assert [i for a, b in calls for i in range(a, b)] == [i for i, x in enumerate(model.cfg.layers) if x == "m"]
        calls.clear()
        with model.hooks([("hook_embed", lambda v, hook: None)]):
            out, slow = model(ids, return_state=True)
        assert not calls
    assert torch.equal(out, straight_out)
    for a, b in zip(state.layers, slow.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))
    weights = list(model.parameters())
    fast = torch.autograd.grad(model(ids, return_type="loss"), weights)
    assert calls
    with model.hooks([("hook_embed", lambda v, hook: None)]):
        other = torch.autograd.grad(model(ids, return_type="loss"), weights)
    for a, b in zip(fast, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

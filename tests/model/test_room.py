"""Keys and values of a generation lie in memory with room: nothing but the cost of appending may tell."""

import pytest
import torch
from torch import Tensor

from mambascope.config import MambaConfig
from mambascope.model import HookedMamba, State
from mambascope.model.mixers import states

V = 23


def model_of(pattern: str) -> HookedMamba:
    torch.manual_seed(3)
    window = {"window": 9} if "w" in pattern else {}
    cfg = MambaConfig(d_model=16, n_layers=len(pattern), d_vocab=V, d_state=2, pattern=pattern, n_heads=2, **window)
    return HookedMamba(cfg, dtype=torch.float64)


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(1))


def stepwise(model: HookedMamba, ids: Tensor, count: int, state: State | None = None) -> Tensor:
    """What ``generate`` does, with public calls whose states are copied."""
    text = ids
    for token in ids.unbind(1):
        logits, state = model.step(token, state)
    for left in range(count, 0, -1):
        text = torch.cat([text, logits.argmax(-1)[:, None]], 1)
        if left > 1:
            logits, state = model.step(text[:, -1], state)
    return text


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns of every room that is made."""
    made: list[int] = []
    plain = states.Room.__init__

    def counted(room: states.Room, k: Tensor, v: Tensor, more: int) -> None:
        plain(room, k, v, more)
        made.append(room.left + k.shape[1])

    monkeypatch.setattr(states.Room, "__init__", counted)
    return made


@pytest.mark.parametrize("pattern", ["a", "w", "mwa", "af"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_long_generation_is_the_same_and_copies_seldom(pattern: str, batch: int, rooms: list[int]) -> None:
    model, ids = model_of(pattern), ids_of(batch, 5)
    text = model.generate(ids, 300, stop_tokens=[])
    made = list(rooms)
    assert torch.equal(text, stepwise(model, ids, 300))
    assert rooms == made, "states that others see have no room"
    full = [64, 2 * 65, 2 * 131, 2 * 263][:4]
    assert made.count(64) == sum(x == "a" for x in pattern) + 6 * ("w" in pattern)
    assert [n for n in made if n > 64] == [n for n in full[1:] for x in pattern if x == "a"]


@pytest.mark.parametrize("pattern", ["a", "mwa"])
@torch.no_grad()
def test_rows_of_different_lengths(pattern: str) -> None:
    model, ids = model_of(pattern), ids_of(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :7], mask[1, 10:] = 0, 0
    rows = model.generate(ids, 150, attention_mask=mask, stop_tokens=[])
    assert torch.equal(rows[0], stepwise(model, ids[:1, 7:], 150)[0])
    assert torch.equal(rows[1], stepwise(model, ids[1:, :10], 150)[0])


@pytest.mark.parametrize("pattern", ["a", "mwa"])
@torch.no_grad()
def test_a_given_state_stays_what_it_was_and_may_be_given_again(pattern: str) -> None:
    model, ids = model_of(pattern), ids_of(2, 30)
    _, state = model(ids, return_state=True)
    before = state.clone()
    more = ids_of(2, 3)
    first = model.generate(more, 90, state=state, stop_tokens=[])
    for mine, old in zip(state.layers, before.layers, strict=True):
        assert all(torch.equal(mine.tensors()[n], t) for n, t in old.tensors().items())
        assert getattr(mine, "room", None) is None
    assert torch.equal(model.generate(more, 90, state=state, stop_tokens=[]), first)
    assert torch.equal(stepwise(model, more, 90, state), first)
    edited = state.clone()
    edited.layers[-1].v[:, 20:] += 3.0
    assert not torch.equal(model.generate(more, 90, state=edited, stop_tokens=[]), first), "an edit counts"
    assert torch.equal(model.generate(more, 90, state=state, stop_tokens=[]), first), "and stays where it was made"


@torch.no_grad()
def test_caches_of_earlier_steps_are_what_happened_then() -> None:
    model, ids = model_of("mwa"), ids_of(1, 6)
    caches: list = []
    new = torch.stack(list(model.stream(ids, 120, watch=caches.append, stop_tokens=[])), 1)
    _, whole = model.run_with_cache(torch.cat([ids, new], 1)[:, :-1])
    pattern = whole["blocks.2.mixer.hook_pattern"]  # B H T S
    for step in (1, 40, 119):
        t = 5 + step
        torch.testing.assert_close(
            caches[step]["blocks.2.mixer.hook_pattern"], pattern[:, :, t : t + 1, : t + 1], rtol=0, atol=1e-12
        )
        for name in ("blocks.1.mixer.hook_z", "blocks.2.mixer.hook_z", "blocks.0.mixer.hook_y"):
            torch.testing.assert_close(caches[step][name], whole[name][:, t : t + 1], rtol=0, atol=1e-12)


@torch.no_grad()
def test_hooks_edit_keys_and_patterns_of_a_generation() -> None:
    model, ids = model_of("ma"), ids_of(2, 6)

    def turn(value: Tensor, hook: object) -> Tensor:
        return -value

    def even(value: Tensor, hook: object) -> Tensor:
        return torch.ones_like(value) / value.shape[-1]

    plain = model.generate(ids, 100, stop_tokens=[])
    for site, fn in (("hook_rot_k[40]", turn), ("hook_v[6:90]", turn), ("hook_pattern", even)):
        with model.hooks([(f"blocks.1.mixer.{site}", fn)]):
            text = model.generate(ids, 100, stop_tokens=[])
            assert torch.equal(text, stepwise(model, ids, 100)), site
        if site != "hook_rot_k[40]":
            assert not torch.equal(text, plain), site


@torch.no_grad()
def test_a_hook_that_runs_the_model_from_a_state_owns_none(rooms: list[int]) -> None:
    model, ids = model_of("a"), ids_of(1, 4)
    _, held = model(ids, return_state=True)
    seen: list[Tensor] = []

    def again(value: Tensor, hook: object) -> None:
        if not seen:
            seen.append(value)
            made = len(rooms)
            one, after = model(ids, state=held, return_state=True)
            two, _ = model(ids, state=held, return_state=True)
            assert torch.equal(one, two)
            assert len(rooms) == made
            assert after.layers[0].room is None

    with model.hooks([("hook_embed", again)]):
        text = model.generate(ids, 5, stop_tokens=[])
    assert seen
    assert torch.equal(text, model.generate(ids, 5, stop_tokens=[]))


@torch.no_grad()
def test_a_state_keeps_no_more_memory_alive_than_it_shows() -> None:
    _, state = model_of("a")(ids_of(2, 40), return_state=True)
    for value in (state.layers[0].k, state.layers[0].v):
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    copy = state.clone().layers[0]
    assert copy.k.data_ptr() != state.layers[0].k.data_ptr()

"""Hooks in some blocks: the others run straight or from recordings, to the same bits."""

from typing import Any

import pytest
import torch

from mambascope.model import HookedMamba, chain, graphs
from tests.conftest import make_model
from tests.model.test_graphs import Again, forms, frozen, ids, played  # noqa: F401  (recordings without a GPU)

EDITS = {
    "hook_resid_pre[3]": lambda v, hook: v * 2,
    "hook_mixer_in": lambda v, hook: v + 1,
    "mixer.hook_h[4]": lambda h, hook: h * 0,
    "mixer.hook_delta": lambda v, hook: v * 1.5,
    "hook_resid_post[-1]": lambda v, hook: v * 2,
}


def hooked(model: HookedMamba, layers: tuple[int, ...], site: str, fn: Any, seed: int = 0, **options: Any) -> Any:
    hooks = [(f"blocks.{i}.{site}", fn) for i in layers]
    return model.run_with_hooks(ids(seed=seed), fwd_hooks=hooks, **options)


def block_by_block(model: HookedMamba, *args: Any, **options: Any) -> Any:
    """The same pass with every block walked through: a hook that reads sits in each."""
    for block in model.blocks:
        block.hook_mixer_out.add_hook(lambda v, hook: None)
    try:
        return hooked(model, *args, **options)
    finally:
        model.reset_hooks()


@pytest.mark.parametrize("site", EDITS)
def test_one_set_of_recordings_serves_hooks_in_any_block(site: str) -> None:
    model = frozen(n_layers=4)
    fn = EDITS[site]
    for turn, layers in enumerate(((1,), (1,), (0,), (3,), (1, 2), (0, 3), (2,))):
        want = block_by_block(model, layers, site, fn, seed=turn)
        got = hooked(model, layers, site, fn, seed=turn)
        assert torch.equal(got, want), layers
        quiet = {p.form for i, p in enumerate(model.explain_path()) if i not in layers}
        assert quiet == ({"graph"} if turn else {"fused"})
        open_form = {"graph"} if "resid" in site and turn else {"fused"} if "resid" in site else None
        forms_there = {model.explain_path()[i].form for i in layers}
        assert "graph" not in forms_there if open_form is None else forms_there == open_form
        assert Again.made == (5 if turn else 0)  # the rates, and each block
    plain = model(ids())
    assert torch.equal(plain, hooked(model, (2,), site, lambda v, hook: None))
    assert torch.equal(hooked(model, (0, 1, 2, 3), site, lambda v, hook: None), plain)


def test_a_stretch_that_comes_often_is_recorded_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_limit", lambda device: 1 << 20)
    model, site = frozen(n_layers=4), "mixer.hook_h[4]"
    fn = EDITS[site]
    for turn in range(7):  # the first pass compiles, the second records every block, the fourth what is around the scan
        want = block_by_block(model, (1,), site, fn, seed=turn)
        assert torch.equal(hooked(model, (1,), site, fn, seed=turn), want)
        assert Again.made == (0, 5, 5, 7, 7, 7, 7)[turn]
        assert [p.form for p in model.explain_path()] == (
            ["fused", "split", "fused", "fused"] if not turn else ["graph", "split", "graph", "graph"]
        )
        if turn == 4:
            with torch.no_grad():
                model.blocks[3].mixer.out_proj.weight.mul_(2)  # in place: the next replay sees it
    kept = []
    model.run_with_hooks(ids(), fwd_hooks=[("blocks.2.hook_resid_pre", lambda v, hook: kept.append(v))])
    before = kept[0].clone()
    hooked(model, (1,), site, fn, seed=3)
    assert torch.equal(kept[0], before)  # what a hook was given stays its own
    for seed in range(2):
        hooked(model, (3,), site, fn, seed=seed)
    Again.failure = RuntimeError("no memory")
    with pytest.warns(UserWarning, match="a stretch of [34] blocks cannot be recorded"):
        got = hooked(model, (3,), site, fn)
    assert torch.equal(got, hooked(model, (3,), site, fn))
    assert torch.equal(got, block_by_block(model, (3,), site, fn))
    monkeypatch.setattr(chain, "_MOST_PARTS", 1)
    Again.failure = None
    for layer in (0, 1, 3, 0):
        assert torch.equal(hooked(model, (layer,), site, fn), block_by_block(model, (layer,), site, fn))


def test_a_hook_that_places_another_further_on_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_limit", lambda device: 1 << 20)
    model = frozen(n_layers=4)
    for where in ("blocks.3.hook_mixer_out", "blocks.1.mixer.hook_gated", "blocks.1.hook_resid_post"):
        later = (where, lambda v, hook: v * 3)
        want = model.run_with_hooks(ids(), fwd_hooks=[("blocks.1.hook_mixer_in", lambda v, hook: None), later])
        for site in ("blocks.1.mixer.hook_h[4]", "blocks.1.hook_resid_pre", "blocks.0.hook_resid_post"):
            for _ in range(5):
                model.run_with_hooks(ids(), fwd_hooks=[(site, lambda v, hook: None)])
                place = (site, lambda v, hook, later=later: model.add_hook(*later))
                assert torch.equal(model.run_with_hooks(ids(), fwd_hooks=[place]), want), (site, where)
                model.reset_hooks()


def test_a_cut_scan_stands_beside_other_hooks_and_other_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, edges hooked as well, and hooks that run the model, the very same pass too, while it is open."""
    monkeypatch.setattr(graphs, "_limit", lambda device: 1 << 20)
    model, fn = frozen(n_layers=5), EDITS["mixer.hook_h[4]"]
    walk = [(f"blocks.{i}.hook_mixer_in", lambda v, hook: None) for i in range(5)]
    state, twice = "mixer.hook_h[4]", lambda v, hook: v * 2
    cases: list[list[Any]] = [
        [(f"blocks.{i}.{state}", fn) for i in (1, 3)],
        [(f"blocks.{i}.{state}", fn) for i in (0, 1, 4)],
        [(f"blocks.2.{state}", fn), ("blocks.2.hook_resid_pre", twice), ("blocks.2.hook_resid_post", twice)],
        [(f"blocks.2.{state}", fn), ("blocks.1.hook_resid_post", twice), ("blocks.3.hook_resid_pre", twice)],
    ]

    def nested(h: torch.Tensor, hook: Any) -> torch.Tensor:
        if hook.pos == 4 and not inside:
            inside.append(True)
            model(ids(seed=5))
            model.run_with_hooks(ids(seed=7), fwd_hooks=[(f"blocks.2.{state}", fn)])
        return h * 0

    inside: list[bool] = []
    cases.append([(f"blocks.2.{state}", nested)])
    for hooks in cases:
        for turn in range(5):
            inside.clear()
            want = model.run_with_hooks(ids(seed=turn), fwd_hooks=[*walk, *hooks])
            inside.clear()
            assert torch.equal(model.run_with_hooks(ids(seed=turn), fwd_hooks=hooks), want), turn
        layers = [int(name.split(".")[1]) for name, _ in hooks if state in name]
        assert inside or {p.form for i, p in enumerate(model.explain_path()) if i not in layers} == {"graph"}


def test_states_and_later_layers_and_losses(backend: str) -> None:
    model = make_model(backend=backend, n_layers=4).requires_grad_(False)
    fn = EDITS["mixer.hook_h[4]"]
    with torch.no_grad():
        for options in ({"return_state": True}, {"return_type": "loss"}, {"stop_at_layer": 3}, {"logits_to_keep": 2}):
            want = block_by_block(model, (1,), "mixer.hook_h[4]", fn, **options)
            for _ in range(3):
                got = hooked(model, (1,), "mixer.hook_h[4]", fn, **options)
            if "return_state" in options:
                assert torch.equal(got[1].ssm, want[1].ssm)
                assert torch.equal(got[1].conv, want[1].conv)
                got, want = got[0], want[0]
            assert torch.equal(got, want), options
        resid = model(ids(), stop_at_layer=1)
        hooks = [("blocks.2.mixer.hook_h[4]", fn)]
        want = model.run_with_hooks(ids(), fwd_hooks=hooks)
        for _ in range(3):
            assert torch.equal(model.run_with_hooks(resid, start_at_layer=1, fwd_hooks=hooks), want)


def test_a_hook_may_run_the_model_and_even_the_same_pass_again() -> None:
    model, site = frozen(n_layers=4), "hook_resid_pre[3]"
    want, plain = hooked(model, (2,), site, EDITS[site]), model(ids(seed=5))
    inside: list[torch.Tensor] = []

    def nested(v: torch.Tensor, hook: Any) -> torch.Tensor:
        if len(inside) < 2:
            inside.append(torch.zeros(()))
            inside[0] = model(ids(seed=5))
            inside.append(model.run_with_hooks(ids(), fwd_hooks=[(f"blocks.1.{site}", EDITS[site])]))
        return v * 2

    for _ in range(3):
        inside.clear()
        got = hooked(model, (2,), site, nested)
        assert torch.equal(got, want)
    assert forms(model) >= {"graph"}
    del plain


def test_what_moves_breaks_or_fails_is_seen() -> None:
    model, site = frozen(n_layers=4), "mixer.hook_h[4]"
    fn = EDITS[site]
    for _ in range(2):
        before = hooked(model, (1,), site, fn)
    assert "graph" in forms(model)
    with torch.no_grad():
        model.blocks[3].mixer.out_proj.weight.mul_(2)  # in place: seen by the next replay
    after = hooked(model, (1,), site, fn)
    assert not torch.equal(before, after)
    assert torch.equal(after, block_by_block(model, (1,), site, fn))
    with pytest.raises(ZeroDivisionError):
        hooked(model, (1,), site, lambda h, hook: 1 / 0)
    assert torch.equal(hooked(model, (1,), site, fn), after)
    assert "graph" in forms(model)  # and was given free
    made = Again.made
    model.blocks[3].mixer.out_proj.weight.data = model.blocks[3].mixer.out_proj.weight.data.clone()  # moved
    for _ in range(2):
        assert torch.equal(hooked(model, (1,), site, fn), after)
    assert Again.made == made + 5
    Again.failure = RuntimeError("no memory")
    model.run_with_hooks(ids(length=9), fwd_hooks=[(f"blocks.1.{site}", fn)])
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        model.run_with_hooks(ids(length=9), fwd_hooks=[(f"blocks.1.{site}", fn)])
    assert "graph" not in forms(model)


def test_hooks_are_seen_whoever_placed_them() -> None:
    """Beside hooks that the model placed, and so knows of: torch's own, a point's own, one that a hook adds."""
    model = frozen(n_layers=4)
    for _ in range(2):
        plain = model(ids())
    double = lambda module, args, out: 2 * out  # noqa: E731
    ways: list[Any] = [
        lambda: model.blocks[2].mixer.in_proj.register_forward_hook(double),
        lambda: model.blocks[2].mixer.hook_gated.register_forward_hook(double),
        lambda: model.blocks[2].norm.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1, *args[1:])),
        lambda: model.blocks[2].hook_mixer_out.add_hook(lambda v, hook: 2 * v).hook,
    ]
    look, nothing = ("blocks.1.mixer.hook_h[4]", lambda h, hook: None), lambda v, hook: None
    everywhere = [(f"blocks.{i}.hook_mixer_in", nothing) for i in range(4)]
    for place in ways:
        for late in (False, True):
            assert torch.equal(model(ids()), plain)
            assert forms(model) == {"graph"}
            handles: list[Any] = [] if late else [place()]
            hooks = [("hook_embed", lambda v, hook, handles=handles, place=place: handles.append(place()))] * late
            got = model.run_with_hooks(ids(), fwd_hooks=[*hooks, look])
            assert torch.equal(got, model.run_with_hooks(ids(), fwd_hooks=everywhere))
            assert not torch.equal(got, plain)
            assert torch.equal(model(ids()), got)  # the hook of ours is gone, the other is there
            handles[0].remove()
            assert torch.equal(model.run_with_hooks(ids(), fwd_hooks=[look]), plain)


def test_gradients_and_caches_walk_through_every_block() -> None:
    model, site = make_model(backend="torch", n_layers=4), "mixer.hook_h[4]"
    for _ in range(3):
        hooked(model, (1,), site, EDITS[site], return_type="loss").backward()
    assert Again.made == 0
    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.1.{site}", EDITS[site])]):
        for _ in range(3):
            _, cache = model.run_with_cache(ids())
    assert Again.made == 0
    assert cache["h", 1][:, 4].abs().max() == 0


def test_one_hooked_point_is_looked_at_once_however_often_it_was_hooked() -> None:
    model = frozen(n_layers=4)
    for seed in range(9):
        hooked(model, (1, 3), "mixer.hook_h[4]", EDITS["mixer.hook_h[4]"], seed=seed)
        assert len(model.graphs.watch._suspects) == 2
    model(ids())
    assert not model.graphs.watch._suspects

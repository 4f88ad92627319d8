"""Backward hooks count positions as their forward pass did, whenever the backward pass comes."""

import pytest
import torch

from mambascope.errors import HookError, InputError
from mambascope.hooks.points import points_of
from mambascope.model import HookedMamba
from tests.conftest import error, make_model


def test_a_position_means_the_forward_pass_that_ran(model: HookedMamba, tokens: torch.Tensor) -> None:
    name, seen = "blocks.1.hook_resid_pre", {}

    def keep(key: object):
        def hook(grad: torch.Tensor, hook: object) -> None:
            pos = hook.pos  # type: ignore[attr-defined]
            seen[key] = (grad.clone(), pos.tolist() if isinstance(pos, torch.Tensor) else pos)

        return hook

    sites = [(name, keep("all")), (f"{name}[-1]", keep(-1)), (f"{name}[2:5]", keep("2:5"))]
    first = model.run_with_hooks(tokens, return_type="loss", bwd_hooks=sites)
    model(tokens[:, :3])  # another length in between
    first.backward()
    whole = seen["all"][0]
    assert torch.equal(seen[-1][0], whole[:, -1])
    assert seen[-1][1] == 69
    assert torch.equal(seen["2:5"][0], whole[:, 2:5])
    assert seen["2:5"][1] == [2, 3, 4]
    with pytest.raises(HookError, match="only 70 tokens"):  # at once, not in the backward pass
        model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[(f"{name}[99]", keep("never"))])


def test_two_steps_of_the_state_get_their_own_gradients(backend: str) -> None:
    model = make_model(backend=backend)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(2))
    calls: list[tuple[str, int]] = []
    grads: dict[int, torch.Tensor] = {}

    def note(which: str):
        def hook(grad: torch.Tensor, hook: object) -> None:
            calls.append((which, hook.pos))  # type: ignore[attr-defined]
            grads[hook.pos] = grad.clone()  # type: ignore[attr-defined]

        return hook

    h = "blocks.1.mixer.hook_h"
    model.run_with_hooks(
        tokens, return_type="loss", bwd_hooks=[(f"{h}[2]", note("a")), (f"{h}[6]", note("b"))]
    ).backward()
    assert calls == [("b", 6), ("a", 2)]
    apart, calls[:] = dict(grads), []
    model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[(h, note("all"))]).backward()
    assert calls == [("all", t) for t in reversed(range(9))]
    for t in (2, 6):
        assert error(apart[t], grads[t]) < 1e-4


def test_a_backward_hook_replaces_its_positions_only(backend: str, tokens: torch.Tensor) -> None:
    name = "blocks.1.hook_resid_pre"

    def gradient(site: str, fn: object) -> torch.Tensor:
        model, out = make_model(backend=backend), []
        hooks = [("blocks.0.hook_resid_post", lambda g, hook: out.append(g.clone())), (site, fn)]
        model.run_with_hooks(tokens, return_type="loss", bwd_hooks=hooks).backward()
        return out[0]

    plain = gradient(name, lambda g, hook: None)
    for fn in (lambda g, hook: g * 0, lambda g, hook: g.zero_(), lambda g, hook: (g.zero_(), None)[1]):
        cut = gradient(f"{name}[3:5]", fn)
        assert cut[:, 3:5].abs().max() == 0
        assert error(cut[:, :3], plain[:, :3]) < 1e-5
        assert error(cut[:, 5:], plain[:, 5:]) < 1e-5
        assert plain[:, 3:5].abs().max() > 0


@pytest.mark.parametrize("tail", [s.name for s in points_of("m") if s.scope == "block"])
def test_edits_in_place_have_the_gradient_of_edits(backend: str, tokens: torch.Tensor, tail: str) -> None:
    def gradient(site: str, fn: object) -> torch.Tensor:
        model = make_model(backend=backend)
        model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(site, fn)]).backward()
        return model.blocks[0].mixer.in_proj.weight.grad

    for site in (f"blocks.1.{tail}", f"blocks.1.{tail}[2:5]"):
        returned = gradient(site, lambda v, hook: v * 1.5)
        assert error(gradient(site, lambda v, hook: (v.mul_(1.5), None)[1]), returned) < 1e-5, site


@pytest.mark.parametrize("tail", ["norm.hook_scale", "mixer.hook_u_skip", "mixer.hook_A_bar", "mixer.hook_h[3]"])
def test_a_value_whose_gradient_a_hook_asks_for_is_in_the_graph(backend: str, tokens: torch.Tensor, tail: str) -> None:
    model, kept = make_model(backend=backend), []
    captured: list[torch.Tensor] = []

    def keep(value: torch.Tensor, hook: object) -> None:
        value.retain_grad()
        kept.append(value)

    site = f"blocks.1.{tail}"
    model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(site, keep)]).backward()
    model.run_with_hooks(
        tokens, return_type="loss", bwd_hooks=[(site, lambda g, hook: captured.append(g.clone()))]
    ).backward()
    assert error(kept[0].grad, captured[0]) < 1e-4


def test_gradients_that_nobody_computes_are_errors(tokens: torch.Tensor) -> None:
    model = make_model(backend="cpu")
    with torch.no_grad():
        with pytest.raises(InputError, match="no gradient"):
            model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
        with pytest.raises(HookError, match="was never reached"):
            model.run_with_hooks(tokens, bwd_hooks=[("blocks.1.hook_resid_pre", lambda g, hook: None)])
    assert not any(point.live for point in model.hook_dict.values())

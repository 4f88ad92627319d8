"""Every hook point takes positions in every kind of call, on every path: the same edits give the same text."""

from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.hooks.points import points_of
from mambascope.model import HookedMamba
from tests.conftest import error, make_model
from tests.hooks.test_positions_per_row import closed_form

iv = ms.interventions
NAMES = [s.name if s.scope == "model" else f"blocks.1.{s.name}" for s in points_of("m")]
INDICES = {"[2]": 2, "[6]": 6, "[3:8:2]": slice(3, 8, 2), "[5:]": slice(5, None)}


def edit(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value * 0.7 + 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["[6]", "[3:8:2]", "rows"])
def test_an_edit_by_position_is_the_same_in_one_run_in_steps_and_in_generate(
    model: HookedMamba, name: str, where: str
) -> None:
    prompt = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(5))
    site = ms.at(name, [2, 7]) if where == "rows" else name + where
    with torch.no_grad():
        with model.hooks(fwd_hooks=[(site, edit)]):
            text = model.generate(prompt, max_new_tokens=4, stop_tokens=[])
            state, logits = None, []
            for t in range(9):
                out, state = model.step(text[:, t], state)
                logits.append(out)
        whole = model.run_with_hooks(text, fwd_hooks=[(site, edit)])
        assert error(torch.stack(logits, 1), whole) < 1e-5
        assert error(whole, model(text)) > 1e-6
        assert torch.equal(whole[:, 4:-1].argmax(-1), text[:, 5:])
        with model.hooks(fwd_hooks=[(site, edit)]):
            assert torch.equal(model(text), whole)


@pytest.mark.parametrize(
    "name", ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.mixer.hook_B", "blocks.1.mixer.hook_h"]
)
@pytest.mark.parametrize("where", [*INDICES, "rows", ""])
def test_prompts_of_unequal_length_grow_with_positions_of_their_own(model: HookedMamba, name: str, where: str) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 50, (1, n), generator=generator) for n in (7, 3)]
    sites = [ms.at(name, [2, 8]), f"{name}[2]", f"{name}[8]"] if where == "rows" else [name + where] * 3
    for left in (True, False):
        tokens, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7)
        for b, row in enumerate(rows):
            cut = slice(7 - row.shape[1], 7) if left else slice(0, row.shape[1])
            tokens[b, cut], mask[b, cut] = row[0], 1
        with model.hooks(fwd_hooks=[(sites[0], edit)]):
            both = model.generate(tokens, max_new_tokens=5, stop_tokens=[], attention_mask=mask)
        for row, got, site in zip(rows, both, sites[1:], strict=True):
            with model.hooks(fwd_hooks=[(site, edit)]):
                assert torch.equal(model.generate(row, max_new_tokens=5, stop_tokens=[])[0], got), (left, site)


@pytest.mark.parametrize(
    "site", ["hook_resid_pre[2:9:3]", "hook_resid_pre", "mixer.hook_h[2:9:3]", "mixer.hook_delta[6]"]
)
def test_held_values_find_their_tokens_while_unequal_prompts_grow(model: HookedMamba, site: str) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 50, (1, n), generator=generator) for n in (7, 3)]
    tokens, mask = torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7)
    tokens[0], tokens[1, 4:], mask[1, :4] = rows[0][0], rows[1][0], 0
    with torch.no_grad():
        donor = model.run_with_cache(torch.randint(0, 50, (1, 11), generator=generator))[1]
    put = iv.patch(f"blocks.1.{site}", donor, channels=range(3, 20))
    with model.intervene(put):
        both = model.generate(tokens, max_new_tokens=4, stop_tokens=[], attention_mask=mask)
        alone = [model.generate(row, max_new_tokens=4, stop_tokens=[])[0] for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize("t", [0, 5, 6, 8])
def test_a_state_edit_in_generate_follows_the_closed_form(model: HookedMamba, t: int) -> None:
    """At the first token, inside the prompt, at its last token, and at a generated one."""
    prompt = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(5))
    e = torch.randn(model.cfg.d_inner, model.cfg.d_state, generator=torch.Generator().manual_seed(3)) * 3
    y: list[torch.Tensor] = []
    hooks = [
        (f"blocks.1.mixer.hook_h[{t}]", lambda h, hook: h + e),
        ("blocks.1.mixer.hook_y", lambda v, hook: y.append(v)),
    ]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        text = model.generate(prompt, max_new_tokens=5, stop_tokens=[])
    with torch.no_grad():
        plain = model.run_with_cache(text[:, :-1])[1]
    change = torch.cat(y, 1).double() - plain["y", 1].double()
    for b in range(2):
        wanted = closed_form(plain, model, 1, b, t, e)
        assert (change[b, t:] - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert not t or change[b, :t].abs().max() < 2e-6 * plain["y", 1].abs().max()


def test_edits_at_several_tokens_add_up(backend: str) -> None:
    model = make_model(backend=backend, n_layers=2)
    tokens = torch.randint(0, 50, (6, 70), generator=torch.Generator().manual_seed(7))
    places = [[0, 69, 5], [3, 4, 5], [1, 2, 40], [64, 63, 65], [10, 20, 30], [68, 69, 0]]
    e = torch.randn(6, model.cfg.d_inner, model.cfg.d_state, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        plain = model.run_with_cache(tokens)[1]
        for together in (True, False):
            y: list[torch.Tensor] = []
            site = "blocks.1.mixer.hook_h"
            sites = [ms.at(site, places)] if together else [ms.at(site, [row[k] for row in places]) for k in range(3)]
            hooks = [(s, lambda h, hook: h + e) for s in sites]
            model.run_with_hooks(tokens, fwd_hooks=[*hooks, ("blocks.1.mixer.hook_y", lambda v, hook: y.append(v))])
            change = y[0].double() - plain["y", 1].double()
            for b, row in enumerate(places):
                wanted = torch.zeros_like(change[b])
                for t in row:
                    wanted[t:] += closed_form(plain, model, 1, b, t, e[b])
                assert (change[b] - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_an_identity_edit_at_every_position_is_the_plain_run(model: HookedMamba, name: str) -> None:
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = model(tokens)
        for sites in ([name], [f"{name}[{t}]" for t in range(12)], [ms.at(name, [list(range(12))] * 2)]):
            out = model.run_with(tokens, [iv.scale(site, 1.0) for site in sites])
            split = name.endswith(
                ("hook_h", "A_bar", "B_bar", "write", "u_skip", "u_write", "norm.hook_scale", "final.hook_scale")
            )
            assert error(out, plain) < 2e-6 if split else torch.equal(out, plain), (name, sites[0])
        assert torch.equal(model(tokens), plain)

"""Positions of their own for every row of a batch: at every point, on every path, in one pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.errors import HookError
from mambascope.hooks.points import points_of
from mambascope.model import HookedMamba
from tests.conftest import BACKENDS, error, make_model

H = "blocks.1.mixer.hook_h"
NAMES = [s.name if s.scope == "model" else f"blocks.1.{s.name}" for s in points_of("m") if s.name != "mixer.hook_h"]
EIGHT = [0, 3, 11, 24, 24, 40, 62, 69]


def batch_of(rows: int, length: int = 70) -> torch.Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(7))


def edit_one_by_one(
    model: HookedMamba, tokens: torch.Tensor, name: str, places: list[list[int]], fn: Callable[..., Any]
) -> torch.Tensor:
    """What per-row positions mean: every row alone, with plain sites."""
    rows = []
    for b, where in enumerate(places):
        hooks = [(f"{name}[{t}]", lambda v, hook, b=b, t=t: fn(v, b, t)) for t in where]
        rows.append(model.run_with_hooks(tokens[b : b + 1], fwd_hooks=hooks))
    return torch.cat(rows)


def closed_form(cache: Any, model: HookedMamba, layer: int, b: int, t: int, e: torch.Tensor) -> torch.Tensor:
    """sum_n C[t', n] exp(A sum_{t < tau <= t'} delta[tau]) e for every t' >= t, ``L-t D``, in float64."""
    delta, C = cache["delta", layer][b].double(), cache["C", layer][b, t:].double()
    since = torch.cat([torch.zeros_like(delta[:1]), delta[t + 1 :].cumsum(0)])
    return (C[:, None] * torch.exp(model.decay(layer).double() * since[..., None]) * e.double()).sum(-1)


def check_closed_form(model: HookedMamba, tokens: torch.Tensor, where: list[int]) -> None:
    """Edit layer 1's state in row b at where[b], and compare the change of y with the closed form."""
    cfg = model.cfg
    e = torch.randn(len(where), cfg.d_inner, cfg.d_state, generator=torch.Generator().manual_seed(3)).to(tokens.device)
    y: list[torch.Tensor] = []
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        hooks = [(ms.at(H, where), lambda h, hook: h + e), ("blocks.1.mixer.hook_y", lambda v, hook: y.append(v))]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    change = y[0].double() - cache["y", 1].double()
    for b, t in enumerate(where):
        wanted = closed_form(cache, model, 1, b, t, e[b])
        cut = cache["y", 1].abs().max() if len(set(where)) > 1 else 0  # the scan is cut where another row is edited
        assert not t or change[b, :t].abs().max() <= 2e-6 * cut
        assert (change[b, t:] - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert [p.form for p in model.explain_path()] == ["fused", "split"]


@pytest.mark.parametrize("where", [EIGHT, [20] * 8, [0] * 8, [69] * 8, [5, 9, 5, 9, 5, 9, 5, 9]])
def test_a_state_edit_at_another_position_in_every_row_follows_the_closed_form(backend: str, where: list[int]) -> None:
    check_closed_form(make_model(backend=backend, n_layers=2), batch_of(8), where)


def test_the_closed_form_test_can_fail() -> None:
    model = make_model(backend="reference", n_layers=2)
    tokens, y = batch_of(1), []
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        hooks = [(ms.at(H, [20]), lambda h, hook: h + 1), ("blocks.1.mixer.hook_y", lambda v, hook: y.append(v))]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        e = torch.ones(model.cfg.d_inner, model.cfg.d_state)
        wanted = closed_form(cache, model, 1, 0, 21, e)  # one token late
    assert (y[0].double() - cache["y", 1].double())[0, 21:].sub(wanted).abs().max() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("name", [*NAMES, H])
@pytest.mark.parametrize("places", [[[t] for t in EIGHT], [[5, 40], [69, 0], [7, 8], [3, 68]]])
def test_a_row_is_edited_as_if_it_were_alone(name: str, places: list[list[int]]) -> None:
    model = make_model(backend="torch")
    tokens = batch_of(len(places))
    index = [row[0] for row in places] if len(places[0]) == 1 else places

    def scaled(v: torch.Tensor, b: int, t: int) -> torch.Tensor:
        return v * (1 + 0.1 * b) + 0.01 * t

    def edit(v: torch.Tensor, hook: Any) -> torch.Tensor:
        b = torch.arange(v.shape[0]).reshape(-1, *[1] * (v.ndim - 1))
        return v * (1 + 0.1 * b) + 0.01 * hook.pos.reshape(*hook.pos.shape, *[1] * (v.ndim - hook.pos.ndim))

    with torch.no_grad():
        together = model.run_with_hooks(tokens, fwd_hooks=[(ms.at(name, index), edit)])
        alone = edit_one_by_one(model, tokens, name, places, scaled)
        assert error(together, alone) < 5e-6
        assert error(together, model(tokens)) > 1e-5
        assert torch.equal(
            model.run_with_hooks(tokens, fwd_hooks=[(ms.at(name, index), lambda v, hook: None)]), model(tokens)
        )


def test_in_a_cached_run_the_states_are_what_happened(backend: str) -> None:
    model, tokens = make_model(backend=backend), batch_of(8)
    edit = (ms.at(H, EIGHT), lambda h, hook: h * 0.5 + 1)
    with torch.no_grad():
        plain = model.run_with_hooks(tokens, fwd_hooks=[edit])
        with model.hooks(fwd_hooks=[edit]):
            logits, cache = model.run_with_cache(tokens)
        _, before = model.run_with_cache(tokens)
        assert error(logits, plain) < 2e-6
        for b, t in enumerate(EIGHT):
            assert error(cache["h", 1][b, t], before["h", 1][b, t] * 0.5 + 1) < 2e-6


def test_rows_left_out_stay_as_they_are(backend: str) -> None:
    model, tokens = make_model(backend=backend), batch_of(8)
    rows = torch.tensor([True, False] * 4)
    with torch.no_grad():
        plain = model(tokens)
        for name in (H, "blocks.1.hook_resid_pre", "blocks.0.mixer.hook_delta"):
            out = model.run_with_hooks(tokens, fwd_hooks=[(ms.at(name, EIGHT, rows), lambda v, hook: v + 1)])
            if name == H:  # few positions: the scan of all rows is cut there
                assert error(out[~rows], plain[~rows]) < 2e-6
            else:
                assert torch.equal(out[~rows], plain[~rows]), name
            assert all(error(out[b], plain[b]) > 1e-5 for b in (0, 2, 4, 6)), name
        seen: list[torch.Tensor] = []
        two = torch.tensor([[True, False], [False, True]])
        hook = (
            ms.at("blocks.1.hook_resid_pre", [[4, 4], [4, 4]], two),
            lambda v, hook: (seen.append(hook.rows), v + 1)[1],
        )
        out = model.run_with_hooks(tokens[:2], fwd_hooks=[hook])
        assert torch.equal(seen[0], two)
        both = model.run_with_hooks(tokens[:2], fwd_hooks=[("blocks.1.hook_resid_pre[4]", lambda v, hook: v + 1)])
        assert error(out, both) < 2e-6


def test_ragged_rows_count_their_own_tokens(backend: str) -> None:
    model = make_model(backend=backend)
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 50, (1, n), generator=generator) for n in (11, 7, 13)]
    tokens, mask, cuts = (
        torch.zeros(3, 13, dtype=torch.long),
        torch.zeros(3, 13),
        (slice(2, 13), slice(1, 8), slice(0, 13)),
    )
    for b, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
        tokens[b, cut], mask[b, cut] = row[0], 1
    for name in (H, "blocks.1.hook_resid_pre", "blocks.0.mixer.hook_B"):
        for where in ([10, 6, 12], [-1, -7, 3]):
            with torch.no_grad():
                both = model.run_with_hooks(
                    tokens, attention_mask=mask, fwd_hooks=[(ms.at(name, where), lambda v, hook: v * 0.5 + 1)]
                )
                for b, cut in enumerate(cuts):
                    one = model.run_with_hooks(
                        rows[b], fwd_hooks=[(f"{name}[{where[b]}]", lambda v, hook: v * 0.5 + 1)]
                    )
                    assert error(both[b, cut], one[0]) < 5e-6, (name, where, b)


def test_in_generate_positions_are_absolute_and_in_each_row_their_own(backend: str) -> None:
    model, prompt = make_model(backend=backend), batch_of(4, 9)
    for name in (H, "blocks.1.hook_resid_pre"):
        seen: list[list[int]] = []

        def push(v: torch.Tensor, hook: Any, seen: list[list[int]] = seen) -> torch.Tensor:
            on = torch.ones(4, dtype=torch.bool) if hook.rows is None else hook.rows
            seen.append(torch.where(on, hook.pos, -1).tolist())
            return v + 4

        with model.hooks(fwd_hooks=[(ms.at(name, [2, 8, 9, 11]), push)]):
            together = model.generate(prompt, max_new_tokens=5, stop_tokens=[])
        flat = [t for row in seen for t in row if t >= 0]
        assert sorted(flat) == [2, 8, 9, 11]
        for b, t in enumerate([2, 8, 9, 11]):
            with model.hooks(fwd_hooks=[(f"{name}[{t}]", lambda v, hook: v + 4)]):
                assert torch.equal(model.generate(prompt[b : b + 1], max_new_tokens=5, stop_tokens=[])[0], together[b])


def test_gradients_flow_through_edits_by_row() -> None:
    def gradients(backend: str, dtype: torch.dtype, by_row: bool) -> dict[str, torch.Tensor]:
        model, tokens = make_model(backend=backend, dtype=dtype), batch_of(8)
        fn = lambda h, hook: h * 0.5 + h.pow(2)  # noqa: E731
        if by_row:
            model.run_with_hooks(tokens, return_type="loss", fwd_hooks=[(ms.at(H, EIGHT), fn)]).backward()
        else:
            losses = [
                model.run_with_hooks(tokens[b : b + 1], return_type="loss", fwd_hooks=[(f"{H}[{t}]", fn)])
                for b, t in enumerate(EIGHT)
            ]
            torch.stack(losses).mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients("reference", torch.float64, by_row=False)
    for path in BACKENDS:
        for name, grad in gradients(path, torch.float32, by_row=True).items():
            assert error(grad, exact[name]) < 1e-4, (path, name)


def test_a_backward_hook_sees_each_row_at_its_own_position() -> None:
    model, tokens = make_model(backend="reference"), batch_of(3, 9)
    for name in ("blocks.1.hook_resid_pre", H):
        got: dict[int, torch.Tensor] = {}

        def keep(g: torch.Tensor, hook: Any, got: dict[int, torch.Tensor] = got) -> None:
            for b in range(3):
                if hook.rows is None or hook.rows[b]:
                    got[b] = g[b].clone()

        model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[(ms.at(name, [1, 8, 4]), keep)]).backward()
        for b, t in enumerate([1, 8, 4]):
            one: list[torch.Tensor] = []
            hooks = [(f"{name}[{t}]", lambda g, hook, one=one: one.append(g.clone()))]
            model.run_with_hooks(tokens, return_type="loss", bwd_hooks=hooks).backward()
            assert error(got[b], one[0][b]) < 1e-5 if one[0][b].any() else not got[b].any()


def test_positions_that_cannot_be_are_named(model: HookedMamba) -> None:
    tokens, name = batch_of(2), "blocks.1.hook_resid_pre"

    def run(positions: Any, rows: Any = None, site: str = name) -> None:
        with torch.no_grad():
            model.run_with_hooks(tokens, fwd_hooks=[(ms.at(site, positions, rows), lambda v, hook: v)])

    for site in (name, H):
        with pytest.raises(HookError, match="position 70 of row 1, which has only 70 tokens"):
            run([3, 70], site=site)
        with pytest.raises(HookError, match=r"given for 3 rows, the batch has 2"):
            run([1, 2, 3], site=site)
        with pytest.raises(HookError, match="row 1 is given position 69 twice"):
            run([[1, 2], [69, -1]], site=site)
    for bad in ([0.5, 1.0], [True, False], [[[1]]], "ab"):
        with pytest.raises(HookError, match="positions must be integers"):
            run(bad)
    with pytest.raises(HookError, match="no positions"):
        run([])
    with pytest.raises(HookError, match=r"rows must be bool of the positions' shape \(2,\)"):
        run([1, 2], [True])
    with pytest.raises(HookError, match="one index for all"):
        run(3, [True])
    with (
        pytest.raises(HookError, match="negative positions have no meaning"),
        model.hooks(fwd_hooks=[(ms.at(name, [-1, 2]), lambda v, hook: v)]),
    ):
        model.generate(tokens, max_new_tokens=1)
    with pytest.raises(HookError, match="was never reached"):
        run([3, 4], [False, False])
    assert not any(point.live for point in model.hook_dict.values())

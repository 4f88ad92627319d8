"""Hooks at the edges: padding, nested calls, handles taken away, other people's hooks, copies."""

import copy

import pytest
import torch

import mambascope as ms
from mambascope.errors import HookError
from mambascope.hooks.points import points_of
from mambascope.model import HookedMamba
from tests.conftest import error

NAMES = [s.name if s.scope == "model" else f"blocks.1.{s.name}" for s in points_of("m")]


def ragged() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, tuple[slice, slice]]:
    """Two rows of 11 and 7 tokens, padded on both sides."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(0, 50, (1, n), generator=generator) for n in (11, 7)]
    batch, mask, columns = torch.zeros(2, 13, dtype=torch.long), torch.zeros(2, 13), (slice(2, 13), slice(1, 8))
    for b, (row, cut) in enumerate(zip(rows, columns, strict=True)):
        batch[b, cut], mask[b, cut] = row[0], 1
    return rows, batch, mask, columns


@pytest.mark.parametrize("name", NAMES)
def test_what_a_hook_writes_at_padding_reaches_no_token(model: HookedMamba, name: str) -> None:
    rows, batch, mask, columns = ragged()
    for fn in (lambda v, hook: v + 0.3, lambda v, hook: (v.add_(0.3), None)[1]):
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, fn)]):
            (both, state), cache = model.run_with_cache(batch, attention_mask=mask, return_state=True)
            for b, (row, cut) in enumerate(zip(rows, columns, strict=True)):
                (alone, own), single = model.run_with_cache(row, return_state=True)
                assert error(both[b, cut], alone[0]) < 5e-6
                assert error(state.ssm[:, b], own.ssm[:, 0]) < 5e-6
                assert error(cache["h", 1][:, cut][b], single["h", 1][:, :][0]) < 5e-6


@pytest.mark.parametrize("name", NAMES)
def test_reading_a_padded_batch_changes_no_bit(model: HookedMamba, name: str, tokens: torch.Tensor) -> None:
    mask = torch.ones(2, 70)
    mask[0, :9], mask[1, 60:] = 0, 0
    with torch.no_grad():
        plain, end = model(tokens, attention_mask=mask, return_state=True)
        read, last = model.run_with_hooks(
            tokens, attention_mask=mask, return_state=True, fwd_hooks=[(name, lambda v, hook: None)]
        )
    assert torch.equal(read[mask.bool()], plain[mask.bool()])
    assert torch.equal(last.ssm, end.ssm)


def test_a_nested_call_leaves_the_outer_positions_alone(model: HookedMamba, tokens: torch.Tensor) -> None:
    seen: list[int] = []
    inner = [False]

    def nested(h: torch.Tensor, hook: object) -> None:
        if hook.pos == 3 and not inner[0]:  # type: ignore[attr-defined]
            inner[0] = True
            model(tokens[:, :4])
            assert hook.pos == 3  # type: ignore[attr-defined]

    site = "blocks.1.mixer.hook_h[2:6]"
    hooks = [(site, nested), (site, lambda h, hook: seen.append(hook.pos))]
    with torch.no_grad():
        model.run_with_hooks(tokens[:, :8], fwd_hooks=hooks)
    assert seen == [2, 2, 3, 3, 4, 5]


def test_a_hook_whose_handle_was_removed_is_forgotten(model: HookedMamba, tokens: torch.Tensor) -> None:
    point = model.blocks[1].mixer.hook_h
    handle = point.add_hook(lambda h, hook: h * 2, index=60)
    handle.hook.remove()
    calls: list[int] = []
    foreign = [
        point.register_forward_hook(lambda module, args, out: calls.append(1)),
        point.register_forward_pre_hook(lambda module, args: calls.append(2)),
    ]
    with torch.no_grad():
        model(tokens[:, :5])  # position 60 would not be there
    assert calls == [2, 1] * 5
    for other in foreign:
        other.remove()
    assert not point.live


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda v: v[:, 1:], "shape"), (lambda v: v.double(), "dtype"), (lambda v: 3, "must return a tensor")],
)
def test_other_libraries_hooks_are_checked_too(
    model: HookedMamba, tokens: torch.Tensor, answer: object, message: str
) -> None:
    handle = model.blocks[1].hook_resid_pre.register_forward_hook(lambda module, args, out: answer(out))
    with torch.no_grad(), pytest.raises(HookError, match=message):
        model(tokens)
    handle.remove()


def test_edits_behind_autograds_back_are_seen(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        for name in ("blocks.1.mixer.hook_h[3]", "blocks.1.norm.hook_scale", "blocks.1.mixer.hook_A_bar"):
            wanted = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: v * 2)])
            for fn in (lambda v, hook: (v.data.mul_(2), None)[1], lambda v, hook: (v.numpy().__imul__(2), None)[1]):
                assert error(model.run_with_hooks(tokens, fwd_hooks=[(name, fn)]), wanted) < 2e-6, name


def test_hooks_follow_a_deep_copy(model: HookedMamba, tokens: torch.Tensor) -> None:
    sites = ["blocks.1.hook_resid_pre[3]", "blocks.1.mixer.hook_h[-1]"]
    for site in sites:
        model.add_hook(site, lambda v, hook: v * 2)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        edited = model(tokens)
        model.reset_hooks()
        assert error(twin(tokens), edited) < 2e-6
        assert error(edited, model(tokens)) > 1e-4
        twin.reset_hooks()
        assert torch.equal(twin(tokens), model(tokens))


def test_a_hook_that_the_run_does_not_reach_is_an_error(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        resid = model(tokens, stop_at_layer=1)
        for site, args, options in (
            ("blocks.2.hook_resid_pre", tokens, {"stop_at_layer": 1}),
            ("blocks.1.mixer.hook_h[3]", tokens, {"stop_at_layer": 1}),
            ("hook_embed", resid, {"start_at_layer": 1}),
        ):
            with pytest.raises(HookError, match="was never reached"):
                model.run_with_hooks(args, fwd_hooks=[(site, lambda v, hook: None)], **options)
        model.run_with_hooks(tokens, stop_at_layer=1, fwd_hooks=[(lambda name: "delta" in name, lambda v, hook: None)])


def test_an_edited_state_gives_the_same_bits_whether_the_scan_is_fused_around_it_or_open(
    model: HookedMamba, tokens: torch.Tensor
) -> None:
    def edit(h: torch.Tensor, hook: object) -> torch.Tensor:
        return h * 0.5 + 1

    reads = ("blocks.1.mixer.hook_y", lambda v, hook: None)  # which opens the scan
    for site in ("blocks.1.mixer.hook_h[3]", "blocks.1.mixer.hook_h[-2:]", ms.at("blocks.1.mixer.hook_h", [1, 6])):
        with torch.no_grad():
            fused = model.run_with_hooks(tokens, fwd_hooks=[(site, edit)])
            state = model.hooks(fwd_hooks=[(site, edit)])
            with state:
                _, cache = model.run_with_cache(tokens, names_filter=["h1", "resid_post1"])
            opened = model.run_with_hooks(tokens, fwd_hooks=[(site, edit), reads])
            with model.hooks(fwd_hooks=[(site, edit), reads]):
                _, wanted = model.run_with_cache(tokens, names_filter=["h1", "resid_post1"])
        assert torch.equal(fused, opened)
        assert torch.equal(cache["resid_post", 1], wanted["resid_post", 1])
        assert torch.equal(cache["h", 1][:], wanted["h", 1][:])
        assert not torch.equal(fused, model(tokens))


def test_a_hook_that_comes_too_late_is_an_error(model: HookedMamba, tokens: torch.Tensor) -> None:
    late = lambda h, hook: model.add_hook("blocks.1.mixer.hook_y", lambda v, hook: v * 0)  # noqa: E731
    with torch.no_grad(), pytest.raises(HookError, match="hook_y: a hook at hook_h .* too late"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_h[3]", late)])

"""Freezing makes a block linear; paths carry what they should, and nothing else."""

from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.errors import HookError, InputError, UnknownNameError
from mambascope.hooks.effective_path import activation_factor
from mambascope.model import HookedMamba
from tests.conftest import error, make_model

iv = ms.interventions


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def others() -> torch.Tensor:
    return torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(10))


def cache_of(model: HookedMamba, tokens: torch.Tensor, edits: Any = ()) -> Any:
    with torch.no_grad(), model.intervene(list(edits)):
        return model.run_with_cache(tokens)[1]


# ---- freeze


def test_with_frozen_gating_y_is_linear_in_u(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    frozen, name = iv.freeze(cache_of(model, others), layers=1), "blocks.1.mixer.hook_u"
    a, b = torch.randn(2, 2, 30, model.cfg.d_inner, generator=torch.Generator().manual_seed(2))

    def y_of(u: torch.Tensor, edits: list[Any]) -> torch.Tensor:
        got: list[torch.Tensor] = []
        hooks = [*edits, (name, lambda v, hook: u), ("blocks.1.mixer.hook_y", lambda v, hook: got.append(v))]
        with torch.no_grad():
            model.run_with_hooks(batch, fwd_hooks=hooks)
        return got[0]

    parts = 2 * y_of(a, [frozen]) - 3 * y_of(b, [frozen])
    assert error(y_of(2 * a - 3 * b, [frozen]), parts) < 1e-5
    assert error(y_of(2 * a - 3 * b, []), 2 * y_of(a, []) - 3 * y_of(b, [])) > 1e-2


def test_with_all_frozen_a_block_is_linear_in_its_input(
    model: HookedMamba, batch: torch.Tensor, others: torch.Tensor
) -> None:
    frozen = iv.freeze(cache_of(model, others), ("delta", "B", "C", "silu", "gate"), 1)
    a, b = torch.randn(2, 2, 30, model.cfg.d_inner, generator=torch.Generator().manual_seed(2))

    def out_of(x: torch.Tensor) -> torch.Tensor:
        got: list[torch.Tensor] = []
        hooks = [
            frozen,
            ("blocks.1.mixer.hook_x", lambda v, hook: x),
            ("blocks.1.hook_mixer_out", lambda v, hook: got.append(v)),
        ]
        with torch.no_grad():
            model.run_with_hooks(batch, fwd_hooks=hooks)
        return got[0]

    bias = out_of(torch.zeros_like(a))  # of the conv
    assert error(out_of(2 * a - 3 * b) - bias, 2 * (out_of(a) - bias) - 3 * (out_of(b) - bias)) < 1e-5


def test_freezing_a_run_to_itself_changes_nothing(model: HookedMamba, batch: torch.Tensor) -> None:
    cache = cache_of(model, batch)
    with torch.no_grad():
        plain = model(batch)
        assert torch.equal(model.run_with(batch, iv.freeze(cache)), plain)
        assert torch.equal(model.run_with(batch, iv.freeze(cache, "gate")), plain)
        assert error(model.run_with(batch, iv.freeze(cache, "silu")), plain) < 2e-6
        with pytest.raises(HookError, match="holds values of 30 tokens, the run has 20"):
            model.run_with(batch[:, :20], iv.freeze(cache))
        with pytest.raises(HookError, match="the text goes on past them"), model.intervene(iv.freeze(cache)):
            model.generate(batch, max_new_tokens=3)
        with model.intervene(iv.freeze(cache)):
            state, logits = None, []
            for t in range(30):
                out, state = model.step(batch[:, t], state)
                logits.append(out)
        assert error(torch.stack(logits, 1), plain) < 1e-5


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "identity"])
def test_the_factor_times_the_conv_is_the_activation(activation: str) -> None:
    fn = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu}.get(activation)
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert torch.allclose(activation_factor(x, activation) * x, x if fn is None else fn(x), atol=1e-12)


# ---- paths


def paths(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor, *args: Any, **options: Any) -> list[Any]:
    return iv.path_patch(model, batch, others, *args, **options)


def test_the_direct_path_to_the_end_is_the_difference_of_the_sender(
    model: HookedMamba, batch: torch.Tensor, others: torch.Tensor
) -> None:
    base, donor = cache_of(model, batch), cache_of(model, others)
    for sender, name in (
        ("blocks.0", "blocks.0.hook_mixer_out"),
        ("embed", "hook_embed"),
        ("blocks.2", "blocks.2.hook_mixer_out"),
    ):
        got = cache_of(model, batch, paths(model, batch, others, sender, "final"))
        last = "blocks.2.hook_resid_post"
        assert error(got[last], base[last] + donor[name] - base[name]) < 2e-6
        assert torch.equal(got["mixer_out", 1], base["mixer_out", 1])


def test_through_everything_it_is_plain_patching(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    donor = cache_of(model, others)
    for sender in ("blocks.0.hook_mixer_out", "hook_embed", "blocks.0.mixer.hook_delta", "blocks.0.mixer.hook_y[5]"):
        edits = paths(model, batch, others, sender, "final", through=[1, 2])
        with torch.no_grad():
            if sender == "hook_embed":
                edits = paths(model, batch, others, sender, "final", through=[0, 1, 2])
            assert error(model.run_with(batch, edits), model.run_with(batch, iv.patch(sender, donor))) < 5e-6, sender


def test_a_receiving_block_hears_the_sender_and_the_others_do_not(
    model: HookedMamba, batch: torch.Tensor, others: torch.Tensor
) -> None:
    base, donor = cache_of(model, batch), cache_of(model, others)
    change = donor["mixer_out", 0] - base["mixer_out", 0]
    got = cache_of(model, batch, paths(model, batch, others, "blocks.0", "blocks.2"))
    assert error(got["mixer_in", 2], base["resid_pre", 2] + change) < 2e-6
    assert torch.equal(got["resid_pre", 2], base["resid_pre", 2])
    with torch.no_grad():
        by_hand = model.run_with_hooks(batch, fwd_hooks=[("blocks.2.hook_mixer_in", lambda v, hook: v + change)])
        assert error(model.run_with(batch, paths(model, batch, others, "blocks.0", "blocks.2")), by_hand) < 2e-6


@pytest.mark.parametrize("part", ["delta", "B", "C", "u", "z", "skip"])
def test_each_input_of_a_block_receives_alone(
    model: HookedMamba, batch: torch.Tensor, others: torch.Tensor, part: str
) -> None:
    base, donor = cache_of(model, batch), cache_of(model, others)
    change = donor["mixer_out", 0] - base["mixer_out", 0]
    with torch.no_grad():
        hooks = [("blocks.2.hook_mixer_in", lambda v, hook: v + change)]
        with model.hooks(fwd_hooks=hooks):
            heard = model.run_with_cache(batch)[1]
    points = {"delta": "delta", "B": "B", "C": "C", "u": "u_write", "z": "gate_in", "skip": "u_skip"}
    got = cache_of(model, batch, paths(model, batch, others, "blocks.0", f"blocks.2.{part}"))
    for name, point in points.items():
        wanted = heard if name == part else base
        assert error(got[point, 2], wanted[point, 2]) < 2e-6, name
    assert error(got["mixer_out", 2], base["mixer_out", 2]) > 1e-5
    assert torch.equal(got["mixer_in", 2], base["mixer_in", 2])
    only = cache_of(model, batch, paths(model, batch, others, "blocks.0", f"blocks.2.{part}[9]"))
    assert error(only[points[part], 2][:, 9], heard[points[part], 2][:, 9]) < 2e-6
    assert torch.equal(only[points[part], 2][:, :9], base[points[part], 2][:, :9])


def test_by_way_of_chosen_blocks(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    base, donor = cache_of(model, batch), cache_of(model, others)
    change = donor["mixer_out", 0] - base["mixer_out", 0]
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda v, hook: v + change)]):
        total = model.run_with_cache(batch)[1]
    got = cache_of(model, batch, paths(model, batch, others, "blocks.0", "blocks.2", through=1))
    assert error(got["mixer_in", 2], total["resid_pre", 2]) < 2e-6
    both = cache_of(model, batch, paths(model, batch, others, "blocks.0", ["blocks.1", "blocks.2"]))
    assert error(both["mixer_in", 1], base["resid_pre", 1] + change) < 2e-6
    assert error(both["mixer_in", 2], both["resid_pre", 2] + change) < 2e-6
    assert error(both["resid_pre", 2], base["resid_pre", 2]) > 1e-5


def test_senders_do_not_hear_one_another(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    base, donor, senders = (
        cache_of(model, batch),
        cache_of(model, others),
        ["blocks.1.mixer.hook_delta", "blocks.2.mixer.hook_C"],
    )
    last = "blocks.2.hook_resid_post"
    together = cache_of(model, batch, paths(model, batch, others, senders, "final"))[last] - base[last]
    alone = [cache_of(model, batch, paths(model, batch, others, s, "final"))[last] - base[last] for s in senders]
    assert error(together, alone[0] + alone[1]) < 1e-5
    heard = cache_of(model, batch, paths(model, batch, others, senders, "final", through=2))[last] - base[last]
    assert error(heard, alone[0] + alone[1]) > 1e-3
    both = cache_of(model, batch, [iv.patch(senders, donor)])[last] - base[last]
    assert error(heard, both) < 1e-5


def test_paths_that_are_none(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    for args, kind, text in (
        (("blocks.1", "blocks.0"), HookError, "lies before sender"),
        (("blocks.1", "blocks.1"), HookError, "lies before sender"),
        (("blocks.1", "blocks.2.gates"), UnknownNameError, "no hook point"),
        (("blocks.1", "blocks.2", 7), HookError, "blocks 0…2"),
    ):
        with pytest.raises(kind, match=text):
            paths(model, batch, others, *args)
    with pytest.raises(InputError, match="row 0: 29 and 30"):
        paths(model, batch, others[:, :29], "blocks.0", "final")
    padded = iv.pair(model, others[:, :28], batch[:, :28])
    assert padded.clean_mask is None


def test_padded_pairs(batch: torch.Tensor, others: torch.Tensor) -> None:
    model = make_model(backend="torch")
    long, short = batch[:1], others[:1]
    mask_b, mask_o = torch.ones(1, 30), torch.ones(1, 30)
    mask_b[0, 25:], mask_o[0, 25:] = 0, 0
    pair = iv.Pair(short, long, mask_o.bool(), mask_b.bool())
    with torch.no_grad():
        for receiver in ("final", "blocks.2.B", "blocks.2"):
            alone = model.run_with(
                long[:, :25], iv.path_patch(model, long[:, :25], short[:, :25], "blocks.0", receiver)
            )
            out = model.run_with(long, iv.path_patch(model, pair, None, "blocks.0", receiver), attention_mask=mask_b)
            assert error(out[:, :25], alone) < 5e-6

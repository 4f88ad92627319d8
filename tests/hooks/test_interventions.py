"""Each intervention does what it says, alone and together, and says what it did."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.errors import CacheError, HookError, InputError, UnknownNameError
from mambascope.hooks.points import LAZY, points_of
from mambascope.model import HookedMamba
from tests.conftest import error, make_model

iv = ms.interventions
H = "blocks.1.mixer.hook_h"
PLAIN = [s for s in points_of("m") if s.name not in LAZY]


def full(spec: Any) -> str:
    return spec.name if spec.scope == "model" else f"blocks.1.{spec.name}"


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def others() -> torch.Tensor:
    return torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(10))


def cache_of(model: HookedMamba, tokens: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(tokens, **options)[1]


def edited_cache(model: HookedMamba, tokens: torch.Tensor, edits: Any) -> Any:
    with torch.no_grad(), model.intervene(edits):
        return model.run_with_cache(tokens)[1]


# ---- patching a run with itself, identity edits, removal


def test_patching_a_run_with_itself_changes_no_bit_where_the_path_is_the_same(
    model: HookedMamba, batch: torch.Tensor
) -> None:
    cache = cache_of(model, batch)
    with torch.no_grad():
        plain = model(batch)
        for spec in PLAIN:
            for where in ("", "[7]", "[3:9]", "[-1]"):
                out = model.run_with(batch, iv.patch(full(spec) + where, cache))
                if spec.name in ("norm.hook_scale", "mixer.hook_u_skip", "mixer.hook_u_write"):
                    assert error(out, plain) < 2e-6, (spec.name, where)  # those split the fused norm or the fused scan
                else:
                    assert torch.equal(out, plain), (spec.name, where)


def test_patching_states_with_themselves_is_a_split(model: HookedMamba, batch: torch.Tensor) -> None:
    cache = cache_of(model, batch)
    with torch.no_grad():
        plain = model(batch)
        for site in (
            f"{H}[0]",
            f"{H}[-1]",
            f"{H}[3:9]",
            H,
            ms.at(H, [0, 39, 12]),
            ms.at(H, [[1, 2], [30, 4], [38, 39]]),
        ):
            assert error(model.run_with(batch, iv.patch(site, cache)), plain) < 2e-6
            assert model.explain_path()[1].form == "split"
        for tail in ("A_bar", "B_bar", "write"):
            assert error(model.run_with(batch, iv.patch(f"blocks.1.mixer.hook_{tail}", cache)), plain) < 2e-6
            assert error(model.run_with(batch, iv.patch(f"blocks.1.mixer.hook_{tail}[5]", cache)), plain) < 2e-6
        assert torch.equal(model(batch), plain)


def test_nothing_is_left_behind_also_after_an_error(model: HookedMamba, batch: torch.Tensor) -> None:
    with torch.no_grad():
        plain = model(batch)
        edits = [iv.zero(f"{H}[4]"), iv.knockout(0, 2, 9, through="conv"), iv.scale("blocks.2.hook_resid_pre", 2)]
        with model.intervene(edits):
            assert error(model(batch), plain) > 1e-4
        assert torch.equal(model(batch), plain)
        with pytest.raises(ZeroDivisionError), model.intervene(edits):
            raise ZeroDivisionError
        with pytest.raises(HookError), model.intervene(edits):
            model.run_with_hooks(batch, fwd_hooks=[("blocks.2.hook_resid_post", lambda v, hook: 3)])
        assert torch.equal(model(batch), plain)
        assert not any(point.live for point in model.hook_dict.values())


# ---- values


def test_patch_puts_the_other_runs_value_in(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    donor = cache_of(model, others)
    for spec in PLAIN:
        if spec.scope == "model" and spec.name != "hook_embed":
            continue
        name = full(spec)
        got = edited_cache(model, batch, iv.patch(name + "[5:8]", donor))
        plain = cache_of(model, batch)
        assert torch.equal(got[name][:, 5:8], donor[name][:, 5:8]), name
        if not name.endswith(("hook_y", "hook_gated")):  # nothing before the edit differs
            assert torch.equal(got[name][:, :5], plain[name][:, :5])
    got = edited_cache(model, batch, iv.patch(f"{H}[10]", donor))
    assert error(got["h", 1][:, 10], donor["h", 1][:, 10]) == 0
    got = edited_cache(model, batch, iv.patch(f"{H}[8:20:4]", donor))
    assert all(error(got["h", 1][:, t], donor["h", 1][:, t]) < 2e-6 for t in (8, 12, 16))


def test_patch_from_other_positions_and_rows(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    donor, name = cache_of(model, others), "blocks.1.hook_resid_pre"
    assert torch.equal(
        edited_cache(model, batch, iv.patch(f"{name}[3]", donor, source=-1))[name][:, 3], donor[name][:, -1]
    )
    got = edited_cache(model, batch, iv.patch(f"{name}[3:5]", donor, source=slice(20, 22)))
    assert torch.equal(got[name][:, 3:5], donor[name][:, 20:22])
    where, source = ms.at(H, [3, 30, 12]), [9, 9, 39]
    got = edited_cache(model, batch, iv.patch(where, donor, source=source))
    for b, (t, s) in enumerate(zip([3, 30, 12], source, strict=True)):
        assert error(got["h", 1][b, t], donor["h", 1][b, s]) < 2e-6
    got = edited_cache(model, batch, iv.patch(f"{name}[3]", donor, rows=[2, 2, 0]))
    assert torch.equal(got[name][:, 3], donor[name][[2, 2, 0], 3])
    one = cache_of(model, others[1:2])
    got = edited_cache(model, batch, iv.patch(f"{name}[3]", one))
    assert torch.equal(got[name][:, 3], one[name][0, 3].expand(3, -1))
    shorter = cache_of(model, others[:, :20])
    got = edited_cache(model, batch, iv.patch(f"{name}[30]", shorter, source=19))
    assert torch.equal(got[name][:, 30], shorter[name][:, 19])


def test_patch_into_padded_rows_goes_by_token(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    mask = torch.ones(3, 40)
    mask[0, :6], mask[1, 35:] = 0, 0
    other = torch.ones(3, 40)
    other[0, 34:], other[1, :5] = 0, 0
    with torch.no_grad():
        _, donor = model.run_with_cache(others, attention_mask=other)
        for site in ("blocks.1.hook_resid_pre", "blocks.0.mixer.hook_delta", H):
            for where in ("[4]", "[-2]", ""):
                got = iv.patch(site + where, donor)
                out = model.run_with(batch, got, attention_mask=mask)
                for b, (mine, theirs) in enumerate(zip(mask.bool(), other.bool(), strict=True)):
                    alone = cache_of(model, others[b : b + 1, theirs])
                    single = model.run_with(batch[b : b + 1, mine], iv.patch(site + where, alone))
                    assert error(out[b, mine], single[0]) < 5e-6, (site, where, b)


def test_ablations(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    donor, name = cache_of(model, others), "blocks.1.mixer.hook_y"
    assert edited_cache(model, batch, iv.zero(name))[name].abs().max() == 0
    assert edited_cache(model, batch, iv.zero(f"{H}[4]"))["h", 1][:, 4].abs().max() == 0
    got = edited_cache(model, batch, iv.mean(name, donor))
    assert error(got[name], donor[name].mean((0, 1)).expand(3, 40, -1)) < 1e-6
    got = edited_cache(model, batch, iv.mean(f"{name}[7]", donor, over="batch"))
    assert error(got[name][:, 7], donor[name][:, 7].mean(0).expand(3, -1)) < 1e-6
    got = edited_cache(model, batch, iv.mean(f"{H}[7]", donor))
    assert error(got["h", 1][:, 7], donor["h", 1].full().mean((0, 1)).expand(3, -1, -1)) < 1e-6
    got = edited_cache(model, batch, iv.resample([f"{name}[7]", f"{H}[8]"], donor, seed=4))
    rows = [next(r for r in range(3) if torch.equal(donor[name][r, 7], got[name][b, 7])) for b in range(3)]
    assert all(error(got["h", 1][b, 8], donor["h", 1][r, 8]) < 2e-6 for b, r in enumerate(rows))
    again = edited_cache(model, batch, iv.resample(f"{name}[7]", donor, seed=4))
    assert torch.equal(again[name][:, 7], got[name][:, 7])


def test_changes_of_what_is_there(model: HookedMamba, batch: torch.Tensor) -> None:
    plain, name = cache_of(model, batch), "blocks.1.mixer.hook_delta"
    v = torch.randn(model.cfg.d_inner, generator=torch.Generator().manual_seed(1)).abs()
    assert torch.equal(
        edited_cache(model, batch, iv.steer(f"{name}[3]", v, 2.0))[name][:, 3], plain[name][:, 3] + 2 * v
    )
    assert torch.equal(edited_cache(model, batch, iv.clamp(name, 0.1, 0.2))[name], plain[name].clamp(0.1, 0.2))
    assert torch.equal(edited_cache(model, batch, iv.clamp(name, high=0.2))[name], plain[name].clamp(max=0.2))
    assert torch.equal(edited_cache(model, batch, iv.scale(name, 0.5))[name], plain[name] * 0.5)
    got = edited_cache(model, batch, iv.decay(1, 6, 0.25))
    assert error(got["h", 1][:, 6], plain["h", 1][:, 6] * 0.25) < 1e-6
    assert edited_cache(model, batch, iv.erase([0, 1], [6, 7, 8]))["h", 1][2, 8].abs().max() == 0


def test_swapped_states_go_on_in_the_other_prompt(model: HookedMamba, batch: torch.Tensor) -> None:
    plain = cache_of(model, batch)
    got = edited_cache(model, batch, iv.swap(f"{H}[6]", (0, 2)))
    assert error(got["h", 1][:, 6], plain["h", 1][:, 6][[2, 1, 0]]) < 1e-6
    assert error(got["y", 1][1], plain["y", 1][1]) < 2e-6
    twice = edited_cache(model, batch, [iv.swap(f"{H}[6]", (0, 2)), iv.swap(f"{H}[6]", (0, 2))])
    assert error(twice["y", 1], plain["y", 1]) < 2e-6


def test_channels_and_dims_restrict(model: HookedMamba, batch: torch.Tensor, others: torch.Tensor) -> None:
    plain, donor = cache_of(model, batch), cache_of(model, others)
    name = "blocks.1.mixer.hook_y"
    got = edited_cache(model, batch, iv.patch(name, donor, channels=[0, 5]))[name]
    keep = [c for c in range(model.cfg.d_inner) if c not in (0, 5)]
    assert torch.equal(got[..., [0, 5]], donor[name][..., [0, 5]])
    assert torch.equal(got[..., keep], plain[name][..., keep])
    got = edited_cache(model, batch, iv.zero(f"{H}[9]").only(channels=slice(3, 6), dims=[1]))["h", 1][:, 9]
    wanted = plain["h", 1][:, 9].clone()
    wanted[:, 3:6, 1] = 0
    assert error(got, wanted) < 1e-6
    assert (got[:, 3:6, 1] == 0).all()
    got = edited_cache(model, batch, iv.zero("blocks.1.mixer.hook_B", dims=[2, 4]))["B", 1]
    assert (got[..., [2, 4]] == 0).all()
    assert torch.equal(got[..., [0, 1, 3]], plain["B", 1][..., [0, 1, 3]])
    stream = edited_cache(model, batch, iv.zero("blocks.1.hook_resid_pre", channels=[0]))["resid_pre", 1]
    assert torch.equal(stream[..., 1:], plain["resid_pre", 1][..., 1:])


# ---- together


def test_order_is_that_of_the_list_and_what_would_be_lost_is_refused(model: HookedMamba, batch: torch.Tensor) -> None:
    plain = cache_of(model, batch)
    for name, read in (("blocks.1.mixer.hook_delta", lambda c: c["delta", 1][:, 5]), (H, lambda c: c["h", 1][:, 5])):
        site = f"{name}[5]"
        got = read(edited_cache(model, batch, [iv.scale(site, 2.0), iv.clamp(site, high=0.5)]))
        assert error(got, (read(plain) * 2).clamp(max=0.5)) < 1e-6
        got = read(edited_cache(model, batch, [iv.clamp(site, high=0.5), iv.scale(site, 2.0)]))
        assert error(got, read(plain).clamp(max=0.5) * 2) < 1e-6
        got = read(edited_cache(model, batch, [iv.patch(site, plain), iv.scale(site, 2.0)]))
        assert error(got, read(plain) * 2) < 1e-6
        for lost in (
            iv.scale(site, 2.0),
            iv.patch(f"{name}[3:9]", plain),
            iv.zero(name),
            iv.scale(ms.at(name, [1, 5, 2]), 3),
        ):
            with torch.no_grad(), pytest.raises(HookError, match=r"zero at .*would overwrite"):
                model.run_with(batch, [lost, iv.zero(site)])
        apart = [iv.scale(f"{name}[6]", 2.0), iv.zero(site), iv.zero(f"{name}[-1]")]
        assert (read(edited_cache(model, batch, apart)) == 0).all()
        channels = [iv.zero(site, channels=[0]), iv.zero(site, channels=[1, 2])]
        assert (read(edited_cache(model, batch, channels))[:, :3] == 0).all()
    with torch.no_grad(), pytest.raises(HookError, match="would overwrite"), model.intervene(iv.scale(f"{H}[5]", 2.0)):
        model.run_with(batch, iv.zero(f"{H}[5]"))  # the other context counts as well


def test_they_stand_in_lists_of_hooks_and_in_every_kind_of_call(model: HookedMamba, batch: torch.Tensor) -> None:
    edit, seen = iv.zero(f"{H}[5]"), []
    with torch.no_grad():
        wanted = model.run_with(batch, edit)
        listed = model.run_with_hooks(batch, fwd_hooks=[edit, ("hook_embed", lambda v, hook: seen.append(1))])
        assert torch.equal(listed, wanted)
        assert seen == [1]
        with model.hooks(fwd_hooks=[edit]):
            assert torch.equal(model(batch), wanted)
        with model.intervene([edit, iv.scale("blocks.0.hook_resid_pre[41]", 3.0)]):
            text = model.generate(batch, max_new_tokens=4, stop_tokens=[])
        with model.intervene(edit):
            state, out = None, []
            for t in range(8):
                logits, state = model.step(batch[:, t], state)
                out.append(logits)
        assert error(torch.stack(out, 1), wanted[:, :8]) < 5e-6
    assert text.shape == (3, 44)


def test_what_was_done_is_reported(model: HookedMamba, batch: torch.Tensor) -> None:
    plain = cache_of(model, batch)
    with torch.no_grad():
        model.run_with(batch, [iv.zero(f"{H}[5:8]"), iv.knockout(0, 2, 9), iv.scale("hook_embed", 1.0)])
    done = model.explain_path()[1].edits
    assert [(e.site, e.calls) for e in done] == [(f"{H}[5:8]", 3)]
    assert 0.9 * plain["h", 1][:, 5].abs().max() < done[0].change <= plain["h", 1][:, 5:8].abs().max() * 1.5
    assert "zero" in repr(done[0])
    assert model.explain_path()[1].form == "split"
    assert model.explain_path()[0].edits[0].what.startswith("knockout")
    assert [e.layer for e in model.edits_done()] == [None, 0, 1]
    assert model.edits_done()[0].change == 0
    with torch.no_grad():
        model(batch)
    assert model.edits_done() == []


# ---- records


def every_kind(model: HookedMamba, donor: Any) -> list[Any]:
    v = torch.ones(model.cfg.d_model)
    return [
        iv.patch("blocks.0.mixer.hook_delta[3:5]", donor, source=slice(7, 9), channels=[1, 2]),
        iv.mean("blocks.0.mixer.hook_y[9]", donor),
        iv.resample("blocks.1.mixer.hook_gate_in[9]", donor, seed=3),
        iv.steer(ms.at("blocks.1.hook_resid_pre", [3, 4, 5], [True, False, True]), v, 0.5),
        iv.clamp("blocks.1.mixer.hook_B", -1.0, 1.0, dims=[0]),
        iv.decay(1, 20, 0.5),
        iv.swap("blocks.2.hook_mixer_out[4]", (0, 1)),
        iv.freeze(donor, ("delta", "silu"), layers=2),
        iv.knockout(2, [1, 2], slice(6, None), through="conv", channels=[0, 1]),
        *iv.path_patch(
            model, iv.pair(model, donor.recording.tokens, donor.recording.tokens), None, "embed", "blocks.1.C"
        ),
        iv.zero("blocks.2.hook_resid_post[39]"),
    ]


def test_a_run_repeats_from_its_record(
    model: HookedMamba, batch: torch.Tensor, others: torch.Tensor, tmp_path: Path
) -> None:
    edits = every_kind(model, cache_of(model, others))
    with torch.no_grad():
        wanted = model.run_with(batch, edits, logits_to_keep=30)
        for one in edits:
            json.dumps(one.to_dict())
            twin = iv.Intervention.from_dict(json.loads(json.dumps(one.to_dict())), one.tensors)
            assert torch.equal(model.run_with(batch, twin), model.run_with(batch, one)), one
        iv.save(tmp_path / "edits.safetensors", edits)
        assert torch.equal(model.run_with(batch, iv.load(tmp_path / "edits.safetensors"), logits_to_keep=30), wanted)
        iv.record(model, batch, edits, logits_to_keep=30).save(tmp_path / "run.safetensors")
        record = iv.load_record(tmp_path / "run.safetensors")
        assert torch.equal(record.run(model), wanted)
        with pytest.raises(HookError, match="other weights"):
            record.run(make_model(seed=1))
    with pytest.raises(CacheError, match="no run file"):
        iv.load_record(tmp_path / "edits.safetensors")
    with pytest.raises(HookError, match="lacks 'value0'"):
        iv.Intervention.from_dict(edits[0].to_dict())
    with pytest.raises(HookError, match="unknown kind of intervention 'pach', did you mean 'patch'"):
        iv.Intervention.from_dict({**edits[0].to_dict(), "kind": "pach"}, edits[0].tensors)
    with pytest.raises(HookError, match="JSON values"):
        iv.record(model, batch, edits, attention_mask=torch.ones(1))


# ---- bad input


def test_a_cache_of_another_model_or_length(model: HookedMamba, batch: torch.Tensor) -> None:
    with torch.no_grad():
        other = make_model(seed=1)
        with pytest.raises(HookError, match="a model with other weights"):
            model.run_with(batch, iv.patch("blocks.1.hook_resid_pre[3]", cache_of(other, batch)))
        twin = make_model(backend=model.backend)
        model.run_with(batch, iv.patch("blocks.1.hook_resid_pre[3]", cache_of(twin, batch)))  # the same weights
        short = cache_of(model, batch[:, :30])
        for site in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_pre[3]", f"{H}[3]", H):
            with pytest.raises(HookError, match="holds values of 30 tokens, the run has 40.*source="):
                model.run_with(batch, iv.patch(site, short))
        with pytest.raises(HookError, match="holds 3 rows, the run has 2"):
            model.run_with(batch[:2], iv.patch("blocks.1.hook_resid_pre[3]", cache_of(model, batch)))
        with pytest.raises(HookError, match="only 30 tokens"):
            iv.patch("blocks.1.hook_resid_pre[35]", short)
        with pytest.raises(HookError, match="another number of positions"):
            iv.patch("blocks.1.hook_resid_pre[3]", short, source=slice(3, 5))
        with pytest.raises(HookError, match=r"holds values of shape \(3, 2, 24\), the run has \(3, 4, 24\)"):
            model.run_with(batch, iv.patch("blocks.1.hook_resid_pre[3:7]", short, source=slice(3, 5)))
        with pytest.raises(HookError, match="give the cache of a run"):
            iv.patch(f"{H}[3]", {})  # type: ignore[arg-type]
        with pytest.raises(CacheError, match="names_filter"):
            iv.patch(f"{H}[3]", cache_of(model, batch, names_filter="hook_embed"))


def test_sites_that_are_not_there(model: HookedMamba, batch: torch.Tensor) -> None:
    with torch.no_grad():
        with pytest.raises(UnknownNameError, match="did you mean"):
            model.run_with(batch, iv.zero("blocks.1.mixer.hook_dleta"))
        for site in ("blocks.1.hook_resid_pre[40]", f"{H}[40]"):
            with pytest.raises(HookError, match="only 40 tokens"):
                model.run_with(batch, iv.zero(site))
        for site in ("blocks.1.hook_resid_pre[60]", f"{H}[60]"):
            with pytest.raises(HookError, match="was never reached"), model.intervene(iv.zero(site)):
                model.generate(batch, max_new_tokens=4)
        with pytest.raises(HookError, match="was never reached"):
            model.run_with(batch, iv.zero(f"{H}[3]"), stop_at_layer=1)
        for name in ("blocks.1.hook_resid_pre", H):
            late = iv.scale(ms.at(name, [3, 60, 41]), 2.0)
            with pytest.raises(HookError, match="never reached at position 60 of row 1"), model.intervene(late):
                model.generate(batch, max_new_tokens=4, stop_tokens=[])
            with model.intervene(iv.scale(ms.at(name, [3, 42, 41]), 2.0)):
                model.generate(batch, max_new_tokens=4, stop_tokens=[])
        with pytest.raises(HookError, match="needs a site"):
            iv.zero([])
        with pytest.raises(HookError, match="has no dims"):
            model.run_with(batch, iv.zero("blocks.1.mixer.hook_y", dims=[0]))
        with pytest.raises(HookError, match="channels 48 is outside 0…47"):
            model.run_with(batch, iv.zero("blocks.1.mixer.hook_y", channels=[48]))
        with pytest.raises(HookError, match="numbers ≥ 0"):
            iv.zero(H, channels=[])
        with pytest.raises(HookError, match="pair \\(site, function\\) or an intervention, got int"):
            model.run_with(batch, [3])


def test_a_path_that_cannot_expose_a_site_says_so(model: HookedMamba, batch: torch.Tensor, monkeypatch: Any) -> None:
    monkeypatch.setattr("mambascope.memory.available_bytes", lambda device: 1000)
    wide = make_model(d_model=512, n_layers=1)
    with torch.no_grad(), pytest.raises(InputError, match="would take"):
        wide.run_with(batch.repeat(1, 40), iv.scale("blocks.0.mixer.hook_A_bar", 0.5))
    mask = torch.ones(3, 40)
    mask[0, :6] = 0
    with torch.no_grad(), pytest.raises(InputError, match="pad on the right"):
        model.run_with(
            batch, [iv.scale(f"{H}[3]", 2.0), iv.scale("blocks.1.mixer.hook_A_bar", 0.5)], attention_mask=mask
        )


def test_arguments_that_mean_nothing(model: HookedMamba, batch: torch.Tensor) -> None:
    cache = cache_of(model, batch)
    for make, text in (
        (lambda: iv.clamp(H), "low, high or both"),
        (lambda: iv.clamp(H, 2, 1), "above high"),
        (lambda: iv.decay(1, 3, 1.5), "between 0 and 1"),
        (lambda: iv.swap(H, (1, 1)), "two different rows"),
        (lambda: iv.swap(ms.at(H, [1, 2])), "one position"),
        (lambda: iv.mean(H, cache, over="rows"), "'text' or 'batch'"),
        (lambda: iv.steer(H, 3), "float tensor"),  # type: ignore[arg-type]
        (lambda: iv.freeze(cache, "gates"), "freeze knows"),
        (lambda: iv.freeze(cache, ("delta", "B"), channels=[1]), "have no channels"),
        (lambda: model.run_with(batch, iv.steer(f"{H}[3]", torch.ones(3))), r"shape \(3,\), values there are D N"),
        (lambda: model.run_with(batch, iv.swap(f"{H}[3]", (0, 7))), "the run has 3 rows"),
    ):
        with torch.no_grad(), pytest.raises(HookError, match=text):
            make()


# ---- pairs


def test_prompts_of_unequal_length_are_named_and_can_be_padded(model: HookedMamba) -> None:
    a, b = torch.arange(12).reshape(2, 6), torch.arange(14).reshape(2, 7)
    with pytest.raises(InputError, match=r"row 0: 6 and 7, row 1: 6 and 7.*unequal='pad'"):
        iv.pair(model, a, b)
    with pytest.raises(InputError, match="2 clean prompts, 1 corrupted"):
        iv.pair(model, a, b[:1])
    padded = iv.pair(model, a, b, unequal="pad")
    assert padded.lengths == [(6, 7), (6, 7)]
    assert padded.counterpart(6, "end") == [5, 5]
    assert padded.counterpart([2, -3]) == [2, 4]
    with pytest.raises(InputError, match="no counterpart"):
        padded.counterpart(0, "end")
    with torch.no_grad():
        wanted = model(a)
        assert error(model(padded.clean, attention_mask=padded.clean_mask)[:, :6], wanted) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, batch: torch.Tensor, others: torch.Tensor) -> None:
    model = make_model(backend="torch", dtype=dtype)
    donor, plain = cache_of(model, others), cache_of(model, batch)
    with torch.no_grad():
        logits = model(batch)
        for spec in PLAIN:
            put = iv.patch(f"{full(spec)}[3:9]", plain)
            near = "norm" in spec.name or spec.name in ("mixer.hook_u_skip", "mixer.hook_u_write")  # forms of their own
            bar = (2e-2 if dtype == torch.bfloat16 else 1e-14) if near or "ln_final" in spec.name else 1e-30
            assert error(model.run_with(batch, put), logits) < bar, spec.name
        edits = [
            iv.mean(f"{H}[4]", donor),
            iv.mean("blocks.0.mixer.hook_B", donor, dims=[1]),
            iv.freeze(donor, ("delta", "silu", "gate"), 2),
            iv.steer("blocks.1.hook_resid_pre[8]", torch.ones(24), 0.5),
            iv.knockout(0, [1, 2], slice(5, None), through="conv"),
            *iv.path_patch(model, batch, others, "blocks.0", ["blocks.2.delta", "final"]),
        ]
        for edit in edits[:-2]:
            assert torch.isfinite(model.run_with(batch, edit)).all()
            assert not torch.equal(model.run_with(batch, edit), logits)
        assert model.run_with(batch, edits[-2:]).dtype == logits.dtype


def test_falcon_mamba(batch: torch.Tensor, others: torch.Tensor) -> None:
    model = make_model(backend="torch", mixer_norm_eps=1e-6)
    donor = cache_of(model, others)
    got = edited_cache(model, batch, iv.freeze(donor, ("delta", "B", "C", "silu", "gate"), 1))
    for name in ("delta", "B", "C", "gate_in"):
        assert torch.equal(got[name, 1], donor[name, 1])
    assert error(edited_cache(model, batch, iv.erase(1, 3))["h", 1][:, 3] + 1, torch.ones(3, 48, 5)) == 0

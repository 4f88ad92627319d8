# ruff: noqa: SIM117, PT012  (nnsight reads a trace's block from its own with statement)
"""nnsight's released tracing on our model: every hook point by name, states at positions, the numbers of hooks."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mambascope as ms
from mambascope.errors import HookError, InputError, UnknownNameError
from mambascope.hooks.nnsight_bridge import TracedMamba
from mambascope.hooks.points import LAZY, hook_names, points_of
from tests.conftest import BACKENDS, error
from tests.hooks.tracing import TEXT, inner, traced

nnsight = pytest.importorskip("nnsight")
from nnsight.intervention.interleaver import OutOfOrderError  # noqa: E402

DOC = Path(__file__).resolve().parents[2] / "docs" / "bridges.md"
TAILS = [spec.name for spec in points_of("m")]


@pytest.fixture
def lm(backend: str) -> TracedMamba:
    return traced(backend)


def name_of(tail: str) -> str:
    return tail if tail in ("hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized") else f"blocks.0.{tail}"


# ---- one prompt: reading and setting


@pytest.mark.parametrize("tail", [t for t in TAILS if t != "mixer.hook_h"])
def test_every_point_is_read_and_set_as_by_a_hook(lm: TracedMamba, tail: str) -> None:
    name, seen = name_of(tail), []
    with torch.no_grad():
        plain = inner(lm)(TEXT)
        inner(lm).run_with_hooks(TEXT, fwd_hooks=[(name, lambda v, hook: seen.append(v.clone()))])
        hooked = inner(lm).run_with_hooks(TEXT, fwd_hooks=[(name, lambda v, hook: v * 1.5 + 0.3)])
        part = inner(lm).run_with_hooks(TEXT, fwd_hooks=[(f"{name}[2:5]", lambda v, hook: v * 0.5)])
        with lm.trace(TEXT):
            value = lm.hooks[name].output.save()
            logits = lm.output.save()
        assert torch.equal(value, seen[0])
        assert torch.equal(logits, plain)
        with lm.trace(TEXT):
            lm.hooks[name].output = lm.hooks[name].output * 1.5 + 0.3
            logits = lm.output.save()
        assert torch.equal(logits, hooked)
        assert error(logits, plain) > 1e-5
        with lm.trace(TEXT):
            lm.get(name).output[:] = lm.get(name).output * 1.5 + 0.3  # in place, by the tree
            logits = lm.output.save()
        assert error(logits, hooked) < 1e-5
        with lm.trace(TEXT):
            cut = lm.site(f"{name}[2:5]").output.save()
            one = lm.site(f"{name}[-1]").output.save()
        assert torch.equal(cut, seen[0][:, 2:5])
        assert torch.equal(one, seen[0][:, -1])
        with lm.trace(TEXT):
            lm.site(f"{name}[2:5]").output *= 0.5
            logits = lm.output.save()
        assert torch.equal(logits, part)
        assert torch.equal(inner(lm)(TEXT), plain)
    assert not any(point.live for point in inner(lm).hook_dict.values())


def test_states_are_read_and_set_at_steps_known_only_as_they_come(lm: TracedMamba) -> None:
    model = inner(lm)
    with torch.no_grad():
        plain, cache = model.run_with_cache(TEXT)
        with lm.trace(TEXT):
            states = nnsight.save([lm.site(f"blocks.1.mixer.hook_h[{t}]").output for t in range(10)])
            logits = lm.output.save()
        assert torch.equal(logits, plain)
        assert model.explain_path()[1].form == "open"
        assert error(torch.stack(states, 1), cache["h", 1].full()) < 1e-6
        hooks = [("h1[2]", lambda h, hook: h * 0.5), ("h1[7]", lambda h, hook: h + 1), ("h1[9]", lambda h, hook: None)]
        hooked = model.run_with_hooks(TEXT, fwd_hooks=hooks)
        with lm.trace(TEXT):
            first = lm.site("h1[2]").output
            lm.site("h1[2]").output = first * 0.5
            if float(first.abs().max()) > 0:  # what is asked for next may depend on what was seen
                lm.site("h1[7]").output += 1
            lm.site("h1[-1]").output.save()
            logits = lm.output.save()
        assert torch.equal(logits, hooked)
        assert [taken.form for taken in model.explain_path()] == ["fused", "split"]
        assert error(logits, plain) > 1e-5


def test_a_later_state_shows_an_earlier_edit_and_exposed_layers_too(lm: TracedMamba) -> None:
    seen: list[Tensor] = []
    with torch.no_grad():
        hooks: list[Any] = [("A_bar1", lambda v, hook: v * 0.9), ("h1[3]", lambda h, hook: h * 0)]
        hooks += [("h1[6]", lambda h, hook: seen.append(h.clone()))]
        hooked = inner(lm).run_with_hooks(TEXT, fwd_hooks=hooks)
        with lm.trace(TEXT):
            lm.hooks["A_bar1"].output *= 0.9
            lm.site("h1[3]").output[:] = 0
            later = lm.site("h1[6]").output.save()
            logits = lm.output.save()
    assert torch.equal(later, seen[0])
    assert torch.equal(logits, hooked)
    assert inner(lm).explain_path()[1].form == "exposed"


def test_states_without_a_position_are_one_occurrence_a_step(lm: TracedMamba) -> None:
    with torch.no_grad():
        _, cache = inner(lm).run_with_cache(TEXT)
        with lm.trace(TEXT) as tracer:
            steps = nnsight.save([])
            for step in tracer.iter[2:6:1]:
                steps.append((step, lm.blocks[1].mixer.hook_h.output.clone()))
        assert [step for step, _ in steps] == [2, 3, 4, 5]
        assert error(torch.stack([h for _, h in steps], 1), cache["h", 1][:, 2:6]) < 1e-6
        with lm.trace(TEXT):
            first = lm.hooks["h1"].output.save()
        assert error(first, cache["h", 1][:, 0]) < 1e-6


def test_what_nobody_asks_for_is_computed_as_in_a_plain_run(lm: TracedMamba) -> None:
    with torch.no_grad():
        plain = inner(lm)(TEXT)
        with lm.trace(TEXT):
            logits = lm.output.save()
        assert torch.equal(logits, plain)
    if inner(lm).explain_path()[0].backend == "cpu":
        assert [taken.form for taken in inner(lm).explain_path()] == ["fused", "fused"]


def test_modules_between_the_points_work_as_in_nnsight(lm: TracedMamba) -> None:
    with torch.no_grad():
        _, cache = inner(lm).run_with_cache(TEXT)
        with lm.trace(TEXT):
            xz = lm.blocks[1].mixer.in_proj.output.save()
            raw = lm.hooks["delta_raw1"].output.save()
            out = lm.blocks[1].mixer.out_proj.output.save()
        assert torch.equal(xz[..., :48], cache["x", 1])
        assert torch.equal(raw, cache["delta_raw", 1])
        assert torch.equal(out, cache["mixer_out", 1])
        with lm.trace(TEXT) as tracer:
            early = lm.hooks["resid_post0"].output.save()
            tracer.stop()
        assert torch.equal(early, cache["resid_post", 0])
        with lm.trace(TEXT):
            lens = lm.unembed(lm.ln_final(lm.hooks["resid_post0"].output)).save()
        assert error(lens, inner(lm).ln_final(cache["resid_post", 0]) @ inner(lm).W_U) < 1e-6


def test_a_cache_of_nnsight_records_the_points(lm: TracedMamba) -> None:
    with torch.no_grad():
        _, cache = inner(lm).run_with_cache(TEXT)
        with lm.trace(TEXT) as tracer:
            every = tracer.cache()
            lm.hooks["delta1"].output *= 2
        assert torch.equal(every["model.blocks.1.mixer.hook_delta"].output, cache["delta", 1] * 2)
        kept = {name for name in inner(lm).hook_dict if f"model.{name}" in every}
        assert kept == {n for n in hook_names(2) if n.split(".", 2)[-1] not in LAZY}
        with lm.trace(TEXT) as tracer:
            some = tracer.cache(modules=[lm.blocks[1].mixer.hook_h, lm.blocks[0].mixer.hook_write])
        steps = some["model.blocks.1.mixer.hook_h"]
        assert len(steps) == 10
        assert torch.equal(some["model.blocks.0.mixer.hook_write"].output, cache["write", 0].full())


def test_a_long_text_is_not_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mambascope.model.graphs._PIECE", 4)
    monkeypatch.setattr("mambascope.model.graphs._PIECE_WIDTH", 1)
    lm = traced()
    with torch.no_grad():
        _, cache = inner(lm).run_with_cache(TEXT)
        with lm.trace(TEXT):
            xz = lm.blocks[0].mixer.in_proj.output.save()
            late = lm.site("delta1[8]").output.save()
    assert xz.shape[1] == 10
    assert error(late, cache["delta", 1][:, 8]) < 1e-6


def test_interventions_of_ours_act_beside_a_trace(lm: TracedMamba) -> None:
    def halve(v: Tensor, hook: object) -> Tensor:
        return v * 0.5

    with torch.no_grad():
        wanted = inner(lm).run_with_hooks(
            TEXT, fwd_hooks=[("delta1", halve), ("h1[4]", halve), ("h1[6]", lambda h, hook: h + 1)]
        )
        with inner(lm).hooks(fwd_hooks=[("delta1", halve), ("h1[4]", halve)]):
            with lm.trace(TEXT):
                delta = lm.hooks["delta1"].output.save()  # after the hook that stands there
                lm.site("h1[6]").output += 1
                logits = lm.output.save()
    assert torch.equal(logits, wanted)
    assert delta.shape == (1, 10, 48)


def test_interventions_are_in_force_in_a_trace(lm: TracedMamba) -> None:
    iv, seen = ms.interventions, []
    edits = [iv.scale("blocks.0.mixer.hook_delta", 0.5), iv.erase(1, 4), iv.knockout([0], [0, 1], [6, 7])]
    with torch.no_grad():
        hooks = [*edits, ("h1[6]", lambda h, hook: seen.append(h.clone())), ("h1[8]", lambda h, hook: h * 2)]
        wanted = inner(lm).run_with_hooks(TEXT, fwd_hooks=hooks)
        with lm.intervene(edits):
            with lm.trace(TEXT):
                state = lm.site("h1[6]").output.save()
                lm.site("h1[8]").output *= 2
                y = lm.hooks["y1"].output.save()
                logits = lm.output.save()
        assert torch.equal(logits, wanted)
        assert torch.equal(state, seen[0])
        assert [done.layer for done in inner(lm).edits_done()] == [0, 0, 1]
        plain, cache = inner(lm).run_with_cache(TEXT)
        assert error(logits, plain) > 1e-4
        assert error(y, cache["y", 1]) > 1e-4


# ---- several prompts


@pytest.mark.parametrize("side", ["left", "right"])
def test_invokes_see_and_change_their_own_rows(backend: str, side: str) -> None:
    lm = traced(backend, side)
    model = inner(lm)
    short, long = "abc", "abcabcabd"
    with torch.no_grad():
        alone, cache = model.run_with_cache(short)
        _, other = model.run_with_cache(long)
        edited = model.run_with_hooks(
            long, fwd_hooks=[("delta0[-2:]", lambda v, hook: v * 3), ("h1[2]", lambda h, hook: h * 0)]
        )
        with lm.trace() as tracer:
            with tracer.invoke(short):
                whole = lm.hooks["delta0"].output.save()
                real = lm.site("delta0[:]").output.save()
                last = lm.site("h1[-1]").output.save()
                logits = lm.output.save()
            with tracer.invoke(long):
                lm.site("delta0[-2:]").output *= 3
                lm.site("h1[2]").output[:] = 0
                end = lm.site("h1[8]").output.save()
                theirs = lm.output.save()
            with tracer.invoke():
                both = lm.hooks["resid_post1"].output.save()
    assert whole.shape == (1, 9, 48)
    assert both.shape == (2, 9, 24)
    cut = slice(-3, None) if side == "left" else slice(0, 3)
    assert error(whole[:, cut], cache["delta", 0]) < 2e-6
    assert torch.equal(real, whole[:, cut])
    assert error(last, cache["h", 1][:, -1]) < 2e-6
    assert error(logits[:, cut], alone) < 5e-6
    assert error(theirs, edited) < 5e-6
    assert error(end, other["h", 1][:, 8]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_prompt_of_several_texts_has_its_positions_row_by_row(backend: str, side: str) -> None:
    lm = traced(backend, side)
    texts = ["abc", "abcabcabd", "abcde"]
    with torch.no_grad():
        solo = [inner(lm).run_with_hooks(t, fwd_hooks=[("h1[-1]", lambda h, hook: h * 2)])[0, -1] for t in texts]
        caches = [inner(lm).run_with_cache(t)[1] for t in texts]
        with lm.trace(texts):
            early = lm.site("h1[1]").output.save()
            picked = lm.site(ms.at("h1", [2, 4, 3])).output.save()
            last = lm.site("h1[-1]").output.clone().save()
            lm.site("h1[-1]").output *= 2
            logits = lm.site("ln_final.hook_normalized[-1]").output.save()
    assert error(early, torch.cat([c["h", 1][:, 1] for c in caches])) < 2e-6
    assert error(picked, torch.cat([c["h", 1][:, t] for c, t in zip(caches, (2, 4, 3), strict=True)])) < 2e-6
    assert error(last, torch.cat([c["h", 1][:, -1] for c in caches])) < 2e-6
    wanted = torch.stack(solo)
    assert error(logits * inner(lm).ln_final.weight @ inner(lm).W_U, wanted) < 1e-5


def test_many_invokes_of_one_text_are_one_batched_sweep(lm: TracedMamba) -> None:
    tokens = inner(lm).to_tokens(TEXT)
    with torch.no_grad():
        wanted = [inner(lm).run_with_hooks(tokens, fwd_hooks=[(f"h1[{t}]", lambda h, hook: h * 0)]) for t in range(6)]
        with lm.trace() as tracer:
            found = nnsight.save([])
            for t in range(6):
                with tracer.invoke(tokens):
                    lm.site(f"h1[{t}]").output[:] = 0
                    found.append(lm.output)
    for ours, theirs in zip(found, wanted, strict=True):
        assert error(ours, theirs) < 5e-6


def test_a_state_is_carried_from_one_prompt_to_another(lm: TracedMamba) -> None:
    """Two invokes meet at a barrier: the second gets the first one's state."""
    with torch.no_grad():
        _, cache = inner(lm).run_with_cache("abcd")
        wanted = inner(lm).run_with_hooks("cdab", fwd_hooks=[("h1[1]", lambda h, hook: cache["h", 1][:, 1])])
        with lm.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke("abcd"):
                state = lm.site("h1[1]").output.clone()
                barrier()
            with tracer.invoke("cdab"):
                barrier()
                lm.site("h1[1]").output = state
                logits = lm.output.save()
    assert error(logits, wanted) < 5e-6


# ---- what is refused


def test_what_is_missed_is_loud(lm: TracedMamba) -> None:
    with torch.no_grad():
        plain = inner(lm)(TEXT)
        with pytest.raises(OutOfOrderError, match=r"hook_h\[2\]\.output") as caught:
            with lm.trace(TEXT):
                lm.site("h1[5]").output.save()
                lm.site("h1[2]").output[:] = 0
        assert "in the order in which they fire" in caught.value.__notes__[0]
        with pytest.raises(OutOfOrderError, match=r"blocks\.0\.mixer\.hook_delta"):
            with lm.trace(TEXT):
                lm.hooks["delta1"].output.save()
                lm.hooks["delta0"].output.save()
        with pytest.raises(OutOfOrderError, match=r"blocks\.1\.mixer\.hook_delta"):
            with lm.trace(TEXT, stop_at_layer=1):
                lm.hooks["delta1"].output.save()
        with pytest.raises(HookError, match="the text has only 10 tokens"):
            with lm.trace(TEXT):
                lm.site("h1[10]").output.save()
        with pytest.raises(HookError, match="row 0 has only 3 tokens"):
            with lm.trace() as tracer:
                with tracer.invoke("abc"):
                    lm.site("h1[5]").output.save()
                with tracer.invoke("abcdefg"):
                    lm.site("h1[5]").output.save()
        with pytest.raises(HookError, match=r"returned shape \(1, 3\), expected \(1, 10, 48\)"):
            with lm.trace(TEXT):
                lm.hooks["delta1"].output = torch.zeros(1, 3)
        with pytest.raises(HookError, match=r"returned shape \(48, 5\), expected \(1, 48, 5\)"):
            with lm.trace(TEXT):
                lm.site("h1[3]").output = torch.zeros(48, 5)
        with pytest.raises(ZeroDivisionError):
            with lm.trace(TEXT):
                lm.site("h1[3]").output[:] = 1 / 0
        assert torch.equal(inner(lm)(TEXT), plain)
    assert not any(point.live for point in inner(lm).hook_dict.values())
    assert not inner(lm).list_hooks()


def test_what_cannot_be_is_refused_by_name() -> None:
    lm = traced()
    with pytest.raises(UnknownNameError, match="did you mean"):
        lm.hooks["blocks.1.mixer.hook_detla"]
    with pytest.raises(UnknownNameError, match="did you mean"):
        lm.site("blocks.1.mixer.hook_hh[3]")
    with pytest.raises(HookError, match=r"lm\.site\('h1\[3\]'\)"):
        lm.hooks["h1[3]"]
    with pytest.raises(HookError, match="states come one after the other"):
        lm.site("h1[2:5]")
    with pytest.raises(ValueError, match="outside of interleaving"):
        _ = lm.hooks["delta1"].output
    with pytest.raises(HookError, match="hands its value on"):
        _ = lm.blocks[1].mixer.hook_delta.input
    with pytest.raises(HookError, match="hook_conv its output"):
        _ = lm.blocks[1].mixer.conv1d.output
    with pytest.raises(InputError, match="wrap takes a mambascope model, got Linear"):
        ms.wrap(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="padding_side"):
        ms.wrap(inner(lm), padding_side="both")
    with pytest.raises(InputError, match="return_type= cannot differ"):
        with lm.trace() as tracer:
            with tracer.invoke("abc", return_type="loss"):
                lm.output.save()
            with tracer.invoke("abc", return_type="logits"):
                lm.output.save()
    with pytest.raises(InputError, match="several prompts in a batch are text or ids"):
        with lm.trace() as tracer:
            with tracer.invoke("abc"):
                lm.output.save()
            with tracer.invoke(torch.randn(1, 3)):
                lm.output.save()
    with pytest.raises(HookError, match="positions were given for 3 rows, the prompt has 1"):
        with lm.trace(TEXT):
            lm.site(ms.at("h1", [1, 2, 3])).output.save()
    for name in ("delta1", "h1[1]"):
        with pytest.raises(HookError, match=r"mixer.hook_\w+: .output was set to None; set a tensor"):
            with lm.trace(TEXT):
                lm.site(name).output = None
    with pytest.raises(HookError, match="a trace and other hooks cannot share it"):
        with inner(lm).hooks(fwd_hooks=[("h1[1]", lambda h, hook: h * 0)]):
            with lm.trace(["abc", "abcdef"]):
                lm.site("h1[-1]").output.save()
    assert len(lm.hooks) == len(list(lm.hooks)) == len(hook_names(2))
    assert repr(lm.site("h1[3]")) == "TracedSite(blocks.1.mixer.hook_h[3])"
    assert not any(point.live for point in inner(lm).hook_dict.values())


def test_beartype_can_be_imported_after_wrap() -> None:
    code = "import mambascope as ms\nms.wrap\nfrom beartype import beartype\nbeartype(lambda: 0)\n"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_are_what_the_model_takes(backend: str) -> None:
    lm = traced(backend)
    model = inner(lm)
    ids, mask = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask)
        with lm.trace(ids, attention_mask=mask):
            last = lm.site("resid_post1[-1]").output.save()
            logits = lm.output.save()
        assert torch.equal(logits, wanted)
        assert last.shape == (2, 24)
        with lm.trace([1, 2, 3]):
            one = lm.output.save()
        assert torch.equal(one, model(torch.tensor([[1, 2, 3]])))
        with lm.trace() as tracer:
            with tracer.invoke(ids, attention_mask=mask):
                two = lm.output.save()
            with tracer.invoke(torch.tensor([8, 9, 10, 11, 12, 13])):
                six = lm.output.save()
        assert error(two[0, :3], wanted[0, :3]) < 5e-6
        assert error(two[1, :4], wanted[1]) < 5e-6
        assert error(six, model(torch.tensor([[8, 9, 10, 11, 12, 13]]))) < 5e-6
        resid = model("abcab", stop_at_layer=1)
        with lm.trace(resid, start_at_layer=1):
            state = lm.site("h1[4]").output.save()
        assert error(state, model.run_with_cache("abcab")[1]["h", 1][:, 4]) < 1e-6
        assert torch.equal(lm("abcab"), model("abcab"))
        assert lm.to_string(lm.generate("abc", max_new_tokens=2)[0]) == model.generate("abc", max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:.*was never reached:UserWarning")
def test_the_document_runs(tmp_path: Path) -> None:
    """In a file of its own: nnsight reads the blocks' source."""
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    file = tmp_path / "bridges_example.py"
    file.write_text(blocks[0], encoding="utf-8")
    names = runpy.run_path(str(file))
    assert names["delta"].shape[0] == 1
    assert names["logits"].shape[1] == names["delta"].shape[1]
    assert names["gradient"].shape == names["state"].shape == names["model"].initial_state().ssm[3].shape
    assert names["ids"].shape[1] == names["model"].to_tokens("The river").shape[1] + 4

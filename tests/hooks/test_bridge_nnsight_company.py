# ruff: noqa: SIM117, PT012  (nnsight reads a trace's block from its own with statement)
"""nnsight's bridge in odd company: traces inside traces, states, dtypes, copies, interrupts."""

import copy

import pytest
import torch

import mambascope as ms
from mambascope.errors import HookError
from mambascope.hooks.nnsight_bridge import TracedMamba
from tests.conftest import error
from tests.hooks.tracing import TEXT, inner, traced

nnsight = pytest.importorskip("nnsight")


@pytest.fixture
def lm(backend: str) -> TracedMamba:
    return traced(backend)


def test_the_model_may_be_called_inside_a_block(lm: TracedMamba) -> None:
    with torch.no_grad():
        _, cache = inner(lm).run_with_cache(TEXT)
        other, _ = inner(lm).run_with_cache("ddcc")
        with lm.trace(TEXT):
            third = lm.site("h1[3]").output.save()
            aside, raw = lm("ddcc").save(), inner(lm)("ddcc").save()
            fifth = lm.site("h1[5]").output.save()
            delta = lm.hooks["resid_post1"].output.save()
    assert torch.equal(aside, other)
    assert torch.equal(raw, other)
    assert error(torch.stack([third, fifth], 1), cache["h", 1][:, [3, 5]]) < 1e-6
    assert torch.equal(delta, cache["resid_post", 1])


def test_another_model_may_be_traced_inside_a_block(lm: TracedMamba) -> None:
    other = traced("cpu", seed=3)
    with torch.no_grad():
        _, cache = inner(other).run_with_cache("ddcc")
        wanted = inner(lm).run_with_hooks(TEXT, fwd_hooks=[("h1[3]", lambda h, hook: cache["h", 1][:, 2])])
        with lm.trace(TEXT):
            with other.trace("ddcc"):
                state = other.site("h1[2]").output.save()
            lm.site("h1[3]").output = state
            logits = lm.output.save()
    assert error(logits, wanted) < 1e-6


def test_values_go_from_trace_to_trace_in_a_session(lm: TracedMamba) -> None:
    with torch.no_grad():
        _, cache = inner(lm).run_with_cache(TEXT)
        wanted = inner(lm).run_with_hooks("ddccab", fwd_hooks=[("h1[3]", lambda h, hook: cache["h", 1][:, 3])])
        with lm.session():
            with lm.trace(TEXT):
                state = lm.site("h1[3]").output
            with lm.trace("ddccab"):
                lm.site("h1[3]").output = state
                logits = lm.output.save()
    assert error(logits, wanted) < 1e-6


def test_states_go_in_and_out(lm: TracedMamba) -> None:
    with torch.no_grad():
        _, cache = inner(lm).run_with_cache(TEXT + "cab")
        _, state = inner(lm)(TEXT, return_state=True)
        with lm.trace("cab", state=state, prepend_bos=False):
            second = lm.site("h1[1]").output.save()  # positions count from the start of this call
        assert error(second, cache["h", 1][:, 11]) < 1e-5
        with lm.trace(return_state=True) as tracer:
            with tracer.invoke("cab"):
                short = lm.output.save()
            with tracer.invoke(TEXT):
                long = lm.output.save()
    assert short[1].batch_size == 1
    assert error(long[1].ssm, state.ssm) < 1e-5
    assert long[0].shape == short[0].shape == (1, 10, 50)


@pytest.mark.parametrize("how", ["bfloat16", "float64", "autocast", "inference"])
def test_other_dtypes_and_modes_have_the_bits_of_hooks(backend: str, how: str) -> None:
    lm = traced("torch" if (backend, how) == ("cpu", "float64") else backend)  # cpu computes in float32
    if how in ("bfloat16", "float64"):
        inner(lm).to(getattr(torch, how))
    mode = torch.inference_mode() if how == "inference" else torch.no_grad()
    with mode, torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        wanted = inner(lm).run_with_hooks(TEXT, fwd_hooks=[("h1[3]", lambda h, hook: h * 0.5)])
        with lm.trace(TEXT):
            lm.site("h1[3]").output = lm.site("h1[3]").output * 0.5
            logits = lm.output.save()
        assert torch.equal(logits, wanted)


def test_copies_and_second_wraps_stand_beside_each_other(lm: TracedMamba) -> None:
    twin, again = ms.wrap(copy.deepcopy(inner(lm))), ms.wrap(inner(lm))
    with torch.no_grad():
        plain = inner(lm)(TEXT)
        for each in (twin, again, lm):
            with each.trace(TEXT):
                each.site("h1[3]").output[:] = 0
                logits = each.output.save()
            assert error(logits, plain) > 1e-4
            assert torch.equal(inner(each)(TEXT), plain)


def test_the_model_is_its_own_again_after_a_trace(lm: TracedMamba) -> None:
    def replaced() -> list[str]:
        return [name for name, module in inner(lm).named_modules() if "forward" in module.__dict__]

    assert not replaced()
    with torch.no_grad(), lm.trace(TEXT):
        during = nnsight.save(replaced())
        lm.output.save()
    assert "blocks.1.mixer" in during
    assert "blocks.1.mixer.in_proj" not in during  # nobody asked: computed as in a plain run
    with torch.no_grad(), lm.trace(TEXT):
        xz = lm.blocks[1].mixer.in_proj.output.save()
    assert xz.shape == (1, 10, 96)
    assert not [name for name in during if name.rsplit(".", 1)[-1].startswith("hook_")]
    assert not replaced()
    other = nnsight.NNsight(inner(lm))
    with torch.no_grad(), lm.trace(TEXT):
        lm.output.save()
    assert "blocks.1.mixer.in_proj" in replaced()  # theirs
    with torch.no_grad(), other.trace(inner(lm).to_tokens(TEXT)):
        logits = other.output.save()
    assert error(logits, inner(lm)(TEXT)) < 1e-6


@pytest.mark.filterwarnings("ignore:An intervention block raised GreenletExit:UserWarning")
def test_an_interrupt_leaves_nothing_behind(lm: TracedMamba) -> None:
    with torch.no_grad():
        plain = inner(lm)(TEXT)
        with pytest.raises(KeyboardInterrupt):
            with lm.trace(TEXT):
                lm.site("h1[3]").output[:] = 0
                raise KeyboardInterrupt
        assert not any(point.live for point in inner(lm).hook_dict.values())
        assert torch.equal(inner(lm)(TEXT), plain)
        with lm.trace(TEXT):
            logits = lm.output.save()
        assert torch.equal(logits, plain)
    with pytest.raises(HookError, match="being traced already"):
        with lm.trace(TEXT):
            with lm.trace(TEXT):
                lm.output.save()

# ruff: noqa: SIM117, PT012, PT031  (nnsight reads a trace's block from its own with statement)
"""nnsight's bridge: edits that stay, gradients, generation."""

import pytest
import torch
from torch import Tensor

from mambascope.errors import HookError
from mambascope.hooks.nnsight_bridge import TracedMamba
from mambascope.hooks.points import LAZY, hook_names
from tests.conftest import error
from tests.hooks.tracing import TEXT, inner, traced

nnsight = pytest.importorskip("nnsight")
from nnsight.intervention.interleaver import OutOfOrderError  # noqa: E402


@pytest.fixture
def lm(backend: str) -> TracedMamba:
    return traced(backend)


# ---- edits


def test_edits_stay_until_they_are_cleared(lm: TracedMamba) -> None:
    with torch.no_grad():
        plain = inner(lm)(TEXT)
        hooked = inner(lm).run_with_hooks(TEXT, fwd_hooks=[("h1[3]", lambda h, hook: h * 0)])
        with lm.edit() as (_, edited):
            edited.site("h1[3]").output[:] = 0
        for _ in range(2):
            with edited.trace(TEXT):
                logits = edited.output.save()
            assert torch.equal(logits, hooked)
        with lm.trace(TEXT):
            logits = lm.output.save()
        assert torch.equal(logits, plain)
        with lm.edit(inplace=True):
            lm.site("h1[3]").output[:] = 0
        with lm.trace() as tracer:
            with tracer.invoke(TEXT):
                one = lm.output.save()
            with tracer.invoke(TEXT):
                lm.site("h1[5]").output[:] = 0
                two = lm.output.save()
        assert error(one, hooked) < 5e-6
        assert error(two, one) > 1e-4
        lm.clear_edits()
        assert torch.equal(lm.trace(TEXT, trace=False), plain)


# ---- gradients


def test_gradients_are_those_of_backward_hooks(lm: TracedMamba) -> None:
    model = inner(lm)
    names = [n for n in hook_names(2) if n.split(".", 2)[-1] not in LAZY and n.startswith("blocks.1")]
    sites = ["blocks.1.mixer.hook_h[2]", "blocks.1.mixer.hook_h[6]"]
    wanted: dict[str, Tensor] = {}
    hooks = [(n, lambda g, hook, n=n: wanted.update({n: g.clone()})) for n in [*names, *sites]]
    model.run_with_hooks(TEXT, return_type="loss", bwd_hooks=hooks).backward()
    model.zero_grad()
    order = [*names[: names.index("blocks.1.mixer.hook_y")], *sites, *names[names.index("blocks.1.mixer.hook_y") :]]
    with lm.trace(TEXT, return_type="loss"):
        values = {name: lm.site(name).output for name in order}
        loss = lm.output
        with loss.backward():
            grads = nnsight.save({})
            for name in reversed(order):
                grads[name] = values[name].grad
    for name in order:
        assert error(grads[name], wanted[name]) < 1e-5, name


def test_a_gradient_can_be_set_and_each_invoke_has_its_own(lm: TracedMamba) -> None:
    model, longer = inner(lm), "abcabcabd"

    def grads_of(text: str) -> Tensor:
        found: list[Tensor] = []
        hook = ("h1[2]", lambda g, hook: found.append(g.clone()))
        model.run_with_hooks(text, bwd_hooks=[hook])[:, -1 if text == longer else 3].square().sum().backward()
        return found[0]

    wanted, other = grads_of(longer), grads_of("abcd")
    model.zero_grad()
    with lm.trace() as tracer:
        with tracer.invoke("abcd"):
            state = lm.site("h1[2]").output
            with lm.output[:, 3].square().sum().backward(retain_graph=True):
                short = state.grad.save()
        with tracer.invoke(longer):
            theirs = lm.site("h1[2]").output
            with lm.output[:, -1].square().sum().backward():
                long = theirs.grad.save()
    assert error(short, other) < 1e-5
    assert error(long, wanted) < 1e-5
    model.zero_grad()
    with lm.trace(TEXT, return_type="loss"):
        delta = lm.hooks["delta1"].output
        with lm.output.backward():
            delta.grad = delta.grad * 0
    assert model.blocks[1].mixer.dt_proj.bias.grad.abs().max() == 0
    assert model.blocks[0].mixer.dt_proj.bias.grad.abs().max() > 0


# ---- generate


def test_generate_fires_points_once_a_step(lm: TracedMamba) -> None:
    ids = inner(lm).to_tokens("abca")
    wanted, cache = inner(lm).generate(ids, max_new_tokens=5, stop_tokens=[], return_cache=True)
    with lm.generate("abca", max_new_tokens=5, stop_tokens=[]) as tracer:
        steps, states = nnsight.save([]), nnsight.save([])
        for _ in tracer.iter[:5]:
            steps.append(lm.hooks["delta1"].output)
            states.append(lm.hooks["resid_post1"].output)
        result = tracer.result.save()
    assert torch.equal(result, wanted)
    assert [s.shape[1] for s in steps] == [4, 1, 1, 1, 1]
    assert error(torch.cat(steps, 1), cache["delta", 1]) < 1e-6
    assert error(torch.cat(states, 1), cache["resid_post", 1]) < 1e-6


def test_sites_in_generate_are_absolute(lm: TracedMamba) -> None:
    def erase(h: Tensor, hook: object) -> Tensor:
        return h * 0

    ids = inner(lm).to_tokens("abca")
    with inner(lm).hooks(fwd_hooks=[("h1[2]", erase), ("h0[5]", erase), ("u1[6]", erase)]):
        wanted, cache = inner(lm).generate(ids, max_new_tokens=5, stop_tokens=[], return_cache=True)
    with lm.generate("abca", max_new_tokens=5, stop_tokens=[]) as tracer:
        lm.site("h1[2]").output[:] = 0
        lm.site("h0[5]").output[:] = 0
        lm.site("u1[6]").output[:] = 0
        late = lm.site("h1[7]").output.save()
        result = tracer.result.save()
    assert torch.equal(result, wanted)
    assert error(late, cache["h", 1][:, 7]) < 1e-5
    with pytest.raises(HookError, match="negative positions have no meaning"):
        with lm.generate("abca", max_new_tokens=2):
            lm.site("h1[-1]").output.save()


def test_a_step_named_late_is_the_step_that_was_named(lm: TracedMamba) -> None:
    ids = inner(lm).to_tokens("abca")
    _, cache = inner(lm).generate(ids, max_new_tokens=5, stop_tokens=[], return_cache=True)
    with lm.generate("abca", max_new_tokens=5, stop_tokens=[]) as tracer:
        for _ in tracer.iter[1]:
            lm.hooks["delta0"].output.save()
        for _ in tracer.iter[3]:
            third = lm.hooks["delta1"].output.save()  # asked for when two of them have passed
        for _ in tracer.iter[3]:
            last = lm.site("y1[4:]").output.save()  # occurrence 0 was the token of step 1, so this is step 4
    assert error(third, cache["delta", 1][:, 6:7]) < 1e-6
    assert error(last, cache["y", 1][:, 7:8]) < 1e-6
    with pytest.warns(UserWarning, match=r"hook_y\[4:\]\.output\.i4' was never reached"):
        with lm.generate("abca", max_new_tokens=5, stop_tokens=[]) as tracer:
            for _ in tracer.iter[4]:
                lm.site("y1[4:]").output.save()  # it has four occurrences, 0 to 3
    with pytest.raises(OutOfOrderError, match=r"hook_y\[4:\]\.output\.i0"):
        with lm.generate("abca", max_new_tokens=5, stop_tokens=[]) as tracer:
            for _ in tracer.iter[3]:
                lm.hooks["delta1"].output.save()
            lm.site("y1[4:]").output.save()  # its first occurrence has passed
    with pytest.raises(OutOfOrderError, match=r"hook_h\[5\]\.output\.i0"):
        with lm.generate("abca", max_new_tokens=5, stop_tokens=[]) as tracer:
            for _ in tracer.iter[3]:
                lm.hooks["delta1"].output.save()
            lm.site("h1[5]").output.save()
    with lm.generate("abca", max_new_tokens=5, stop_tokens=[]) as tracer:
        for _ in tracer.iter[1]:
            lm.hooks["delta0"].output.save()
        for _ in tracer.iter[3]:
            xz = lm.blocks[1].mixer.in_proj.output.save()
    assert error(xz[..., :48], cache["x", 1][:, 6:7]) < 1e-6
    with pytest.warns(UserWarning, match=r"was never reached"):
        with lm.generate("abca", max_new_tokens=3, stop_tokens=[]) as tracer:
            every = nnsight.save([])
            for _ in tracer.iter[:]:
                every.append(lm.hooks["h1"].output)  # a state without a position: one occurrence a token
    assert error(torch.stack(every, 1), cache["h", 1][:, :6]) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_of_prompts_of_different_lengths(backend: str, side: str) -> None:
    lm = traced(backend, side)
    texts = ["abc", "abcabcab"]
    wanted = [inner(lm).generate(inner(lm).to_tokens(t), max_new_tokens=4, stop_tokens=[])[0] for t in texts]
    with lm.generate(max_new_tokens=4, stop_tokens=[]) as tracer:
        with tracer.invoke(texts[0]):
            first = nnsight.save([])
            for _ in tracer.iter[:4]:
                first.append(lm.hooks["delta1"].output)
            short = tracer.result.save()
        with tracer.invoke(texts[1]):
            state = lm.site("h1[9]").output.save()
            long = tracer.result.save()
    assert torch.equal(short[0], wanted[0])
    assert torch.equal(long[0], wanted[1])
    _, cache = inner(lm).generate(inner(lm).to_tokens(texts[1]), max_new_tokens=4, stop_tokens=[], return_cache=True)
    assert error(state, cache["h", 1][:, 9]) < 1e-5
    assert [v.shape[:2] for v in first] == [(1, 8), (1, 1), (1, 1), (1, 1)]

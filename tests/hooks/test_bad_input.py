"""What goes wrong in first attempts, and what is said then: the thing, what was expected, what to do."""

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.errors import BackendError, HookError, InputError, UnknownNameError
from mambascope.model import HookedMamba
from tests.conftest import make_model

iv = ms.interventions
NAN = float("nan")
POINT = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def small() -> HookedMamba:
    return make_model(backend="torch")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: iv.zero(3), r"a site is a string like .*got 3"),
        (lambda: iv.zero(None), r"got None"),
        (lambda: iv.zero(("h", 3)), r"got 3"),
        (lambda: ms.at("blocks.1.mixer.hook_h[3]", [5]), r"positions apart from it; got 'blocks.1.mixer.hook_h\[3\]'"),
        (lambda: iv.clamp(POINT, NAN), r"clamp: low is NaN"),
        (lambda: iv.clamp(POINT, high="1"), r"clamp: high must be a number, got '1'"),
        (lambda: iv.scale(POINT, "2"), r"scale: factor must be a number, got '2'"),
        (lambda: iv.scale(POINT, NAN), r"scale: factor is NaN"),
        (lambda: iv.steer(POINT, torch.full((24,), NAN)), r"the direction has NaN"),
        (lambda: iv.steer(POINT, torch.ones(24, dtype=torch.long)), r"float tensor as direction, got torch.int64"),
        (lambda: iv.decay(1, 2, "half"), r"decay: factor must be a number"),
        (lambda: iv.knockout("12", 1, 3), r"layers are integers, got '12'"),
        (lambda: iv.knockout([1, 2.0], 1, 3), r"layers are integers, got 2.0"),
        (lambda: iv.knockout([], 1, 3), r"None means all\): layers is empty"),
        (lambda: iv.knockout(1, "a", 3), r"sources must be positions, got 'a'"),
        (lambda: iv.knockout(1, 1, 1.5), r"targets must be positions, got 1.5"),
        (lambda: iv.erase("1", 2), r"layers are integers, got '1'"),
    ],
)
def test_an_intervention_that_means_nothing_is_refused_when_it_is_made(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(HookError, match=said):
        make()


@pytest.mark.parametrize("through", ["1", ["blocks.1"], 1.5])
def test_blocks_on_a_path_are_numbers(small: HookedMamba, ids: torch.Tensor, through: Any) -> None:
    with pytest.raises(HookError, match="path_patch: through: layers are integers"):
        iv.path_patch(small, ids, ids.flip(0), "blocks.0", "blocks.2", through)


def test_a_name_without_its_block(small: HookedMamba, ids: torch.Tensor) -> None:
    for short in ("hook_h", "delta"):
        with pytest.raises(UnknownNameError, match=rf"'{short}' stands in every block: name one of them"):
            small.run_with_hooks(ids, fwd_hooks=[(short, lambda v, hook: None)])
    with pytest.raises(UnknownNameError, match=r"'h' stands in every block: name one.*'blocks.0.mixer.hook_h' or 'h0'"):
        small.run_with(ids, iv.zero("h"))
    assert small.run_with(ids, iv.zero("h0")).shape == (2, 9, 50)


def test_one_intervention_is_recorded_as_several_are(small: HookedMamba, ids: torch.Tensor, tmp_path: Path) -> None:
    one = iv.zero(POINT)
    iv.save(tmp_path / "one", one)
    assert str(iv.load(tmp_path / "one")[0]) == str(one)
    assert torch.equal(iv.record(small, ids, one).run(small), small.run_with(ids, one))
    for wrong in ([(POINT, lambda v, hook: v)], tmp_path):
        with pytest.raises(HookError, match="only interventions have a record"):
            iv.record(small, ids, wrong)  # type: ignore[arg-type]
    with pytest.raises(HookError, match="only interventions have a record"):
        iv.save(one, tmp_path / "two")  # type: ignore[arg-type]


def test_a_patch_of_weights_that_changed_since_is_refused(ids: torch.Tensor) -> None:
    model = make_model()
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=POINT)
        iv.patch(POINT, cache)
        model.blocks[1].mixer.D.add_(1)
        with pytest.raises(ms.MambascopeError, match=r"blocks.1.mixer.D has changed since"):
            iv.patch(POINT, cache)


def scaled(model: HookedMamba, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)


def trained(model: HookedMamba) -> None:
    """By an optimizer that torch does not count the edits of."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model(torch.zeros(1, 4, dtype=torch.long), return_type="loss").backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("made", ["patch", "mean", "resample", "freeze", "path_patch"])
@pytest.mark.parametrize(
    "change",
    [
        partial(scaled, name="blocks.2.mixer.in_proj.weight"),
        partial(scaled, name="embed.weight"),
        partial(scaled, name="ln_final.weight"),
        trained,
    ],
)
def test_an_edit_made_before_its_models_weights_changed_does_not_run(
    made: str, change: Callable[[HookedMamba], None], ids: torch.Tensor, tmp_path: Path
) -> None:
    model = make_model()
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
        edit = {
            "patch": lambda: iv.patch(POINT, cache),
            "mean": lambda: iv.mean(POINT, cache),
            "resample": lambda: iv.resample(POINT, cache),
            "freeze": lambda: iv.freeze(cache, "delta", layers=1),
            "path_patch": lambda: iv.path_patch(model, ids[:1], ids[1:2], "blocks.0", "blocks.1")[0],
        }[made]()
        want = model.run_with(ids, edit)
        assert torch.equal(model.run_with(ids, edit), want)
        twin = copy.deepcopy(model)
    change(model)
    with torch.no_grad():
        for use in (lambda: model.run_with(ids, edit), lambda: iv.save(tmp_path / "edit", edit)):
            with pytest.raises(
                HookError, match=r"weights that are no more: [\w.]+ of .* was changed, trained or moved"
            ):
                use()
        with pytest.raises(HookError, match="no more"), model.intervene(edit):
            pass
        free = dataclasses.replace(edit, source=None)
        assert not torch.equal(model.run_with(ids, free), want)
        assert torch.equal(twin.run_with(ids, free), want)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (ms.KL, r"metric is the class KL; give one of its kind: KL\(…\)"),
        (ms.LogitDifference(3, 3), r"right and wrong answer of pair 0 are one token \(3\)"),
        (ms.LogitDifference(1.5, 3), r"answer 1.5 is neither a text nor an id"),
        (ms.Probability(None), r"answer None is neither a text nor an id"),
        (lambda logits: logits.sum() * 1j, r"returned a complex number"),
    ],
)
def test_a_metric_that_is_none(small: HookedMamba, ids: torch.Tensor, metric: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ms.sweep(small, ids[:1], ids[1:], metric)


def test_answers_as_a_tensor_and_places_as_numbers_or_slices(small: HookedMamba, ids: torch.Tensor) -> None:
    answers = ms.LogitDifference(torch.tensor([3]), torch.tensor([4]))  # type: ignore[arg-type]
    found = ms.sweep(small, ids[:1], ids[1:], answers, {"layers": slice(1, None), "positions": slice(-2, None)})
    one = ms.sweep(small, ids[:1], ids[1:], ms.LogitDifference(3, 4), {"layers": 2, "positions": -1})
    assert found.values.shape == (1, 2, 2, 1)
    assert torch.allclose(found.values[0, 1, 1], one.values[0, 0, 0])


def test_attribution_in_inference_mode(small: HookedMamba, ids: torch.Tensor) -> None:
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        ms.attribute(small, ids[:1], ids[1:], ms.LogitDifference(3, 4))


def test_an_error_in_a_hook_says_where_it_was(small: HookedMamba, ids: torch.Tensor) -> None:
    for name, calls in (("mixer.hook_h", "at every step, h B D N"), ("hook_resid_pre", r"hook(value, hook=point)")):
        for wrong, kind in ((lambda value, hook: 1 / 0, ZeroDivisionError), (lambda value: value, TypeError)):
            with pytest.raises(kind) as caught:
                small.run_with_hooks(ids, fwd_hooks=[(f"blocks.1.{name}[3]", wrong)])
            (note,) = caught.value.__notes__
            assert note.startswith(f"raised by a hook at blocks.1.{name}; hooks are called as hook(")
            assert calls in note
    with pytest.raises(HookError, match=r"returned layout torch.sparse_coo, expected torch.strided"):
        small.run_with_hooks(ids, fwd_hooks=[(POINT, lambda value, hook: value.to_sparse())])


def test_a_model_with_hooks_is_copied_but_not_pickled(ids: torch.Tensor) -> None:
    model = make_model()
    with model.hooks([("blocks.1.mixer.hook_h[3]", lambda h, hook: h * 0)]):
        assert torch.equal(copy.deepcopy(model)(ids), model(ids))
        for write in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
            with pytest.raises(HookError, match=r"hooks in force \(at blocks.1.mixer.hook_h\) cannot be pickled"):
                write(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), model(ids))


def test_a_shallow_copy_of_a_model_shares_its_hooks(ids: torch.Tensor) -> None:
    model = make_model()
    plain = model(ids)
    with model.intervene(iv.zero(POINT)):
        twin = copy.copy(model)
        edited = model(ids)
        assert torch.equal(twin(ids), edited)
        assert not torch.equal(edited, plain)
    assert torch.equal(twin(ids), plain)
    assert torch.equal(twin.run_with(ids, iv.zero(POINT)), edited)
    assert torch.equal(model(ids), plain)


def test_a_copied_state_keeps_its_graph(small: HookedMamba, ids: torch.Tensor) -> None:
    _, state = small(ids, return_state=True)
    twin = copy.deepcopy(state)
    assert torch.equal(twin.ssm, state.ssm)
    assert twin.layers[0].ssm is not state.layers[0].ssm  # type: ignore[union-attr]
    small(ids, state=twin).sum().backward()


def test_a_backend_that_is_none(small: HookedMamba) -> None:
    for wrong in ("gpu", None):
        with pytest.raises(BackendError, match="unknown backend"):
            small.backend = wrong
    with pytest.raises(BackendError, match="unknown backend 'gpu', did you mean 'cpu'"):
        make_model(backend="gpu")
    assert small.backend == "torch"


def test_input_without_values(small: HookedMamba, ids: torch.Tensor) -> None:
    for given, options in ((ids, {}), (torch.zeros(1, 3, 24), {"start_at_layer": 1})):
        with pytest.raises(InputError, match="meta device and holds no values"):
            small(given.to("meta"), **options)

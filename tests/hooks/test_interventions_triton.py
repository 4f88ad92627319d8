"""Interventions on the Triton path: under the interpreter on a CPU, as they are on a GPU."""

import os
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

import mambascope as ms
from mambascope.model import HookedMamba
from tests.conftest import error, make_model
from tests.hooks.test_positions_per_row import batch_of, check_closed_form

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)


@pytest.mark.parametrize("where", [[0, 3, 8, 8, 5, 6], [2, 5]])
def test_a_state_edit_follows_the_closed_form(where: list[int]) -> None:
    model = make_model(backend="triton", n_layers=2, d_model=8).to(DEVICE)
    check_closed_form(model, batch_of(len(where), 9).to(DEVICE), where)


iv = ms.interventions


def pair_of_models() -> tuple[HookedMamba, HookedMamba]:
    """The Triton path and the truth, of the same weights."""
    sizes: Any = {"n_layers": 2, "d_model": 8}
    return make_model(backend="triton", **sizes).to(DEVICE), make_model(backend="reference", **sizes).to(DEVICE)


@pytest.mark.parametrize("name", ["states", "knockout", "conv", "freeze"])
def test_interventions_agree_with_the_reference(name: str) -> None:
    tokens, others = (batch_of(2, 7).to(DEVICE), batch_of(4, 7)[2:].to(DEVICE))
    got = []
    with torch.no_grad():
        for model in pair_of_models():
            cache = model.run_with_cache(others)[1]
            edits = {
                "states": [
                    iv.decay(0, 0, 0.5),
                    iv.patch("blocks.1.mixer.hook_h[2:5]", cache),
                    iv.erase(1, -1, dims=[0]),
                ],
                "knockout": [iv.knockout(1, [1, 2], slice(4, None)), iv.knockout(0, [[0], [3]], [[5], [6]], dims=[1])],
                "conv": [iv.knockout([0, 1], [1, 2], slice(3, None), through="conv")],
                "freeze": [iv.freeze(cache, ("delta", "B", "C", "silu"))],
            }[name]
            got.append((model.run_with(tokens, edits), model(tokens)))
            assert model.explain_path()[0].backend == model.backend
    (mine, plain), (truth, _) = got
    assert error(mine, truth) < 1e-5
    assert error(mine, plain) > 1e-4


def test_a_run_patched_with_itself_is_the_plain_run() -> None:
    model, _ = pair_of_models()
    tokens = batch_of(1, 6).to(DEVICE)
    with torch.no_grad():
        plain, cache = model(tokens), model.run_with_cache(tokens)[1]
        for site in ("hook_mixer_out[3]", "mixer.hook_delta[2:5]"):
            assert torch.equal(model.run_with(tokens, iv.patch(f"blocks.1.{site}", cache)), plain), site
        for where in ("[3]", ""):
            assert error(model.run_with(tokens, iv.patch(f"blocks.1.mixer.hook_h{where}", cache)), plain) < 2e-6
        assert torch.equal(model(tokens), plain)


def test_in_generate_edits_reach_the_later_tokens() -> None:
    fast, true = pair_of_models()
    tokens = batch_of(1, 5).to(DEVICE)
    texts = []
    with torch.no_grad():
        for model in (fast, true):
            with model.intervene([iv.scale("blocks.1.mixer.hook_h[5]", 3.0), iv.knockout(0, [1], slice(5, None))]):
                texts.append(model.generate(tokens, max_new_tokens=2, stop_tokens=[]))
    assert torch.equal(*texts)

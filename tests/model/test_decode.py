"""One token by the step kernels, against the float64 reference: Triton's interpreter on CPU tensors."""

import copy
import os

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (extra 'test')")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the step kernels run on CPU tensors only under TRITON_INTERPRET=1", allow_module_level=True)

from mambascope.model import HookedMamba
from mambascope.model.decode import Decoder
from tests.conftest import error, make_model


def truth(model: HookedMamba, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, and both states after the last token, in float64 by the plain recurrence."""
    exact = copy.deepcopy(model).double()
    exact.backend = "reference"
    with torch.no_grad():
        logits, state = exact(tokens, return_state=True)
    return logits, state.ssm, state.conv


SHAPES = {
    "plain": {},
    "odd": {"d_model": 20, "d_inner": 37, "d_state": 7, "dt_rank": 3, "d_conv": 3, "conv_bias": False},
    "biases": {"proj_bias": True, "d_conv": 1, "n_layers": 2},
    "falcon": {"mixer_norm_eps": 1e-6, "d_state": 4},
    "untied": {"tie_embeddings": False, "residual_in_fp32": False, "d_vocab": 61},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_as_near_to_the_truth_as_the_whole_text(shape: str) -> None:
    model = make_model(**{"n_layers": 2, **SHAPES[shape]})
    model.requires_grad_(False)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    want, ssm, conv = truth(model, tokens)
    with torch.no_grad():
        decoder = Decoder(model, 2, record=False)
        state = model.initial_state(2)
        for t in range(tokens.shape[1]):
            logits, layers = decoder.step(model, tokens[:, t], state)
            assert error(logits, want[:, t]) < 2e-6
            state = type(state)(layers, t + 1, model.model_id)
    assert error(state.ssm, ssm) < 1e-6
    if conv.numel():
        assert error(state.conv, conv) < 1e-6

"""Blocks as one node each of autograd's graph: what the operators one by one give. Interpreted, or on a GPU."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from mambascope.config import MambaConfig
from mambascope.errors import BackendError
from mambascope.model import HookedMamba, straight
from mambascope.ops import block
from tests.ops.tolerance import error

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)
DEVICE = "cuda" if CUDA else "cpu"


def make(**options: Any) -> HookedMamba:
    torch.manual_seed(0)
    shape = {"d_model": 6, "n_layers": 2, "d_vocab": 11, "d_state": 2, "dt_rank": 3}
    return HookedMamba(MambaConfig(**(shape | options)), device=DEVICE, backend="triton")


def tokens(seed: int = 0, length: int = 5) -> Tensor:
    return torch.randint(0, 11, (1, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def gradients(model: HookedMamba, total: Tensor) -> dict[str, Tensor]:
    names, leaves = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(total, leaves, allow_unused=True), strict=True))


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = block.residual_block
    monkeypatch.setattr(straight, "residual_block", lambda *a, **o: (calls.append(1), original(*a, **o))[1])
    return calls


def compare(found: dict[str, Tensor], want: dict[str, Tensor], bar: float) -> None:
    for name, exact in want.items():
        assert found[name].dtype == exact.dtype
        assert error(found[name], exact) < bar, name


@pytest.mark.parametrize("options", [{}, {"proj_bias": True, "residual_in_fp32": False, "conv_bias": False}])
def test_loss_and_gradients(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = make(**options), tokens(), count(monkeypatch)
    loss = model(x, return_type="loss")
    found = gradients(model, loss)
    assert calls == [1, 1]
    assert {p.form for p in model.explain_path()} == {"fused"}
    monkeypatch.setattr(straight, "can_join", lambda *_: False)
    apart = model(x, return_type="loss")
    assert torch.equal(apart, loss)
    compare(found, gradients(model, apart), 2e-6)
    exact = make(**options).double()
    exact.backend = "reference"
    compare(found, {k: v.float() for k, v in gradients(exact, exact(x, return_type="loss")).items()}, 5e-6)
    wrong = gradients(exact, exact(x.flip(1), return_type="loss"))
    assert error(wrong["blocks.0.mixer.in_proj.weight"], found["blocks.0.mixer.in_proj.weight"]) > 1e-2


def test_through_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = make(), tokens(length=6), count(monkeypatch)

    def total(in_pieces: bool) -> Tensor:
        if not in_pieces:
            return model(x).square().sum()
        first, state = model(x[:, :3], return_state=True)
        second, state = model(x[:, 3:], state=state, return_state=True)
        last = sum(layer.ssm.sum() + layer.conv.sum() for layer in state.layers)
        return first.square().sum() + second.square().sum() + 0.0 * last

    want, found = gradients(model, total(False)), gradients(model, total(True))
    assert len(calls) == 6
    compare(found, want, 5e-6)


def test_only_states_or_only_the_residual_are_asked_for() -> None:
    model, x = make(), tokens()
    _, state = model(x, return_state=True)
    found = gradients(model, state.layers[0].ssm.sum() + state.layers[0].conv.sum())
    exact = make().double()
    exact.backend = "reference"
    state = exact(x, return_state=True)[1]
    want = gradients(exact, state.layers[0].ssm.sum() + state.layers[0].conv.sum())
    for name in ("embed.weight", "blocks.0.norm.weight", "blocks.0.mixer.in_proj.weight", "blocks.0.mixer.A_log"):
        assert error(found[name], want[name]) < 5e-6, name
    assert found["blocks.0.mixer.out_proj.weight"] is None or not found["blocks.0.mixer.out_proj.weight"].any()
    resid = torch.randn(1, 5, 6, device=DEVICE, requires_grad=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    (slope,) = torch.autograd.grad(model(resid, start_at_layer=1).square().sum(), resid)
    exact.requires_grad_(False)
    other = resid.detach().double().requires_grad_()
    assert error(slope, torch.autograd.grad(exact(other, start_at_layer=1).square().sum(), other)[0]) < 5e-6


def test_two_passes_give_the_same_bits_and_hooks_take_the_open_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, calls = make(), tokens(), count(monkeypatch)
    first, second = (gradients(model, model(x, return_type="loss")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    calls.clear()
    plain = model(x)
    seen: list[Tensor] = []
    with model.hooks(fwd_hooks=[("blocks.1.mixer.hook_u", lambda value, hook: seen.append(value))]):
        assert torch.equal(model(x), plain)
        hooked = gradients(model, model(x, return_type="loss"))
    assert len(calls) == 2
    assert len(seen) == 2
    compare(first, hooked, 2e-6)


def test_second_derivatives_are_refused_by_name() -> None:
    model, x = make(), tokens()
    leaf = model.embed.weight
    (slope,) = torch.autograd.grad(model(x).square().sum(), leaf, create_graph=True)
    with pytest.raises(BackendError, match="a block's backward on backend 'triton' has no second derivative"):
        torch.autograd.grad(slope.square().sum(), leaf)


def test_under_autocast() -> None:
    model, x = make(), tokens()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = model(x, return_type="loss")
    found, want = gradients(model, loss), gradients(model, model(x, return_type="loss"))
    assert loss.dtype == torch.float32
    compare(found, want, 0.1)
    assert not torch.equal(found["blocks.0.mixer.in_proj.weight"], want["blocks.0.mixer.in_proj.weight"])

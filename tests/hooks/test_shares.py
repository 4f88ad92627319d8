"""Source contributions of a cache: amounts that add up, in both spaces, from both ends of the convolution."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mambascope.errors import CacheError, InputError
from mambascope.model import HookedMamba
from tests.conftest import error, make_model


def cached(model: HookedMamba, tokens: Any, **options: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(tokens, **options)[1]


def vector(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def lively(**options: Any) -> HookedMamba:
    model = make_model(proj_bias=True, **options)
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.bias.normal_()
    return model


@pytest.mark.parametrize("through", ["scan", "conv"])
@pytest.mark.parametrize("N", [1, 7, 16])
def test_they_add_up(tokens: Tensor, N: int, through: Any) -> None:
    model = lively(d_state=N)
    with torch.no_grad():
        _, state = model(tokens[:, :19], return_state=True)
    cache = cached(model, tokens[:, 19:], state=state)
    for layer, query in ((0, 0), (1, 17), (2, -1)):
        inner = cache.source_contributions(layer, query, vector(48), through=through)
        y = cache["y", layer][:, query].double() @ vector(48).double()
        assert error(inner.amounts.sum(-1) + inner.before + inner.bias, y) < 1e-5
        assert inner.error < 1e-5
        resid = cache.source_contributions(layer, query, vector(24), space="resid", through=through)
        out = cache["mixer_out", layer][:, query].double() @ vector(24).double()
        assert error(resid.added, out) < 1e-5
        assert resid.error < 1e-5
        assert resid.amounts.shape == (2, 51)
        assert not resid.amounts[:, resid.query[0] + 1 :].any()
        assert resid.before.abs().min() > 0 and resid.skip.abs().min() > 0 and resid.constant.abs().min() > 0
        assert (inner.bias.abs().max() > 0) == (through == "conv")
        other = cache.source_contributions(layer, query, vector(48, 1), through=through)  # the check can fail
        assert error(other.amounts.sum(-1) + other.before, y) > 1e-2


def test_by_hand_and_written_out(tokens: Tensor) -> None:
    model = make_model()
    cache = cached(model, tokens)
    v, t = vector(48), 20
    found = cache.source_contributions(1, t, v)
    delta, B, C, u = (cache[n, 1].double() for n in ("delta", "B", "C", "u_write"))
    A = model.decay(1).double()
    for s in (0, 11, 20):
        decay = torch.exp(A * delta[:, s + 1 : t + 1].sum(1)[..., None])  # B D N
        alpha = (C[:, t, None] * decay * delta[:, s, :, None] * B[:, s, None]).sum(-1)
        assert error(found.amounts[:, s], (alpha * u[:, s]) @ v.double()) < 1e-5
    assert error(found.skip, (u[:, t] * model.blocks[1].mixer.D.detach().double()) @ v.double()) < 1e-6


def test_an_amount_is_what_goes_away_without_the_token(tokens: Tensor) -> None:
    model = make_model().double()
    cache = cached(model, tokens)
    w = vector(24).double()
    found = cache.source_contributions(2, -1, w, space="resid")
    with model.hooks(fwd_hooks=[("blocks.2.mixer.hook_u_write[31]", lambda u, hook: torch.zeros_like(u))]):
        change = (cached(model, tokens)["mixer_out", 2] - cache["mixer_out", 2])[:, -1] @ w
    assert error(change, -found.amounts[:, 31]) < 1e-6
    assert error(change, -found.amounts[:, 30]) > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_nobodys(side: str) -> None:
    model = make_model()
    rows = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in (13, 20)]
    ids, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(20 - len(row), 20) if side == "left" else slice(0, len(row))
        ids[b, at], mask[b, at] = row, 1
    found = cached(model, ids, attention_mask=mask).source_contributions(1, -1, vector(24), space="resid")
    assert found.query == (12, 19)
    for b, row in enumerate(rows):
        alone = cached(model, row[None]).source_contributions(1, -1, vector(24), space="resid")
        real = mask[b].bool()
        assert error(found.amounts[b, real], alone.amounts[0]) < 1e-5
        assert not found.amounts[b, ~real].any()
        assert float(found.skip[b]) == pytest.approx(float(alone.skip[0]), rel=1e-4)


def test_one_row_without_a_batch_axis(tokens: Tensor) -> None:
    model = make_model()
    whole = cached(model, tokens)
    found = whole.source_contributions(1, 5, vector(48))
    one = whole.apply_slice_to_batch_dim(1).source_contributions(1, 5, vector(48))
    assert one.amounts.shape == (70,)
    assert error(one.amounts, found.amounts[1]) < 1e-6
    short = cached(model, tokens[:, :1]).source_contributions(0, 0, vector(24), space="resid")
    assert short.amounts.shape == (2, 1)
    assert short.error < 1e-6


def test_bad_input(tokens: Tensor) -> None:
    model = make_model()
    cache = cached(model, tokens)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((3, 0, vector(48)), {}, "layer 3 is outside the model's 3 layers"),
        ((0, 70, vector(48)), {}, "query 70 is outside the text of 70 tokens"),
        ((0, 0, vector(24)), {}, r"d_inner = 48 numbers, got \(24,\)"),
        ((0, 0, vector(48)), {"space": "resid"}, r"d_model = 24 numbers, got \(48,\)"),
        ((0, 0, [1.0] * 48), {}, "d_inner = 48 numbers, got list"),
        ((0, 0, vector(48) * math.nan), {}, "direction holds NaN"),
        ((0, 0, vector(48)), {"space": "residual"}, "space 'residual' is unknown, did you mean 'resid'"),
        ((0, 0, vector(48)), {"through": "gate"}, "through='gate' is unknown here"),
    ]
    for args, options, match in cases:
        with pytest.raises(InputError, match=match):
            cache.source_contributions(*args, **options)
    model.blocks[1].mixer = torch.nn.Identity()
    with pytest.raises(InputError, match="layer 1 has no selective scan"):
        cache.source_contributions(1, 0, vector(48))


def test_edits(tokens: Tensor) -> None:
    model = make_model()

    def edited(site: str) -> Any:
        with model.hooks(fwd_hooks=[(f"blocks.1.mixer.{site}", lambda v, hook: v + v.abs().max())]):
            return cached(model, tokens)

    for site in ("hook_delta", "hook_C", "hook_u_write", "hook_skip", "hook_gate_in"):  # honoured
        cache = edited(f"{site}[30]")
        found = cache.source_contributions(1, 40, vector(24), space="resid")
        assert found.error < 1e-5
        here = cache.source_contributions(1, 30, vector(24), space="resid")
        assert error(here.added, cache["mixer_out", 1][:, 30].double() @ vector(24).double()) < 1e-5
    with pytest.raises(CacheError, match="layer 1: a hook edited hook_h or hook_y at position 30"):
        edited("hook_h[30]").source_contributions(1, 40, vector(48))
    assert edited("hook_h[30]").source_contributions(1, 29, vector(48)).error < 1e-5  # before the edit
    with pytest.raises(CacheError, match="layer 1: a hook edited hook_gated at position 30"):
        edited("hook_gated[30]").source_contributions(1, 40, vector(24), space="resid")
    assert edited("hook_gated[30]").source_contributions(1, 40, vector(48)).error < 1e-5
    with pytest.raises(CacheError, match="layer 1: a hook edited hook_u or hook_u_write"):
        edited("hook_u_write[30]").source_contributions(1, 40, vector(48), through="conv")


def test_backends_agree(model: HookedMamba, tokens: Tensor) -> None:
    found = cached(model, tokens).source_contributions(1, -1, vector(24), space="resid", through="conv")
    want = cached(make_model().double(), tokens).source_contributions(
        1, -1, vector(24).double(), space="resid", through="conv"
    )
    assert error(found.amounts, want.amounts) < 1e-4

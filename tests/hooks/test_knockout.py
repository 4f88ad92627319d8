"""Knockout against the naive computation from the full alpha, through the scan and through the conv."""

from typing import Any

import pytest
import torch

import mambascope as ms
from mambascope.errors import HookError
from mambascope.model import HookedMamba
from tests.conftest import error, make_model

iv = ms.interventions
LAYER = 1
Y, SKIP = f"blocks.{LAYER}.mixer.hook_y", f"blocks.{LAYER}.mixer.hook_skip"


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(9))


def full_alpha(model: HookedMamba, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha by state dimension, ``B T S D N`` in float64, and what h0 weighs, ``B T D N``; step by step."""
    delta, B, C = (cache[n, LAYER].double() for n in ("delta", "B", "C"))
    A, length = model.decay(LAYER).double(), delta.shape[1]
    alpha = torch.zeros(*delta.shape[:2], length, *A.shape, dtype=torch.float64)
    first = torch.ones(delta.shape[0], length, *A.shape, dtype=torch.float64)
    carry = torch.ones_like(first[:, 0])
    weight = torch.zeros_like(alpha[:, 0])  # B S D N
    for t in range(length):
        decay = torch.exp(delta[:, t, :, None] * A)
        weight, carry = weight * decay[:, None], carry * decay
        weight[:, t] = delta[:, t, :, None] * B[:, t, None, :]
        alpha[:, t], first[:, t] = weight * C[:, t, None, None, :], carry * C[:, t, None, :]
    return alpha, first


def naive(
    model: HookedMamba, cache: Any, S: list[int], T: list[int], h0: torch.Tensor | None = None, **only: Any
) -> torch.Tensor:
    """y with alpha[t, s] = 0 for t in T, s in S: formed, zeroed, summed."""
    alpha, first = full_alpha(model, cache)
    cut = torch.ones(alpha.shape[1:], dtype=torch.bool)  # T S D N: what is cut
    rows, columns = torch.zeros(2, alpha.shape[1], dtype=torch.bool)
    rows[T], columns[S] = True, True
    cut &= rows[:, None, None, None] & columns[None, :, None, None]
    start = torch.ones(first.shape[1:], dtype=torch.bool) & rows[:, None, None] & bool(only.get("initial_state"))
    if "channels" in only:
        mine = torch.zeros(alpha.shape[3], dtype=torch.bool)
        mine[only["channels"]] = True
        cut, start = cut & mine[:, None], start & mine[:, None]
    if "dims" in only:
        mine = torch.zeros(alpha.shape[4], dtype=torch.bool)
        mine[only["dims"]] = True
        cut, start = cut & mine, start & mine
    y = torch.einsum("btsdn,bsd->btd", alpha.masked_fill(cut, 0.0), cache["u_write", LAYER].double())
    return y if h0 is None else y + (first.masked_fill(start, 0.0) * h0.double()[:, None]).sum(-1)


def with_knockout(model: HookedMamba, tokens: torch.Tensor, edits: Any, **options: Any) -> Any:
    with torch.no_grad(), model.intervene(edits):
        return model.run_with_cache(tokens, **options)[1]


def plain_cache(model: HookedMamba, tokens: torch.Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(tokens, **options)[1]


CASES = [
    ([3], [9], {}),
    ([0, 1, 2, 7], [5, 8, 29], {}),
    (list(range(12)), list(range(12, 30)), {}),
    (list(range(29)), list(range(30)), {}),
    ([4, 5], [5, 6, 20], {"channels": [0, 3, 7]}),
    ([4, 5], [5, 6, 20], {"dims": [1, 4]}),
    ([4, 5], [5, 6, 20], {"channels": [2, 3], "dims": [0]}),
]


@pytest.mark.parametrize(("S", "T", "only"), CASES)
def test_it_is_what_the_full_alpha_gives(
    model: HookedMamba, batch: torch.Tensor, S: list[int], T: list[int], only: dict[str, Any]
) -> None:
    plain = plain_cache(model, batch)
    got = with_knockout(model, batch, iv.knockout(LAYER, S, T, **only))
    wanted = naive(model, plain, S, T, **only)
    assert error(got[Y], wanted) < 1e-5
    assert error(got[Y], plain[Y]) > 1e-4
    rest = [t for t in range(30) if t not in T]
    assert torch.equal(got[Y][:, rest], plain[Y][:, rest])
    assert torch.equal(got[SKIP], plain[SKIP])
    for name in ("delta", "B", "C", "u"):
        assert torch.equal(got[name, LAYER], plain[name, LAYER])
    assert error(got["h", LAYER][:, -1], plain["h", LAYER][:, -1]) < 1e-6  # the state goes on as it was


def test_the_check_above_can_fail(batch: torch.Tensor) -> None:
    model = make_model(backend="torch")
    got = with_knockout(model, batch, iv.knockout(LAYER, [3], [9]))
    assert error(got[Y], naive(model, plain_cache(model, batch), [4], [9])) > 1e-4


def test_with_an_initial_state(model: HookedMamba, batch: torch.Tensor) -> None:
    with torch.no_grad():
        _, state = model(batch[:, :10], return_state=True)
    rest = batch[:, 10:]
    plain = plain_cache(model, rest, state=state)
    h0 = state.layers[LAYER].ssm
    for options in ({}, {"initial_state": True}, {"initial_state": True, "dims": [0, 2]}):
        got = with_knockout(model, rest, iv.knockout(LAYER, [2, 3], [3, 9, 15], **options), state=state)
        assert error(got[Y], naive(model, plain, [2, 3], [3, 9, 15], h0, **options)) < 1e-5


def test_cutting_all_that_came_before_is_erasing_the_state(model: HookedMamba, batch: torch.Tensor) -> None:
    with torch.no_grad():
        _, carried = model(batch[:, :7], return_state=True)
        for t0 in (1, 9, 22):
            for tokens, state in ((batch, None), (batch[:, 7:], carried)):
                for layer in range(3):
                    y = f"blocks.{layer}.mixer.hook_y"
                    cut = iv.knockout(layer, slice(0, t0), slice(t0, None), initial_state=True)
                    knocked = with_knockout(model, tokens, cut, state=state)[y]
                    erased = with_knockout(model, tokens, iv.erase(layer, t0 - 1), state=state)[y]
                    assert error(knocked[:, t0:], erased[:, t0:]) < 1e-5
                    plain = plain_cache(model, tokens, state=state)[y]
                    assert torch.equal(knocked[:, :t0], plain[:, :t0])
                # In all layers at once token t0-1 must lose it too: what is erased there is what it reads.
                cut = iv.knockout(None, slice(0, t0), slice(t0 - 1, None), initial_state=True)
                knocked = model.run_with(tokens, cut, state=state)
                assert error(knocked, model.run_with(tokens, iv.erase([0, 1, 2], t0 - 1), state=state)) < 1e-5
                assert error(knocked, model(tokens, state=state)) > 1e-3


def through_conv(model: HookedMamba, cache: Any, S: list[int]) -> torch.Tensor:
    """What x[S] contributes to u with SiLU's factor frozen, ``B L D``, tap by tap."""
    weight = model.blocks[LAYER].mixer.conv1d.weight[:, 0].detach().double()  # D K
    x, conv = cache["x", LAYER].double(), cache["conv", LAYER].double()
    out, width = torch.zeros_like(x), weight.shape[1]
    for s in S:
        for k in range(width):
            if s + k < x.shape[1]:
                out[:, s + k] += weight[:, width - 1 - k] * x[:, s]
    return out * torch.sigmoid(conv)


@pytest.mark.parametrize(("S", "T", "only"), CASES)
def test_through_the_conv_it_is_what_the_full_alpha_gives(
    model: HookedMamba, batch: torch.Tensor, S: list[int], T: list[int], only: dict[str, Any]
) -> None:
    plain = plain_cache(model, batch)
    got = with_knockout(model, batch, iv.knockout(LAYER, S, T, through="conv", **only))
    alpha, _ = full_alpha(model, plain)
    lost = through_conv(model, plain, S)
    alpha = alpha[..., only["dims"]] if "dims" in only else alpha
    y = torch.einsum("btsdn,bsd->btd", alpha, lost)
    skip = model.blocks[LAYER].mixer.D.detach().double() * lost
    rows = torch.zeros(30, model.cfg.d_inner)
    rows[T] = 1
    if "channels" in only:
        rows[:, [c for c in range(model.cfg.d_inner) if c not in only["channels"]]] = 0
    assert error(got[Y], plain[Y].double() - rows * y) < 1e-5
    wanted = plain[SKIP].double() - (0 if "dims" in only else rows * skip)
    assert error(got[SKIP], wanted) < 1e-5


def test_other_tokens_in_every_row(model: HookedMamba, batch: torch.Tensor) -> None:
    plain = plain_cache(model, batch)
    got = with_knockout(model, batch, iv.knockout(LAYER, [[3, 4], [8, 0]], [[9], [10]]))
    assert error(got[Y][0], naive(model, plain, [3, 4], [9])[0]) < 1e-5
    assert error(got[Y][1], naive(model, plain, [8, 0], [10])[1]) < 1e-5


@pytest.mark.parametrize("through", ["scan", "conv"])
def test_padded_rows_count_their_own_tokens(model: HookedMamba, batch: torch.Tensor, through: str) -> None:
    mask = torch.ones(2, 30)
    mask[0, :6], mask[1, 25:] = 0, 0
    edit = iv.knockout([0, 1], [2, 3], slice(-4, None), through=through)
    with torch.no_grad():
        both = model.run_with(batch, edit, attention_mask=mask)
        for b, real in enumerate(mask.bool()):
            alone = model.run_with(batch[b : b + 1, real], edit)
            assert error(both[b, real], alone[0]) < 5e-6


def test_several_add_up_and_a_pair_is_cut_once(model: HookedMamba, batch: torch.Tensor) -> None:
    plain = plain_cache(model, batch)
    both = [iv.knockout(LAYER, [3], [9, 10]), iv.knockout(LAYER, [4, 5], [9, 20])]
    got = with_knockout(model, batch, both)[Y]
    wanted = naive(model, plain, [3], [9, 10]) + naive(model, plain, [4, 5], [9, 20]) - plain[Y].double()
    assert error(got, wanted) < 1e-5
    with torch.no_grad(), pytest.raises(HookError, match="cut the same flow"):
        model.run_with(batch, [iv.knockout(LAYER, [3], [9]), iv.knockout(LAYER, [3, 4], [8, 9])])
    model.run_with(batch, [iv.knockout(LAYER, [3], [9], channels=[0]), iv.knockout(LAYER, [3], [9], channels=[1])])
    scaled = with_knockout(model, batch, [iv.scale(f"{Y}[9]", 2.0), iv.knockout(LAYER, [3], [9])])[Y]
    lost = plain[Y].double() - naive(model, plain, [3], [9])
    assert error(scaled[:, 9], (plain[Y] * 2 - lost)[:, 9]) < 1e-5


@pytest.mark.parametrize("through", ["scan", "conv"])
def test_in_generate_it_goes_on_with_the_text(model: HookedMamba, batch: torch.Tensor, through: str) -> None:
    """What is generated under a knockout is what one pass over the whole text under it predicts."""
    edit = iv.knockout([0, 2], [1, 2, 12], slice(8, None), through=through)
    prompt = batch[:, :10]
    with torch.no_grad():
        with model.intervene(edit):
            text = model.generate(prompt, max_new_tokens=8, stop_tokens=[])
            state, logits = None, []
            for t in range(18):
                out, state = model.step(text[:, t], state)
                logits.append(out)
        whole = model.run_with(text, edit)
        assert torch.equal(whole[:, 9:-1].argmax(-1), text[:, 10:])
        assert error(torch.stack(logits, 1), whole) < 1e-5
        assert error(whole, model(text)) > 1e-4
        for never in (iv.knockout(1, 60, slice(61, None), through=through), iv.knockout(1, [60], slice(8, None))):
            with pytest.raises(HookError, match="never reached"), model.intervene(never):
                model.generate(prompt, max_new_tokens=3, stop_tokens=[])
        _, state = model(prompt, return_state=True)
        with pytest.raises(HookError, match="began before this knockout"), model.intervene(edit):
            model.step(batch[:, 10], state)


def test_gradients_flow_through_it(batch: torch.Tensor) -> None:
    def gradients(backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = make_model(backend=backend, dtype=dtype)
        edits = [iv.knockout(1, [3, 4], slice(6, None)), iv.knockout(2, [0], [12], through="conv")]
        model.run_with(batch, edits, return_type="loss").backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients("reference", torch.float64)
    for backend in ("torch", "cpu"):
        for name, grad in gradients(backend, torch.float32).items():
            assert error(grad, exact[name]) < 1e-4, (backend, name)


def test_what_cannot_be_cut_is_said(model: HookedMamba, batch: torch.Tensor) -> None:
    for make, text in (
        (lambda: iv.knockout(1, [], [3]), "sources is empty"),
        (lambda: iv.knockout(1, [3], []), "targets is empty"),
        (lambda: iv.knockout(1, slice(3, 3), [5]), "sources is empty"),
        (lambda: iv.knockout([], [3], [5]), "layers is empty"),
        (lambda: iv.knockout(1, [9], [3, 5]), "lie before the sources"),
        (lambda: iv.knockout(1, [9], [3], through="gate"), "'scan' or 'conv'"),
        (lambda: iv.knockout(1, True, [3]), "must be positions"),
        (lambda: iv.knockout(1, [0.5], [3]), "must be integers"),
        (lambda: model.run_with(batch, iv.knockout(1, -1, slice(0, 5))), "lie before the sources"),
        (lambda: model.run_with(batch, iv.knockout(1, [[3], [9]], [[4], [8]])), "lie before the sources in row 1"),
        (lambda: model.run_with(batch, iv.knockout(1, [3], [30])), "has only 30 tokens"),
        (lambda: model.run_with(batch, iv.knockout(1, slice(40, 50), [3])), "addresses no token"),
        (
            lambda: model.run_with(batch, [iv.knockout(1, 3, 9), iv.zero("blocks.1.mixer.hook_h[5]")]),
            "is edited in this",
        ),
        (
            lambda: model.run_with(batch, [iv.knockout(1, 3, 9), iv.scale("blocks.1.mixer.hook_write", 2)]),
            "is edited in",
        ),
        (lambda: model.run_with(batch, [iv.knockout(1, 3, 9), iv.zero(f"{Y}[9]")]), "would overwrite"),
    ):
        with torch.no_grad(), pytest.raises(HookError, match=text):
            make()
    with torch.no_grad():
        model.run_with(batch, [iv.knockout(1, 3, 9), iv.zero("blocks.0.mixer.hook_h[5]")])

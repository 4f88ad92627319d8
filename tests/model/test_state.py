"""State: pieces, padding and steps give what one run gives."""

from pathlib import Path

import pytest
import torch

from mambascope.errors import StateError
from mambascope.model import HookedMamba, State
from tests.conftest import error, make_model

TOLERANCE = 5e-6


@pytest.mark.parametrize("options", [{}, {"d_conv": 1}, {"d_conv": 8, "mixer_norm_eps": 1e-6}])
def test_split_at_every_position_equals_one_run(backend: str, options: dict[str, object]) -> None:
    model = make_model(backend=backend, **options)
    tokens = torch.randint(0, 50, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, end = model(tokens, return_state=True)
        for k in range(1, 23):
            first, state = model(tokens[:, :k], return_state=True)
            second, last = model(tokens[:, k:], state=state, return_state=True)
            assert error(torch.cat([first, second], 1), whole) < TOLERANCE
            assert error(last.ssm, end.ssm) < TOLERANCE
            assert torch.equal(last.conv, end.conv) or error(last.conv, end.conv) < TOLERANCE
            assert last.position == 23


@pytest.mark.parametrize("with_state", [False, True])
def test_padding_on_either_side_is_exact(backend: str, with_state: bool) -> None:
    model = make_model(backend=backend, d_conv=5)
    generator = torch.Generator().manual_seed(1)
    lengths, lefts, width = (1, 2, 9, 14, 3), (3, 12, 0, 0, 6), 14
    tokens, mask = torch.zeros(5, width, dtype=torch.long), torch.zeros(5, width)
    rows = [torch.randint(0, 50, (1, n), generator=generator) for n in lengths]
    start = torch.randint(0, 50, (5, 6), generator=generator)
    for b, row in enumerate(rows):
        cut = slice(lefts[b], lefts[b] + lengths[b])
        tokens[b, cut], mask[b, cut] = row[0], 1
    with torch.no_grad():
        state = model(start, return_state=True)[1] if with_state else None
        logits, end = model(tokens, attention_mask=mask, state=state, return_state=True)
        noise = torch.where(mask.bool(), tokens, torch.full_like(tokens, 7))
        assert torch.equal(model(noise, attention_mask=mask, state=state)[mask.bool()], logits[mask.bool()])
        for b, row in enumerate(rows):
            own = None if state is None else state.rows(slice(b, b + 1))
            alone, last = model(row, state=own, return_state=True)
            assert error(logits[b, lefts[b] : lefts[b] + lengths[b]], alone[0]) < TOLERANCE
            assert error(end.ssm[:, b], last.ssm[:, 0]) < TOLERANCE
            assert torch.allclose(end.conv[:, b], last.conv[:, 0], atol=1e-5)
            assert int(end.position[b]) == last.position
        loss = model(tokens, attention_mask=mask, return_type="loss")
        per_row = [model(row, return_type="loss", loss_per_token=True).sum() for row in rows if row.shape[1] > 1]
        assert error(loss, sum(per_row) / (sum(lengths) - 5)) < TOLERANCE
        kept = model(tokens, attention_mask=mask, logits_to_keep=1)
        full = model(tokens, attention_mask=mask)
        ends = [left + n - 1 for left, n in zip(lefts, lengths, strict=True)]
        assert error(kept[:, 0], full[torch.arange(5), ends]) < TOLERANCE


def test_steps_equal_the_full_forward(model: HookedMamba, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        whole = model(tokens)
        logits, state = model.step(tokens[:, 0])
        for t in range(1, 30):
            assert error(logits, whole[:, t - 1]) < TOLERANCE
            logits, state = model.step(tokens[:, t], state)
        assert state.position == 30


def test_gradients_flow_into_and_out_of_a_state(backend: str, tokens: torch.Tensor) -> None:
    model = make_model(backend=backend)
    whole = model(tokens, return_type="loss", loss_per_token=True)[:, 40:].sum()
    exact = torch.autograd.grad(whole, model.blocks[0].mixer.in_proj.weight)[0]
    _, state = model(tokens[:, :40], return_state=True)
    second = model(tokens[:, 40:], state=state, return_type="loss", loss_per_token=True).sum()
    pieces = torch.autograd.grad(second, model.blocks[0].mixer.in_proj.weight)[0]
    assert error(pieces, exact) < 1e-4
    assert (
        error(
            torch.autograd.grad(
                model(tokens[:, 40:], state=state.detach(), return_type="loss", loss_per_token=True).sum(),
                model.blocks[0].mixer.in_proj.weight,
            )[0],
            exact,
        )
        > 1e-3
    )  # a detached state stops the gradient


def test_a_state_is_saved_loaded_and_checked(model: HookedMamba, tokens: torch.Tensor, tmp_path: Path) -> None:
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
        state.save(tmp_path / "state", model)
        again = State.load(tmp_path / "state", model)
        assert again.position == 70
        assert torch.equal(model(tokens, state=again), model(tokens, state=state))
        other = make_model(seed=1)
        with pytest.raises(StateError, match="other weights"):
            State.load(tmp_path / "state", other)
        for run in (lambda: other(tokens, state=state), lambda: other.step(tokens[:, 0], state)):
            with pytest.raises(StateError, match="another model"):
                run()
        with pytest.raises(StateError, match=r"layer 0: state.ssm has shape \(2, 48, 5\), expected \(1, 48, 5\)"):
            model(tokens[:1], state=state)
        with pytest.raises(StateError, match="expected torch.float32"):
            model(tokens, state=state._map(lambda t: t.double()))
        with pytest.raises(StateError, match="must be a mambascope State"):
            model(tokens, state=state.ssm)


def test_state_shapes_and_dtypes(model: HookedMamba) -> None:
    state = model.initial_state(4)
    assert state.ssm.shape == (3, 4, 48, 5)
    assert state.conv.shape == (3, 4, 48, 3)
    assert state.ssm.dtype == torch.float32
    assert state.batch_size == 4
    assert state.nbytes == 3 * 4 * 48 * 8 * 4

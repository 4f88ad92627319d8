"""A mask per position: masked steps leave the state as it is, wherever they stand."""

from typing import Any

import pytest
import torch
from cases import backend_params, double, run, scan_inputs
from tolerance import assert_within, error
from torch import Tensor

from mambascope import ops
from mambascope.errors import InputError

BACKENDS = backend_params("reference", "torch", "cpu")
TIMED = ("u", "delta", "B", "C", "z")


def mask_of(batch: int, length: int) -> Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(3)) < 0.6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["fused", "bare"])
def test_masked_steps_are_as_if_they_were_not_there(backend: Any, kind: str) -> None:
    x, mask = scan_inputs(3, 40, 20, 5), mask_of(3, 40)
    if kind == "bare":
        x["delta"] = ops.softplus(x["delta"])
        del x["dt_bias"]
    found = run(x, backend, mask=mask)
    exact = run(double(x), "reference", mask=mask)
    sequential = run(x, "reference", mask=mask)
    for name, t in found.items():
        assert_within(t, exact[name], sequential[name], name)
    for row in range(3):
        kept = {n: t[row : row + 1, mask[row]] if n in TIMED else t for n, t in x.items()}
        kept["h0"] = x["h0"][row : row + 1]
        short = run(kept, backend, gradients=False)
        assert error(found["y"][row : row + 1, mask[row]], short["y"].double()) < 1e-6
        assert error(found["h_last"][row : row + 1], short["h_last"].double()) < 1e-6
    assert not found["ddelta"][~mask].any()
    assert found["ddelta"][mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_padding_gives_the_bits_of_lengths(backend: Any) -> None:
    x, lengths = scan_inputs(3, 40, 20, 5), torch.tensor([40, 7, 0])
    by_length = run(x, backend, lengths=lengths, gradients=False)
    by_mask = run(x, backend, mask=torch.arange(40) < lengths[:, None], gradients=False)
    for name, t in by_mask.items():
        assert torch.equal(t, by_length[name]), name
    assert not torch.equal(by_mask["h_last"], run(x, backend, gradients=False)["h_last"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_at_masked_steps_touches_nothing_else(backend: Any) -> None:
    x, mask = scan_inputs(2, 30, 20, 5), mask_of(2, 30)
    clean = run(x, backend, mask=mask)
    dirty = {name: t.clone() for name, t in x.items()}
    dirty["delta"][~mask] = float("nan")
    found = run(dirty, backend, mask=mask)
    for name in ("h_last", "dA", "dD", "ddt_bias", "ddelta"):
        assert torch.equal(found[name], clean[name]), name
    assert torch.equal(found["y"][mask], clean["y"][mask])


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(2, 9, dtype=torch.bool), r"mask must be B L = \(2, 8\)"),
        (torch.ones(2, 8), "mask must be bool"),
        (torch.ones(2, 8, dtype=torch.bool, device="meta"), "mask is on meta"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ops.selective_scan(**scan_inputs(2, 8, 4, 3), dt_softplus=True, mask=mask)

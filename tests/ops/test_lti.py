"""Time-invariant diagonal models: kernel, FFT, free response and jumps ahead against the plain float64 recurrence."""

import pytest
import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.ops.lti import Diagonal, _good_size, diagonal_kernel, fft_convolve
from tests.ops.tolerance import error

KINDS = pytest.mark.parametrize("kind", ["real", "complex"])
D, N = 5, 6


def make(kind: str, seed: int = 0) -> Diagonal:
    rng = torch.Generator().manual_seed(seed)
    delta = torch.logspace(-3, 0.3, D, dtype=torch.float64)[:, None]
    A = -torch.arange(1.0, N + 1, dtype=torch.float64)
    C = torch.randn(D, N, generator=rng, dtype=torch.float64)
    if kind == "complex":
        A = torch.complex(A * 0.1, 3.0 * torch.arange(N, dtype=torch.float64))
        C = torch.complex(C, torch.randn(D, N, generator=rng, dtype=torch.float64))
    rate = delta * A
    return Diagonal(rate, (torch.exp(rate) - 1) / A, C)


def inputs(length: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(length)
    u = torch.randn(batch, length, D, generator=rng, dtype=torch.float64)
    return u, torch.randn(batch, D, N, generator=rng, dtype=torch.float64)


def recurrence(model: Diagonal, u: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """y ``B L D`` and the states ``B L D N``, one step after the other."""
    ys, hs = [], []
    for t in range(u.shape[1]):
        h = torch.exp(model.rate) * h + model.gain * u[:, t, :, None]
        out = (model.C * h).sum(-1)
        ys.append(out.real if out.is_complex() else out)
        hs.append(h)
    return torch.stack(ys, 1), torch.stack(hs, 1)


@KINDS
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
def test_fft_recurrence_and_jumps_are_the_same(kind: str, length: int) -> None:
    model = make(kind)
    u, h0 = inputs(length)
    h0 = h0.to(model.rate.dtype)
    y, h = recurrence(model, u, h0)
    assert error(model.run(h0, u), y) < 1e-12
    assert error(torch.view_as_real(model.advance(h0, u) + 0j), torch.view_as_real(h[:, -1] + 0j)) < 1e-12
    assert error(model.run(None, u), recurrence(model, u, torch.zeros_like(h0))[0]) < 1e-12
    assert error(fft_convolve(model.kernel(length, torch.float64), u), model.run(None, u)) < 1e-15
    assert error(model.run(1.01 * h0, u), y) > 1e-5  # the comparison can fail


@KINDS
def test_float32_keeps_five_digits_against_float64(kind: str) -> None:
    model = make(kind)
    u, h0 = inputs(300)
    h0 = h0.to(model.rate.dtype)
    y, h = recurrence(model, u, h0)
    single = h0.to(torch.complex64 if kind == "complex" else torch.float32)
    assert error(model.run(single, u.float()), y) < 5e-6
    found = model.advance(single, u.float())
    assert error(torch.view_as_real(found + 0j), torch.view_as_real(h[:, -1] + 0j)) < 5e-6
    step = single
    for t in range(300):
        step = model.step(step, u[:, t].float())
    assert error(model.read(step), y[:, -1]) < 5e-6


@KINDS
def test_rows_stop_after_their_own_inputs(kind: str) -> None:
    model = make(kind)
    u, h0 = inputs(20, batch=4)
    h0 = h0.to(model.rate.dtype)
    counts = torch.tensor([0, 1, 13, 20])
    _, h = recurrence(model, u, h0)
    want = torch.stack([h0[0], h[1, 0], h[2, 12], h[3, 19]])
    assert torch.allclose(model.advance(h0, u, counts), want, rtol=1e-12, atol=1e-13)
    u[1, 1:] = torch.nan  # what follows a row's inputs is not read
    assert torch.allclose(model.advance(h0, u, counts), want, rtol=1e-12, atol=1e-13)


@KINDS
def test_gradients_are_those_of_the_recurrence(kind: str) -> None:
    model = make(kind)
    u, h0 = inputs(11)
    leaves = [v.requires_grad_() for v in (model.rate, model.gain, model.C, u, h0.to(model.rate.dtype))]
    weight = torch.randn(2, 11, D, dtype=torch.float64)
    fast = Diagonal(*leaves[:3])
    loss = (fast.run(leaves[4], leaves[3]) * weight).sum() + fast.read(fast.advance(leaves[4], leaves[3])).sum()
    found = torch.autograd.grad(loss, leaves)
    y, h = recurrence(fast, leaves[3], leaves[4])
    wanted = torch.autograd.grad((y * weight).sum() + fast.read(h[:, -1]).sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


def test_a_kernel_by_hand_and_what_is_refused() -> None:
    half = torch.tensor([[0.5]]).double().log()
    assert torch.allclose(
        diagonal_kernel(half, 2 * torch.ones_like(half), 4)[:, 0], torch.tensor([2, 1, 0.5, 0.25]).double()
    )
    with pytest.raises(InputError, match="length must be a positive integer, got 0"):
        diagonal_kernel(half, half, 0)
    with pytest.raises(InputError, match="kernel must be K 5"):
        fft_convolve(torch.ones(3, 4), torch.ones(7, 5))


def test_sizes_of_transforms_are_products_of_small_primes() -> None:
    for least in (1, 2, 3, 7, 135, 1001, 4097):
        size, n = _good_size(least), _good_size(least)
        for p in (2, 3, 5):
            while n % p == 0:
                n //= p
        assert n == 1 and least <= size <= 1.25 * least + 1, least
    assert [_good_size(n) for n in (135, 144, 145, 1025)] == [135, 144, 150, 1080]

"""The reference recurrence: by hand, by gradcheck, and by its promise that bits do not depend on how a text is cut."""

import math
from typing import Any

import pytest
import torch
from cases import backend_params, run, scan_inputs
from torch import Tensor

from mambascope import ops
from mambascope.errors import BackendError

SEQUENTIAL = backend_params("reference", "cpu")
EVERY = backend_params("reference", "torch", "cpu")


def tensor(*values: float) -> Tensor:
    """A sequence of one channel, ``1 L 1``, in float64."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_one_step_by_hand(backend: Any) -> None:
    """h = exp(2·(−0.5))·3 + 2·0.25·4, y = (7·h + 10·4)·silu(1)."""
    out = ops.selective_scan(
        tensor(4.0), tensor(2.0), torch.tensor([[-0.5]]).double(), tensor(0.25), tensor(7.0),
        torch.tensor([10.0]).double(), tensor(1.0), h0=tensor(3.0), boundaries=1, backend=backend,
    )  # fmt: skip
    h = 3.0 * math.exp(-1.0) + 2.0
    assert out.h_last.item() == pytest.approx(h, rel=1e-15)
    assert out.y.item() == pytest.approx((7 * h + 40) / (1 + math.exp(-1.0)), rel=1e-15)
    assert out.h_boundary is not None
    assert out.h_boundary.shape == (1, 1, 1, 1)
    assert out.h_boundary.item() == 3.0


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_halving_by_hand(backend: Any) -> None:
    """A = −ln 2, delta = 1: each step halves what was there and adds u."""
    A = torch.tensor([[-math.log(2.0)]], dtype=torch.float64)
    one = tensor(1.0, 1.0, 1.0)
    out = ops.selective_scan(tensor(1.0, 0.0, 4.0), one, A, one, one, boundaries=2, backend=backend)
    torch.testing.assert_close(out.y.flatten(), torch.tensor([1.0, 0.5, 4.25], dtype=torch.float64))
    assert out.h_boundary is not None
    torch.testing.assert_close(out.h_boundary.flatten(), torch.tensor([0.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_softplus_and_its_bias_by_hand(backend: Any) -> None:
    """softplus(ln(e − 1) − 1 + 1) = 1."""
    A = torch.tensor([[-math.log(2.0)]], dtype=torch.float64)
    raw = tensor(math.log(math.e - 1) - 1, math.log(math.e - 1) - 1)
    out = ops.selective_scan(
        tensor(1.0, 0.0), raw, A, tensor(1.0, 1.0), tensor(1.0, 1.0),
        dt_bias=torch.ones(1, dtype=torch.float64), dt_softplus=True, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(out.y.flatten(), torch.tensor([1.0, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("order", ["first", "second"])
def test_gradcheck(order: str, backend: Any) -> None:
    x = scan_inputs(2, 5, 3, 2, dtype=torch.float64)
    lengths = torch.tensor([5, 3])

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        out = ops.selective_scan(
            *tensors[:7],
            dt_bias=tensors[7],
            h0=tensors[8],
            dt_softplus=True,
            lengths=lengths,
            boundaries=2,
            backend=backend,
        )
        assert out.h_boundary is not None
        return out.y, out.h_last, out.h_boundary

    inputs = [t.requires_grad_() for t in x.values()]
    assert torch.autograd.gradcheck(outputs, inputs)
    if order == "second":
        assert torch.autograd.gradgradcheck(outputs, inputs)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck_of_the_pieces_at_their_corners(backend: Any) -> None:
    """Softplus, SiLU and the gate at 0 and far out, where formulas tend to give NaN or a one-sided derivative."""
    x = torch.tensor([0.0, -0.0, 1e-9, -800.0, 800.0, -30.0, 30.0], dtype=torch.float64, requires_grad=True)
    for f, slope in ((ops.softplus, torch.sigmoid(x)), (ops.silu, torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))))):
        (grad,) = torch.autograd.grad(f(x, backend=backend).sum(), x, create_graph=True)
        torch.testing.assert_close(grad, slope, rtol=1e-12, atol=1e-300)
        (second,) = torch.autograd.grad(grad.sum(), x)
        (expected,) = torch.autograd.grad(slope.sum(), x, retain_graph=True)
        torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-12)
    y = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y, z: ops.gate(y, z, backend=backend), (y, torch.randn(7).double().requires_grad_())
    )


def test_torch_func_transforms_run_on_the_reference() -> None:
    x = scan_inputs(1, 6, 3, 2, dtype=torch.float64)

    def last(u: Tensor, backend: Any = "auto") -> Tensor:
        return ops.selective_scan(**dict(x, u=u), dt_softplus=True, backend=backend).y.sum()

    forward = torch.func.jvp(last, (x["u"],), (torch.ones_like(x["u"]),))[1]
    torch.testing.assert_close(forward, torch.func.grad(last)(x["u"]).sum())
    for backend in ("torch", "cpu"):
        with pytest.raises(BackendError, match=r"torch\.func"):
            torch.func.grad(last)(x["u"], backend)


def pieces(x: dict[str, Tensor], start: int, stop: int, h0: Tensor) -> dict[str, Tensor]:
    sequences = ("u", "delta", "B", "C", "z")
    return {name: t[:, start:stop] if name in sequences else t for name, t in dict(x, h0=h0).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", SEQUENTIAL)
def test_a_text_cut_anywhere_gives_the_bits_of_the_whole(backend: Any, dtype: torch.dtype) -> None:
    x = scan_inputs(2, 33, 40, 7, dtype=dtype)
    whole = run(x, backend, gradients=False, boundaries=1)
    for k in range(1, 33):
        first = run(pieces(x, 0, k, x["h0"]), backend, gradients=False)
        second = run(pieces(x, k, 33, first["h_last"]), backend, gradients=False)
        assert torch.equal(torch.cat((first["y"], second["y"]), 1), whole["y"]), k
        assert torch.equal(second["h_last"], whole["h_last"]), k
        assert torch.equal(first["h_last"], whole["h_boundary"][:, k]), k


@pytest.mark.parametrize("backend", EVERY)
def test_a_text_cut_in_two_agrees(backend: Any) -> None:
    """What every backend promises: the numbers, by the tolerance table's floor."""
    x = scan_inputs(2, 200, 40, 7)
    whole = run(x, backend, gradients=False)
    for k in (1, 16, 63, 128, 199):
        first = run(pieces(x, 0, k, x["h0"]), backend, gradients=False)
        second = run(pieces(x, k, 200, first["h_last"]), backend, gradients=False)
        torch.testing.assert_close(torch.cat((first["y"], second["y"]), 1), whole["y"], rtol=0, atol=1e-5)
        torch.testing.assert_close(second["h_last"], whole["h_last"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", SEQUENTIAL)
def test_boundaries_threads_and_gradients_change_no_bit(backend: Any) -> None:
    x = scan_inputs(2, 70, 200, 7)
    plain = run(x, backend, gradients=False)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for options in ({}, {"boundaries": 1}, {"boundaries": 9}, {"boundaries": 1000}):
                for gradients in (False, True):
                    found = run(x, backend, gradients=gradients, **options)
                    assert torch.equal(found["y"], plain["y"]), (count, options, gradients)
                    assert torch.equal(found["h_last"], plain["h_last"]), (count, options, gradients)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", EVERY)
def test_rows_of_different_length_keep_the_state_of_their_last_real_token(backend: Any) -> None:
    x = scan_inputs(3, 40, 12, 5)
    lengths = torch.tensor([40, 17, 0])
    found = run(x, backend, gradients=False, lengths=lengths, boundaries=8)
    for b, n in enumerate(lengths.tolist()):
        alone = {
            k: t if k in ("A", "D", "dt_bias") else t[b : b + 1, :n] if k != "h0" else t[b : b + 1]
            for k, t in x.items()
        }
        short = run(alone, backend, gradients=False)
        torch.testing.assert_close(found["y"][b, :n], short["y"][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(found["h_last"][b], short["h_last"][0], rtol=0, atol=1e-5)
        if backend != "torch":
            assert torch.equal(found["h_last"][b], short["h_last"][0])
    assert torch.equal(found["h_last"][2], x["h0"][2])
    assert torch.equal(found["h_boundary"][2], x["h0"][2].expand(5, 12, 5))
    again = run(x, backend, gradients=False, lengths=lengths.int(), boundaries=8)
    assert torch.equal(again["y"], found["y"])


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_fused_and_apart_give_the_same_bits(gradients: bool, dtype: torch.dtype, backend: Any) -> None:
    x = scan_inputs(2, 67, 40, 7, dtype=dtype)
    del x["dt_bias"]
    xz = torch.cat((x["u"], x["z"]), -1)
    x["u"], x["z"] = xz[..., :40], xz[..., 40:]
    if gradients:
        x = {name: t.requires_grad_() for name, t in x.items()}
    fused = ops.selective_scan(**x, dt_softplus=True, boundaries=20, backend=backend)
    delta = ops.softplus(x["delta"], backend=backend)
    assert delta.dtype == torch.float32
    bare = ops.selective_scan(x["u"], delta, x["A"], x["B"], x["C"], h0=x["h0"], backend=backend)
    assert bare.y.dtype == torch.float32
    skipped = ops.selective_scan(x["u"], delta, x["A"], x["B"], x["C"], x["D"], h0=x["h0"], backend=backend)
    with_skip = torch.add(bare.y, torch.mul(x["D"], x["u"]))
    assert torch.equal(skipped.y, with_skip)
    assert torch.equal(fused.y, ops.gate(with_skip, x["z"], backend=backend))
    assert fused.y.dtype == dtype
    assert torch.equal(fused.h_last, bare.h_last)
    assert torch.equal(
        ops.gate(with_skip, x["z"], backend=backend), ops.gate(with_skip, x["z"].contiguous(), backend=backend)
    )


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("kind", ["tame", "wild"])
def test_two_runs_give_the_same_bits(kind: str, backend: Any) -> None:
    x = scan_inputs(2, 130, 48, 16, kind=kind)
    first, second = (run(x, backend, boundaries=32) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("backend", EVERY)
def test_no_tokens_and_no_rows(backend: Any) -> None:
    x = scan_inputs(2, 0, 6, 3)
    out = run(x, backend, gradients=False, boundaries=4)
    assert out["y"].shape == (2, 0, 6)
    assert out["h_boundary"].shape == (2, 0, 6, 3)
    assert torch.equal(out["h_last"], x["h0"])
    assert out["h_last"].data_ptr() != x["h0"].data_ptr()
    empty = run(scan_inputs(0, 5, 6, 3), backend, gradients=False)
    assert empty["y"].shape == (0, 5, 6)
    assert empty["h_last"].shape == (0, 6, 3)
    y, h_last, h = ops.linear_scan(torch.ones(1, 0, 2, 3), torch.ones(1, 0, 2, 3), torch.ones(1, 0, 3))
    assert y.shape == (1, 0, 2)
    assert h.shape == (1, 0, 2, 3)
    assert torch.equal(h_last, torch.zeros(1, 2, 3))

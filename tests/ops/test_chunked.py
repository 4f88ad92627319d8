"""The chunked scan: cuts, memory, and that it never loops over tokens."""

from typing import Any

import pytest
import torch
from cases import poisoned, run, scan_inputs  # noqa: F401  (poisoned is a fixture)
from tolerance import assert_within, error
from torch.utils._python_dispatch import TorchDispatchMode

from mambascope import ops
from mambascope.ops.scan import chunked_blocks

pytestmark = pytest.mark.usefixtures("poisoned")


class Watch(TorchDispatchMode):
    """Counts operator calls, and the largest tensor that any of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("budget", [1 << 12, 1 << 16, 1 << 22])
@pytest.mark.parametrize("every", [None, 1, 3, 7, 16, 64, 1000])
def test_every_cut_gives_the_same_numbers(budget: int, every: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many super-blocks, few rows at a time, ragged tails, boundaries on, between and across chunks."""
    monkeypatch.setitem(chunked_blocks._BUDGET, "cpu", budget)
    for length in (1, 5, 64, 131, 400):
        x = scan_inputs(3, length, 5, 3, dtype=torch.float64)
        lengths = torch.tensor([length, length // 2, 0])
        exact = run(x, "reference", boundaries=every, lengths=lengths)
        for name, tensor in run(x, "torch", boundaries=every, lengths=lengths).items():
            assert_within(tensor, exact[name], name=f"{name} at L = {length}")
        quiet = run(x, "torch", gradients=False, boundaries=every, lengths=lengths)
        for name, tensor in quiet.items():
            assert_within(tensor, exact[name], name=f"{name} at L = {length} without gradients")


def test_super_blocks_change_no_bit_between_fused_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked_blocks._BUDGET, "cpu", 1 << 14)
    x = scan_inputs(2, 333, 37, 5)
    del x["dt_bias"]
    fused = ops.selective_scan(**x, dt_softplus=True, backend="torch")
    delta = ops.softplus(x["delta"], backend="torch")
    bare = ops.selective_scan(x["u"], delta, x["A"], x["B"], x["C"], h0=x["h0"], backend="torch")
    apart = ops.gate(bare.y + x["D"] * x["u"], x["z"], backend="torch")
    assert torch.equal(fused.y, apart)
    assert torch.equal(fused.y, run(x, "torch", dt_softplus=True)["y"])


def test_long_texts_take_few_calls_and_little_memory() -> None:
    length, channels, states = 20_000, 32, 16
    x = scan_inputs(1, length, channels, states)
    with Watch() as quiet:
        run(x, "torch", gradients=False)
    assert quiet.calls < length
    assert quiet.largest <= 2 * length * channels
    with Watch() as loud:
        run(x, "torch")
    assert loud.calls < 2 * length
    assert loud.largest <= 2 * length * channels, "a multiple of L D N was kept"


def test_memory_does_not_grow_with_the_text() -> None:
    """Beyond what is linear in L·D, a text of twice the length needs no more."""
    sizes = []
    for length in (4096, 8192):
        x = scan_inputs(1, length, 256, 16)
        with Watch() as watch, torch.no_grad():
            ops.selective_scan(**x, dt_softplus=True, backend="torch")
        sizes.append(watch.largest)
    assert sizes[1] <= 2 * 4096 * 256


def test_plans() -> None:
    for shape in (
        (1, 1, 8, 1),
        (1, 63, 1536, 16),
        (1, 512, 1536, 16),
        (32, 512, 512, 16),
        (64, 2048, 5120, 256),
        (4, 10**6, 64, 4),
    ):
        batch, length, channels, states = shape
        for device, budget in chunked_blocks._BUDGET.items():
            at = chunked_blocks.plan(batch, length, channels, states, device, 4)
            assert 1 <= at.rows <= batch
            assert at.steps <= 32
            if length >= 64:
                assert at.chunks >= 2, "a chunk alone would be a loop over tokens"
            used = at.rows * at.steps * at.chunks * channels * states * 4
            assert used <= max(budget, 64 * channels * states * 4) + at.rows * at.steps * channels * states * 4, (
                shape,
                device,
            )


def test_large_delta_underflows_to_zero_and_nothing_else() -> None:
    x = scan_inputs(1, 300, 8, 16)
    x["delta"] = torch.full_like(x["delta"], 50.0)
    x["A"] = -torch.arange(1.0, 17).expand(8, 16)
    found = run(x, "torch")
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), name
    assert found["dh0"].abs().max() < 1e-20
    assert not found["dh0"][..., 3:].any()


def test_decays_close_to_one_lose_nothing() -> None:
    """The sum of delta over the text is large, each step is small: differences of global prefix sums would be wrong."""
    x = scan_inputs(1, 3000, 4, 2, dtype=torch.float64)
    x["delta"] = torch.where(torch.arange(3000)[:, None] < 2900, 50.0, 1e-3).expand(1, 3000, 4).double()
    del x["dt_bias"]
    exact = run(x, "reference", gradients=False)
    single = {name: t.float() for name, t in x.items()}
    sequential = run(single, "reference", gradients=False)
    for name, tensor in run(single, "torch", gradients=False).items():
        assert_within(tensor, exact[name], sequential[name], name)
        assert error(tensor, exact[name]) < 1e-5

"""The one tolerance table: how far a path may be from the float64 reference, the same on every machine.

error = max|a − b| / max|b| for each tensor, b in float64. The bar for
- float32 is max(1e-6, 2 × the error of the plain sequential recurrence in float32 on the same inputs);
- bfloat16 and float16 is 1.1 × the error that rounding the float64 result to that dtype makes;
- float64 is 1e-12.
Every bar is a function of the inputs; none is tuned to what a kernel happens to reach.
"""

import torch
from torch import Tensor

FLOAT32_FLOOR = 1e-6
FLOAT32_FACTOR = 2.0
ROUNDING_FACTOR = 1.1
FLOAT64_BAR = 1e-12


def error(a: Tensor, b: Tensor) -> float:
    """max|a − b| / max|b|; infinite where one is finite and the other not, 0 for two empty tensors."""
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        return 0.0
    apart = (a - b).abs()
    apart = torch.where(a == b, 0.0, apart)  # equal infinities
    if not torch.isfinite(apart).all():
        return float("inf")
    scale = b.abs().max().item()
    return apart.max().item() / scale if scale > 0 else apart.max().item()


def bar(truth: Tensor, dtype: torch.dtype, sequential: Tensor | None = None, rounded: Tensor | None = None) -> float:
    """The largest error allowed of a result of ``dtype``.

    ``sequential``: the plain float32 recurrence's result. ``rounded``: what exact arithmetic with the contract's own
    roundings gives, where there is more than the last one.
    """
    if dtype == torch.float64:
        return FLOAT64_BAR
    if dtype == torch.float32:
        return max(FLOAT32_FLOOR, FLOAT32_FACTOR * error(sequential, truth) if sequential is not None else 0.0)
    return ROUNDING_FACTOR * error(truth.to(dtype) if rounded is None else rounded, truth)


def assert_within(
    got: Tensor, truth: Tensor, sequential: Tensor | None = None, name: str = "result", rounded: Tensor | None = None
) -> None:
    """Fail unless ``got`` is as near to the float64 ``truth`` as the table asks for its dtype."""
    assert truth.dtype == torch.float64, f"the truth of {name} is {truth.dtype}, not float64"
    found, allowed = error(got, truth), bar(truth, got.dtype, sequential, rounded)
    assert found <= allowed, f"{name}: error {found:.2e}, allowed {allowed:.2e} ({got.dtype})"

"""Arithmetic that all Triton kernels share, so that a fused kernel and the same steps apart give the same bits.

A compiler may contract a product and an addition into one rounding, and may do so in one kernel and not in another. So
in these functions no rounded product meets an addition: where one would, ``tl.fma`` or `product` is written.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import os
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = [
    "EXP2_SHIFT",
    "INTERPRETED",
    "LOG2E",
    "MINUS_LOG2E",
    "backwards",
    "decay",
    "decline",
    "exp",
    "product",
    "sigmoid",
    "sigmoids",
    "silu",
    "softplus",
    "steps",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
"""Whether Triton's interpreter runs the kernels (on CPU tensors); fixed when this module is imported."""


def _interpreted_steps(first: Any, last: Any) -> range:
    """``range`` whose ends may be the interpreter's tensors, which numpy ≥ 2.4 no longer turns into integers."""

    def whole(x: Any) -> int:
        return x if isinstance(x, int) else int(x.handle.data.reshape(-1)[0])

    return range(whole(first), whole(last))


steps: Any = _interpreted_steps if INTERPRETED else tl.range
"""Loop counter of the kernels."""

LOG2E = tl.constexpr(1.4426950408889634)
MINUS_LOG2E = tl.constexpr(-1.4426950408889634)
EXP2_SHIFT = tl.constexpr(0.0 if INTERPRETED or torch.version.cuda is None else 3e-8)
"""What NVIDIA's ``ex2.approx`` is short of, in exponents: on an H100 its results are low by 0.5e-8 to 5e-8 on average
(relative, of exponents in 0…−30), and nothing averages that out. Decays multiply along time, so that dA came out up to
1.3 times as far off as it may be; with this shift, one constant in a multiply-add that was a multiplication, half as
far. 2^shift is 1 exactly: where delta is 0 the state still stands still.
"""


@triton.jit
def backwards():
    """This program's number, counted from the last. Matrix products go through rows from the first: what the one before
    wrote last is in the L2 cache still, and what is written here last will be when the next one begins."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def product(x, y):
    """x · y, rounded: the compiler may not contract it with an addition that follows."""
    return tl.fma(x, y, 0.0)


@triton.jit
def exp(x):
    """e^x for float32: one hardware exponential (2 ulp, denormal results flushed to 0)."""
    return tl.exp2(x * LOG2E)


@triton.jit
def decay(a, dt):
    """exp(A delta) over steps that add up to dt, from a = A · log2(e)."""
    return tl.exp2(tl.fma(a, dt, EXP2_SHIFT))


@triton.jit
def decline(x):
    """e^-x for float32: one hardware exponential (2 ulp), and no negation, which compilers do not fold."""
    return tl.exp2(x * MINUS_LOG2E)


@triton.jit
def sigmoid(x):
    """Exactly 0 below −87.3, where it would be denormal: one hardware reciprocal gives the same."""
    b = 1.0 + decline(x)
    return tl.where(b > 8.507059173023462e37, 0.0, 1.0 / b)  # 2^126


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(−x), each with full relative precision: 1 − sigmoid(x) loses it for large x."""
    e = decline(tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x >= 0.0, large, small), tl.where(x >= 0.0, small, large)


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + e^x) as max(x, 0) + log1p(e^-|x|), with log1p(e) = 2 artanh(e / (2 + e)).

    The argument of artanh lies in [0, 1/3], where an even polynomial of degree 8 (Chebyshev fit, error 1.6e-8) holds:
    small steps keep their relative precision, which ``log(1 + e)`` loses.
    """
    e = decline(tl.abs(x))
    r = e / (2.0 + e)
    s = r * r
    p = tl.fma(s, 0.13433775305747986, 0.14116977155208588)
    p = tl.fma(s, p, 0.2000383585691452)
    p = tl.fma(s, p, 0.33333319425582886)
    p = tl.fma(s, p, 1.0)
    return tl.fma(2.0 * r, p, tl.maximum(x, 0.0))

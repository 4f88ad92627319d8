"""Thin matrix products on a CPU, each joined with a reduction over channels while it is still in registers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features

from mambascope.ops.cpu.vector import (
    BYTES,
    FLOAT,
    INT64,
    WIDTH,
    Emitter,
    Lanes,
    fma,
    greater,
    lane_intrinsic,
)

__all__ = ["MAX", "MEAN_ABS", "RMS", "SIGNED", "joined", "products"]

MEAN_ABS, RMS, SIGNED, MAX = range(4)

_FEATURES = getattr(config, "CPU_FEATURES", None)
_ROOMY = "+avx512f" in (get_host_cpu_features() if _FEATURES is None else _FEATURES)
ROWS = 8 if _ROOMY else 4  # of a product held in registers: 32 of them, or 16 of half the size
PAIR = 2 if _ROOMY else 1  # vectors of a row


@lane_intrinsic(Lanes, Lanes)
def absolute(e: Emitter, x: Any) -> Any:
    return e.call("llvm.fabs", x)


def _product(vectors: int, join: Callable[[Emitter, Any, Any], Any]) -> Any:
    """An intrinsic: acc ← join(acc, Σ_n q[n]ᵀ k[n]) for ROWS rows and 16·vectors columns.

    ``q`` and ``k`` lie as n rows, ``step`` bytes apart; a row of acc has ``step`` bytes too.
    """

    def emit(e: Emitter, q: Any, k: Any, step: Any, states: Any, acc: Any) -> None:
        b = e.b
        totals = [[cgutils.alloca_once(b, e.constant(0).type) for _ in range(vectors)] for _ in range(ROWS)]
        for row in totals:
            for total in row:
                b.store(e.constant(0), total)
        with cgutils.for_range(b, states, intp=INT64) as loop:
            there = b.mul(loop.index, step)
            source, key = b.add(q, there), b.add(k, there)
            keys = [e.load(e.offset(key, ir.Constant(INT64, BYTES), j)) for j in range(vectors)]
            for r, row in enumerate(totals):
                address = b.add(source, ir.Constant(INT64, 4 * r))
                factor = e.splat(b.load(e.pointer(address, FLOAT), align=4))
                for total, value in zip(row, keys, strict=True):
                    b.store(e.fma(factor, value, b.load(total)), total)
        for r, row in enumerate(totals):
            for j, total in enumerate(row):
                place = b.add(e.offset(acc, step, r), ir.Constant(INT64, BYTES * j))
                e.store(place, join(e, e.load(place), b.load(total)))

    emit.__name__ = f"product_{join.__name__}_{vectors}"
    return lane_intrinsic(types.void, *[types.int64] * 5)(emit)


def _mean_abs(e: Emitter, acc: Any, value: Any) -> Any:
    return e.b.fadd(acc, e.call("llvm.fabs", value))


def _rms(e: Emitter, acc: Any, value: Any) -> Any:
    return e.fma(value, value, acc)


def _signed(e: Emitter, acc: Any, value: Any) -> Any:
    return e.b.fadd(acc, value)


def _max(e: Emitter, acc: Any, value: Any) -> Any:
    b, size = e.b, e.call("llvm.fabs", value)
    larger = b.select(b.fcmp_ordered(">", size, acc), size, acc)
    return b.fadd(larger, b.fsub(value, value))  # 0, or NaN, which no comparison keeps


add_abs, add_square, add_value, take_max = (_product(PAIR, join) for join in (_mean_abs, _rms, _signed, _max))
add_abs_1, add_square_1, add_value_1, take_max_1 = (_product(1, join) for join in (_mean_abs, _rms, _signed, _max))


@njit
def products(P: int, Q: int, T: int, N: int, acc: int, reduce: int) -> None:
    "acc, T rows of T, joined with the product of the factors P and Q, N rows of T"
    step = 4 * T
    wide = WIDTH * PAIR if T % (WIDTH * PAIR) == 0 else WIDTH
    for t in range(0, T, ROWS):
        for s in range(0, T, wide):
            q, k, place = P + 4 * t, Q + 4 * s, acc + 4 * (t * T + s)
            if wide > WIDTH:
                if reduce == MEAN_ABS:
                    add_abs(q, k, step, N, place)
                elif reduce == RMS:
                    add_square(q, k, step, N, place)
                elif reduce == SIGNED:
                    add_value(q, k, step, N, place)
                else:
                    take_max(q, k, step, N, place)
            elif reduce == MEAN_ABS:
                add_abs_1(q, k, step, N, place)
            elif reduce == RMS:
                add_square_1(q, k, step, N, place)
            elif reduce == SIGNED:
                add_value_1(q, k, step, N, place)
            else:
                take_max_1(q, k, step, N, place)


@njit
def joined(acc: Any, value: Any, reduce: int) -> Any:
    if reduce == MEAN_ABS:
        return acc + absolute(value)
    if reduce == RMS:
        return fma(value, value, acc)
    if reduce == SIGNED:
        return acc + value
    return greater(acc, absolute(value)) + (value - value)

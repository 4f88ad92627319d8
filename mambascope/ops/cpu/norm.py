"""Root-mean-square norm: scale, normalised value and output in one pass over a row."""

from __future__ import annotations

import math
import sys
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mambascope.ops.cpu.blocks import ZERO, cast, dense, pointer, rows
from mambascope.ops.cpu.compiling import kernel
from mambascope.ops.cpu.threads import Arguments, run
from mambascope.ops.cpu.vector import (
    WIDTH,
    fetch_add,
    fma,
    lane_sum,
    load_float,
    load_part,
    reader,
    splat,
    store_float,
    store_part,
)

NORM = Arguments("length columns x x_batch x_row weight eps out normalized scale")
read = reader(NORM)
EPS_SLOT = 8 * NORM.names.index("eps")  # bytes; a float32 in the low half of its slot


@cache
def _float_bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32)) << (0 if sys.byteorder == "little" else 32)


@kernel(NORM)
def norm_forward_units(address: int) -> None:
    p = read(address)
    eps = load_float(address + EPS_SLOT)
    while True:
        unit = fetch_add(address, 1)
        if unit >= p.units:
            break
        b = unit // p.length
        x = p.x + 4 * (b * p.x_batch + (unit - b * p.length) * p.x_row)
        even, odd = splat(ZERO), splat(ZERO)  # two chains: one alone would wait for itself
        for column in range(0, p.columns, 2 * WIDTH):
            value = load_part(x + 4 * column, min(WIDTH, p.columns - column))
            even = fma(value, value, even)
            column += WIDTH
            if column < p.columns:
                value = load_part(x + 4 * column, min(WIDTH, p.columns - column))
                odd = fma(value, value, odd)
        scale = np.float32(math.sqrt(lane_sum(even + odd) / np.float32(p.columns) + eps))
        if p.scale != 0:
            store_float(p.scale + 4 * unit, scale)
        divisor = splat(scale)
        target = 4 * unit * p.columns
        for column in range(0, p.columns, WIDTH):
            lanes = min(WIDTH, p.columns - column)
            value = load_part(x + 4 * column, lanes) / divisor
            if p.normalized != 0:
                store_part(p.normalized + target + 4 * column, value, lanes)
            if p.weight != 0:
                value = value * load_part(p.weight + 4 * column, lanes)
            store_part(p.out + target + 4 * column, value, lanes)
        fetch_add(address + 8, 1)


def norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, *, expose: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(out, normalized, scale)``, the last two float32 and None unless exposed; see `mambascope.ops.rms_norm`."""
    source = rows(x)
    if source.dim() == 3:
        batch, length, columns = source.shape
        x_batch, x_row, _ = source.stride()
    else:
        columns = source.shape[-1]
        source = source.reshape(-1, columns)
        batch, length, x_batch, x_row = 1, source.shape[0], 0, source.stride(0)
    gain = None if weight is None else dense(weight)
    out = torch.empty(x.shape, dtype=torch.float32)
    normalized = torch.empty(x.shape, dtype=torch.float32) if expose else None
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32) if expose else None
    run(
        norm_forward_units,
        batch * length,
        2 * batch * length * columns,
        *(length, columns, source.data_ptr(), x_batch, x_row, pointer(gain), _float_bits(eps)),
        *(out.data_ptr(), pointer(normalized), pointer(scale)),
    )
    return cast(out, x.dtype if weight is None else weight.dtype), normalized, scale

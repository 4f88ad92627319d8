"""Softplus, SiLU and the gate by themselves: the very operations that the fused kernels apply, lane by lane."""

from __future__ import annotations

import torch
from torch import Tensor

from mambascope.ops.cpu.blocks import cast, dense, pointer, rows
from mambascope.ops.cpu.compiling import kernel
from mambascope.ops.cpu.threads import Arguments, run
from mambascope.ops.cpu.vector import WIDTH, fetch_add, load_part, reader, silu, softplus, store_part

SOFTPLUS, SILU, GATE, FOLD = 0, 1, 2, 3
STRETCH = 4096  # elements of a row in one unit of work

MAP = Arguments("operation length columns x x_batch x_row other other_batch other_row y parts")
read = reader(MAP)


@kernel(MAP)
def elementwise_units(address: int) -> None:
    p = read(address)
    stretches = (p.columns + STRETCH - 1) // STRETCH
    while True:
        unit = fetch_add(address, 1)
        if unit >= p.units:
            break
        row = unit // stretches
        first = (unit - row * stretches) * STRETCH
        b = row // p.length
        t = row - b * p.length
        x = p.x + 4 * (b * p.x_batch + t * p.x_row)
        other = p.other + 4 * (b * p.other_batch + t * p.other_row)
        y = p.y + 4 * row * p.columns
        for column in range(first, min(first + STRETCH, p.columns), WIDTH):
            lanes = min(WIDTH, p.columns - column)
            value = load_part(x + 4 * column, lanes)
            if p.operation == SOFTPLUS:
                value = softplus(value)
            elif p.operation == SILU:
                value = silu(value)
            elif p.operation == GATE:
                value = value * silu(load_part(other + 4 * column, lanes))
            else:
                for part in range(1, p.parts):  # summed in this order, whoever does it
                    value = value + load_part(x + 4 * (part * p.x_batch + column), lanes)
            store_part(y + 4 * column, value, lanes)
        fetch_add(address + 8, 1)


def _two_level(x: Tensor) -> tuple[Tensor, int, int, int, int, int]:
    "x as (batch, length, columns) with its strides; anything but three axes, or whole memory, becomes one row"
    x = rows(x) if x.dim() else x.float()
    if x.dim() == 3 and not x.is_contiguous():
        batch, length, columns = x.shape
        return x, batch, length, columns, x.stride(0), x.stride(1)
    return x.contiguous(), 1, 1, x.numel(), 0, 0


def softplus_forward(x: Tensor) -> Tensor:
    """``ln(1 + e^x)``, float32, any shape."""
    return _apply(SOFTPLUS, x)


def silu_forward(x: Tensor) -> Tensor:
    """``x / (1 + e^-x)`` in x's dtype, any shape."""
    return cast(_apply(SILU, x), x.dtype)


def gate_forward(y: Tensor, z: Tensor) -> Tensor:
    """``y · silu(z)`` in z's dtype; y and z of one shape."""
    if y.dim() == 3 and not (y.is_contiguous() and z.is_contiguous()):
        first, second = rows(y), rows(z)
        batch, length, columns = y.shape
        strides = (first.stride(0), first.stride(1)), (second.stride(0), second.stride(1))
    else:
        first, second = dense(y), dense(z)
        batch, length, columns = 1, 1, y.numel()
        strides = (0, 0), (0, 0)
    out = torch.empty(y.shape, dtype=torch.float32)
    _run(GATE, batch, length, columns, first, *strides[0], second, *strides[1], out, 1)
    return cast(out, z.dtype)


def fold(parts: Tensor) -> Tensor:
    """The sum over the first axis, added in order: the same bits for any number of threads."""
    out = torch.empty(parts.shape[1:], dtype=torch.float32)
    count = out.numel()
    _run(FOLD, 1, 1, count, parts, count, 0, None, 0, 0, out, parts.shape[0])
    return out


def _apply(operation: int, x: Tensor) -> Tensor:
    source, batch, length, columns, batch_stride, row_stride = _two_level(x)
    out = torch.empty(x.shape, dtype=torch.float32)
    _run(operation, batch, length, columns, source, batch_stride, row_stride, None, 0, 0, out, 1)
    return out


def _run(
    operation: int,
    batch: int,
    length: int,
    columns: int,
    x: Tensor,
    x_batch: int,
    x_row: int,
    other: Tensor | None,
    other_batch: int,
    other_row: int,
    out: Tensor,
    parts: int,
) -> None:
    units = batch * length * ((columns + STRETCH - 1) // STRETCH)
    run(
        elementwise_units,
        units,
        2 * batch * length * columns,
        *(operation, length, columns, x.data_ptr(), x_batch, x_row, pointer(other), other_batch, other_row),
        *(out.data_ptr(), parts),
    )

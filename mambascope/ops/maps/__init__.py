"""Effective kernels: how much every query of a layer reads of what every earlier token wrote.

A Mamba layer is, for a given text, linear in what it writes (2312.00752, equation 2; read as attention by Ali et al.,
2403.01590). With h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t] and y[t] = C[t]·h[t],

    y[t, d] = Σ_{s ≤ t} alpha[t, s, d] u[s, d] + carry[t, d]
    alpha[t, s, d] = Σ_n C[t, n] exp(A[d, n] Σ_{s < r ≤ t} delta[r, d]) delta[s, d] B[s, n]

where carry is what the state before the first token contributes. Three more factors take the path further: ``gain``
``B L D`` multiplies what a token writes, ``taps`` ``D K`` spreads a source over the steps s … s+K-1 (a causal
convolution before the scan; tap K-1 is its own step), ``read`` ``B L D`` multiplies what a query reads:

    alpha[t, s, d] ← read[t, d] Σ_j taps[d, K-1-j] gain[s+j, d] alpha[t, s+j, d]     over s + j ≤ t

The exponents are sums over the steps between, taken afresh in each tile and never as differences of long prefix sums
(which lose everything in float32), so they are ≤ 0 whatever delta is, and nothing overflows. Results carry no gradient.
"""

import importlib
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mambascope.ops.dispatch import Backend, choose
from mambascope.ops.maps import lines, tiled
from mambascope.ops.maps.problem import (
    REDUCTIONS,
    Problem,
    Reduction,
    at_columns,
    check_reduction,
    over_channels,
    problem,
    window,
)

__all__ = [
    "REDUCTIONS",
    "KernelRow",
    "Reduction",
    "check_reduction",
    "kernel_column",
    "kernel_map",
    "kernel_row",
    "over_channels",
    "window",
]


class KernelRow(NamedTuple):
    """One row: ``weights`` ``B L D`` (0 after the query), ``early`` ``B K-1 D`` on the inputs of the convolution
    before the first token (oldest first), ``carry`` ``B D``: the share of h0."""

    weights: Tensor
    early: Tensor
    carry: Tensor


@torch.no_grad()
def kernel_map(
    delta: Float[Tensor, "B L D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B L N"],
    C: Float[Tensor, "B L N"],
    *,
    reduce: Reduction = "mean_abs",
    gain: Float[Tensor, "B L D"] | None = None,
    taps: Float[Tensor, "D K"] | None = None,
    read: Float[Tensor, "B L D"] | None = None,
    rows: slice | None = None,
    cols: slice | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "B T S"]:
    """alpha[t, s] of all pairs, or of a window of them, reduced over channels; zero above the diagonal.

    ``delta`` is after softplus and 0 at padding. ``reduce``: see :data:`REDUCTIONS`. ``rows``, ``cols``: windows of
    queries and sources. float32, or float64 if an input is. Time O(T S D N); memory beyond the result O(L D).

    Raises
    ------
    InputError: tensors that do not fit together, an unknown reduction, an empty window.
    """
    check_reduction(reduce)
    p = problem(delta, A, B, C, gain, taps, read)
    length = delta.shape[1]
    wanted, sources = window(rows, length, "rows"), window(cols, length, "cols")
    name = choose(backend, p.delta, d_state=A.shape[1])
    if name == "reference":
        return tiled.kernel_map_reference(p, reduce, wanted, sources)
    if name == "torch":
        return tiled.kernel_map(p, reduce, wanted, sources)
    return _kernels(name).kernel_map(p, reduce, wanted, sources)


@torch.no_grad()
def kernel_row(
    delta: Float[Tensor, "B L D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B L N"],
    C: Float[Tensor, "B L N"],
    query: int | Int[Tensor, " B"],
    *,
    gain: Float[Tensor, "B L D"] | None = None,
    taps: Float[Tensor, "D K"] | None = None,
    read: Float[Tensor, "B L D"] | None = None,
    h0: Float[Tensor, "B D N"] | None = None,
    backend: Backend = "auto",
) -> KernelRow:
    """alpha of one query (of each batch row its own) to all sources, every channel, and the share of h0 in its y.

    Arguments as :func:`kernel_map`. Time O(L D N), memory beyond the result O(L D).
    """
    p = problem(delta, A, B, C, gain, taps, read)
    batch, length, _ = delta.shape
    at = at_columns(query, batch, length, delta, "query")
    each = torch.arange(batch, device=delta.device)
    fixed = p.C[each, at]  # B N
    factor = None if p.read is None else p.read[each, at]  # B D
    out, total = _line(backend, p, fixed, p.B, at, True, p.gain, factor)
    carry = torch.zeros_like(total)
    if h0 is not None:
        carry = (torch.exp(total[..., None] * p.A) * fixed[:, None] * h0.to(out)).sum(-1)  # B D
        carry = carry if factor is None else carry * factor
    if p.taps is None:
        return KernelRow(out, out[:, :0], carry)
    reach = p.reach
    wide = functional.pad(out, (0, 0, reach, reach))  # column i is place i - K + 1
    full = wide[:, : length + reach] * p.tap(0)
    for behind in range(1, reach + 1):
        full += wide[:, behind : behind + length + reach] * p.tap(behind)
    return KernelRow(full[:, reach:], full[:, :reach], carry)


@torch.no_grad()
def kernel_column(
    delta: Float[Tensor, "B L D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B L N"],
    C: Float[Tensor, "B L N"],
    source: int | Int[Tensor, " B"],
    *,
    gain: Float[Tensor, "B L D"] | None = None,
    taps: Float[Tensor, "D K"] | None = None,
    read: Float[Tensor, "B L D"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "B L D"]:
    """alpha of one source (of each batch row its own) to all queries, every channel; zero before the source.

    Arguments as :func:`kernel_map`. Time O(K L D N), memory beyond the result O(L D).
    """
    p = problem(delta, A, B, C, gain, taps, read)
    batch, length, _ = delta.shape
    at = at_columns(source, batch, length, delta, "source")
    each = torch.arange(batch, device=delta.device)
    write = p.write
    total = None
    for behind in range(p.reach + 1):
        place = at + behind
        inside = (place < length)[:, None]  # B 1
        if not bool(inside.any()):
            break
        place = place.clamp(max=length - 1)
        wrote = write[each, place] * p.tap(behind) * inside  # B D
        part, _ = _line(backend, p, p.B[each, place], p.C, place, False, p.read, wrote)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _line(backend: Backend, p: Problem, *line: Any) -> tuple[Tensor, Tensor]:
    name = choose(backend, p.delta, d_state=p.A.shape[1])
    return (lines if name in ("reference", "torch") else _kernels(name)).line(p, *line)


def _kernels(name: str) -> Any:
    """The module of ``cpu`` or ``triton``: ``kernel_map`` and ``line`` as :mod:`tiled` and :mod:`lines` have them."""
    return importlib.import_module(f"mambascope.ops.maps.{name}")

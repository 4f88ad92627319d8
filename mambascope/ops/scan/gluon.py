"""The scan for Hopper-class GPUs (compute capability 9.x), in Triton's Gluon; up to 16 states a channel.

Same interface as the portable kernels, which serve everything else. h has the same bits however a text is split, and
whatever the table chooses (few channels over a long time aside, which the portable kernels take in chunks): states are
walked in order, with one arithmetic. y's and the gradients' bits depend on the
form of the kernel only through the order of sums over states. Two runs give the same bits; so do the fused form and the
same steps apart. The sums over time in dA, dD and the bias's gradient depend on how the table cuts time.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from typing import Any

import torch
import triton
from torch import Tensor

from mambascope.ops.scan.gluon_adjoint import adjoint_kernel
from mambascope.ops.scan.gluon_backward import backward_kernel
from mambascope.ops.scan.gluon_forward import forward_kernel
from mambascope.ops.scan.gluon_table import (
    BACKWARD_TILE,
    BackwardPlan,
    ForwardPlan,
    backward_plan,
    few,
    forward_plan,
)
from mambascope.ops.scan.triton_backward import sum_kernel
from mambascope.ops.scan.triton_launch import beside_dx, dense, launch, processor_count, strides, whole

__all__ = ["MAX_STATE", "REPLAY_INTERVAL", "few", "scan_backward", "scan_forward", "supports"]

MAX_STATE = 16
REPLAY_INTERVAL = BACKWARD_TILE

_PADDED = 16  # states as the kernels hold them
_MAX_SCRATCH = 1 << 30  # bytes of partial sums; above it the backward takes the rows in slices
_BLOCK = 256  # entries of a sum a program
_ADJOINT = {"BD": 32, "NL": 4, "KE": 2, "num_warps": 4}  # of the adjoint alone, whatever the backward's plan is
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_capability: dict[torch.device, bool] = {}


def supports(device: torch.device, dtype: torch.dtype, N: int, K: int = 1) -> str:
    """'' if the kernels can take it, else the reason in words."""
    if device.type != "cuda":
        return f"the Hopper kernels run on CUDA tensors, these are on {device}"
    if device not in _capability:
        _capability[device] = torch.cuda.get_device_capability(device)[0] == 9
    if not _capability[device]:
        return f"the Hopper kernels want compute capability 9.x, {device} has another"
    if dtype not in _DTYPES:
        return f"the Hopper kernels take float32, bfloat16 and float16, got {dtype}"
    if N > MAX_STATE:
        return f"the Hopper kernels hold at most N = {MAX_STATE} states a channel, got {N}"
    return ""


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _pairs(*tensors: Tensor | None) -> bool:
    """Whether neighbours in all that have 16 bits can be read as 32."""
    given = [x for x in tensors if x is not None and x.element_size() == 2]
    if any(x.shape[-1] % 2 or x.data_ptr() % 4 for x in given):
        return False
    return not any(x.stride(0) % 2 or x.stride(1) % 2 for x in given)


def _in_pairs(*tensors: Tensor | None) -> bool:
    """Whether all are bfloat16 and neighbours can be read as 32 bits."""
    return all(x is None or x.dtype == torch.bfloat16 for x in tensors) and _pairs(*tensors)


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    *,
    dt_softplus: bool,
    boundaries: int | None,
    turned: bool = False,
    plan: ForwardPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the portable `scan_forward`; ``boundaries`` must be a multiple of 16. Time O(B L D N), one launch.

    ``turned``: u, delta, z are ``B D L``, B and C ``B N L``, all dense along time; y is then ``B D L`` in u's dtype.
    """
    batch, length, channels = (u.shape[0], u.shape[2], u.shape[1]) if turned else u.shape
    states = A.shape[1]
    plan = plan or forward_plan(batch, length, channels, processor_count(u.device), u.element_size())
    y = torch.empty(u.shape, dtype=torch.float32 if z is None and not turned else u.dtype, device=u.device)
    h_last = _new(u, batch, channels, states)
    n_bound = -(-length // boundaries) if boundaries else 0
    bound = _new(u, batch, n_bound, channels, states) if boundaries else None
    u, delta, B, C, z = dense(u), dense(delta), dense(B), dense(C), dense(z)  # type: ignore[assignment]
    launch(
        forward_kernel,
        batch * -(-channels // plan.block),
        u.device,
        u, delta, whole(A, torch.float32), B, C, whole(D), z, whole(dt_bias), whole(h0, torch.float32), lengths,
        y, h_last, bound,
        *strides(u, delta, B, C, z),
        y.stride(1), length, (boundaries or BACKWARD_TILE) // BACKWARD_TILE, n_bound,
        D=channels, N=states, NP=_PADDED, BD=plan.block, NL=plan.lanes, T=plan.tile, NB=plan.slots,
        KG=plan.groups, KE=plan.per_thread,
        PRODUCER_EARLY=plan.producer_early, FINISHER_EARLY=plan.finisher_early, AHEAD=plan.ahead,
        PRODUCER_REGISTERS=plan.producer_registers, FINISHER_REGISTERS=plan.finisher_registers,
        SOFTPLUS=dt_softplus, HAS_BIAS=dt_bias is not None, HAS_D=D is not None, HAS_Z=z is not None,
        HAS_H0=h0 is not None, HAS_LENGTHS=lengths is not None, BOUNDARIES=boundaries is not None,
        EVEN=length % plan.tile == 0, PACKED=not turned and _in_pairs(u, delta, B, C, z), TURNED=turned,
        num_warps=plan.block * plan.lanes // 32, maxnreg=plan.registers,
    )  # fmt: skip
    return y, h_last, bound


def scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    h_boundary: Tensor,
    dy: Tensor,
    dh_last: Tensor | None,
    dh_boundary: Tensor | None,
    *,
    dt_softplus: bool,
    boundaries: int,
    paired: bool = False,
    plan: BackwardPlan | None = None,
) -> dict[str, Tensor | None]:
    """As the portable `scan_backward`, but ``h_boundary`` holds the states every 16 steps whatever ``boundaries`` is,
    the interval of ``dh_boundary`` (a multiple of 16); dh0 only with h0."""
    batch, length, channels = u.shape
    states = A.shape[1]
    plan = plan or backward_plan(batch, length, channels, processor_count(u.device))
    wide = torch.float32
    shared = {"dA": A, "dD": D, "ddt_bias": dt_bias}
    out: dict[str, Any] = {
        name: None if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for name, like in {"du": u, "ddelta": delta, "dB": B, "dC": C, "dz": z}.items()
    }
    if paired and z is not None:
        out |= beside_dx(z)
    out |= {name: None if like is None else _new(u, *like.shape) for name, like in shared.items()}
    out["dh0"] = None if h0 is None else _new(u, batch, channels, states)
    whole_A, whole_D, whole_bias = whole(A, wide), whole(D), whole(dt_bias)
    by_row = (dense(u), dense(delta), dense(B), dense(C), dense(z), lengths)
    by_row += (whole(h_boundary, wide), dense(dy), whole(dh_boundary, wide), whole(dh_last, wide))
    blocks = -(-channels // plan.block)
    rows = max(1, min(batch, _MAX_SCRATCH // (8 * blocks * length * states)))
    flags = {
        "D": channels, "N": states, "NP": _PADDED,
        "SOFTPLUS": dt_softplus, "HAS_BIAS": dt_bias is not None, "HAS_Z": z is not None,
        "HAS_LENGTHS": lengths is not None, "HAS_DBOUND": dh_boundary is not None,
        "HAS_DLAST": dh_last is not None, "EVEN": length % BACKWARD_TILE == 0,
    }  # fmt: skip
    own: dict[str, Any] = {
        "BD": plan.block, "NL": plan.lanes, "FOLD": plan.parts > 1,
        "DZ": channels if z is None else out["dz"].stride(1), "HAS_D": D is not None,
        "HAS_H0": h0 is not None, "PAIRED": _pairs(*by_row[:5], by_row[7]), "num_warps": plan.block * plan.lanes // 32,
        "maxnreg": plan.registers,
    }  # fmt: skip
    packed = _in_pairs(*by_row[:5], by_row[7])
    added_flags = {"HAS_D": D is not None, "HAS_BIAS": dt_bias is not None, "BLOCK": _BLOCK}
    n_bound = -(-length // boundaries)
    for begin in range(0, batch, rows):
        cut = slice(begin, min(batch, begin + rows))
        count = cut.stop - begin
        u_, delta_, B_, C_, z_, lengths_, h_, dy_, dbound_, dlast_ = (
            x if x is None or count == batch else x[cut] for x in by_row
        )
        views = {k: v if v is None or k in shared or count == batch else v[cut] for k, v in out.items()}
        partial = _new(u, 2, blocks, count, length, states)
        terms = count * plan.parts
        dA = _new(u, terms, channels, states)
        dD = None if D is None else _new(u, terms, channels)
        ddt_bias = None if dt_bias is None else _new(u, terms, channels)
        ends = spans = None
        if plan.parts > 1:
            ends, spans = _new(u, count, plan.parts - 1, channels, states), _new(u, count, plan.parts - 1, channels)
            pointers = (delta_, whole_A, C_, z_, whole_bias, lengths_, dy_, dbound_, dlast_, ends, spans)
            lines = strides(delta_, C_, z_, dy_)
            sizes = (length, boundaries, n_bound, plan.parts)
            programs = -(-channels // _ADJOINT["BD"]) * (plan.parts - 1) * count
            launch(adjoint_kernel, programs, u.device, *pointers, *lines, *sizes, **_ADJOINT, **flags, PACKED=packed)
        launch(
            backward_kernel,
            blocks * plan.parts * count,
            u.device,
            u_, delta_, whole_A, B_, C_, whole_D, z_, whole_bias, lengths_, h_, dy_, dbound_, dlast_, ends, spans,
            views["du"], views["ddelta"], views["dz"], partial, dA, dD, ddt_bias, views["dh0"],
            *strides(u_, delta_, B_, C_, z_, dy_),
            length, boundaries, n_bound, plan.parts,
            **own, **flags,
        )  # fmt: skip
        added = (partial[0], partial[1], dA, dD, ddt_bias, *(views[k] for k in ("dB", "dC", "dA", "dD", "ddt_bias")))
        size, entries = count * length * states, channels * states
        programs = 2 * triton.cdiv(size, _BLOCK) + triton.cdiv(entries, _BLOCK) + triton.cdiv(channels, _BLOCK)
        counts = (size, blocks, entries, channels, terms)
        options = {**added_flags, "ADD": begin > 0, "num_warps": 4, "enable_fp_fusion": False}
        launch(sum_kernel, programs, u.device, *added, *counts, **options)
    return out

"""The portable GPU backend: plain Triton, no inline assembly, no atomics; any GPU that Triton knows.

Row strides are free, the last axis is dense. Arithmetic is IEEE float32 whatever the inputs' dtype; the exponential
is the hardware's (2 ulp). Two runs give the same bits; so do the fused form and the same steps apart. A different cut
in time, or a different plan, agrees within rounding only.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import importlib
import sys
import warnings
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mambascope.ops.scan import triton_check, triton_launch
from mambascope.ops.scan.triton_adjoint import contraction_kernel
from mambascope.ops.scan.triton_backward import adjoint_kernel, backward_kernel, sum_kernel
from mambascope.ops.scan.triton_conv import conv_forward
from mambascope.ops.scan.triton_conv_backward import conv_backward, conv_backward_into
from mambascope.ops.scan.triton_forward import forward_kernel
from mambascope.ops.scan.triton_launch import beside_dx, check, dense, launch, processor_count, strides, whole
from mambascope.ops.scan.triton_layers import (
    add_norm_forward,
    gate_forward,
    norm_forward,
    silu_forward,
    softplus_forward,
    wide_norm_forward,
)
from mambascope.ops.scan.triton_loss import loss_forward, scaled
from mambascope.ops.scan.triton_matmul import linear_forward, serves
from mambascope.ops.scan.triton_norm import norm_backward
from mambascope.ops.scan.triton_replay import replayed
from mambascope.ops.scan.triton_table import BackwardPlan, ForwardPlan, backward_plan, forward_plan, padded
from mambascope.ops.scan.triton_window import window_dot

__all__ = [
    "REPLAY_INTERVAL",
    "add_norm_forward",
    "backward_plan_of",
    "conv_backward",
    "conv_backward_into",
    "conv_forward",
    "forward_plan_of",
    "gate_forward",
    "hopper",
    "linear_forward",
    "loss_forward",
    "norm_backward",
    "norm_forward",
    "preferred_interval",
    "scaled",
    "scan_backward",
    "scan_forward",
    "serves",
    "silu_forward",
    "softplus_forward",
    "state_window",
    "supports",
    "wide_norm_forward",
    "window_dot",
]

REPLAY_INTERVAL = 32
"""Steps between the states kept for the backward pass: N / 8 bytes a token and channel."""

_MAX_SCRATCH = 1 << 30  # bytes of partial sums and replayed states; above it the backward takes the rows in slices
_ENDS, _OUTPUTS, _STATES, _WINDOW = 0, 1, 2, 3  # modes of forward_kernel
_BLOCK = 256  # entries of a sum a program


HOPPER_BACKWARD = True
"""Whether the Hopper kernels also take the backward."""

_HOPPER_TRITON = ((3, 6), (3, 7))  # versions that the Hopper kernels compile on: Gluon still moves
_hopper_kernels: dict[None, Any] = {}  # the module of the Hopper kernels, or None where there is none


def supports(device: torch.device, dtype: torch.dtype, N: int, K: int) -> str:
    """'' if the kernels can take it, else the reason in words. On a GPU of a kind that was not tested they must first
    pass a small self-check, once."""
    reason = triton_launch.supports(device, dtype, N, K)
    return reason or triton_check.trusted(device, sys.modules[__name__])


def hopper(device: torch.device, dtype: torch.dtype, states: int, interval: int | None) -> Any:
    """The module with the kernels for Hopper-class GPUs if they take N ``states``, and states saved or gradients given
    every ``interval`` steps; else None."""
    if device.type != "cuda" or states > 16 or (interval is not None and interval % 16):
        return None
    if None not in _hopper_kernels:
        version = tuple(int(n) for n in triton.__version__.split(".")[:2])
        why = "" if version in _HOPPER_TRITON else f"were not tested on triton {triton.__version__}"
        _hopper_kernels[None] = None
        try:
            _hopper_kernels[None] = None if why else importlib.import_module("mambascope.ops.scan.gluon")
        except ImportError as error:
            why = f"cannot be imported ({error})"
        if why and torch.cuda.get_device_capability(device)[0] == 9:
            warnings.warn(f"the Hopper kernels {why}: using the portable ones", stacklevel=2)
    module = _hopper_kernels[None]
    return None if module is None or module.supports(device, dtype, states) else module


def preferred_interval(device: torch.device, dtype: torch.dtype, states: int) -> int:
    """Steps between the states that are best kept for the backward pass."""
    module = hopper(device, dtype, states, None) if HOPPER_BACKWARD else None
    return REPLAY_INTERVAL if module is None else module.REPLAY_INTERVAL


def forward_plan_of(u: Tensor, A: Tensor, boundaries: int | None) -> ForwardPlan:
    """What `scan_forward` would choose."""
    batch, length, channels = u.shape
    return forward_plan(batch, length, channels, A.shape[1], processor_count(u.device), boundaries)


def backward_plan_of(u: Tensor, A: Tensor, boundaries: int) -> BackwardPlan:
    """What `scan_backward` would choose."""
    batch, length, channels = u.shape
    return backward_plan(batch, length, channels, A.shape[1], processor_count(u.device), boundaries)


class _Operands(NamedTuple):
    """A scan's operands as the kernels take them."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    h0: Tensor | None
    lengths: Tensor | None

    @classmethod
    def of(cls, *tensors: Any) -> "_Operands":
        raw = cls(*tensors)
        check(raw.u, raw.A.shape[1])
        wide = torch.float32
        strided = (dense(raw.u), dense(raw.delta), whole(raw.A, wide), dense(raw.B), dense(raw.C))
        made = (*strided, whole(raw.D), dense(raw.z), whole(raw.dt_bias), whole(raw.h0, wide), whole(raw.lengths))
        return cls(*made)  # type: ignore[arg-type]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, L, D, N."""
        batch, length, channels = self.u.shape
        return batch, length, channels, self.A.shape[1]

    def rows(self, part: slice) -> "_Operands":
        """Some rows of the batch."""
        shared = ("A", "D", "dt_bias")
        cut = [x if x is None or k in shared else x[part] for k, x in zip(self._fields, self, strict=True)]
        return type(self)(*cut)  # type: ignore[arg-type]

    def flags(self, block: int, dt_softplus: bool) -> dict[str, Any]:
        """Compile-time constants and options that every kernel wants.

        Products may be contracted with the additions that sum them up only where each thread adds several of its own
        before threads exchange sums. Otherwise two threads would each contract their own product, hold sums that differ
        in the last bit, and both write theirs. N = 16 in whole vectors of four gives every thread 4 states, 2 channels.
        """
        states = self.A.shape[1]
        several = padded(states) == 16 and states % 4 == 0 and self.A.data_ptr() % 16 == 0
        return {
            "num_warps": 1,
            "enable_fp_fusion": several,
            "N": states,
            "NP": padded(states),
            "BD": block,
            "SOFTPLUS": dt_softplus,
            "HAS_BIAS": self.dt_bias is not None,
            "HAS_LENGTHS": self.lengths is not None,
        }

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)


def _chunk_scratch(x: _Operands, n_chunks: int) -> tuple[Tensor | None, Tensor | None]:
    """For all chunks but the last: end states, and sums of delta."""
    if n_chunks == 1:
        return None, None
    batch, _, channels, states = x.sizes
    return x.new(batch, n_chunks - 1, channels, states), x.new(batch, n_chunks - 1, channels)


def _walk(x: _Operands, mode: int, plan: tuple[int, int, int, int], outputs: Any, **flags: Any) -> None:
    """One launch of the forward kernel; plan: steps a chunk, chunks, steps between boundary states, their number."""
    batch, length, channels, _ = x.sizes
    programs = batch * -(-channels // flags["BD"]) * (plan[1] - (mode == _ENDS))
    on = {
        "HAS_D": False,
        "HAS_Z": False,
        "HAS_H0": False,
        "HAS_STARTS": False,
        "BOUNDARIES": False,
        "FOLD": False,
    } | flags
    arguments = (*x, *outputs, *strides(x.u, x.delta, x.B, x.C, x.z), length, channels, *plan)
    launch(forward_kernel, programs, x.u.device, *arguments, MODE=mode, **on)


@replayed(tensors=10)
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
    plan: ForwardPlan | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``y B L D``, ``h_last B D N``, ``h_boundary B ceil(L/boundaries) D N`` or None; see ``ops.selective_scan``.

    Time O(B L D N), in one pass or in chunks of time as the table says; ``plan`` overrides it (tests, measurements).
    y has u's dtype with z, float32 without. Raises `BackendError` where `supports` gives a reason.
    """
    fast = hopper(u.device, u.dtype, A.shape[1], boundaries) if plan is None and u.numel() else None
    if fast is not None and not fast.few(*u.shape):
        inputs = (u, delta, A, B, C, D, z, dt_bias, h0, lengths)
        return fast.scan_forward(*inputs, dt_softplus=dt_softplus, boundaries=boundaries)
    x = _Operands.of(u, delta, A, B, C, D, z, dt_bias, h0, lengths)
    batch, length, channels, states = x.sizes
    y = torch.empty(u.shape, dtype=torch.float32 if z is None else u.dtype, device=u.device)
    n_bound = -(-length // boundaries) if boundaries else 0
    bound = x.new(batch, n_bound, channels, states) if boundaries else None
    if batch == 0 or length == 0:
        h_last = x.new(batch, channels, states).zero_() if h0 is None else h0.to(torch.float32, copy=True)
        return y, h_last, bound
    h_last = x.new(batch, channels, states)
    plan = plan or forward_plan_of(u, A, boundaries)
    flags = x.flags(plan.block, dt_softplus)
    outputs = (y, h_last, bound, None, *_chunk_scratch(x, plan.n_chunks))
    if plan.n_chunks > 1:
        _walk(x, _ENDS, (plan.chunk, plan.n_chunks, plan.chunk, 0), outputs, **flags)
    on = {
        "HAS_D": D is not None,
        "HAS_Z": z is not None,
        "HAS_H0": h0 is not None,
        "BOUNDARIES": boundaries is not None,
        "FOLD": plan.n_chunks > 1,
    }
    _walk(x, _OUTPUTS, (plan.chunk, plan.n_chunks, boundaries or plan.chunk, n_bound), outputs, **flags, **on)
    return y, h_last, bound


@replayed(tensors=5)
def state_window(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, h_start: Tensor) -> Tensor:
    """``h B W D N`` after each of the W given steps, from ``h_start``; delta is after softplus. Time O(B W D N)."""
    x = _Operands.of(u, delta, A, B, B, None, None, None, h_start, None)
    batch, length, channels, states = x.sizes
    h = x.new(batch, length, channels, states)
    if h.numel():
        flags = x.flags(forward_plan_of(u, A, None).block, False)
        _walk(x, _WINDOW, (length, 1, length, length), (u, None, h, None, None, None), **flags, HAS_H0=True)
    return h


@replayed(tensors=14)
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
    """Gradients of everything: du, ddelta, dA, dB, dC, dD, dz, ddt_bias, dh0 (``B D N``, float32).

    ``h_boundary`` are the forward's states at interval ``boundaries``. Intervals up to 64 steps are walked as they are,
    wider ones are filled in first. Time O(B L D N). Scratch, mostly the partial sums of dB and dC, is at most about
    1 GiB (or one row's): beyond that, rows are taken in slices. Every sum has a fixed order: two calls, the same bits.
    ``paired``: dz is the right half of ``dxz B L 2D``, which comes as well; the left half is left for dx.
    """
    takes = HOPPER_BACKWARD and plan is None and u.numel()
    fast = hopper(u.device, u.dtype, A.shape[1], boundaries) if takes else None
    if fast is not None and not fast.few(*u.shape):
        inputs = (u, delta, A, B, C, D, z, dt_bias, h0, lengths)
        if boundaries != fast.REPLAY_INTERVAL:
            h_boundary = _finer_states(_Operands.of(*inputs), h_boundary, boundaries, fast.REPLAY_INTERVAL, dt_softplus)
        arriving = (h_boundary, dy, dh_last, dh_boundary)
        return fast.scan_backward(*inputs, *arriving, dt_softplus=dt_softplus, boundaries=boundaries, paired=paired)
    x = _Operands.of(u, delta, A, B, C, D, z, dt_bias, h0, lengths)
    batch, length, channels, states = x.sizes
    by_row = {"du": x.u, "ddelta": x.delta, "dB": x.B, "dC": x.C, "dz": x.z}
    out: dict[str, Any] = {
        name: None if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for name, like in by_row.items()
    }
    if paired and x.z is not None:
        out |= beside_dx(x.z)
    out["dh0"] = x.new(batch, channels, states)
    summed = {"dA": x.A, "dD": x.D, "ddt_bias": x.dt_bias}
    out |= {name: None if like is None else x.new(*like.shape) for name, like in summed.items()}
    wide = torch.float32
    arriving = (whole(h_boundary, wide), dense(dy), whole(dh_last, wide), whole(dh_boundary, wide))
    if batch == 0 or length == 0:
        for name in ("dh0", *summed):
            if out[name] is not None:
                out[name].zero_()
        if dh_last is not None:
            out["dh0"] += dh_last
        return out
    plan = plan or backward_plan_of(u, A, boundaries)
    rows = max(1, min(batch, _MAX_SCRATCH // _scratch_of_row(x, plan, boundaries)))
    for begin in range(0, batch, rows):
        some, now, views = list(arriving), x, out
        if rows < batch:
            part = slice(begin, min(batch, begin + rows))
            views = {k: v if v is None or k in summed else v[part] for k, v in out.items()}
            some, now = [None if t is None else t[part] for t in arriving], x.rows(part)
        _backward_rows(now, some, views, plan, dt_softplus, boundaries, add=begin > 0)
    return out


def _finer_states(x: _Operands, h_boundary: Tensor, interval: int, finer: int, dt_softplus: bool) -> Tensor:
    """States every ``finer`` steps, replayed from those every ``interval`` steps, a multiple of it."""
    batch, length, channels, states = x.sizes
    fine = x.new(batch, -(-length // finer), channels, states)
    flags = x.flags(forward_plan_of(x.u, x.A, None).block, dt_softplus)
    outputs = (x.u, None, fine, whole(h_boundary, torch.float32), None, None)
    steps = (interval, -(-length // interval), finer, fine.shape[1])
    _walk(x, _STATES, steps, outputs, **flags, HAS_STARTS=True, BOUNDARIES=True)
    return fine


def _scratch_of_row(x: _Operands, plan: BackwardPlan, boundaries: int) -> int:
    """Bytes that the backward of one row wants beyond its results."""
    _, length, channels, states = x.sizes
    partial = 2 * -(-channels // plan.block) * length * states
    chunks = plan.n_chunks * channels * padded(states) * (3 + -(-plan.segment // 4))
    refined = plan.n_segments * channels * states if plan.segment < boundaries else 0
    return 4 * (partial + chunks + refined)


def _backward_rows(
    x: _Operands,
    arriving: list[Tensor | None],
    out: dict[str, Any],
    plan: BackwardPlan,
    dt_softplus: bool,
    boundaries: int,
    add: bool,
) -> None:
    """One slice of rows: writes the gradients; ``add``: adds to those that have no rows, after an earlier slice."""
    entering, dy, dh_last, dh_boundary = arriving
    batch, length, channels, states = x.sizes
    n_bound = -(-length // boundaries)
    blocks = -(-channels // plan.block)
    flags = x.flags(plan.block, dt_softplus)
    if plan.segment < boundaries:
        fine = x.new(batch, plan.n_segments, channels, states)
        steps = (boundaries, n_bound, plan.segment, plan.n_segments)
        outputs = (x.u, None, fine, entering, None, None)
        _walk(x, _STATES, steps, outputs, **flags, HAS_STARTS=True, BOUNDARIES=True)
        entering = fine
    sizes = (length, channels, plan.chunk, plan.n_chunks, boundaries, plan.segment, plan.n_segments, n_bound)
    flags |= {"HAS_Z": x.z is not None, "HAS_DBOUND": dh_boundary is not None}
    ends, sums = _chunk_scratch(x, plan.n_chunks)
    if plan.n_chunks > 1:
        pointers = (x.delta, x.A, x.C, x.z, x.dt_bias, x.lengths, dy, dh_boundary, ends, sums)
        programs = blocks * batch * (plan.n_chunks - 1)
        rows = strides(x.delta, x.C, x.z, dy)
        launch(adjoint_kernel, programs, x.u.device, *pointers, *rows, *sizes, **flags)
    programs = blocks * batch * plan.n_chunks
    partial = x.new(2, blocks, batch, length, states)
    dA = x.new(batch * plan.n_chunks, channels, states)
    dD = None if x.D is None else x.new(batch * plan.n_chunks, channels)
    ddt_bias = None if x.dt_bias is None else x.new(batch * plan.n_chunks, channels)
    scratch = x.new(programs, -(-plan.segment // 4), plan.block * padded(states))
    pointers = (x.u, x.delta, x.A, x.B, x.C, x.D, x.z, x.dt_bias, x.lengths, entering, dy, dh_boundary)
    pointers += (dh_last, ends, sums)
    results = (out["du"], out["ddelta"], out["dz"], partial[0], partial[1], dA, dD, ddt_bias, out["dh0"], scratch)
    rows = strides(x.u, x.delta, x.B, x.C, x.z, dy, out["dz"])
    flags |= {"HAS_D": x.D is not None, "HAS_DLAST": dh_last is not None, "FOLD": plan.n_chunks > 1}
    launch(backward_kernel, programs, x.u.device, *pointers, *results, *rows, *sizes, batch, **flags)
    added = (*partial, dA, dD, ddt_bias, *(out[name] for name in ("dB", "dC", "dA", "dD", "ddt_bias")))
    size, entries = batch * length * states, channels * states
    programs = 2 * triton.cdiv(size, _BLOCK) + triton.cdiv(entries, _BLOCK) + triton.cdiv(channels, _BLOCK)
    counts = (size, blocks, entries, channels, batch * plan.n_chunks)
    own = {"HAS_D": x.D is not None, "HAS_BIAS": x.dt_bias is not None, "ADD": add, "BLOCK": _BLOCK}
    launch(sum_kernel, programs, x.u.device, *added, *counts, **own, num_warps=4, enable_fp_fusion=False)


def state_contraction(
    dy: Tensor,
    delta: Tensor,
    C: Tensor,
    A: Tensor,
    u1: Tensor,
    delta1: Tensor,
    B1: Tensor,
    h1: Tensor,
    u2: Tensor,
    delta2: Tensor,
    B2: Tensor,
    h2: Tensor,
    *,
    boundaries: int,
    plan: BackwardPlan | None = None,
) -> Tensor:
    """``Σ_n G (h2 − h1)``, ``B L D`` float32; see ``ops.scan.adjoint``. ``boundaries`` at most 64 steps."""
    x = _Operands.of(u1, delta, A, B1, C, None, None, None, None, None)
    batch, length, channels, states = x.sizes
    out = x.new(batch, length, channels)
    plan = plan or backward_plan_of(u1, A, boundaries)
    flags = x.flags(plan.block, False)
    gradient, delta1, u2, delta2, B2 = (dense(v) for v in (dy, delta1, u2, delta2, B2))
    h1, h2 = (v.to(torch.float32).contiguous() for v in (h1, h2))
    ends, sums = _chunk_scratch(x, plan.n_chunks)
    programs = batch * -(-channels // plan.block) * plan.n_chunks
    if plan.n_chunks > 1:
        pointers = (x.delta, x.A, x.C, None, None, None, gradient, None, ends, sums)
        sizes = (length, channels, plan.chunk, plan.n_chunks, boundaries, boundaries, plan.n_segments, plan.n_segments)
        some = programs // plan.n_chunks * (plan.n_chunks - 1)
        lines = strides(x.delta, x.C, None, gradient)
        launch(adjoint_kernel, some, out.device, *pointers, *lines, *sizes, **flags, HAS_Z=False, HAS_DBOUND=False)
    scratch = x.new(programs, 2 * -(-boundaries // 4), plan.block * padded(states))
    pointers = (gradient, x.delta, x.C, x.A, x.u, delta1, x.B, h1, u2, delta2, B2, h2, ends, sums, out, scratch)
    lines = strides(gradient, x.delta, x.C, x.u, delta1, x.B, u2, delta2, B2)
    sizes = (length, channels, plan.chunk, plan.n_chunks, boundaries, plan.n_segments, batch)
    own = {key: flags[key] for key in ("num_warps", "enable_fp_fusion", "N", "NP", "BD")}
    launch(contraction_kernel, programs, out.device, *pointers, *lines, *sizes, **own, FOLD=plan.n_chunks > 1)
    return out

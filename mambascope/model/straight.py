"""The blocks where nobody looks: what Block, RMSNorm and MambaMixer do, without walking past their hook points.

The same operations on the same values, so the same bits; with no Python in between that only a hook would need, and the
residual addition inside the next norm's pass where the backend can do that.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mambascope import ops
from mambascope.hooks.run import PathTaken, Recorder, Run
from mambascope.model.mixer import MambaMixer
from mambascope.model.recurrence import anchors_of
from mambascope.model.state import MambaState
from mambascope.ops.block import BlockWeights, can_join, residual_block
from mambascope.ops.dispatch import kernels
from mambascope.ops.ready import plain, unwatched

if TYPE_CHECKING:
    from mambascope.model.language_model import HookedMamba

__all__ = [
    "Join",
    "ScanArguments",
    "add_and_norm",
    "decays",
    "from_scan",
    "in_turn",
    "through",
    "to_scan",
    "took",
]

Join = Callable[[int, Tensor | None, Tensor, nn.Module], tuple[Tensor, Tensor]]
"""From a layer, what the block before it wrote (None: nothing), the residual entering that block, and this layer's norm
to the residual entering this layer, and its normed value."""


def add_and_norm(
    out: Tensor | None, resid: Tensor, norm: Any, backend: Any, wide: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``resid + out`` and its norm; without ``out`` resid alone, in the dtype ``wide`` if that is given."""
    weight = norm._parameters["weight"]
    if out is None and wide is not None and resid.dtype != wide:
        if backend == "triton" and not torch.is_grad_enabled() and unwatched() and plain((resid, weight)):
            return kernels("triton").wide_norm_forward(resid, weight, norm.eps, wide=wide)  # type: ignore[attr-defined]
        resid = resid.to(wide)
    if out is None:
        return resid, ops.rms_norm(resid, weight, norm.eps, backend=backend).out
    added = ops.add_norm(out, resid, weight, norm.eps, backend=backend)
    return added.residual, added.out


def through(
    model: "HookedMamba",
    resid: Tensor,
    layers: list[Any],
    run: Run,
    first: int,
    last: int,
    join: Join | None = None,
    left: Callable[[int, ops.ScanOutput], None] | None = None,
    boundaries: int | None = None,
    rates: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run blocks [first, last): the residual entering the last of them, and what that block writes into it.

    ``layers`` gets the states. ``join`` replaces `add_and_norm`; ``left`` sees each scan's result, with states at
    ``boundaries`` (the run's own by default); ``rates``: these blocks' A, where somebody has them.
    """
    boundaries = run.boundaries if boundaries is None else boundaries
    blocks: list[Any] = list(model.blocks[first:last])
    rates = decays([block.mixer for block in blocks]) if rates is None else rates
    recorder, path, out = run.recorder, PathTaken(run.backend, "fused", run.why), None
    if recorder is None and join is None and left is None and boundaries is None:
        joined = _joined(blocks, resid, layers, run, first, rates)
        if joined is not None:
            for block in blocks:
                block._modules["mixer"].path = path
            return joined
    early = recorder if recorder is not None and recorder.early else None
    for i, block, A in zip(range(first, last), blocks, rates, strict=True):
        norm, mixer = block._modules["norm"], block._modules["mixer"]
        if join is None:
            resid, normed = add_and_norm(out, resid, norm, run.backend, block.residual_dtype)
        else:
            resid = resid.to(block.residual_dtype) if out is None else resid
            resid, normed = join(i, out, resid, norm)
        if recorder is not None:
            recorder.begin_block(i, resid, layers[i], plain=True)
        if early is not None:
            early.take(f"blocks.{i}.hook_resid_pre", resid)
        out, layers[i], scan = _mix(mixer, normed, layers[i], A, run.backend, boundaries, early)
        if recorder is not None and boundaries is not None:
            anchors = anchors_of(scan, boundaries, resid.shape[1])
            recorder.take_anchors(str(mixer._modules["hook_h"].name), anchors)
        if left is not None:
            left(i, scan)
        mixer.path = path
    return resid, out


def in_turn(
    model: "HookedMamba", resid: Tensor, layers: list[Any], run: Run, first: int, last: int
) -> tuple[Tensor, Tensor | None]:
    """As `through` where some blocks are no Mamba: those run as they do for hooks, Mamba's between them straight."""
    letters, out, i = model.cfg.layers, None, first
    while i < last:
        if out is not None:
            resid, out = resid + out, None
        if letters[i] != "m":
            resid, layers[i] = model.run_block(i, resid, run, layers[i])
            i += 1
            continue
        stop = next((k for k in range(i, last) if letters[k] != "m"), last)
        resid, out = through(model, resid, layers, run, i, stop)
        i = stop
    return resid, out


def _joined(
    blocks: list[Any], resid: Tensor, layers: list[Any], run: Run, first: int, rates: list[Tensor]
) -> tuple[Tensor, Tensor | None] | None:
    """`through` where a gradient is asked for: every block one node of its graph. None where that cannot be."""
    if not torch.is_grad_enabled() or any(block.cfg.mixer_norm_eps is not None for block in blocks):
        return None
    weights = [_weights(block, A) for block, A in zip(blocks, rates, strict=True)]
    states = [_states(state) for state in layers[first : first + len(blocks)]]
    if not can_join(run.backend, resid, *chain.from_iterable(weights), *chain.from_iterable(states)):
        return None
    out = None
    for i, (block, w) in enumerate(zip(blocks, weights, strict=True), first):
        if out is None:
            resid = resid.to(block.residual_dtype)
        conv_state, h0 = states[i - first]
        resid, out, h_last, conv_last = residual_block(out, resid, w, block.norm.eps, conv_state=conv_state, h0=h0)
        layers[i] = MambaState(h_last, conv_last)
    return resid, out


def _states(state: MambaState | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if state is None else (state.conv, state.ssm)


def _weights(block: Any, A: Tensor) -> BlockWeights:
    modules, mixer = block._modules["mixer"]._modules, block._modules["mixer"]
    own: Any = {name: modules[name]._parameters for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
    return BlockWeights(
        norm=block._modules["norm"]._parameters["weight"],
        in_proj=own["in_proj"]["weight"],
        in_bias=own["in_proj"]["bias"],
        conv=own["conv1d"]["weight"],
        conv_bias=own["conv1d"]["bias"],
        x_proj=own["x_proj"]["weight"],
        dt_proj=own["dt_proj"]["weight"],
        dt_bias=own["dt_proj"]["bias"],
        A=A,
        D=mixer._parameters["D"],
        out_proj=own["out_proj"]["weight"],
        out_bias=own["out_proj"]["bias"],
    )


def took(blocks: Any, path: PathTaken) -> None:
    """Say of blocks how they were computed, past a module's own way of setting an attribute, which is slow."""
    for block in blocks:
        block._modules["mixer"].__dict__["path"] = path


def decays(mixers: list[MambaMixer]) -> list[Tensor]:
    """Every layer's A, as `MambaMixer.decay` computes it; on a GPU in two launches for all."""
    logs = [cast(Tensor, m._parameters["A_log"]) for m in mixers]
    if not mixers or logs[0].device.type != "cuda" or logs[0].dtype != torch.float32:
        return [m.decay() for m in mixers]
    if not torch.is_grad_enabled():
        return _decays(logs)
    if not unwatched() or not plain(logs):
        return [m.decay() for m in mixers]
    return list(_Decays.apply(*logs))  # type: ignore[arg-type]


def _decays(logs: Sequence[Tensor]) -> list[Tensor]:
    foreach: Any = torch
    found = foreach._foreach_exp(logs)
    foreach._foreach_neg_(found)
    return list(found)


class _Decays(torch.autograd.Function):
    """A = −exp(A_log) of all layers, of which each is its own derivative."""

    @staticmethod
    def forward(ctx: Any, *logs: Tensor) -> Any:
        found = tuple(_decays(logs))
        ctx.save_for_backward(*found)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        pairs = list(zip(grads, ctx.saved_tensors, strict=True))
        if torch.is_grad_enabled():
            return tuple(None if g is None else g * A for g, A in pairs)
        there = [(g, A) for g, A in pairs if g is not None]
        foreach: Any = torch
        found = iter(foreach._foreach_mul(*(list(x) for x in zip(*there, strict=True))) if there else ())
        return tuple(None if g is None else next(found) for g in grads)


class ScanArguments(NamedTuple):
    """What a block's scan reads, with softplus, skip and gate inside it, and the conv's state after it."""

    u: Tensor
    raw: Tensor  # B L D
    A: Tensor
    B: Tensor
    C: Tensor
    z: Tensor  # B L D
    conv_state: Tensor


def to_scan(mixer: MambaMixer, r: Tensor, conv_in: Tensor | None, A: Tensor, backend: ops.Backend) -> ScanArguments:
    """A mixer up to its scan, from the normed residual ``B L M``."""
    modules, cfg = mixer._modules, mixer.cfg
    xz = _linear(r, modules["in_proj"], backend)  # B L 2D
    x, z = xz[..., : cfg.d_inner], xz[..., cfg.d_inner :]
    taps = cast(Any, modules["conv1d"])._parameters
    u, conv_state = ops.causal_conv(x, taps["weight"], taps["bias"], activation="silu", state=conv_in, backend=backend)
    dt_low, B, C = _linear(u, modules["x_proj"], backend).split([cfg.dt_rank, cfg.d_state, cfg.d_state], -1)
    if cfg.mixer_norm_eps is not None:
        dt_low, B, C = (
            ops.rms_norm(v, None, cfg.mixer_norm_eps, backend=backend).out.to(u.dtype) for v in (dt_low, B, C)
        )
    return ScanArguments(u, _linear(dt_low, modules["dt_proj"], backend), A, B, C, z, conv_state)


def from_scan(mixer: MambaMixer, gated: Tensor, backend: ops.Backend) -> Tensor:
    """What a mixer writes, ``B L M``, from what its scan gave."""
    return _linear(gated, mixer._modules["out_proj"], backend)


def _mix(
    mixer: MambaMixer,
    r: Tensor,
    state: MambaState | None,
    A: Tensor,
    backend: ops.Backend,
    boundaries: int | None,
    early: Recorder | None,
) -> tuple[Tensor, MambaState, ops.ScanOutput]:
    conv_in, h0 = (None, None) if state is None else (state.conv, state.ssm)
    u, raw, A, B, C, z, conv_state = to_scan(mixer, r, conv_in, A, backend)
    if early is not None:
        _offer(early, mixer, u, raw, B, C, backend)
    D = cast(Tensor, mixer._parameters["D"])
    scan = ops.selective_scan(u, raw, A, B, C, D, z, dt_softplus=True, h0=h0, boundaries=boundaries, backend=backend)
    return from_scan(mixer, scan.y, backend), MambaState(scan.h_last, conv_state), scan


def _offer(
    recorder: Recorder, mixer: MambaMixer, u: Tensor, raw: Tensor, B: Tensor, C: Tensor, backend: ops.Backend
) -> None:
    """Give a recorder what it wants of a mixer before its scan."""
    prefix = str(cast(Any, mixer.hook_u).name).removesuffix("hook_u")
    for tail, value in {"B": B, "C": C, **dict.fromkeys(("u", "u_select", "u_write", "u_skip"), u)}.items():
        if f"mixer.hook_{tail}" in recorder.early:
            recorder.take(f"{prefix}hook_{tail}", value)
    if "mixer.hook_delta" in recorder.early and recorder.wants(f"{prefix}hook_delta"):
        recorder.take(f"{prefix}hook_delta", ops.softplus(raw, backend=backend))


def _linear(x: Tensor, linear: Any, backend: ops.Backend) -> Tensor:
    """As the mixer's own."""
    return ops.linear(x, linear._parameters["weight"], linear._parameters["bias"], backend=backend)

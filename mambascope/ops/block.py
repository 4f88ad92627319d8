"""A residual block as one node of autograd's graph: residual addition, norm and Mamba mixer (2312.00752, section 3.4).

    r' = r + before,    x, z = in_proj(norm(r')),    u = SiLU(conv(x)),    dt, B, C = x_proj(u),
    y = scan(u, softplus(dt_proj(dt)), A, B, C) gated by z,    out = out_proj(y)

The kernels and products of the operators one by one, so the same bits forward. Backward they need not pass whole
tensors between nodes: the two gradients of u are summed inside a matrix product; those of x and z are written side by
side, as one matrix; the residual's is added inside the norm's pass; dt_proj's bias gets its sum from the scan. No copy,
no addition and no filling of a tensor of B L D is left, and a 24-layer model has 24 nodes instead of 500.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambascope.errors import BackendError
from mambascope.ops import operators
from mambascope.ops.dispatch import kernels
from mambascope.ops.ready import eager_apply, plain, unwatched

__all__ = ["BlockOutput", "BlockWeights", "can_join", "residual_block"]


class BlockWeights(NamedTuple):
    """Of one block, as its modules hold them, but A, which is −exp(A_log)."""

    norm: Tensor  # M
    in_proj: Tensor  # 2D M
    in_bias: Tensor | None  # 2D
    conv: Tensor  # D 1 K
    conv_bias: Tensor | None  # D
    x_proj: Tensor  # R+2N D
    dt_proj: Tensor  # D R
    dt_bias: Tensor | None  # D
    A: Tensor  # D N
    D: Tensor  # D
    out_proj: Tensor  # M D
    out_bias: Tensor | None  # M


class BlockOutput(NamedTuple):
    """The residual that the block read ``B L M``, what it adds to it ``B L M``, and the mixer's states at the end."""

    residual: Tensor
    out: Tensor
    h_last: Tensor  # B D N
    conv_state: Tensor  # B D K-1


def can_join(backend: str, *tensors: Tensor | None) -> bool:
    """Whether `residual_block` may stand for the operators: Triton, a gradient asked for, nobody watching."""
    if backend != "triton" or not torch.is_grad_enabled() or not unwatched() or not plain(tensors):
        return False
    return any(x is not None and x.requires_grad for x in tensors) and all(x is None or x.numel() for x in tensors)


def residual_block(
    before: Tensor | None,
    residual: Tensor,
    weights: BlockWeights,
    eps: float,
    *,
    conv_state: Tensor | None = None,
    h0: Tensor | None = None,
) -> BlockOutput:
    """One block on the Triton kernels, differentiable once in every tensor; where `can_join` says so.

    Args:
        before: ``B L M``, what the block before adds to the residual; None: nothing.
        residual: ``B L M``. Its sum with ``before`` is rounded to the wider of their dtypes.
        weights: the block's; under autocast the products run in its dtype.
        eps: of the norm.
        conv_state: ``B D K-1``, h0: ``B D N``: the mixer's states before the first step; zeros if None.

    Raises:
        BackendError: a second derivative is asked for.
    """
    device = residual.device.type
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.in_proj.dtype
    return BlockOutput(*_apply(eps, narrow, before, residual, conv_state, h0, *weights))


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, of float32 sums, in a dtype that may be wider than theirs."""
    if dtype == a.dtype:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b).to(dtype)


def _forward(
    eps: float,
    dtype: torch.dtype,
    before: Tensor | None,
    residual: Tensor,
    conv_state: Tensor | None,
    h0: Tensor | None,
    w: BlockWeights,
) -> tuple[BlockOutput, dict[str, Tensor | None], int]:
    """The output, what the backward pass reads of it, and the steps between saved states."""
    k: Any = kernels("triton")
    if before is None:
        added, normed = residual, k.norm_forward(residual, w.norm, eps, expose=False, dtype=dtype)[0]
    else:
        added, normed = k.add_norm_forward(before, residual, w.norm, eps, expose=False, dtype=dtype)[:2]
    D, R, N = w.dt_proj.shape[0], w.dt_proj.shape[1], w.A.shape[1]
    shape = added.shape[:2]
    xz = _affine(normed.view(-1, normed.shape[-1]), w.in_proj.to(dtype), w.in_bias).view(*shape, -1)  # B L 2D
    u, conv_last = k.conv_forward(xz[..., :D], w.conv, w.conv_bias, conv_state, None, silu=True)
    proj = torch.mm(u.view(-1, D), w.x_proj.to(dtype).t())  # B*L R+2N
    raw = _affine(proj[:, :R], w.dt_proj.to(dtype), w.dt_bias).view(*shape, D)
    B, C = (part.view(*shape, N) for part in proj[:, R:].split([N, N], 1))
    interval = operators.replay_interval(None, k.preferred_interval(u.device, u.dtype, N))
    options = {"dt_softplus": True, "boundaries": interval}
    y, h_last, bound = k.scan_forward(u, raw, w.A, B, C, w.D, xz[..., D:], None, h0, None, **options)
    out = _affine(y.view(-1, D), w.out_proj.to(dtype), w.out_bias).view(*shape, -1)  # B L M
    kept = {"added": added, "normed": normed, "xz": xz, "u": u, "proj": proj, "raw": raw, "y": y, "bound": bound}
    kept |= {"conv_state": conv_state, "h0": h0}
    return BlockOutput(added, out, h_last, conv_last), kept, interval


_KEPT = ("added", "normed", "xz", "u", "proj", "raw", "y", "bound", "conv_state", "h0")


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        eps: float,
        dtype: torch.dtype,
        before: Tensor | None,
        residual: Tensor,
        conv_state: Tensor | None,
        h0: Tensor | None,
        *weights: Any,
    ) -> Any:
        w = BlockWeights(*weights)
        device = residual.device.type
        quiet = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with quiet:
            output, kept, ctx.interval = _forward(eps, dtype, before, residual, conv_state, h0, w)
        ctx.save_for_backward(*(kept[name] for name in _KEPT), *weights)
        ctx.eps, ctx.dtype = eps, dtype
        ctx.dtypes = (None if before is None else before.dtype, residual.dtype)
        ctx.set_materialize_grads(False)
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint gives them a single time
        kept: dict[str, Any] = dict(zip(_KEPT, saved, strict=False))
        w = BlockWeights(*saved[len(_KEPT) :])
        if not torch.is_grad_enabled():
            found = _backward(ctx, kept, w, arriving)
        else:
            with torch.no_grad():
                found = _backward(ctx, kept, w, arriving)
            behind = [x for x in (*saved, *arriving) if x is not None and x.requires_grad]
            given = [g for g in found if g is not None]
            once = iter(_Once.apply(len(given), *given, *behind) if behind and given else given)  # type: ignore[arg-type]
            found = [None if g is None else next(once) for g in found]
        return None, None, *found


_apply = eager_apply(_Block)


def _backward(ctx: Any, kept: dict[str, Any], w: BlockWeights, arriving: tuple[Tensor | None, ...]) -> list[Any]:
    """Gradients of before, residual, conv_state, h0 and the weights; None where nobody wants one."""
    beside, dout, dh_last, dconv_last = arriving
    narrow, wide = ctx.dtypes
    wants = ctx.needs_input_grad[2:]
    if dout is None and dh_last is None and dconv_last is None:  # nobody reads what the mixer made
        passed = [None if beside is None or kind is None else beside.to(kind) for kind in (narrow, wide)]
        return [*passed, *[None] * (len(wants) - 2)]
    k: Any = kernels("triton")
    found = {}
    dy = None
    D, R, N = w.dt_proj.shape[0], w.dt_proj.shape[1], w.A.shape[1]
    wanted = dict(zip(BlockWeights._fields, wants[4:], strict=True))
    xz, u, proj, raw, y = (kept[name] for name in ("xz", "u", "proj", "raw", "y"))
    shape, rows_u, dtype = u.shape[:2], u.view(-1, D), ctx.dtype
    if dout is not None:
        flat = dout.reshape(-1, dout.shape[-1]).to(dtype)
        dy = torch.mm(flat, w.out_proj.to(dtype)).view(*shape, D)
        if wanted["out_proj"]:
            found["out_proj"] = _product(flat.t(), y.view(-1, D), w.out_proj.dtype)
        if wanted["out_bias"]:
            found["out_bias"] = flat.sum(0)
    B, C = (part.view(*shape, N) for part in proj[:, R:].split([N, N], 1))
    # A bias of zeros changes nothing, and its gradient is dt_proj's: a sum that the scan makes on its way.
    zero = None if w.dt_bias is None else torch.zeros(D, dtype=torch.float32, device=u.device)
    inputs = (u, raw, w.A, B, C, w.D, xz[..., D:], zero, kept["h0"], None)
    arriving_there = operators.arriving_at_scan(inputs, dy, dh_last, None)
    options = {"dt_softplus": True, "boundaries": ctx.interval, "paired": True}
    scan = k.scan_backward(*inputs, kept["bound"], *arriving_there, **options)
    found |= {"A": scan["dA"], "D": scan["dD"], "dt_bias": scan["ddt_bias"]}
    draw = scan["ddelta"].view(-1, D)
    dproj = torch.cat([torch.mm(draw, w.dt_proj.to(dtype)), *(scan[g].view(-1, N) for g in ("dB", "dC"))], 1)
    if wanted["dt_proj"]:
        found["dt_proj"] = _product(draw.t(), proj[:, :R], w.dt_proj.dtype)
    if wanted["x_proj"]:
        found["x_proj"] = _product(dproj.t(), rows_u, w.x_proj.dtype)
    du = scan["du"].view(-1, D).addmm_(dproj, w.x_proj.to(dtype)).view(*shape, D)
    taps = w.conv[:, 0]
    dconv_last = None if dconv_last is None else dconv_last.contiguous()
    from_x, dxz = (xz[..., :D], taps, w.conv_bias, kept["conv_state"], None), scan["dxz"]
    conv = k.conv_backward_into(*from_x, du, dconv_last, dxz, silu=True)
    found |= {"conv": conv["dweight"][:, None], "conv_bias": conv["dbias"]}
    dxz, normed = dxz.view(-1, 2 * D), kept["normed"]
    if wanted["in_proj"]:
        found["in_proj"] = _product(dxz.t(), normed.view(-1, normed.shape[-1]), w.in_proj.dtype)
    if wanted["in_bias"]:
        found["in_bias"] = dxz.sum(0)
    dbefore = dresidual = None
    if wants[0] or wants[1] or wanted["norm"]:
        dnormed = torch.mm(dxz, w.in_proj.to(dtype)).view(normed.shape)
        other = None if narrow is None or narrow == wide else narrow
        added = kept["added"]
        beside = None if beside is None else beside.contiguous()
        dresidual, rounded, found["norm"] = k.norm_backward(added, w.norm, dnormed, beside, ctx.eps, other)
        dbefore = None if narrow is None else dresidual if other is None else rounded
    first = [dbefore, dresidual.to(wide) if dresidual is not None else None, conv["dstate"]]
    first.append(scan["dh0"] if kept["h0"] is not None else None)
    weights = [_as(found.get(name), like) for name, like in zip(BlockWeights._fields, w, strict=True)]
    return [g if want else None for g, want in zip([*first, *weights], wants, strict=True)]


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or like is None else gradient.to(like.dtype)


class _Once(torch.autograd.Function):
    """Gradients that were asked for with ``create_graph=True``: whoever differentiates them is refused."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:
        return tuple(g.view_as(g) for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise BackendError(
            "a block's backward on backend 'triton' has no second derivative; use backend='torch' or 'reference' for "
            "second derivatives"
        )

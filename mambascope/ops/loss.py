"""The loss of a language model's head, which never holds length x vocabulary.

For R rows x (``R M``, the normalised residual) and the unembedding W (``V M``):

    loss = −1/n Σ over scored r of log softmax(W x_r)[target_r]

1. Rows are taken in chunks. A chunk's logits are one matrix product; log softmax in float32 (float64 for float64 x).
2. Their gradient, softmax − one-hot up to 1 / n, is known at once and takes the logits' place, and both products of
   the backward pass are made in the same visit: the chunk's share of dx, and its share of dW, summed in float32.
3. The backward pass only scales what is there. Three products a chunk, nothing computed twice, memory one chunk;
   nothing waits for the host, so a step can be recorded as a CUDA graph.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambascope.ops.dispatch import Backend, choose, kernels
from mambascope.ops.ready import plain, unwatched

__all__ = ["IGNORED", "linear_cross_entropy", "rows_at_a_time", "softmax_losses"]

IGNORED = -100
"""A target that is not scored."""

_HELD = {"cpu": 1 << 26, "cuda": 1 << 31}
"""Bytes of logits held at a time, by device: a GPU's products and sums over chunks want few and large ones."""


def rows_at_a_time(rows: int, vocabulary: int, device: torch.device, size: int, share: int = 1) -> int:
    """Rows of a chunk whose logits take ``size`` bytes each; chunks come out about equal.

    ``share``: of the memory that a chunk may take, for who needs more than the logits themselves.
    """
    held = _HELD.get(device.type, _HELD["cpu"]) // share
    if device.type == "cuda":
        held = min(held, torch.cuda.get_device_properties(device).total_memory // (32 * share))
    most = max(1, held // (vocabulary * size))
    return _evenly(rows, most)


def _evenly(rows: int, most: int) -> int:
    chunks = max(1, -(-rows // most))
    even = -(-rows // chunks)
    return min(most, -(-even // 128) * 128) if most >= 128 else even


def softmax_losses(logits: Tensor, targets: Tensor, *, gradient: bool = False, backend: Backend = "auto") -> Tensor:
    """−log softmax(logits)[target] of every row, in nats; 0 where the target is `IGNORED`.

    Args:
        logits: ``R V``, contiguous. With ``gradient`` they are overwritten by softmax − one-hot, rounded to their
            dtype, with zeros in rows that are not scored.
        targets: ``R``, ids.
        backend: ``triton`` takes one read and one write of the logits; every other, torch's own operators.

    Returns:
        ``R`` in float32, float64 for float64 logits. Not differentiable.
    """
    if choose(backend, logits) == "triton" and unwatched() and plain((logits, targets)) and logits.numel():
        return kernels("triton").loss_forward(logits, targets.contiguous(), gradient, IGNORED)  # type: ignore[attr-defined]
    scored, goal = targets != IGNORED, targets.clamp_min(0)[:, None]  # R, R 1
    logp = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))  # R V
    right = logp.gather(1, goal)  # R 1
    if gradient:
        torch.exp(logp, out=logits)
        logits.scatter_(1, goal, right.expm1().to(logits.dtype))  # softmax − 1 where the target stands, rounded once
        if logits.device.type == "cpu":
            logits[~scored] = 0.0  # touches those rows alone, and has to know how many they are
        else:
            logits.masked_fill_(~scored[:, None], 0.0)
    return torch.where(scored, -right[:, 0], 0.0)


def linear_cross_entropy(
    x: Float[Tensor, "R M"],
    weight: Float[Tensor, "V M"],
    targets: Int[Tensor, " R"],
    *,
    chunk: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, ""]:
    """Mean of −log softmax(x W^T)[target] over targets other than `IGNORED`; see the module's algorithm.

    Under autocast the products run in its dtype. ``chunk``: logits held at a time. Differentiable in ``x`` and
    ``weight``; higher derivatives come from torch's own operators, chunk by chunk. NaN where no target is scored, as
    in torch.
    """
    device = x.device.type
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if chunk is None:
        rows = rows_at_a_time(x.shape[0], weight.shape[0], x.device, narrow.itemsize)
    else:
        rows = max(1, chunk // weight.shape[0])
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, targets, narrow, rows, backend)  # pyright: ignore[reportReturnType]
    return _visit(x, weight, targets, narrow, rows, backend, (False, False))[0]


def _visit(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    rows: int,
    backend: Backend,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The loss, 1 / n, and, up to that factor, dx and dW where they are wanted."""
    of_x, of_weight = wanted
    dx = torch.empty(x.shape, dtype=dtype, device=x.device) if of_x else None
    dw = None
    loss = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        w = weight.to(dtype)  # V M
        share = 1 / (targets != IGNORED).sum()
        for a in range(0, x.shape[0], rows):
            part, goal = x[a : a + rows].to(dtype), targets[a : a + rows]
            logits = part @ w.t()  # rows V
            loss += softmax_losses(logits, goal, gradient=of_x or of_weight, backend=backend).sum()
            if dx is not None:
                torch.mm(logits, w, out=dx[a : a + rows])
            if of_weight:
                dw = _added(dw, logits, part, last=a + rows >= x.shape[0])
            del logits  # before the next chunk's are made
        loss *= share
    return loss, share, dx, dw


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, rows: int, backend: Backend
    ) -> Tensor:
        loss, *found = _visit(x, weight, targets, dtype, rows, backend, ctx.needs_input_grad[:2])
        ctx.dtype, ctx.rows, ctx.backend = dtype, rows, backend
        ctx.save_for_backward(x, weight, targets, *found)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets, share, dx, dw = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(x, weight, targets, upstream[0], ctx), None, None, None, None
        scale = (share * upstream[0])[None]  # not of dimension 0: that would be rounded to dx's dtype
        of_x = None if dx is None else _scaled(dx, scale, x.dtype, ctx.backend)
        of_weight = None
        if dw is not None:
            of_weight = _scaled(dw, scale, weight.dtype, ctx.backend)
        elif ctx.needs_input_grad[1]:  # no row at all
            of_weight = torch.zeros_like(weight)
        return of_x, of_weight, None, None, None, None


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype, backend: Backend) -> Tensor:
    """x · factor in ``dtype``, rounded once."""
    if choose(backend, x) == "triton" and unwatched() and plain((x, factor)) and x.numel():
        return kernels("triton").scaled(x, factor, dtype)  # type: ignore[attr-defined]
    return torch.mul(x, factor, out=torch.empty(x.shape, dtype=dtype, device=x.device))


def _added(dw: Tensor | None, logits: Tensor, part: Tensor, last: bool) -> Tensor:
    """dW so far, and a chunk's share of it: sums of chunks are float32, of a single one what its product gives."""
    at = logits.t()
    narrow = logits.dtype in (torch.bfloat16, torch.float16)
    if dw is None:
        if narrow and not last:
            return torch.mm(at, part, out_dtype=torch.float32) if at.is_cuda else torch.mm(at, part).float()
        return torch.mm(at, part)
    return dw.add_(torch.mm(at, part)) if narrow else dw.addmm_(at, part)


def _differentiable(x: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, ctx: Any) -> tuple[Any, Any]:
    """Gradients that can be differentiated again, when ``create_graph=True`` asks for that."""

    def chunk(rows: Tensor, w: Tensor, goal: Tensor) -> Tensor:
        logits = rows.to(ctx.dtype) @ w.to(ctx.dtype).t()
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), goal, ignore_index=IGNORED, reduction="sum")

    total: Any = 0
    for a in range(0, x.shape[0], ctx.rows):
        some = (x[a : a + ctx.rows], weight, targets[a : a + ctx.rows])
        total = total + checkpoint(chunk, *some, use_reentrant=False)
    loss = total / (targets != IGNORED).sum()
    wanted = [t for t, needed in zip((x, weight), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=True))
    dx, dw = (next(found) if needed else None for needed in ctx.needs_input_grad[:2])
    return dx, dw

"""The loss of a training step, and a head that never holds length x vocabulary.

For a batch of R scored rows x (``R M``, the normalised residual) and the unembedding W (``V M``):

    loss = -1/n sum over scored r of log softmax(W x_r)[target_r]

1. Rows are taken in chunks. Logits of a chunk are one matrix product; log softmax in float32 (float64 for float64 x).
2. Their gradient, softmax - one-hot, up to 1 / n, is known at once, so both products of the backward pass are made in
   the same visit: the chunk's share of dx, and its share of dW, summed in float32.
3. Backward only scales what is there. Three products a chunk, nothing recomputed, memory one chunk; nothing waits for
   the host, so the step can be recorded as a CUDA graph.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mambascope.hooks.sites import SitePoint
from mambascope.model import HookedMamba
from mambascope.training.sampler import IGNORED, Batch

__all__ = ["answer_loss", "linear_cross_entropy"]

_CHUNK = 1 << 26
"""Logits held at a time: 256 MB in float32."""


def answer_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the scored targets, in float32.

    A model of ours takes the chunked head; any other, and one whose final norm or unembedding is hooked, gives logits.
    """
    keep, length = batch.targets.shape[1], batch.tokens.shape[1]
    if isinstance(model, HookedMamba) and not _hooked(model):
        resid = model(batch.tokens, stop_at_layer=model.cfg.n_layers)[:, length - keep :]  # B K M
        normed = model.ln_final(resid).flatten(0, 1)  # B*K M
        return linear_cross_entropy(normed, model.unembed.weight, batch.targets.flatten())
    logits = model(batch.tokens, return_type="logits", logits_to_keep=None if keep == length else keep)  # B K V
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)


def _hooked(model: HookedMamba) -> bool:
    """Whether somebody watches what the chunked head does not make: the final norm's points, the unembedding."""
    head, norm = model.unembed, model.ln_final
    points: tuple[SitePoint, ...] = (norm.hook_scale, norm.hook_normalized)
    return any(point.live for point in points) or any(m._forward_hooks or m._forward_pre_hooks for m in (head, norm))


def linear_cross_entropy(
    x: Float[Tensor, "R M"], weight: Float[Tensor, "V M"], targets: Int[Tensor, " R"], *, chunk: int = _CHUNK
) -> Float[Tensor, ""]:
    """Mean of -log softmax(x W^T)[target] over targets other than -100; see the module's algorithm.

    Under autocast the products run in its dtype. ``chunk``: logits held at a time. Differentiable once in ``x`` and
    ``weight``. NaN where no target is scored, as in torch.
    """
    device = x.device.type
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = max(1, chunk // weight.shape[0])
    return _LinearCrossEntropy.apply(x, weight, targets, narrow, rows)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(dtype)  # V M
            scored = (targets != IGNORED)[:, None]  # R 1
            share = 1 / scored.sum()  # of a scored row in the mean
            goal = targets.clamp_min(0)[:, None]
            wide = torch.promote_types(dtype, torch.float32)
            dx = torch.empty_like(x) if needs else None
            dw = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs else None
            loss = torch.zeros((), dtype=wide, device=x.device)
            for a in range(0, x.shape[0], rows):
                part, at, counts = x[a : a + rows].to(dtype), goal[a : a + rows], scored[a : a + rows]
                logp = torch.log_softmax(part @ w.t(), -1, dtype=wide)  # rows V
                right = logp.gather(1, at)
                loss -= (right * counts).sum()
                if dx is None or dw is None:
                    continue
                # softmax - one-hot, rounded once: expm1 where the target stands
                gradient = torch.exp(logp, out=torch.empty(logp.shape, dtype=dtype, device=logp.device))
                gradient.scatter_(1, at, right.expm1().to(dtype))
                dx[a : a + rows] = (gradient @ w) * (counts * share)
                dw += gradient.t() @ (part * counts)
            loss *= share
            if dw is not None:
                dw *= share
        if dx is not None and dw is not None:
            ctx.save_for_backward(dx, dw.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx, dw = ctx.saved_tensors
        g = upstream[0]
        return dx * g.to(dx.dtype), dw * g.to(dw.dtype), None, None, None

"""The loss of a training step: mean cross-entropy over the scored targets, by the head that never holds length x
vocabulary (`mambascope.ops.linear_cross_entropy`)."""

from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambascope.hooks.sites import SitePoint
from mambascope.model import HookedMamba
from mambascope.ops import Backend, linear_cross_entropy
from mambascope.training.sampler import IGNORED, Batch

__all__ = ["answer_loss"]


def answer_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the scored targets, in float32.

    A model of ours takes the chunked head; any other, and one whose final norm or unembedding is hooked, gives logits.
    """
    keep, length = batch.targets.shape[1], batch.tokens.shape[1]
    if isinstance(model, HookedMamba) and not _hooked(model):
        resid = model(batch.tokens, stop_at_layer=model.cfg.n_layers)[:, length - keep :]  # B K M
        normed = model.ln_final(resid).flatten(0, 1)  # B*K M
        backend = cast(Backend, model.backend)
        return linear_cross_entropy(normed, model.unembed.weight, batch.targets.flatten(), backend=backend)
    logits = model(batch.tokens, return_type="logits", logits_to_keep=None if keep == length else keep)  # B K V
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)


def _hooked(model: HookedMamba) -> bool:
    """Whether somebody watches what the chunked head does not make: the final norm's points, the unembedding."""
    head, norm = model.unembed, model.ln_final
    points: tuple[SitePoint, ...] = (norm.hook_scale, norm.hook_normalized)
    return any(point.live for point in points) or any(m._forward_hooks or m._forward_pre_hooks for m in (head, norm))

"""The loss of a training step: mean cross-entropy over the scored targets, by the head that never holds length x
vocabulary (`mambascope.ops.linear_cross_entropy`)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambascope.model import HookedMamba
from mambascope.model.head import scored_loss
from mambascope.training.sampler import IGNORED, Batch

__all__ = ["answer_loss"]


def answer_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the scored targets, in float32.

    A model of ours takes the chunked head; any other, and one whose unembedding is hooked, gives logits.
    """
    keep, length = batch.targets.shape[1], batch.tokens.shape[1]
    last = None if keep == length else keep
    if isinstance(model, HookedMamba):
        normed = model(batch.tokens, return_type="normed", logits_to_keep=last)  # B K M
        loss = scored_loss(model, normed, batch.targets)
        if loss is not None:
            return loss
        logits = model.unembed(normed)  # B K V
    else:
        logits = model(batch.tokens, return_type="logits", logits_to_keep=last)  # B K V
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED)

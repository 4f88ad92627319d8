"""The unembedding: logits where they are asked for, and a loss that never holds length x vocabulary."""

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mambascope import ops
from mambascope.errors import InputError
from mambascope.hooks.sites import Padding
from mambascope.memory import require_bytes
from mambascope.model.mixers.base import watched
from mambascope.ops.loss import IGNORED, rows_at_a_time
from mambascope.ops.ready import plain, unwatched

if TYPE_CHECKING:
    from mambascope.model.inputs import Entry
    from mambascope.model.language_model import HookedMamba

__all__ = [
    "Output",
    "check_logits",
    "kept_rows",
    "last_positions",
    "loss_of",
    "mean_loss",
    "next_token_losses",
    "scored_loss",
    "unembed",
]


class Output(NamedTuple):
    """What ``return_type="both"`` gives."""

    logits: Tensor
    loss: Tensor


def check_logits(model: "HookedMamba", rows: int) -> bool:
    """InputError if the logits of ``rows`` positions cannot fit; else True."""
    if torch.compiler.is_compiling():  # sizes may be open there
        return True
    need = rows * model.cfg.d_vocab * torch.empty((), dtype=model.dtype).element_size()
    way_out = "ask for the last ones with logits_to_keep=, for return_type='loss', or for fewer tokens at a time"
    require_bytes(need, model.device, f"logits of {rows:,} tokens x {model.cfg.d_vocab:,}", way_out, InputError)
    return True


def unembed(model: "HookedMamba", normed: Tensor) -> Tensor:
    """Logits ``… V`` of the normalised residual."""
    head, rows = model.unembed, normed.reshape(-1, normed.shape[-1])
    if type(head) is nn.Linear and not watched(head):
        backend, _ = ops.resolve_backend(model.backend, rows.device, rows.dtype)
        logits = ops.linear(rows, head.weight, head.bias, backend=cast(ops.Backend, backend))
    else:
        logits = head(rows)
    return logits.view(*normed.shape[:-1], -1)


def last_positions(x: Tensor, keep: int, padding: Padding | None) -> Tensor:
    """The last ``keep`` real positions of every row of ``B L …``."""
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise InputError(f"logits_to_keep must be a positive integer, got {keep!r}")
    shortest = x.shape[1] if padding is None else int(padding.lengths.min())
    if keep > shortest:
        raise InputError(f"logits_to_keep={keep} exceeds the {shortest} tokens of the shortest row")
    if padding is None:
        return x[:, -keep:]
    end = padding.left + padding.lengths
    columns = end[:, None] - keep + torch.arange(keep, device=x.device)  # B keep
    return x[torch.arange(x.shape[0], device=x.device)[:, None], columns]


def next_token_losses(model: "HookedMamba", normed: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats, ``B T``, from the normalised residual ``B T M`` and target ids ``B T``.

    Works in chunks of rows, so that memory is chunk x vocabulary also under autograd (each chunk's logits
    are computed again in the backward pass).
    """
    rows, goal = normed.reshape(-1, normed.shape[-1]), targets.reshape(-1)
    graph = torch.is_grad_enabled()
    share = 4 if graph and rows.is_cuda else 1  # autograd's own operators hold several tensors of the logits' size
    size = rows_at_a_time(rows.shape[0], model.cfg.d_vocab, rows.device, rows.dtype.itemsize, share)

    def chunk(x: Tensor, y: Tensor) -> Tensor:
        logits = unembed(model, x)
        if not graph and unwatched() and plain((logits,)):
            return ops.softmax_losses(logits.contiguous(), y, backend=cast(ops.Backend, model.backend))
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return F.cross_entropy(logits, y, reduction="none")

    if rows.shape[0] <= size:
        return chunk(rows, goal).view(targets.shape)
    parts = []
    for start in range(0, rows.shape[0], size):
        x, y = rows[start : start + size], goal[start : start + size]
        parts.append(checkpoint(chunk, x, y, use_reentrant=False) if graph else chunk(x, y))
    return torch.cat(parts).view(targets.shape)


def loss_of(model: "HookedMamba", normed: Tensor, tokens: Tensor, padding: Padding | None) -> Tensor | None:
    """The mean next-token loss with its gradients, `scored_loss`, from the normalised residual ``B L M`` of tokens
    ``B L``; None where there is no gradient to make, or where somebody must see the unembedding itself: then it is
    `next_token_losses` and `mean_loss`."""
    if not torch.is_grad_enabled() or not (normed.requires_grad or model.unembed.weight.requires_grad):
        return None
    following = tokens[:, 1:]
    if padding is not None:
        _count(padding)
        following = following.masked_fill(~_pairs(padding), IGNORED)
    return scored_loss(model, normed, F.pad(following, (0, 1), value=IGNORED))  # cheaper than to cut the last rows off


def scored_loss(model: "HookedMamba", normed: Tensor, targets: Tensor) -> Tensor | None:
    """Mean −log p(target) in nats over the targets ``B T`` that are not `ops.loss.IGNORED`, from the normalised
    residual ``B T M``; with a gradient, in the same visit of the logits. None where the unembedding is not just its
    weight."""
    head = model.unembed
    if type(head) is not nn.Linear or watched(head) or head.bias is not None:
        return None
    if not unwatched() or not plain((normed, head.weight)):
        return None
    rows, backend = normed.reshape(-1, normed.shape[-1]), cast(ops.Backend, model.backend)
    return ops.linear_cross_entropy(rows, head.weight, targets.reshape(-1), backend=backend)


def _pairs(padding: Padding) -> Tensor:
    """Where a token and its next are both real, ``B L-1``."""
    return padding.mask[:, 1:] & padding.mask[:, :-1]


def _count(padding: Padding) -> int:
    count = int(padding.lengths.sum()) - padding.lengths.shape[0]
    if count == 0:
        raise InputError("no row has two tokens, so there is no next token to score")
    return count


def mean_loss(losses: Tensor, padding: Padding | None, per_token: bool) -> Tensor:
    """The mean over real next-token pairs, or (``per_token``) the losses themselves with zeros at padding."""
    if padding is None:
        return losses if per_token else losses.mean()
    losses, count = losses * _pairs(padding), _count(padding)
    return losses if per_token else losses.sum() / count


def kept_rows(normed: Tensor, begin: int, end: int, entry: "Entry", keep: int | None) -> Tensor:
    """Of the piece [begin, end) of a text what ``logits_to_keep`` asks for."""
    if keep is None:
        return normed
    if entry.padding is not None or end - begin == entry.length:
        return last_positions(normed, keep, entry.padding)
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= entry.length:
        raise InputError(f"logits_to_keep must be an integer from 1 to the {entry.length} tokens, got {keep!r}")
    return normed[:, max(0, entry.length - keep - begin) :]

"""What each source token adds to a layer's output along a direction: signed amounts that add up, exactly.

A row of the effective kernel (:mod:`mambascope.hooks.effective`) times what the tokens wrote, projected:

    y[t] · v          = Σ_s Σ_d v[d] alpha[t, s, d] u[s, d]  + before + bias                              v ``D``
    mixer_out[t] · w  = Σ_s Σ_d g[d] alpha[t, s, d] u[s, d]  + before + bias + skip + constant            w ``M``
                        with g = (W_outᵀ w) · SiLU(z[t])

Amounts, not fractions: they may cancel, and a fraction of a sum near 0 means nothing.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.brief import Brief
from mambascope.errors import InputError, nearest
from mambascope.hooks.effective_path import Through, activate, layer_index, tensor_of

__all__ = ["ShareMethods", "SourceContributions"]

Space = Literal["inner", "resid"]
_SPACES = ("inner", "resid")


@dataclass(frozen=True, repr=False)
class SourceContributions(Brief):
    """Parts of y · direction (``space="inner"``) or mixer_out · direction (``"resid"``) at one query, float64.

    ``amounts`` ``B S``: of every token, 0 after the query and at padding. ``before`` ``B``: of the state before the
    text. ``bias`` ``B``: of the convolution's bias (0 unless ``through="conv"``). ``skip`` ``B``: D·u of the query
    itself; ``constant`` ``B``: out_proj's bias. ``total`` ``B`` is the sum as the run computed it: in inner space
    y · direction, to which skip does not belong; in the residual stream skip and constant do. Without a batch axis if
    the cache has none.
    """

    layer: int
    query: tuple[int, ...]
    space: Space
    through: Through
    amounts: Float[Tensor, "*B S"]
    before: Float[Tensor, "*B"]
    bias: Float[Tensor, "*B"]
    skip: Float[Tensor, "*B"]
    constant: Float[Tensor, "*B"]
    total: Float[Tensor, "*B"]

    @property
    def added(self) -> Float[Tensor, "*B"]:
        """The parts that belong to ``total``, added up."""
        scan = self.amounts.sum(-1) + self.before + self.bias
        return scan if self.space == "inner" else scan + self.skip + self.constant

    @property
    def error(self) -> float:
        """How far the parts are from ``total``: the largest gap over the largest sum of magnitudes."""
        size = self.amounts.abs().sum(-1) + self.before.abs() + self.bias.abs() + self.skip.abs() + self.constant.abs()
        return float((self.added - self.total).abs().amax() / size.amax().clamp_min(1e-300))


class ShareMethods:
    """Mixed into MambaCache."""

    def source_contributions(
        self: Any,
        layer: int,
        query: int,
        direction: Float[Tensor, " width"],
        space: Space = "inner",
        through: Literal["scan", "conv"] = "scan",
    ) -> SourceContributions:
        """What each token adds, through this layer's scan, to its output at ``query`` along ``direction``.

        ``space="inner"``: y, direction ``D``; ``"resid"``: what the block writes to the residual stream, direction
        ``M``. ``through``: tokens are where the scan wrote (u), or where the convolution read (x, SiLU's factor held).
        Time and memory O(S D N).

        Raises
        ------
        InputError: layer, query, space or path that does not exist, a layer without a scan, a direction of another size
            or with NaN, NaN in the states.
        CacheError: a hook edited what the path describes (named); stale cache.
        """
        if space not in _SPACES:
            raise InputError(f"space {space!r} is unknown{nearest(str(space), _SPACES)}; known: {', '.join(_SPACES)}")
        if through not in ("scan", "conv"):
            raise InputError(f"through={through!r} is unknown here; known: scan, conv (the gate follows from space)")
        layer, cfg = layer_index(self.model, layer), self.model.cfg
        width, name = (cfg.d_inner, "d_inner") if space == "inner" else (cfg.d_model, "d_model")
        v = check_direction(direction, width, name).to(self.device, torch.float64)
        path: Any = through if space == "inner" else "gate" if through == "scan" else "conv+gate"
        along = None if space == "inner" else direction.to(self.device)
        row = self.effective_kernel(layer, query, through=path, direction=along)
        parts = [self._batched(x).double() for x in (row.weights, row.inputs, row.before, row.bias, row.total)]
        weights, inputs, before, bias, total = parts
        skip = self._at(tensor_of(self, "skip", layer), row.query).double()  # B D
        if space == "inner":
            amounts = torch.einsum("bsd,bsd,d->bs", weights, inputs, v)
            found = (amounts, before @ v, bias @ v, skip @ v, torch.zeros_like(skip[:, 0]), total @ v)
        else:
            out = self.model.blocks[layer].mixer.out_proj
            z = self._at(tensor_of(self, "gate_in", layer), row.query).double()
            skip = (skip * activate(z, cfg.activation)) @ (v @ out.weight.detach().to(v))
            wrote = self._at(tensor_of(self, "mixer_out", layer), row.query).double() @ v
            constant = torch.zeros_like(skip) if out.bias is None else (out.bias.detach().to(v) @ v).expand_as(skip)
            found = ((weights * inputs).sum(-1), before.sum(-1), bias.sum(-1), skip, constant, wrote)
        return SourceContributions(layer, row.query, space, through, *(self._squeezed(x) for x in found))

    def _batched(self: Any, value: Tensor) -> Tensor:
        return value if self.has_batch_dim else value[None]

    def _at(self: Any, value: Tensor, query: tuple[int, ...]) -> Tensor:
        """``B L …`` at each row's query, a place among its real tokens."""
        padding = self.recording.padding
        at = torch.tensor(query, device=value.device)
        at = at if padding is None else at + padding.left.to(at)
        return value[torch.arange(len(at), device=value.device), at]


def check_direction(direction: Any, size: int, what: str) -> Tensor:
    """The direction; InputError unless it is a finite vector of ``size`` numbers."""
    if not isinstance(direction, Tensor) or tuple(direction.shape) != (size,):
        got = tuple(direction.shape) if isinstance(direction, Tensor) else type(direction).__name__
        raise InputError(f"the direction must be a tensor of {what} = {size} numbers, got {got}")
    if not bool(torch.isfinite(direction).all()):
        raise InputError("the direction holds NaN or Inf")
    return direction.detach()

"""RMSNorm with its two hook points."""

import torch
from torch import Tensor, nn

from mambascope import ops
from mambascope.hooks.run import Run
from mambascope.hooks.sites import SitePoint

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """out = weight * x / sqrt(mean(x^2) + eps)   (Zhang & Sennrich, 1910.07467; no mean is subtracted).

    ``hook_scale`` is the root, ``hook_normalized`` is x / scale before the weight, as in TransformerLens.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.hook_scale = SitePoint()
        self.hook_normalized = SitePoint()

    def forward(self, x: Tensor, run: Run | None = None) -> Tensor:
        """Normalise ``… M``; the result has the weight's dtype. Without a run no hook fires."""
        if run is None:
            return ops.rms_norm(x, self.weight, self.eps).out.to(self.weight.dtype)
        if not (run.exposes(self.hook_scale) or run.exposes(self.hook_normalized)):
            return ops.rms_norm(x, self.weight, self.eps, backend=run.backend).out.to(self.weight.dtype)
        parts = ops.rms_norm(x, self.weight, self.eps, expose=True, backend=run.backend)
        assert parts.scale is not None and parts.normalized is not None
        scale, edited = run.emit_checked(self.hook_scale, parts.scale)
        normalized = (x / scale if edited else parts.normalized).to(self.weight.dtype)
        normalized, edited_too = run.emit_checked(self.hook_normalized, normalized)
        if edited or edited_too:
            return normalized * self.weight
        return parts.out.to(self.weight.dtype)

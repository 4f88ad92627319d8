"""One residual block: norm, mixer, add. The mixer is a slot."""

from typing import Any

import torch
from torch import Tensor, nn

from mambascope.config import MambaConfig
from mambascope.hooks.run import Run
from mambascope.hooks.sites import SitePoint
from mambascope.model.mixers.registry import MIXERS
from mambascope.model.norm import RMSNorm

__all__ = ["Block"]


class Block(nn.Module):
    """resid_post = resid_pre + mixer(norm(mixer_in)), where mixer_in is this block's own copy of resid_pre."""

    hook_out_is_single_residual_stream = True  # what TransformerLens' readouts ask of a block

    def __init__(self, cfg: MambaConfig, letter: str = "m") -> None:
        super().__init__()
        self.cfg = cfg
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mixer: Any = MIXERS[letter](cfg)  # a Mixer
        self.hook_resid_pre = SitePoint()
        self.hook_mixer_in = SitePoint()
        self.hook_mixer_out = SitePoint()
        self.hook_resid_post = SitePoint()

    @property
    def residual_dtype(self) -> torch.dtype:
        """float32 where the config keeps the residual stream so, else the weights' dtype."""
        dtype = self.norm.weight.dtype
        return torch.float32 if self.cfg.residual_in_fp32 and dtype != torch.float64 else dtype

    def forward(self, resid: Tensor, run: Run, state: Any = None) -> tuple[Tensor, Any]:
        """The residual stream ``B L M`` after the block, and the mixer's state after the last real token."""
        return self.inside(run.emit(self.hook_resid_pre, resid, fork=True), run, state)

    def inside(self, resid: Tensor, run: Run, state: Any = None) -> tuple[Tensor, Any]:
        """The same, from what its hooks at ``hook_resid_pre`` have seen."""
        mixer_in = run.emit(self.hook_mixer_in, resid, fork=True)
        out, after = self.mixer(self.norm(mixer_in, run), run, state)
        return self._add(resid, out, run), after

    def leave(self, resid: Tensor, gated: Tensor, run: Run) -> Tensor:
        """The end of a block with Mamba's mixer, from what entered it and what its mixer's gate let through."""
        return self._add(resid, self.mixer.written(gated, run), run)

    def _add(self, resid: Tensor, out: Tensor, run: Run) -> Tensor:
        return run.emit(self.hook_resid_post, resid + run.emit(self.hook_mixer_out, out))

"""A feed-forward layer: SwiGLU (Shazeer, 2002.05202), one token at a time."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mambascope.config import MambaConfig
from mambascope.hooks.run import PathTaken, Run
from mambascope.hooks.sites import SitePoint
from mambascope.model.mixers.base import Mixer, project
from mambascope.model.mixers.states import Stateless

__all__ = ["FeedForwardMixer"]


class FeedForwardMixer(Mixer):
    """pre, pre_linear = in_proj(r); post = SiLU(pre) * pre_linear; out_proj(post). No token sees another."""

    letter = "f"
    state_type = Stateless
    inner = "mixer.hook_post"

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__(cfg)
        self.in_proj = nn.Linear(cfg.d_model, 2 * cfg.d_ff, bias=cfg.proj_bias)
        self.out_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=cfg.proj_bias)
        self.hook_pre = SitePoint()
        self.hook_pre_linear = SitePoint()
        self.hook_post = SitePoint()

    def initial_state(self, batch: int) -> Stateless:
        """Nothing, for so many rows."""
        return Stateless(torch.empty(batch, 0, device=self.placed.device, dtype=self.placed.dtype))

    def forward(self, r: Tensor, run: Run, state: Stateless | None = None) -> tuple[Tensor, Stateless]:
        """Transform the normalised residual ``B L M``; the output ``B L M`` and the same empty state."""
        pre, pre_linear = project(r, self.in_proj, run.backend).chunk(2, -1)  # B L F each
        pre = run.emit(self.hook_pre, pre)
        pre_linear = run.emit(self.hook_pre_linear, pre_linear)
        if pre.device.type == "cpu":  # where silu rounds otherwise at the end of a row than at the end of a tensor
            pre = pre.contiguous()
        post = run.emit(self.hook_post, F.silu(pre) * pre_linear)  # B L F
        self.path = PathTaken("torch", "open", "a feed-forward layer has one path")
        out = project(post, self.out_proj, run.backend)  # B L M
        return out, self.initial_state(r.shape[0]) if state is None else state

"""H3 (Hungry Hungry Hippos, 2212.14052, section 3): two state space models and two multiplications.

    q, k, v = in_proj(r);   s = shift(k);   u = s v;   y = ssm(u);   out_proj(q (y + D u))

``shift`` remembers the last K tokens of k and weighs them: a state space model whose matrix moves its K states down by
one (``d_conv`` of them; the paper has 64), which is a causal conv; its skip is the newest tap. ``ssm`` is the diagonal
one of S4D. Multiplications are of channels one by one (the paper's heads of width 1).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambascope.config import MambaConfig
from mambascope.hooks.run import PathTaken, Run, compute_dtype
from mambascope.hooks.sites import SitePoint
from mambascope.hooks.state_point import StatePoint
from mambascope.model.mixers.base import Mixer, project
from mambascope.model.mixers.conv import causal_conv
from mambascope.model.mixers.diagonal import DiagonalSSM
from mambascope.model.mixers.states import ConvSSMState

__all__ = ["H3Mixer"]


class H3Mixer(Mixer):
    """q (diagonal(shift(k) v) + skip), with q, k, v ``B L D`` from one matrix."""

    letter = "h"
    state_type = ConvSSMState
    inner = "mixer.hook_gated"

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__(cfg)
        D, K = cfg.d_inner, cfg.d_conv
        self.in_proj = nn.Linear(cfg.d_model, 3 * D, bias=cfg.proj_bias)
        self.shift = nn.Conv1d(D, D, K, groups=D, padding=K - 1, bias=False)
        # Normal taps as in the paper, drawn such that shift(k) has the variance of k whatever K is.
        nn.init.normal_(self.shift.weight, std=K**-0.5)
        self.ssm = DiagonalSSM(cfg, cfg.ssm_init)
        self.out_proj = nn.Linear(D, cfg.d_model, bias=cfg.proj_bias)
        self.hook_in_q = SitePoint()
        self.hook_in_k = SitePoint()
        self.hook_in_v = SitePoint()
        self.hook_shift = SitePoint()
        self.hook_u = SitePoint()
        self.hook_ssm_kernel = SitePoint(lazy=True)
        self.hook_state = StatePoint()
        self.hook_y = SitePoint()
        self.hook_skip = SitePoint()
        self.hook_gated = SitePoint()

    def initial_state(self, batch: int) -> ConvSSMState:
        """Zeros."""
        cfg, like = self.cfg, self.in_proj.weight
        ssm = torch.zeros(batch, cfg.d_inner, cfg.d_state, device=like.device, dtype=compute_dtype(like.dtype))
        return ConvSSMState(ssm, like.new_zeros(batch, cfg.d_inner, cfg.d_conv - 1))

    def core(self, batch: int, length: int, dtype: torch.dtype) -> Callable[[], None] | None:
        """The state space model, forward and backward, in the parameters' dtype."""
        return self.ssm.core(batch, length)

    def forward(self, r: Tensor, run: Run, state: ConvSSMState | None = None) -> tuple[Tensor, ConvSSMState]:
        """Mix the normalised residual ``B L M``; the output ``B L M`` and the state after the last real token."""
        parts = project(r, self.in_proj, run.backend).chunk(3, -1)  # B L D each
        q, k, v = (run.emit(p, x) for p, x in zip((self.hook_in_q, self.hook_in_k, self.hook_in_v), parts, strict=True))
        incoming = None if state is None else state.conv
        shifted, conv = causal_conv(k, self.shift, incoming, "identity", (self.hook_in_k, self.hook_shift), run)
        wide = compute_dtype(q.dtype)
        u = run.emit(self.hook_u, (shifted.to(wide) * v.to(wide)).to(q.dtype))
        h0 = None if state is None else state.ssm
        y, h_last, form = self.ssm(u.to(wide), h0, run, self.hook_ssm_kernel, self.hook_state)
        self.path = PathTaken("torch", form, "a time-invariant state space model")
        y = run.emit(self.hook_y, y)
        skip = run.emit(self.hook_skip, u.to(wide) * self.ssm.D.to(wide))
        gated = run.emit(self.hook_gated, ((y + skip) * q.to(wide)).to(q.dtype))
        return project(gated, self.out_proj, run.backend), ConvSSMState(h_last, conv)

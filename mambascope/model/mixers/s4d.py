"""S4D (2206.11893), a time-invariant diagonal state space model, in Mamba's block ("s") or in a plain layer ("p").

"s" is Mamba's block with another recurrence in the scan's place; in_proj, conv and gate are Mamba's. It is the row
"Mamba | S4" of 2312.00752, table 1: what differs from Mamba is selection alone.

    x, z = in_proj(r);  u = SiLU(conv(x));  y = ssm(u);  out_proj((y + D u) SiLU(z))

"p" has neither conv nor gate, the row "No gate | S4" (S4's own layer, with SiLU for GELU):

    u = x = in_proj(r);  y = ssm(u);  out_proj(SiLU(y + D u))
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambascope.config import MambaConfig
from mambascope.hooks.run import PathTaken, Run, compute_dtype
from mambascope.hooks.sites import SitePoint
from mambascope.hooks.state_point import StatePoint
from mambascope.model.mixers.base import Mixer, project
from mambascope.model.mixers.conv import activate, apply_gate, causal_conv
from mambascope.model.mixers.diagonal import DiagonalSSM
from mambascope.model.mixers.states import ConvSSMState, SSMState

__all__ = ["PlainS4DMixer", "S4DMixer"]


class _S4D(Mixer):
    """What both forms have: the state space model, its skip, and out_proj."""

    inner = "mixer.hook_gated"
    _gated: bool

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__(cfg)
        D, K = cfg.d_inner, cfg.d_conv
        self.in_proj = nn.Linear(cfg.d_model, (1 + self._gated) * D, bias=cfg.proj_bias)
        self.hook_x = SitePoint()
        if self._gated:
            self.conv1d = nn.Conv1d(D, D, K, groups=D, padding=K - 1, bias=cfg.conv_bias)
            self.hook_gate_in = SitePoint()
            self.hook_conv = SitePoint()
            self.hook_u = SitePoint()
        self.ssm = DiagonalSSM(cfg, cfg.ssm_init)
        self.hook_ssm_kernel = SitePoint(lazy=True)
        self.hook_state = StatePoint()
        self.hook_y = SitePoint()
        self.hook_skip = SitePoint()
        self.hook_gated = SitePoint()
        self.out_proj = nn.Linear(D, cfg.d_model, bias=cfg.proj_bias)

    def core(self, batch: int, length: int, dtype: torch.dtype) -> Callable[[], None] | None:
        """The state space model, forward and backward, in the parameters' dtype."""
        return self.ssm.core(batch, length)

    def _zeros(self, batch: int) -> Tensor:
        like = self.in_proj.weight
        shape = (batch, self.cfg.d_inner, self.cfg.d_state)
        return torch.zeros(shape, device=like.device, dtype=compute_dtype(like.dtype))

    def _mix(self, u: Tensor, h0: Tensor | None, run: Run) -> tuple[Tensor, Tensor]:
        """y + D u ``B L D`` in the compute dtype, and the last state."""
        wide = u.to(compute_dtype(u.dtype))
        y, h_last, form = self.ssm(wide, h0, run, self.hook_ssm_kernel, self.hook_state)
        self.path = PathTaken("torch", form, "a time-invariant state space model")
        y = run.emit(self.hook_y, y)
        skip = run.emit(self.hook_skip, wide * self.ssm.D.to(wide.dtype))
        return y + skip, h_last


class S4DMixer(_S4D):
    """S4D in Mamba's block."""

    letter = "s"
    state_type = ConvSSMState
    _gated = True

    def initial_state(self, batch: int) -> ConvSSMState:
        """Zeros."""
        conv = self.in_proj.weight.new_zeros(batch, self.cfg.d_inner, self.cfg.d_conv - 1)
        return ConvSSMState(self._zeros(batch), conv)

    def forward(self, r: Tensor, run: Run, state: ConvSSMState | None = None) -> tuple[Tensor, ConvSSMState]:
        """Mix the normalised residual ``B L M``; the output ``B L M`` and the state after the last real token."""
        D, activation = self.cfg.d_inner, self.cfg.activation
        xz = project(r, self.in_proj, run.backend)  # B L 2D
        x = run.emit(self.hook_x, xz[..., :D])
        z = run.emit(self.hook_gate_in, xz[..., D:])
        incoming = None if state is None else state.conv
        u, conv = causal_conv(x, self.conv1d, incoming, activation, (self.hook_x, self.hook_conv), run)
        u = run.emit(self.hook_u, u)
        total, h_last = self._mix(u, None if state is None else state.ssm, run)
        gated = run.emit(self.hook_gated, apply_gate(total, z, activation, run))
        return project(gated, self.out_proj, run.backend), ConvSSMState(h_last, conv)


class PlainS4DMixer(_S4D):
    """S4D without conv and gate."""

    letter = "p"
    state_type = SSMState
    _gated = False

    def initial_state(self, batch: int) -> SSMState:
        """Zeros."""
        return SSMState(self._zeros(batch))

    def forward(self, r: Tensor, run: Run, state: SSMState | None = None) -> tuple[Tensor, SSMState]:
        """Mix the normalised residual ``B L M``; the output ``B L M`` and the state after the last real token."""
        x = run.emit(self.hook_x, project(r, self.in_proj, run.backend))  # B L D
        total, h_last = self._mix(x, None if state is None else state.ssm, run)
        gated = run.emit(self.hook_gated, activate(total, self.cfg.activation, run).to(x.dtype))
        return project(gated, self.out_proj, run.backend), SSMState(h_last)

"""A gated causal convolution net: Mamba's block without its scan (compare 1612.08083, 2302.10866).

    x, z = in_proj(r);   u = SiLU(conv(x) + b);   out_proj(u SiLU(z))

A token sees the ``d_conv`` newest tokens, itself among them, and nothing before. Convs of 32 taps and more go by FFT.
"""

from torch import Tensor, nn

from mambascope.config import MambaConfig
from mambascope.hooks.run import PathTaken, Run, compute_dtype
from mambascope.hooks.sites import SitePoint
from mambascope.model.mixers.base import Mixer, project
from mambascope.model.mixers.conv import apply_gate, causal_conv
from mambascope.model.mixers.states import ConvState

__all__ = ["GatedConvMixer"]


class GatedConvMixer(Mixer):
    """A depthwise causal conv times a gate."""

    letter = "g"
    state_type = ConvState
    inner = "mixer.hook_gated"

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__(cfg)
        D, K = cfg.d_inner, cfg.d_conv
        self.in_proj = nn.Linear(cfg.d_model, 2 * D, bias=cfg.proj_bias)
        self.conv1d = nn.Conv1d(D, D, K, groups=D, padding=K - 1, bias=cfg.conv_bias)
        self.out_proj = nn.Linear(D, cfg.d_model, bias=cfg.proj_bias)
        self.hook_x = SitePoint()
        self.hook_gate_in = SitePoint()
        self.hook_conv = SitePoint()
        self.hook_u = SitePoint()
        self.hook_gated = SitePoint()

    def initial_state(self, batch: int) -> ConvState:
        """Zeros."""
        return ConvState(self.in_proj.weight.new_zeros(batch, self.cfg.d_inner, self.cfg.d_conv - 1))

    def forward(self, r: Tensor, run: Run, state: ConvState | None = None) -> tuple[Tensor, ConvState]:
        """Mix the normalised residual ``B L M``; the output ``B L M`` and the last K-1 real inputs of the conv."""
        D, activation = self.cfg.d_inner, self.cfg.activation
        xz = project(r, self.in_proj, run.backend)  # B L 2D
        x = run.emit(self.hook_x, xz[..., :D])
        z = run.emit(self.hook_gate_in, xz[..., D:])
        incoming = None if state is None else state.conv
        u, conv = causal_conv(x, self.conv1d, incoming, activation, (self.hook_x, self.hook_conv), run)
        u = run.emit(self.hook_u, u)
        gated = run.emit(self.hook_gated, apply_gate(u.to(compute_dtype(u.dtype)), z, activation, run))
        self.path = PathTaken("torch", "open", "a gated convolution has one path")
        return project(gated, self.out_proj, run.backend), ConvState(conv)

"""The Mamba mixer (2312.00752, algorithm 2 and section 3.4), open at every step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mambascope import ops
from mambascope.config import MambaConfig
from mambascope.errors import HookError
from mambascope.hooks.run import PathTaken, Run, compute_dtype
from mambascope.hooks.sites import SitePoint
from mambascope.hooks.state_point import StatePoint
from mambascope.model.mixers.base import Mixer, project
from mambascope.model.mixers.conv import apply_gate, causal_conv
from mambascope.model.recurrence import Ends, Inputs, Points, anchors_of, run_recurrence
from mambascope.model.state import MambaState

__all__ = ["MambaMixer"]


class ScanInputs(NamedTuple):
    """u, delta (after softplus) ``B L D``, B, C ``B L N``, and z ``B L D``, which the gate reads."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor


class MambaMixer(Mixer):
    """x, z = in_proj(r); u = SiLU(conv(x)); delta, B, C from u; y = scan(u); out_proj((y + D u) SiLU(z))."""

    letter = "m"
    state_type = MambaState
    inner = "mixer.hook_gated"

    def __init__(self, cfg: MambaConfig) -> None:
        super().__init__(cfg)
        D, N, R, K = cfg.d_inner, cfg.d_state, cfg.dt_rank, cfg.d_conv
        self.in_proj = nn.Linear(cfg.d_model, 2 * D, bias=cfg.proj_bias)
        # A Conv1d for its parameter names and initialisation; ops.causal_conv does the work.
        self.conv1d = nn.Conv1d(D, D, K, groups=D, padding=K - 1, bias=cfg.conv_bias)
        self.x_proj = nn.Linear(D, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, D, bias=True)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, N + 1, dtype=torch.float32)).repeat(D, 1))  # D N, S4D-real
        self.D = nn.Parameter(torch.ones(D))
        self.out_proj = nn.Linear(D, cfg.d_model, bias=cfg.proj_bias)
        self.hook_x = SitePoint()
        self.hook_gate_in = SitePoint()
        self.hook_conv = SitePoint()
        self.hook_u = SitePoint()
        self.hook_u_select = SitePoint()
        self.hook_u_write = SitePoint()
        self.hook_u_skip = SitePoint()
        self.hook_dt_low = SitePoint()
        self.hook_B = SitePoint()
        self.hook_C = SitePoint()
        self.hook_delta_raw = SitePoint()
        self.hook_delta = SitePoint()
        self.hook_A_bar = SitePoint(lazy=True)
        self.hook_B_bar = SitePoint(lazy=True)
        self.hook_write = SitePoint(lazy=True)
        self.hook_h = StatePoint()
        self.hook_y = SitePoint()
        self.hook_skip = SitePoint()
        self.hook_gated = SitePoint()
        self._points = Points(self.hook_A_bar, self.hook_B_bar, self.hook_write, self.hook_h, self.hook_y)
        self._init_delta()

    def _init_delta(self) -> None:
        """dt_proj's bias such that softplus(bias) is log-uniform in [dt_min, dt_max] (2312.00752, section 3.6)."""
        cfg = self.cfg
        spread = cfg.dt_rank**-0.5 * cfg.dt_scale
        with torch.no_grad():
            if cfg.dt_init == "constant":
                nn.init.constant_(self.dt_proj.weight, spread)
            else:
                nn.init.uniform_(self.dt_proj.weight, -spread, spread)
            low, high = math.log(cfg.dt_min), math.log(cfg.dt_max)
            delta = torch.exp(torch.rand(cfg.d_inner) * (high - low) + low).clamp(min=cfg.dt_floor)
            self.dt_proj.bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MambaMixer":
        """As in torch, but A_log and D stay float32 in a bf16 or fp16 model, as in the authors' code."""
        if recurse:
            for module in self.children():
                module._apply(fn)

        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.dtype in (torch.bfloat16, torch.float16) else out

        return super()._apply(keep, recurse=False)

    def decay(self) -> Tensor:
        """A = -exp(A_log), ``D N``. Never kept: fused optimizers and ``.data`` change A_log without its version."""
        return torch.exp(self.A_log.to(compute_dtype(self.A_log.dtype))).neg()

    def initial_state(self, batch: int) -> MambaState:
        """The state before the first token: zeros."""
        weight = self.in_proj.weight
        ssm = torch.zeros(
            batch, self.cfg.d_inner, self.cfg.d_state, device=weight.device, dtype=compute_dtype(weight.dtype)
        )
        conv = torch.zeros(batch, self.cfg.d_inner, self.cfg.d_conv - 1, device=weight.device, dtype=weight.dtype)
        return MambaState(ssm, conv)

    def forward(self, r: Tensor, run: Run, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """Mix the normalised residual ``B L M``; the output ``B L M`` and the state after the last real token."""
        D = self.cfg.d_inner
        xz = project(r, self.in_proj, run.backend)  # B L 2D
        x = run.emit(self.hook_x, xz[..., :D])
        z = run.emit(self.hook_gate_in, xz[..., D:])
        u, conv_state = self.conv(x, run, state)
        u = run.emit(self.hook_u, u)
        u_select = run.emit(self.hook_u_select, u, fork=True)
        u_write = run.emit(self.hook_u_write, u, fork=True)
        u_skip = run.emit(self.hook_u_skip, u, fork=True)
        dt_low, B, C = self.select(u_select, run)
        raw = project(dt_low, self.dt_proj, run.backend)  # B L D
        raw = run.emit(self.hook_delta_raw, raw)
        h0 = state.ssm if state is not None else None
        why = self._why_open(run, u_write, u_skip)
        if why:
            gated, h_last = self._open(raw, u_write, u_skip, B, C, z, h0, run, why)
        elif run.hooks and self.hook_h.live:
            h0 = self.initial_state(raw.shape[0]).ssm if h0 is None else h0
            gated, h_last = self.around_states(u_write, raw, self.decay(), B, C, z, h0, run)
        else:
            gated, h_last = self._fused(raw, u_write, B, C, z, h0, run)
        return self.written(gated, run), MambaState(h_last, conv_state)

    def written(self, gated: Tensor, run: Run) -> Tensor:
        """What the mixer writes, ``B L M``, from what leaves its gate."""
        return project(run.emit(self.hook_gated, gated), self.out_proj, run.backend)

    def conv_inputs(self, r: Tensor, run: Run) -> Tensor:
        """x ``B L D``, what the conv reads, from the normalised residual ``B L M``."""
        return project(r, self.in_proj, run.backend)[..., : self.cfg.d_inner]

    def scan_inputs(self, r: Tensor, run: Run, state: MambaState | None) -> "ScanInputs":
        """What the recurrence and what follows it read: the mixer up to there."""
        xz = project(r, self.in_proj, run.backend)  # B L 2D
        u, _ = self.conv(xz[..., : self.cfg.d_inner], run, state)
        dt_low, B, C = self.select(u, run)
        delta = ops.softplus(project(dt_low, self.dt_proj, run.backend), backend=run.backend)
        return ScanInputs(u, delta, B, C, xz[..., self.cfg.d_inner :])

    def leave(self, y: Tensor, skip: Tensor, z: Tensor, run: Run) -> Tensor:
        """The mixer's output ``B L M`` from y, the skip's part and the gate's input, ``B L D`` each."""
        gated = apply_gate(torch.add(y, skip), z, self.cfg.activation, run)
        return project(gated, self.out_proj, run.backend)

    def conv(self, x: Tensor, run: Run, state: MambaState | None) -> tuple[Tensor, Tensor]:
        """u ``B L D`` from x, and the last K-1 inputs."""
        incoming = state.conv if state is not None else None
        points = (self.hook_x, self.hook_conv)
        return causal_conv(x, self.conv1d, incoming, self.cfg.activation, points, run, by_fft=False)

    def select(self, u: Tensor, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """dt_low ``… R``, B and C ``… N`` from u ``… D``."""
        cfg = self.cfg
        dt_low, B, C = project(u, self.x_proj, run.backend).split([cfg.dt_rank, cfg.d_state, cfg.d_state], -1)
        if cfg.mixer_norm_eps is not None:  # Falcon-Mamba (2410.05355): weightless RMSNorm of all three
            dt_low, B, C = (
                ops.rms_norm(v, None, cfg.mixer_norm_eps, backend=run.backend).out.to(u.dtype) for v in (dt_low, B, C)
            )
        return run.emit(self.hook_dt_low, dt_low), run.emit(self.hook_B, B), run.emit(self.hook_C, C)

    def _why_open(self, run: Run, u_write: Tensor, u_skip: Tensor) -> str:
        """Why softplus, skip and gate cannot run inside the scan; empty if they can."""
        for point in (self.hook_delta, self.hook_y, self.hook_skip):
            if run.exposes(point):
                return f"{str(point.name).rsplit('.', 1)[-1]} is read"
        if run.hooks:
            for point in (self.hook_A_bar, self.hook_B_bar, self.hook_write):
                if point.live:
                    return f"{str(point.name).rsplit('.', 1)[-1]} has a hook"
            if self.hook_h.demand is not None:  # who asks while the recurrence runs may ask for y next
                return "hook_h is traced"
        if u_write is not u_skip:
            return "u_write and u_skip differ"
        if run.padding is not None:
            return "the batch is padded"
        return "" if self.cfg.activation == "silu" else f"activation {self.cfg.activation}"

    def _fused(
        self, raw: Tensor, u: Tensor, B: Tensor, C: Tensor, z: Tensor, h0: Tensor | None, run: Run
    ) -> tuple[Tensor, Tensor]:
        out = ops.selective_scan(
            u,
            raw,
            self.decay(),
            B,
            C,
            self.D,
            z,
            dt_softplus=True,
            h0=h0,
            boundaries=run.boundaries,
            backend=run.backend,
        )
        if run.recorder is not None and run.boundaries is not None:
            run.recorder.take_anchors(str(self.hook_h.name), anchors_of(out, run.boundaries, u.shape[1]))
        self.path = PathTaken(run.backend, "fused", run.why)
        return out.y, out.h_last

    def around_states(
        self, u: Tensor, raw: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, h0: Tensor, run: Run
    ) -> tuple[Tensor, Tensor]:
        """What leaves the gate, and the last state, with hooks at states and nowhere else in the scan.

        Softplus, skip and gate stay in the pieces of the scan: the same bits.
        """
        inputs = Inputs(u, raw, A, B, C, h0, Ends(self.D, z))
        gated, h_last, form = run_recurrence(inputs, self._points, run)
        for point in (self.hook_y, self.hook_skip):
            if run.exposes(point):
                raise HookError(
                    f"{point.name}: a hook at hook_h of the same block placed a hook here while the scan ran, which is "
                    "too late; place it before the run"
                )
        self.path = PathTaken(run.backend, form, "hook_h has a hook")
        return gated, h_last

    def _open(
        self,
        raw: Tensor,
        u_write: Tensor,
        u_skip: Tensor,
        B: Tensor,
        C: Tensor,
        z: Tensor,
        h0: Tensor | None,
        run: Run,
        why: str,
    ) -> tuple[Tensor, Tensor]:
        delta = ops.softplus(raw, backend=run.backend)  # B L D, compute dtype
        if run.padding is None:
            delta = run.emit(self.hook_delta, delta)
        else:  # after softplus: a padded step must neither decay nor write, whatever a hook makes of it
            padded = ~run.padding.mask[..., None]
            delta, edited = run.emit_checked(self.hook_delta, delta.masked_fill(padded, 0.0))
            if edited:
                delta = delta.masked_fill(padded, 0.0)
                if run.recorder is not None:
                    run.recorder.take(str(self.hook_delta.name), delta)
        if h0 is None:
            h0 = self.initial_state(raw.shape[0]).ssm
        inputs = Inputs(u_write, delta, self.decay(), B, C, h0)
        y, h_last, form = run_recurrence(inputs, self._points, run)
        y = run.emit(self.hook_y, y)
        self.hook_y.beneath = None
        skip = torch.mul(u_skip.to(y.dtype), self.D.to(y.dtype))  # B L D
        skip = run.emit(self.hook_skip, skip)
        self.path = PathTaken(run.backend, form, why)
        return apply_gate(torch.add(y, skip), z, self.cfg.activation, run), h_last

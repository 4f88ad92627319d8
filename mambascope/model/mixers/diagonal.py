"""The time-invariant diagonal state space model of S4D (2206.11893) and H3, with hooks on its kernel and its states.

    A = -exp(A_log) + i A_imag,   A_bar = exp(delta A),   B_bar = (A_bar - 1) / A     zero-order hold, B = 1
    h[t] = A_bar h[t-1] + B_bar u[t],   y[t] = 2 Re Σ_n C[n] h[t, n]                  N/2 conjugate pairs
                                                                                      (real: N states, no 2, no Re)

Over a text y is a convolution by FFT, O(D L log L); for one token the recurrence. Steps that somebody looks at are
computed beside the convolution; after an edited state the convolution starts anew from it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambascope.config import MambaConfig
from mambascope.errors import HookError
from mambascope.hooks.run import Run
from mambascope.hooks.sites import SitePoint
from mambascope.hooks.state_point import StatePoint
from mambascope.model.mixers.stepwise import Steps, left_in
from mambascope.ops.lti import Diagonal

__all__ = ["DiagonalSSM"]


class DiagonalSSM(nn.Module):
    """delta ``D``, A and C ``D N/2`` pairs (or ``D N`` real), the skip ``D``; parameters stay float32 in bf16 models.

    ``init``: "lin" A = -1/2 + πn i, "inv" A = -1/2 + (N/π)(N/(2n+1) - 1) i, both of 2206.11893 (equations 8 and 9), or
    "real" A = -(n + 1), Mamba's. delta is log-uniform in [dt_min, dt_max]; C and the skip are standard normal.
    """

    def __init__(self, cfg: MambaConfig, init: str) -> None:
        super().__init__()
        D, N = cfg.d_inner, cfg.d_state
        low, high = math.log(cfg.dt_min), math.log(cfg.dt_max)
        self.log_dt = nn.Parameter(torch.rand(D) * (high - low) + low)
        n = torch.arange(N if init == "real" else N // 2, dtype=torch.float32)
        if init == "real":
            self.A_log = nn.Parameter(torch.log(n + 1).repeat(D, 1))
            self.register_parameter("A_imag", None)
            self.C = nn.Parameter(torch.randn(D, N))
        else:
            imag = math.pi * n if init == "lin" else N / math.pi * (N / (2 * n + 1) - 1)
            self.A_log = nn.Parameter(torch.full((D, N // 2), math.log(0.5)))
            self.A_imag = nn.Parameter(imag.repeat(D, 1))
            self.C = nn.Parameter(torch.randn(D, N // 2, 2) * 0.5**0.5)  # variance 1 as a complex number
        self.D = nn.Parameter(torch.randn(D))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiagonalSSM":
        """As in torch, but the parameters stay float32 in a bf16 or fp16 model, as Mamba's A_log does."""

        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.dtype in (torch.bfloat16, torch.float16) else out

        return super()._apply(keep, recurse)

    def discretised(self) -> Diagonal:
        """The recurrence's rate, gain and C, in float64: ``D N/2`` complex or ``D N`` real."""
        A, C = -torch.exp(self.A_log.double()), self.C.double()
        if self.A_imag is not None:
            A, C = torch.complex(A, self.A_imag.double()), 2 * torch.view_as_complex(C)
        rate = torch.exp(self.log_dt.double())[:, None] * A
        return Diagonal(rate, (torch.exp(rate) - 1) / A, C)

    def core(self, batch: int, length: int) -> Callable[[], None]:
        """The convolution of a training step, its kernel and its gradients, on random inputs: to be timed."""
        like = self.log_dt
        u = torch.randn(batch, length, len(like), device=like.device, dtype=like.dtype, requires_grad=True)
        g, leaves = torch.randn_like(u), [p for name, p in self.named_parameters() if name != "D"]

        def step() -> None:
            torch.autograd.grad(self.discretised().run(None, u), [u, *leaves], g)

        return step

    def forward(
        self, u: Tensor, h0: Tensor | None, run: Run, kernel_point: SitePoint, state_point: StatePoint
    ) -> tuple[Tensor, Tensor, str]:
        """y ``B L D``, the state after each row's last token ``B D N``, and the form taken.

        ``u``: ``B L D`` in the compute dtype. ``h0``: ``B D N``; a pair takes two of N places, its real part first.
        """
        ssm, padding = self.discretised(), run.padding
        aligned = padding is not None and padding.any_left
        if aligned and padding is not None:
            u = padding.align(u)
        steps = Steps([state_point], run, u.shape[1])
        kernel = self._shown_kernel(ssm, u, run, kernel_point, h0, state_point.name if steps else None)
        h = torch.zeros(self._shape(u), device=u.device, dtype=u.dtype) if h0 is None else h0
        h = h if self.A_imag is None else _pairs_to_complex(h)
        y, h_last, form = _walk(ssm, u, h, h0 is not None, kernel, steps, state_point, run)
        if aligned and padding is not None:
            y = padding.unalign(y)
        return y, _complex_to_pairs(h_last), form

    def _shape(self, u: Tensor) -> tuple[int, int, int]:
        return u.shape[0], u.shape[2], self.C[0].numel()

    def _shown_kernel(
        self, ssm: Diagonal, u: Tensor, run: Run, point: SitePoint, h0: Tensor | None, states: str | None
    ) -> Tensor | None:
        """The kernel as hooks left it, ``B L D`` (a copy for each row), or None where nobody edited it or wants its
        gradient. ``states``: the point where somebody reads or edits states in this pass, which an edited one has not.
        """
        if not run.exposes(point):
            return None
        padding, (batch, length, _) = run.padding, u.shape
        given = ssm.kernel(length, u.dtype).expand(batch, -1, -1)
        given = given.clone() if run.hooks and point.live else given
        aligned = padding is not None and padding.any_left
        if aligned and padding is not None:
            given = padding.unalign(given)  # lag j stands where token j does, so that a site's [j] means lag j
        before = given.detach().clone()
        out, touched = run.emit_checked(point, given)
        if not touched:
            return None
        edited = not torch.equal(out.detach(), before)  # else somebody wants its gradient
        if edited and states is not None:
            raise HookError(
                f"{point.name} is edited, and {states} is read or edited in the same pass: an edited kernel has no "
                "states; use one of them"
            )
        if edited and h0 is not None:
            raise HookError(
                f"{point.name} is edited where a text goes on from a state, which was made with the kernel as it is; "
                "run the whole text at once"
            )
        return padding.align(out) if aligned and padding is not None else out


def _walk(
    ssm: Diagonal,
    u: Tensor,
    h0: Tensor,
    entered: bool,
    kernel: Tensor | None,
    steps: Steps,
    point: StatePoint,
    run: Run,
) -> tuple[Tensor, Tensor, str]:
    """y, the last state, and the form: the convolution in one piece, or in pieces between edited states."""
    length, counts = u.shape[1], run.lengths
    h, done, start, entry, pieces = h0, 0, 0, h0 if entered else None, []
    t = steps.after(-1)
    while t is not None:
        h = ssm.advance(h, u[:, done : t + 1], left_in(counts, done, t + 1))
        shown, edited = steps.show(point, t, _complex_to_pairs(h))
        if edited:
            if kernel is not None:
                raise HookError(
                    f"{point.name} is edited, or its gradient is asked for, where that of the kernel is asked for too: "
                    "states cut the convolution in pieces; use one of them"
                )
            if t > start:
                pieces.append(_outputs(ssm, u[:, start:t], entry))
            h = _pairs_to_complex(shown) if h.is_complex() else shown
            pieces.append(ssm.read(h)[:, None])
            start, entry = t + 1, h
        done, t = t + 1, steps.after(t)
    steps.offer()
    if not pieces:  # bits do not depend on who was reading
        h_last = ssm.advance(h0, u, counts)
        if kernel is not None:
            return ssm.run(entry, u, kernel), h_last, "kernel"
        if length == 1:
            return ssm.read(h_last)[:, None] if counts is None else _outputs(ssm, u, entry), h_last, "step"
        return _outputs(ssm, u, entry), h_last, "fft"
    if start < length:
        pieces.append(_outputs(ssm, u[:, start:], entry))
    if done < length:
        h = ssm.advance(h, u[:, done:], left_in(counts, done, length))
    return torch.cat(pieces, 1), h, "split"


def _outputs(ssm: Diagonal, u: Tensor, h: Tensor | None) -> Tensor:
    if u.shape[1] == 1 and h is not None:
        return ssm.read(ssm.step(h, u[:, 0]))[:, None]
    return ssm.run(h, u)


def _pairs_to_complex(h: Tensor) -> Tensor:
    """``B D N`` real, a real part before its imaginary one, as ``B D N/2`` complex."""
    return torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())


def _complex_to_pairs(h: Tensor) -> Tensor:
    return torch.view_as_real(h).flatten(-2) if h.is_complex() else h

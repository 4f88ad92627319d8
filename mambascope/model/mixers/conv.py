"""The pieces that blocks shaped like Mamba's share: the causal conv with its hook point, activation, gate."""

from torch import Tensor, nn
from torch.nn import functional as F

from mambascope import ops
from mambascope.errors import HookError
from mambascope.hooks.run import Run
from mambascope.hooks.sites import SitePoint
from mambascope.model.mixers.base import hooked

__all__ = ["LONG", "activate", "apply_gate", "causal_conv"]

LONG = 32
"""Convs of so many taps and more go by FFT."""

_ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "identity": lambda x: x}


def activate(x: Tensor, activation: str, run: Run) -> Tensor:
    """One of ``mambascope.config.ACTIVATIONS``."""
    return ops.silu(x, backend=run.backend) if activation == "silu" else _ACTIVATIONS[activation](x)


def apply_gate(y: Tensor, z: Tensor, activation: str, run: Run) -> Tensor:
    """y * activation(z), ``B L D`` in z's dtype."""
    if activation == "silu":
        return ops.gate(y, z, backend=run.backend)
    return (y * activate(z, activation, run).to(y.dtype)).to(z.dtype)


def causal_conv(
    x: Tensor,
    conv: nn.Module,
    incoming: Tensor | None,
    activation: str,
    points: tuple[SitePoint, SitePoint],
    run: Run,
    by_fft: bool = True,
) -> tuple[Tensor, Tensor]:
    """activation(conv(x)) ``B L D``, and the last K-1 real inputs ``B D K-1``.

    ``conv``: a depthwise Conv1d, for its parameters. ``incoming``: the K-1 inputs before these, None for zeros.
    ``points``: of x, for errors, and between conv and activation, which is passed here. ``by_fft``: whether
    :data:`LONG` ones may go that way.
    """
    point = points[1]
    if type(conv) is not nn.Conv1d or hooked(conv):
        before, after = (str(p.name).rsplit(".", 1)[-1] for p in points)
        raise HookError(
            f"{point.name}: the conv was exchanged or carries a hook of torch's own, which would never fire; hook "
            f"{before} (its input) or {after} (its output)"
        )
    padding = run.padding
    if padding is not None and padding.any_left:
        x = padding.align(x)
    fused = None
    if by_fft and conv.weight.shape[-1] >= LONG:
        out = ops.long_causal_conv(x, conv.weight, conv.bias, state=incoming, lengths=run.lengths)
    else:
        fused = "silu" if activation == "silu" and not run.exposes(point) else None
        out = ops.causal_conv(
            x, conv.weight, conv.bias, activation=fused, state=incoming, lengths=run.lengths, backend=run.backend
        )
    y = padding.unalign(out.y) if padding is not None and padding.any_left else out.y
    if fused:
        return y, out.state
    return activate(run.emit(point, y), activation, run), out.state

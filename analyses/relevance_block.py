"""One block as the linear map that it is while everything that selects, gates and normalises is held at its values.

With delta, B, C, the SiLU factors sigmoid(conv) and sigmoid(z), the gate and the norm's scale held as they were on this
text, a block is linear in the residual stream that enters it:

    x = W_x (w · r / scale) + b_x,    conv = taps * x + b,    u = sigmoid(conv) · conv,
    y = scan(u),    mixer_out = W_out ((y + D u) · SiLU(z)) + b_out,    resid_post = r + mixer_out

:meth:`FrozenBlock.pull` takes a gradient with respect to resid_post back to one with respect to r. Two rules for the
gate, a product of two things that both depend on the text (name the rule: results depend on it):

- ``"frozen"``: the gate is held; all goes to the scan's side. The result is the exact linear decomposition, and an
  intervention on r with the gates clamped changes the output by just so much.
- ``"half"``: either side gets half (Jafari et al., MambaLRP, 2406.07592, section 4; the gate's own SiLU as above).

Under both, what comes in equals what goes out: Σ gradient · r + bias terms + what earlier state contributes.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambascope import ops
from mambascope.analyses.source import Reading, finite
from mambascope.errors import CacheError, InputError, nearest
from mambascope.hooks.effective_path import activation_factor

if TYPE_CHECKING:
    from mambascope.model.block import Block

__all__ = ["RULES", "FrozenBlock", "Pulled", "Rule", "check_rule", "frozen_block", "scan_adjoint"]

Rule = Literal["frozen", "half"]
RULES: tuple[Rule, ...] = ("frozen", "half")

_AGREES = 1e-4  # relative; the paths' rounding is 1e-6


def check_rule(rule: str) -> None:
    """InputError unless the gate's rule is known."""
    if rule not in RULES:
        raise InputError(f"rule {rule!r} is unknown{nearest(str(rule), RULES)}; known: {', '.join(RULES)}")


class Pulled(NamedTuple):
    """What a block hands back: the gradient at its entry ``Q L M``; what its biases take at each position, ``Q L``; and
    what the state before the text does, ``Q``."""

    gradient: Tensor
    bias: Tensor
    carry: Tensor


def scan_adjoint(
    g: Float[Tensor, "Q L D"],
    delta: Float[Tensor, "L D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "L N"],
    C: Float[Tensor, "L N"],
) -> tuple[Float[Tensor, "Q L D"], Float[Tensor, "Q D N"]]:
    """Gradients with respect to u and h0 of Σ g·y, with delta, B, C held: Σ_t alpha[t, s, d] g[t, d], by one backward
    scan. Time O(Q L D N), memory O(Q L D)."""
    rows = g.shape[0]
    with torch.enable_grad():
        u = torch.zeros_like(g).requires_grad_()
        h0 = torch.zeros(rows, *A.shape, dtype=g.dtype, device=g.device).requires_grad_()
        held = [v.to(g.dtype).expand(rows, -1, -1) for v in (delta, B, C)]
        y = ops.selective_scan(u, held[0], A.to(g.dtype), held[1], held[2], h0=h0).y
        du, dh0 = torch.autograd.grad(y, (u, h0), g.contiguous())
    return du, dh0


@dataclass(frozen=True)
class FrozenBlock:
    """What one block computed on a text (the module's equations), in the compute dtype.

    ``L M``: r, ``scale`` ``L 1``; ``L D``: x, z, conv, u, delta, total (y + D u); B, C ``L N``; h0 ``D N``;
    ``before`` ``K-1 D``: what the inputs before the text add to the first steps' conv.
    """

    layer: int
    activation: str
    r: Tensor
    scale: Tensor
    x: Tensor
    z: Tensor
    conv: Tensor
    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    total: Tensor
    h0: Tensor
    before: Tensor
    A: Tensor
    D: Tensor
    taps: Tensor  # D K
    norm: Tensor
    W_in: Tensor  # 2D M
    W_out: Tensor  # M D
    b_in: Tensor  # 2D
    b_conv: Tensor
    b_out: Tensor  # M

    @property
    def gate(self) -> Float[Tensor, "L D"]:
        """act(z)."""
        return self.z * activation_factor(self.z, self.activation)

    @property
    def factor(self) -> Float[Tensor, "L D"]:
        """u / conv."""
        return activation_factor(self.conv, self.activation)

    def upto(self, stop: int) -> "FrozenBlock":
        """The same block on the first ``stop`` tokens (it is causal)."""
        names = ("r", "scale", "x", "z", "conv", "u", "delta", "B", "C", "total")
        return replace(self, **{name: getattr(self, name)[:stop] for name in names})

    def pull(self, g: Float[Tensor, "Q L M"], rule: Rule = "frozen") -> Pulled:
        """The gradient with respect to r of what has gradient ``g`` with respect to resid_post; the module's rules.

        Time O(Q L (D N + M D)), memory some tensors ``Q L D``.
        """
        width = self.x.shape[1]
        g_gated = g @ self.W_out  # Q L D
        bias = g @ self.b_out  # Q L
        g_total = g_gated * self.gate * (1.0 if rule == "frozen" else 0.5)
        du, dh0 = scan_adjoint(g_total, self.delta, self.A, self.B, self.C)
        carry = (dh0 * self.h0).flatten(1).sum(-1)
        g_conv = (du + g_total * self.D) * self.factor
        bias = bias + g_conv @ self.b_conv
        first = g_conv[:, : self.before.shape[0]]
        carry = carry + (first * self.before[: first.shape[1]]).flatten(1).sum(-1)
        g_x = self.conv_adjoint(g_conv)
        back = g_x @ self.W_in[:width]  # Q L M
        bias = bias + g_x @ self.b_in[:width]
        if rule == "half":
            g_z = 0.5 * g_gated * self.total * activation_factor(self.z, self.activation)
            back = back + g_z @ self.W_in[width:]
            bias = bias + g_z @ self.b_in[width:]
        return Pulled(g + back * self.norm / self.scale, bias, carry)

    def conv_adjoint(self, g: Float[Tensor, "Q L D"]) -> Float[Tensor, "Q L D"]:
        """Gradient with respect to x from one with respect to conv."""
        width, length = self.taps.shape[1], g.shape[1]
        out = torch.zeros_like(g)
        for k in range(width):
            back = width - 1 - k  # tap k meets the token so many steps earlier
            if back < length:
                out[:, : length - back] += g[:, back:] * self.taps[:, k]
        return out


def _plain(module: nn.Module, layer: int, name: str) -> tuple[Tensor, Tensor | None]:
    if type(module) is not nn.Linear:
        raise InputError(
            f"layer {layer}: {name} is a {type(module).__name__}, whose inside is unknown; merge it into a Linear"
        )
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


@torch.no_grad()
def frozen_block(reading: Reading, layer: int) -> FrozenBlock:
    """Read one block of a text. Cost: recomputing the block; memory its activations.

    Raises
    ------
    InputError: NaN in the block, projections that are no plain Linear.
    CacheError: weights changed since the run; a hook edited something between the block's entry and its exit that its
        equations do not account for (named). Edits of what is held anyway (delta, B, C, u_select, the scale) are
        honoured.
    """
    block = cast("Block", reading.model.blocks[layer])
    mixer, names = block.mixer, ("x", "gate_in", "conv", "u_write", "delta", "B", "C", "y", "skip", "scale")
    W_in, b_in = _plain(mixer.in_proj, layer, "in_proj")
    W_out, b_out = _plain(mixer.out_proj, layer, "out_proj")
    reading.cache.check_fresh(layer)
    wide = torch.promote_types(reading.value("delta", layer).dtype, torch.float32)
    read = {n: finite(reading.value(n, layer), f"{n} of layer {layer}").to(wide) for n in names}
    D, device = mixer.cfg.d_inner, read["x"].device

    def weight(value: Tensor | None, size: int) -> Tensor:
        return torch.zeros(size, dtype=wide, device=device) if value is None else value.detach().to(device, wide)

    taps = weight(mixer.conv1d.weight, 0).flatten(1)  # D K
    record = reading.cache.recording.blocks.get(layer)
    state = None if record is None or record.state is None else record.state.conv[0].to(device, wide)  # D K-1
    before = torch.zeros(taps.shape[1] - 1, D, dtype=wide, device=device)
    if state is not None:
        for t in range(before.shape[0]):  # step t sees the last K-1-t inputs before the text
            before[t] = (state[:, t:] * taps[:, : before.shape[0] - t]).sum(1)
    found = FrozenBlock(
        layer, mixer.cfg.activation, reading.value("resid_pre", layer).to(wide), read["scale"], read["x"],
        read["gate_in"], read["conv"], read["u_write"], read["delta"], read["B"], read["C"],
        read["y"] + read["skip"], reading.entry_state(layer).to(device, wide), before,
        reading.model.decay(layer).to(device, wide), weight(mixer.D, D), taps, weight(block.norm.weight, 0),
        weight(W_in, 0), weight(W_out, 0), weight(b_in, 2 * D), weight(mixer.conv1d.bias, D),
        weight(b_out, W_out.shape[0]),
    )  # fmt: skip
    if record is not None and record.edited:
        _check_links(reading, found)
    return found


def _check_links(reading: Reading, block: FrozenBlock) -> None:
    """CacheError naming the first site of a hooked block whose value is not what the ones before it give."""
    layer, D = block.layer, block.x.shape[1]

    def value(name: str) -> Tensor:
        return reading.value(name, layer).to(block.r.dtype)

    normed = value("normalized")
    conv = ops.causal_conv(block.x[None], block.taps, block.b_conv).y[0]
    conv[: block.before.shape[0]] += block.before[: conv.shape[0]]
    u = block.conv * block.factor
    gated, out = value("gated"), value("mixer_out")
    projected = (normed * block.norm) @ block.W_in.T + block.b_in
    links: list[tuple[str, Tensor, Tensor]] = [
        ("hook_mixer_in", value("mixer_in"), block.r),
        ("norm.hook_normalized", normed, value("mixer_in") / block.scale),
        ("mixer.hook_x", block.x, projected[:, :D]),
        ("mixer.hook_gate_in", block.z, projected[:, D:]),
        ("mixer.hook_conv", block.conv, conv),
        ("mixer.hook_u", value("u"), u),
        ("mixer.hook_u_write", block.u, u),
        ("mixer.hook_u_skip", value("u_skip"), u),
        ("mixer.hook_skip", value("skip"), u * block.D),
        ("mixer.hook_gated", gated, block.total * block.gate),
        ("hook_mixer_out", out, gated @ block.W_out.T + block.b_out),
        ("hook_resid_post", value("resid_post"), block.r + out),
    ]
    rounding = max(_AGREES, 16 * torch.finfo(reading.model.dtype).eps)
    for name, got, want in links:
        off = ((got - want).abs() > rounding * want.abs().amax().clamp_min(1e-30)).any(-1)
        if bool(off.any()):
            raise CacheError(
                f"layer {layer}: a hook edited {name} at position {int(off.nonzero()[0])}, so the block is not the "
                "linear map of its input; analyse the run without that hook"
            )
    reading.unedited_recurrence(layer, reading.length)

"""A layer as a plain convolution: delta, B and C held constant, and what is then left of it.

With delta, B, C the same at every step the recurrence is time-invariant, and y is the convolution of u with one kernel
a channel (2312.00752, equation 3; 2111.00396, section 2.4):

    k[j, d] = sum_n C[n] exp(A[d, n] delta[d] j) delta[d] B[n]        y[t, d] = sum_{s <= t} k[t - s, d] u[s, d]

1. Hold delta ``D``, B ``N``, C ``N`` at their mean over a text or over a sample of texts, or at given values
   (:class:`Selection`).
2. The kernel, O(L D N); exponents are never positive, so nothing overflows (:mod:`mambascope.ops.lti`).
3. The convolution by FFT with zero padding, O(D L log L) (:func:`mambascope.ops.lti.fft_convolve`).
4. The spectrum, exact for the endless kernel: H(f) = Σ_n C[n] delta B[n] / (1 - exp(A[n] delta - 2πi f)), f in cycles
   per token; the time constants 1 / (|A| delta) in tokens.
5. How much of the layer this is: the share of y's energy on the text that the convolution reproduces, per channel
   and in all, 1 - Σ(y - k*u)² / Σy². 1: a plain convolution; 0: none of it (it can be negative).

What freezing costs in nats is another question: :mod:`mambascope.analyses.lti_freezing`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mambascope.analyses.source import Reading, Source, finite, read, scan_layer, scan_layers
from mambascope.brief import Brief
from mambascope.errors import InputError
from mambascope.hooks.cache import MambaCache
from mambascope.ops.lti import Diagonal, diagonal_kernel, fft_convolve

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["LTILayer", "Selection", "lti_kernel", "lti_view", "mean_selection"]


# ---- the convolution


@torch.no_grad()
def lti_kernel(
    delta: Float[Tensor, " D"], A: Float[Tensor, "D N"], B: Float[Tensor, " N"], C: Float[Tensor, " N"], length: int
) -> Float[Tensor, "L D"]:
    """k[j, d] = Σ_n C[n] exp(A[d, n] delta[d] j) delta[d] B[n] for j = 0 … length - 1, in delta's dtype.

    Time O(L D N) (:func:`mambascope.ops.lti.diagonal_kernel`). Raises InputError for a length below 1.
    """
    rate = A.to(delta.dtype) * delta[:, None]  # D N
    gain = (C * B).to(delta.dtype) * delta[:, None]  # D N
    return diagonal_kernel(rate.double(), gain.double(), length, delta.dtype)


# ---- what is held constant


@dataclass(frozen=True, repr=False)
class Selection(Brief):
    """Constant delta ``layers D``, B and C ``layers N`` of some layers, averaged over ``tokens`` (0: given)."""

    layers: tuple[int, ...]
    delta: Float[Tensor, "n D"]
    B: Float[Tensor, "n N"]
    C: Float[Tensor, "n N"]
    tokens: int = 0

    def of(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """delta ``D``, B ``N``, C ``N`` of one layer."""
        if layer not in self.layers:
            raise InputError(f"this Selection has no layer {layer}; it has {', '.join(map(str, self.layers))}")
        i = self.layers.index(layer)
        return self.delta[i], self.B[i], self.C[i]

    def check(self, model: "HookedMamba") -> None:
        """InputError unless sizes are the model's, everything is finite and no delta is negative."""
        cfg, n = model.cfg, len(self.layers)
        D, N = cfg.d_inner, cfg.d_state
        for name, value, width in (("delta", self.delta, D), ("B", self.B, N), ("C", self.C, N)):
            if tuple(value.shape) != (n, width):
                raise InputError(f"the Selection's {name} has shape {tuple(value.shape)}, expected {(n, width)}")
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"the Selection's {name} holds NaN or Inf")
        if bool((self.delta < 0).any()):
            raise InputError("the Selection's delta is negative somewhere; a step size is at least 0")
        scan_layers(model, self.layers)


def rows_of(source: Any) -> list[Any]:
    """A source, a list of texts or ids ``R L`` as single sources."""
    if isinstance(source, (list, tuple)) and source and not isinstance(source[0], int):
        return list(source)
    if isinstance(source, Tensor) and source.ndim == 2:
        return list(source)
    return [source]


@torch.no_grad()
def mean_selection(
    model: "HookedMamba", source: Source | Sequence[Source], *, layers: Iterable[int] | None = None
) -> Selection:
    """Mean delta, B and C over every token of a text, or of a sample (texts, or ids ``R L``), in float64.

    Time: one forward pass a text. Raises InputError for no text, a layer without a scan, NaN.
    """
    chosen, rows = scan_layers(model, layers), rows_of(source)
    sums = [[torch.zeros(())] * 3 for _ in chosen]
    tokens = 0
    for row in rows:
        reading = read(model, row)
        tokens += reading.length
        for j, i in enumerate(chosen):
            for k, name in enumerate(("delta", "B", "C")):
                value = finite(reading.value(name, i), f"{name} of layer {i}")
                sums[j][k] = sums[j][k] + value.double().sum(0).cpu()
    delta, B, C = (torch.stack(column) / tokens for column in zip(*sums, strict=True))
    return Selection(chosen, delta, B, C, tokens)


# ---- one layer


@dataclass(frozen=True, repr=False)
class LTILayer(Brief):
    """One layer with delta ``D``, B ``N``, C ``N`` held constant (A ``D N`` is), all float64.

    ``energy`` ``D`` is Σy² of each channel on the text, ``missed`` ``D`` Σ(y - k*u - carry)², where carry is what the
    state before the text contributes to the time-invariant layer. ``length``: tokens of the text.
    """

    layer: int
    delta: Float[Tensor, " D"]
    A: Float[Tensor, "D N"]
    B: Float[Tensor, " N"]
    C: Float[Tensor, " N"]
    energy: Float[Tensor, " D"]
    missed: Float[Tensor, " D"]
    length: int

    @property
    def explained(self) -> float:
        """Share of y's energy on the text that the plain convolution reproduces, all channels together."""
        total = float(self.energy.sum())
        return 1 - float(self.missed.sum()) / total if total > 0 else math.nan

    @property
    def by_channel(self) -> Float[Tensor, " D"]:
        """The same of each channel; NaN where y is 0 throughout."""
        return 1 - self.missed / self.energy

    @property
    def time_constants(self) -> Float[Tensor, "D N"]:
        """Tokens after which a state dimension has decayed to 1/e: 1 / (|A| delta)."""
        return 1 / (self.A.abs() * self.delta[:, None])

    def kernel(self, length: int | None = None) -> Float[Tensor, "L D"]:
        """The kernel's first ``length`` taps (default: as many as the text has tokens)."""
        return lti_kernel(self.delta, self.A, self.B, self.C, self.length if length is None else length)

    def convolve(self, u: Float[Tensor, "... L D"]) -> Float[Tensor, "... L D"]:
        """y of the time-invariant layer for an input u, from an empty state, by FFT; in u's dtype."""
        return fft_convolve(self.kernel(u.shape[-2]).to(u.device), u)

    def response(self, frequency: Float[Tensor, " F"]) -> Complex[Tensor, "F D"]:
        """H(f) of the endless kernel at frequencies in cycles per token (0 … 0.5), complex128."""
        rate = self.A * self.delta[:, None]  # D N
        angle = 2 * math.pi * frequency.double()
        turn = torch.polar(torch.ones_like(angle), -angle)[:, None, None]  # F 1 1
        decay = torch.exp(rate)
        # 1 - a w = (1 - a) + a (1 - w); expm1 keeps the first part where a is nearly 1
        below = -torch.expm1(rate) + decay * (1 - turn)  # F D N
        return ((self.C * self.B) * self.delta[:, None] / below).sum(-1)

    def table(self) -> "pd.DataFrame":
        """A row a channel: gain at frequency 0, mean delay of |k| and time constants in tokens, share explained."""
        import pandas as pd

        k = self.kernel().abs()
        j = torch.arange(k.shape[0], dtype=k.dtype, device=k.device)
        tau = self.time_constants
        return pd.DataFrame(
            {
                "channel": range(k.shape[1]),
                "delta": self.delta.tolist(),
                "gain": self.response(torch.zeros(1))[0].real.tolist(),
                "mean delay": ((j @ k) / k.sum(0)).tolist(),
                "shortest": tau.amin(1).tolist(),
                "longest": tau.amax(1).tolist(),
                "explained": self.by_channel.tolist(),
            }
        )

    def figure(self, channels: Sequence[int] | None = None, length: int = 128) -> "go.Figure":
        """Kernels of some channels (default: the six of most energy on the text) against the lag, plotly."""
        from mambascope.analyses.effective_plots import channel_curves

        picked = self._pick(channels)
        title = f"layer {self.layer} as a convolution: kernels of {len(picked)} channels"
        return channel_curves(self.kernel(length)[:, picked], picked, range(length), title, "lag, tokens", "kernel")

    def spectrum_figure(self, channels: Sequence[int] | None = None, points: int = 129) -> "go.Figure":
        """|H(f)| of some channels from f = 0 to 0.5 cycles per token, plotly."""
        from mambascope.analyses.effective_plots import channel_curves

        picked = self._pick(channels)
        f = torch.linspace(0, 0.5, points)
        title = f"layer {self.layer} as a convolution: spectra of {len(picked)} channels"
        size = self.response(f).abs()[:, picked]
        return channel_curves(size, picked, f.tolist(), title, "frequency, cycles per token", "|H|", log_y=True)

    def _pick(self, channels: Sequence[int] | None) -> list[int]:
        from mambascope.analyses.timescales import channel_list

        if channels is None:
            return self.energy.argsort(descending=True, stable=True)[:6].tolist()
        return channel_list(channels, len(self.delta))


@torch.no_grad()
def lti_view(model: "HookedMamba", source: Source, layer: int, *, selection: Selection | None = None) -> LTILayer:
    """One layer as a plain convolution, and how much of it that is on this text (the module's algorithm).

    ``selection``: what delta, B, C are held at; by default their mean over this text. Time O(L D N + D L log L).

    Raises
    ------
    InputError: a layer that does not exist or has no scan; a Selection of other sizes, or NaN.
    CacheError: a hook edited the recurrence in this layer, so that its y is not that of delta, B, C and u.
    """
    reading: Reading = read(model, source)
    layer = scan_layer(model, layer)
    reading.unedited_recurrence(layer, reading.length)
    if selection is None:
        selection = mean_selection(model, reading, layers=[layer])
    selection.check(model)
    delta, B, C = (v.double().cpu() for v in selection.of(layer))
    A = model.decay(layer).double().cpu()
    u, y = reading.value("u_write", layer).double().cpu(), finite(reading.value("y", layer), f"y of layer {layer}")
    y = y.double().cpu()
    found = fft_convolve(lti_kernel(delta, A, B, C, reading.length), u)
    found += _carry(delta, A, C, reading.entry_state(layer).double().cpu(), reading.length)
    return LTILayer(layer, delta, A, B, C, y.pow(2).sum(0), (y - found).pow(2).sum(0), reading.length)


def _carry(delta: Tensor, A: Tensor, C: Tensor, h0: Tensor, length: int) -> Tensor:
    """What a state before the text adds to y: Σ_n C[n] exp(A delta (t + 1)) h0, ``L D``."""
    if not bool(h0.any()):
        return torch.zeros(length, len(delta), dtype=delta.dtype)
    rate = A * delta[:, None]
    return Diagonal(rate, torch.zeros_like(rate), C.expand_as(rate)).response(h0[None], length)[0]


def is_text_sample(source: Any) -> bool:
    """Whether a source can be run again: texts or ids, not a cache or a Reading."""
    return not any(isinstance(row, (MambaCache, Reading)) for row in rows_of(source))

"""What delta does: at which tokens a layer writes and forgets, and which of its channels are open or closed.

delta is Mamba's gate. For a channel whose decay rate is 1 (N = 1, A = -1), theorem 1 of 2312.00752 reads

    g[t] = sigmoid(delta_raw[t]) = 1 - exp(-delta[t]),      h[t] = (1 - g[t]) h[t-1] + g[t] x[t]

so delta -> 0 closes the channel (the token is ignored, the past is kept) and delta -> infinity opens it (the past
is overwritten). With A = -exp(A_log), ``D N``, a state dimension forgets at the rate |A[d, n]| delta.

1. Read delta of every layer, ``L D``.
2. Average over channels: which tokens make the layer write (``delta``).
3. g = 1 - exp(-delta): a channel is *open* at a token if g > ``open_above``, *closed* if g < ``closed_below``; count.
4. Per channel over the text: mean g, and the token where g is largest.
5. Selectivity: the share of the variance of log delta that lies between tokens within a channel (not between
   channels). 0 in a layer whose delta does not depend on the text; how selective this layer's gate is.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambascope.analyses.source import Reading, Source, finite, layer_index, read
from mambascope.brief import Brief
from mambascope.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["Gating", "gates"]


@dataclass(frozen=True, repr=False)
class Gating(Brief):
    """delta over a text.

    Shapes: ``delta``, ``open_share``, ``closed_share`` ``layers L`` (mean over channels; shares of channels);
    ``gate`` ``layers D`` (mean of g over the text), ``opens_at`` ``layers D`` (position of the largest g, in what is
    shown), ``selectivity`` ``layers`` in 0…1 (0 for a text of one token).
    """

    delta: Float[Tensor, "n L"]
    open_share: Float[Tensor, "n L"]
    closed_share: Float[Tensor, "n L"]
    gate: Float[Tensor, "n D"]
    opens_at: Int[Tensor, "n D"]
    selectivity: Float[Tensor, " n"]
    open_above: float
    closed_below: float
    labels: tuple[str, ...]
    start: int = 0

    def table(self) -> "pd.DataFrame":
        """A row a token: mean delta, shares of open and closed channels, delta by layer."""
        import pandas as pd

        frame = pd.DataFrame({"position": range(self.start, self.start + len(self.labels)), "token": self.labels})
        frame["delta"] = self.delta.mean(0).tolist()
        frame["open"] = self.open_share.mean(0).tolist()
        frame["closed"] = self.closed_share.mean(0).tolist()
        return frame.assign(**{f"layer {i}": self.delta[i].tolist() for i in range(self.delta.shape[0])})

    def channels(self, layer: int) -> "pd.DataFrame":
        """A row a channel, the most open first: mean g, and the token at which it opens widest."""
        import pandas as pd

        n = self.gate.shape[0]
        if isinstance(layer, bool) or not isinstance(layer, int) or not -n <= layer < n:
            raise InputError(f"layer {layer!r} is outside the model's {n} layers ({-n}…{n - 1})")
        at = self.opens_at[layer].tolist()
        frame = pd.DataFrame({"channel": range(self.gate.shape[1]), "gate": self.gate[layer].tolist()})
        frame["opens at"] = [self.start + p for p in at]
        frame["token"] = [self.labels[p] for p in at]
        return frame.sort_values("gate", ascending=False, kind="stable").reset_index(drop=True)

    def figure(self) -> "go.Figure":
        """Layer × token map of mean delta on a logarithmic colour scale, plotly."""
        from mambascope.analyses.plots import token_map

        return token_map(self.delta, self.labels, "delta, mean over channels", "delta", log=True, start=self.start)


@torch.no_grad()
def gates(model: "HookedMamba", source: Source, *, open_above: float = 0.5, closed_below: float = 0.01) -> Gating:
    """delta by token, layer and channel (2312.00752, theorem 1; the module's algorithm).

    The default thresholds: an open channel replaces at least half of a state of rate 1 in one step, a closed one
    would take 100 tokens to do so. Time: reading one layer's activations after another; memory: one layer's.

    Raises
    ------
    InputError: thresholds that are not 0 <= closed_below < open_above <= 1; NaN in delta.
    """
    if not 0 <= closed_below < open_above <= 1:
        raise InputError(f"thresholds need 0 <= closed_below < open_above <= 1, got {closed_below} and {open_above}")
    reading = read(model, source)
    return gating_of(reading, [layer_gating(reading, i, open_above, closed_below) for i in range(reading.n_layers)])


@dataclass(frozen=True, repr=False)
class LayerGating(Brief):
    """One layer's part of :class:`Gating`."""

    delta: Tensor
    open_share: Tensor
    closed_share: Tensor
    gate: Tensor
    opens_at: Tensor
    selectivity: Tensor
    thresholds: tuple[float, float]


def layer_gating(reading: Reading, layer: int, open_above: float = 0.5, closed_below: float = 0.01) -> LayerGating:
    """Steps 1 to 5 for one layer."""
    layer = layer_index(reading.model, layer)
    delta = finite(reading.value("delta", layer), f"delta of layer {layer}")  # L D
    gate = -torch.expm1(-delta)
    log = delta.clamp_min(torch.finfo(delta.dtype).tiny).log()
    within = (log - log.mean(0)).pow(2).sum()
    total = (log - log.mean()).pow(2).sum()
    floor = log.numel() * (torch.finfo(delta.dtype).eps * log.abs().amax()).pow(2)  # rounding is no variance
    selectivity = torch.where(within > floor, within / total.clamp_min(floor), torch.zeros_like(within))
    return LayerGating(
        delta.mean(1),
        (gate > open_above).to(delta.dtype).mean(1),
        (gate < closed_below).to(delta.dtype).mean(1),
        gate.mean(0),
        delta.argmax(0),  # g saturates at 1 and would tie
        selectivity,
        (open_above, closed_below),
    )


def gating_of(reading: Reading, parts: list[LayerGating]) -> Gating:
    """Put the layers together."""

    def stack(name: str) -> Tensor:
        return torch.stack([getattr(part, name) for part in parts])

    opened, closed = parts[0].thresholds
    return Gating(
        stack("delta"),
        stack("open_share"),
        stack("closed_share"),
        stack("gate"),
        stack("opens_at"),
        stack("selectivity"),
        opened,
        closed,
        reading.labels,
        reading.start,
    )

"""Effective kernels: which earlier tokens a token reads through the state of a layer, and how much.

A Mamba layer is, for a given text, linear in what it writes (2312.00752, equation 2; read as attention by Ali et
al., 2403.01590). With h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t] and y[t] = C[t]·h[t],

    y[t, d] = sum_{s <= t} alpha[t, s, d] u[s, d] + carry[t, d]
    alpha[t, s, d] = sum_n C[t, n] exp(A[d, n] sum_{s < r <= t} delta[r, d]) delta[s, d] B[s, n]

where carry is what the state before the first token contributes. The cache computes rows, columns and maps of it
(:mod:`mambascope.hooks.effective`, kernels in :mod:`mambascope.ops.maps`); here they get labels, tables and figures.

The kernel is signed: a reduction over channels says which (``mean_abs``, ``rms``, ``signed``, ``max``).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.labels import visible
from mambascope.analyses.source import Reading, Source, layer_index, position_index, read
from mambascope.brief import Brief
from mambascope.errors import CacheError
from mambascope.hooks.effective_path import Through
from mambascope.ops.maps import REDUCTIONS, Reduction, check_reduction, over_channels

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = [
    "REDUCTIONS",
    "AttentionMap",
    "KernelRow",
    "Reduction",
    "Sources",
    "effective_kernel",
    "hidden_attention",
    "sources",
]

_AGREES = 1e-3  # relative; float32 gives 1e-6, an edited state gives order 1


# ---- one row


@dataclass(frozen=True, repr=False)
class KernelRow(Brief):
    """One row of a layer's effective kernel: what ``query`` reads.

    ``alpha`` ``S D`` weighs u_write ``S D`` of the tokens 0…query; ``carry`` ``D`` is the share of the state before
    them; alpha·u + carry adds up to ``y`` ``D`` with the relative ``error``. ``labels``: the S tokens.
    """

    layer: int
    query: int
    alpha: Float[Tensor, "S D"]
    u: Float[Tensor, "S D"]
    carry: Float[Tensor, " D"]
    y: Float[Tensor, " D"]
    error: float
    labels: tuple[str, ...]
    start: int = 0

    def weights(self, reduce: Reduction = "mean_abs") -> Float[Tensor, " S"]:
        """alpha reduced over channels: how strongly the query reads what each token wrote."""
        check_reduction(reduce)
        return over_channels(self.alpha, reduce)

    def contributions(self, reduce: Reduction = "mean_abs") -> Float[Tensor, " S"]:
        """alpha·u reduced over channels: what each token adds to y, in y's units."""
        check_reduction(reduce)
        return over_channels(self.alpha * self.u, reduce)

    def table(self, reduce: Reduction = "mean_abs") -> "pd.DataFrame":
        """A row a source token: position, token, weight, contribution."""
        import pandas as pd

        return pd.DataFrame(
            {
                "position": range(self.start, self.start + len(self.labels)),
                "token": self.labels,
                "weight": self.weights(reduce).tolist(),
                "contribution": self.contributions(reduce).tolist(),
            }
        )

    def figure(self, reduce: Reduction = "mean_abs") -> "go.Figure":
        """Contributions by source token, plotly."""
        from mambascope.analyses.plots import token_bars

        title = f"layer {self.layer}: what {visible(self.labels[-1])!r} at {self.start + self.query} reads"
        return token_bars(
            self.contributions(reduce), self.labels, title, f"alpha·u, {reduce} over channels", start=self.start
        )


@torch.no_grad()
def effective_kernel(model: "HookedMamba", source: Source, layer: int, query: int = -1) -> KernelRow:
    """One row of a layer's effective kernel, exactly, with its sum checked against y.

    y[t, d] = Σ_s alpha[t, s, d] u_write[s, d] + carry[d]   (Ali et al., 2403.01590; our module's algorithm).
    ``layer`` and ``query`` may be negative (Python's meaning). Time O(L D N) beyond reading the layer's cache.

    Raises
    ------
    InputError: layer or query outside the model or text; NaN in the layer.
    CacheError: a hook edited h, y, A_bar, B_bar or write in this block, so that the kernel is not what happened.
    """
    reading = read(model, source)
    layer = layer_index(model, layer)
    query = position_index(reading.length, query, "query")
    return row_of(reading, layer, query)


def row_of(reading: Reading, layer: int, query: int) -> KernelRow:
    """The row of one layer and query of a text that was read."""
    row, stop = reading.cache.effective_kernel(layer, query), query + 1
    alpha, u, carry, y = row.weights, row.inputs, row.before, row.total
    if reading.cache.has_batch_dim:
        alpha, u, carry, y = alpha[0], u[0], carry[0], y[0]
    if not row.error < _AGREES:
        raise CacheError(
            f"layer {layer}, query {query}: Σ alpha·u differs from y by {row.error:.1e} of its terms; the cache's "
            "tensors do not belong together"
        )
    u = u[:stop].to(alpha.dtype)
    return KernelRow(layer, query, alpha[:stop], u, carry, y, row.error, reading.labels[:stop], reading.start)


# ---- all layers, one query


@dataclass(frozen=True, repr=False)
class Sources(Brief):
    """Which tokens one query reads, in every layer.

    ``amount`` ``layers S``: alpha·u reduced over channels, in units of that layer's y; ``carry`` ``layers``: the same
    of the state before the first token; ``error`` ``layers``: how well the parts add up to y (relative).
    """

    query: int
    reduce: Reduction
    amount: Float[Tensor, "n S"]
    carry: Float[Tensor, " n"]
    error: Float[Tensor, " n"]
    labels: tuple[str, ...]
    start: int = 0

    @property
    def share(self) -> Float[Tensor, "n S"]:
        """|amount| as a share of its layer's sum over sources and carry: rows add up to 1 - carry's share."""
        total = self.amount.abs().sum(-1) + self.carry.abs()
        return self.amount.abs() / total[:, None].clamp_min(torch.finfo(total.dtype).tiny)

    def table(self) -> "pd.DataFrame":
        """A row a source token: its share in every layer, and their mean."""
        import pandas as pd

        share = self.share
        frame = pd.DataFrame({"position": range(self.start, self.start + len(self.labels)), "token": self.labels})
        frame["mean"] = share.mean(0).tolist()
        return frame.assign(**{f"layer {i}": share[i].tolist() for i in range(share.shape[0])})

    def figure(self) -> "go.Figure":
        """Shares as a layer × source map, plotly."""
        from mambascope.analyses.plots import token_map

        title = f"what {visible(self.labels[-1])!r} at {self.start + self.query} reads, share by layer"
        return token_map(self.share, self.labels, title, "share", start=self.start)


@torch.no_grad()
def sources(model: "HookedMamba", source: Source, query: int = -1, *, reduce: Reduction = "mean_abs") -> Sources:
    """Which earlier tokens a query reads, by layer: :func:`effective_kernel` of every layer, reduced over channels.

    Time O(layers L D N); memory one layer's row. Raises as :func:`effective_kernel`.
    """
    check_reduction(reduce)
    reading = read(model, source)
    query = position_index(reading.length, query, "query")
    return sources_of([row_of(reading, i, query) for i in range(reading.n_layers)], reduce)


def sources_of(rows: list[KernelRow], reduce: Reduction) -> Sources:
    """Put rows of all layers together."""
    first = rows[0]
    return Sources(
        first.query,
        reduce,
        torch.stack([row.contributions(reduce) for row in rows]),
        torch.stack([over_channels(row.carry, reduce) for row in rows]),
        torch.tensor([row.error for row in rows]),
        first.labels,
        first.start,
    )


# ---- the map


@dataclass(frozen=True, repr=False)
class AttentionMap(Brief):
    """The hidden attention of one layer: ``weights`` ``T S``, alpha reduced over channels (says ``reduce``).

    ``through``: whether sources are what the scan reads, or what the convolution reads, and queries what the scan gives
    or what reaches the residual stream (:mod:`mambascope.hooks.effective_path`).
    """

    layer: int
    reduce: Reduction
    weights: Float[Tensor, "L L"]
    labels: tuple[str, ...]
    start: int = 0
    through: Through = "scan"

    def figure(self) -> "go.Figure":
        """The map, query down, source across, colours logarithmic over three decades, plotly."""
        from mambascope.analyses.plots import pair_map

        title = f"layer {self.layer}: hidden attention through the {self.through}, {self.reduce} of alpha over channels"
        signed = self.reduce == "signed"
        return pair_map(self.weights, self.labels, title, "alpha", log=True, signed=signed, start=self.start)


@torch.no_grad()
def hidden_attention(
    model: "HookedMamba",
    source: Source,
    layer: int,
    *,
    reduce: Reduction = "mean_abs",
    through: Through = "scan",
) -> AttentionMap:
    """The effective kernel of a layer as a map over (query, source), reduced over channels.

    Time O(L² D N), memory the map. Raises as :func:`effective_kernel`; InputError for a map that does not fit.
    """
    reading = read(model, source)
    layer = layer_index(model, layer)
    weights = reading.cache.hidden_attention(layer, reduce, through=through)
    weights = weights[0] if weights.ndim == 3 else weights
    return AttentionMap(layer, reduce, weights, reading.labels, reading.start, through)

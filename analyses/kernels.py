"""Effective kernels: which earlier tokens a token reads through the state of a layer, and how much.

A Mamba layer is, for a given text, linear in what it writes (2312.00752, equation 2; read as attention by Ali et
al., 2403.01590). With h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t] and y[t] = C[t]·h[t],

    y[t, d] = sum_{s <= t} alpha[t, s, d] u[s, d] + carry[t, d]
    alpha[t, s, d] = sum_n C[t, n] exp(A[d, n] sum_{s < r <= t} delta[r, d]) delta[s, d] B[s, n]

where carry is what the state before the first token contributes. A row (one query t) is computed as follows.

1. Start with g = C[t], ``D N``: how much of each state dimension the query reads.
2. Walk backward in blocks of time. Inside a block, sum delta afresh from each s to the block's end; every exponent
   is then <= 0, and no difference of long prefix sums is taken (which would lose everything in float32).
3. alpha[t, s] = delta[s] sum_n g[n] exp(A[n] Σdelta) B[s, n].
4. Multiply g by the whole block's decay and go on; nothing is ever divided by a decay.
5. What is left of g, read against h0, is the carry. Then sum_s alpha u + carry must be y: it is checked.

A map (all queries, reduced over channels) goes forward in tiles: for each tile of sources their weights decayed
to the tile's end, ``Q[s, d, n]``, are built by running products (which also give the tile on the diagonal); for every
later tile of queries, P[t, d, n] = C[t, n] exp(A Σdelta since that tile began), and the tile of alpha is one thin
matrix product a channel, P Qᵀ; Q is then decayed through the tile. Memory: tiles, and the map.

The kernel is signed: a reduction over channels says which (``mean_abs``, ``rms``, ``signed``, ``max``).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.labels import visible
from mambascope.analyses.source import Reading, Source, finite, layer_index, position_index, read
from mambascope.errors import CacheError, InputError, nearest
from mambascope.memory import require_bytes

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
    "attention_map",
    "effective_kernel",
    "hidden_attention",
    "kernel_row",
    "sources",
]

Reduction = Literal["mean_abs", "rms", "signed", "max"]
REDUCTIONS: tuple[Reduction, ...] = ("mean_abs", "rms", "signed", "max")
"""Over channels: mean |alpha|; root mean square; plain mean (channels cancel); largest |alpha|."""

_BLOCK = 1 << 21  # elements of a ``block D N`` tensor of exponentials: 8 MB in float32
_TILE = 32
_AGREES = 1e-3  # relative; float32 gives 1e-6, an edited state gives order 1


def _check_reduction(reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise InputError(
            f"reduction {reduce!r} is unknown{nearest(str(reduce), REDUCTIONS)}; known: {', '.join(REDUCTIONS)}"
        )


def over_channels(x: Tensor, reduce: Reduction) -> Tensor:
    """Reduce the last axis (channels) of a signed tensor."""
    if reduce == "signed":
        return x.mean(-1)
    if reduce == "rms":
        return x.pow(2).mean(-1).sqrt()
    return x.abs().amax(-1) if reduce == "max" else x.abs().mean(-1)


# ---- one row


@torch.no_grad()
def kernel_row(
    delta: Float[Tensor, "S D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "S N"],
    C: Float[Tensor, " N"],
    h0: Float[Tensor, "D N"],
) -> tuple[Float[Tensor, "S D"], Float[Tensor, " D"]]:
    """alpha of the last of S steps, ``S D``, and the share of h0 in its y, ``D``; see the module's algorithm.

    ``delta`` is after softplus, ``C`` the query's. Computed in delta's dtype: time O(S D N), memory a block.
    """
    steps, width = delta.shape
    g = C.to(delta.dtype).expand_as(A).clone()  # D N
    A, B = A.to(delta.dtype), B.to(delta.dtype)
    alpha = torch.zeros_like(delta)
    size = max(1, _BLOCK // (width * A.shape[1]))
    for stop in range(steps, 0, -size):
        begin = max(0, stop - size)
        block = delta[begin:stop]
        through = block.flip(0).cumsum(0).flip(0)  # delta over [s, stop)
        after = torch.cat([through[1:], torch.zeros_like(through[:1])])  # over (s, stop)
        weight = torch.exp(after[..., None] * A).mul_(g).mul_(B[begin:stop, None, :])  # S D N
        alpha[begin:stop] = weight.sum(-1) * block
        g = g * torch.exp(through[0][:, None] * A)
        if not bool(g.any()):  # all is forgotten: earlier sources weigh exactly 0
            break
    return alpha, (g * h0).sum(-1)


@dataclass(frozen=True)
class KernelRow:
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
        _check_reduction(reduce)
        return over_channels(self.alpha, reduce)

    def contributions(self, reduce: Reduction = "mean_abs") -> Float[Tensor, " S"]:
        """alpha·u reduced over channels: what each token adds to y, in y's units."""
        _check_reduction(reduce)
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
    stop = query + 1
    reading.unedited_recurrence(layer, stop)
    delta = finite(reading.value("delta", layer)[:stop], f"delta of layer {layer}")
    u = reading.value("u_write", layer)[:stop].to(delta.dtype)
    B, C = reading.value("B", layer)[:stop], reading.value("C", layer)[query]
    y = finite(reading.value("y", layer)[query : query + 1], f"y of layer {layer}")[0].to(delta.dtype)
    h0 = reading.entry_state(layer).to(delta.device)
    alpha, carry = kernel_row(delta, reading.model.decay(layer).to(delta.device), B, C, h0)
    parts = alpha * u
    scale = (parts.abs().sum(0) + carry.abs()).clamp_min(torch.finfo(delta.dtype).tiny)
    error = float(((parts.sum(0) + carry - y).abs() / scale.amax()).amax())
    if not error < _AGREES:
        raise CacheError(
            f"layer {layer}, query {query}: Σ alpha·u differs from y by {error:.1e} of its terms; the cache's tensors "
            "do not belong together"
        )
    return KernelRow(layer, query, alpha, u, carry, y, error, reading.labels[:stop], reading.start)


# ---- all layers, one query


@dataclass(frozen=True)
class Sources:
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
    _check_reduction(reduce)
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


@torch.no_grad()
def attention_map(
    delta: Float[Tensor, "B L D"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B L N"],
    C: Float[Tensor, "B L N"],
    *,
    reduce: Reduction = "mean_abs",
    tile: int = _TILE,
) -> Float[Tensor, "B L L"]:
    """alpha[t, s] of all pairs, reduced over channels: ``B T S``, zero above the diagonal.

    Time O(L² D N), memory O(tile D N + tile² D) beyond the map. See the module's algorithm.
    """
    _check_reduction(reduce)
    batch, length, _ = delta.shape
    need = batch * length * length * delta.element_size()
    way_out = "take a shorter text, or single rows with effective_kernel"
    require_bytes(need, delta.device, f"a map of {length:,} x {length:,} tokens", way_out, InputError)
    out = torch.zeros(batch, length, length, dtype=delta.dtype, device=delta.device)
    A, B, C = A.to(delta.dtype), B.to(delta.dtype), C.to(delta.dtype)
    for begin in range(0, length, tile):
        columns = slice(begin, min(begin + tile, length))
        Q = _diagonal(out, delta, A, B, C, columns, reduce)  # B S D N
        for start in range(columns.stop, length, tile):
            rows = slice(start, min(start + tile, length))
            since = delta[:, rows].cumsum(1)  # B T D, over [start, t]
            P = torch.exp(since[..., None] * A).mul_(C[:, rows, None, :])  # B T D N
            alpha = torch.einsum("btdn,bsdn->btsd", P, Q)
            out[:, rows, columns] = over_channels(alpha, reduce)
            Q = Q * torch.exp(since[:, -1, :, None] * A)[:, None]
            if not bool(Q.any()):  # all later weights are exactly 0
                break
    return out


def _diagonal(out: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, columns: slice, reduce: Reduction) -> Tensor:
    """Fill the tile on the diagonal by running products; the sources' weights at the tile's end, ``B S D N``."""
    begin, stop = columns.start, columns.stop
    Q = delta[:, columns, :, None] * B[:, columns, None, :]  # B S D N: each source as written
    for t in range(begin, stop):
        k = t - begin
        Q[:, :k] *= torch.exp(delta[:, t, :, None] * A)[:, None]
        alpha = (Q[:, : k + 1] * C[:, t, None, None, :]).sum(-1)  # B S D
        out[:, t, begin : t + 1] = over_channels(alpha, reduce)
    return Q


@dataclass(frozen=True)
class AttentionMap:
    """The hidden attention of one layer: ``weights`` ``T S``, alpha reduced over channels (says ``reduce``)."""

    layer: int
    reduce: Reduction
    weights: Float[Tensor, "L L"]
    labels: tuple[str, ...]
    start: int = 0

    def figure(self) -> "go.Figure":
        """The map, query down, source across, plotly."""
        from mambascope.analyses.plots import pair_map

        title = f"layer {self.layer}: hidden attention, {self.reduce} of alpha over channels"
        return pair_map(self.weights, self.labels, title, "alpha", signed=self.reduce == "signed", start=self.start)


@torch.no_grad()
def hidden_attention(
    model: "HookedMamba", source: Source, layer: int, *, reduce: Reduction = "mean_abs"
) -> AttentionMap:
    """The effective kernel of a layer as a map over (query, source), reduced over channels.

    For short texts: time O(L² D N). Raises as :func:`effective_kernel`; InputError for a map that does not fit.
    """
    reading = read(model, source)
    layer = layer_index(model, layer)
    reading.unedited_recurrence(layer, reading.length)
    delta = finite(reading.value("delta", layer), f"delta of layer {layer}")
    A = model.decay(layer).to(delta.device)
    B, C = reading.value("B", layer), reading.value("C", layer)
    weights = attention_map(delta[None], A, B[None], C[None], reduce=reduce)[0]
    return AttentionMap(layer, reduce, weights, reading.labels, reading.start)

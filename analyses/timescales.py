"""How long a layer remembers: half-lives in tokens of every state dimension, and how far back its outputs reach.

*Half-life.* A state dimension (d, n) decays by exp(A[d, n] delta[t, d]) a step (2312.00752, equation 4a), so how long
it holds depends on the text. From token t on it has halved after the least k with

    |A[d, n]| (delta[t+1, d] + … + delta[t+k, d]) >= ln 2

1. Prefix sums of delta per channel, in float64.
2. |A| only scales the threshold: the answer for every t and n is one binary search in the channel's prefix sums.
3. Median over t. A t from which the text ends too early is *censored*: it counts as longer than any that is seen, so
   the median is infinite where half of them or more are; the share of such t is reported.

A half-life says what the state *could* carry; whether anything is written and read there is the kernel's business:

*Reach.* For some queries t and each channel, from the row |alpha[t, s]| of the effective kernel
(:mod:`mambascope.analyses.kernels`): the mean distance Σ_s (t - s) |alpha| / Σ_s |alpha|, which is the effective
receptive field, and the share of Σ|alpha| that lies beyond k tokens. Channels that look back less than
``local_below`` tokens on average are local, those above ``global_above`` global.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.half_life_kernel import merge_half_lives
from mambascope.analyses.source import Reading, Source, finite, position_index, read, scan_layers
from mambascope.brief import Brief
from mambascope.errors import InputError
from mambascope.hooks.effective_path import channel_index

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["HalfLives", "Reach", "Timescales", "half_lives", "reach", "timescale_spectrum"]

_SEARCHED = 1 << 21  # half-lives searched at a time: some 60 MB with their thresholds
_COMPILED = 1 << 21  # half-lives beyond which a CPU runs compiled code, which takes a second or two to compile once
_QUANTILES = (0.1, 0.5, 0.9)


class HalfLives(NamedTuple):
    """``median`` ``D N`` in tokens (infinite where half of the text or more is censored), ``censored`` ``D N``."""

    median: Float[Tensor, "D N"]
    censored: Float[Tensor, "D N"]


@torch.no_grad()
def half_lives(delta: Float[Tensor, "L D"], A: Float[Tensor, "D N"]) -> HalfLives:
    """Half-life in tokens of every (channel, state dimension), median over the text; the module's algorithm.

    ``delta`` is after softplus, ``A`` negative. Both results are float64. Time O(D N L log L); memory O(L N) beyond
    the inputs, since channels go in groups. On a CPU long texts take O(D N L) in compiled code (:mod:`mambascope.
    analyses.half_life_kernel`), with equal results.
    """
    length, width = delta.shape
    threshold = math.log(2) / A.double().abs()  # D N
    merged = delta.device.type == "cpu" and threshold.numel() * length >= _COMPILED
    size = width if merged else max(1, _SEARCHED // (length * A.shape[1]))
    parts = []
    for first in range(0, width, size):
        total = delta[:, first : first + size].T.double().cumsum(1)
        total = torch.cat([torch.zeros_like(total[:, :1]), total], 1)  # D L+1
        slack = 8 * torch.finfo(torch.float64).eps * total[:, -1:]  # a sum that equals the threshold reaches it
        least = threshold[first : first + size] - slack
        low, high, gone = merge_half_lives(total, least) if merged else _searched(total, least)
        middle = (low.double() + high.double()) / 2
        parts.append((middle.masked_fill(high > length, math.inf), gone.double() / length))
    median, censored = (torch.cat(column) for column in zip(*parts, strict=True))
    return HalfLives(median, censored)


def _searched(total: Float[Tensor, "D L1"], least: Float[Tensor, "D N"]) -> tuple[Tensor, Tensor, Tensor]:
    """The two middle half-lives (length + 1: censored) and the number censored of every state dimension."""
    length = total.shape[1] - 1
    begins = torch.arange(1, length + 1, device=total.device)
    goal = total[:, None, 1:] + least[..., None]  # D N L
    found = torch.searchsorted(total, goal.flatten(1)).view_as(goal)
    gone = found > length
    ordered = (found - begins).clamp_min_(1).masked_fill_(gone, length + 1).to(torch.int32).sort(-1).values
    return ordered[..., (length - 1) // 2], ordered[..., length // 2], gone.sum(-1)


@dataclass(frozen=True, repr=False)
class Timescales(Brief):
    """Half-lives over a text of ``length`` tokens.

    ``half_life`` ``layers D N``: tokens, median over the text; ``censored`` ``layers D N``: share of tokens from which
    the text ended before the state had halved. Where that share is a half or more, the text does not show the median,
    and it is infinite: longer than can be seen here, not endless; a longer text may show it.
    """

    layers: tuple[int, ...]
    half_life: Float[Tensor, "n D N"]
    censored: Float[Tensor, "n D N"]
    length: int

    def table(self) -> "pd.DataFrame":
        """A row a layer: the 10th, 50th and 90th percentile of the medians over its state dimensions (``inf``: longer
        than the text shows); ``median beyond the text``: the share of state dimensions whose median is; ``censored``:
        the share of all (token, state dimension) that are."""
        import pandas as pd

        flat = self.half_life.flatten(1)
        ordered = flat.sort(1).values
        frame = pd.DataFrame({"layer": self.layers})
        for q in _QUANTILES:
            frame[f"{q:.0%}"] = ordered[:, round(q * (flat.shape[1] - 1))].tolist()
        frame["median beyond the text"] = torch.isinf(flat).double().mean(1).tolist()
        frame["censored"] = self.censored.flatten(1).mean(1).tolist()
        return frame

    def spectrum(self, per_octave: int = 2) -> tuple[Float[Tensor, "n bins"], list[float]]:
        """Share of state dimensions by half-life, ``layers bins``, and the bins' lower edges in tokens.

        Bins are equal on a logarithmic axis, from one token to the text's length; the last one, whose edge is
        infinite, holds what is longer than the text shows. Rows add up to 1.
        """
        if isinstance(per_octave, bool) or not isinstance(per_octave, int) or per_octave < 1:
            raise InputError(f"per_octave must be a positive integer, got {per_octave!r}")
        count = math.ceil(math.log2(max(self.length, 2)) * per_octave) + 1
        flat = self.half_life.flatten(1)
        index = (flat.clamp_min(1).log2() * per_octave).floor().clamp(0, count - 1)
        index = torch.where(torch.isinf(flat), float(count), index).long()
        ones = torch.full_like(flat, 1 / flat.shape[1])
        shares = torch.zeros(flat.shape[0], count + 1, dtype=flat.dtype, device=flat.device)
        return shares.scatter_add_(1, index, ones), [2 ** (i / per_octave) for i in range(count)] + [math.inf]

    def figure(self) -> "go.Figure":
        """Layer × half-life map: the share of state dimensions in each bin, plotly."""
        from mambascope.analyses.effective_plots import timescale_map

        return timescale_map(self)


@torch.no_grad()
def timescale_spectrum(model: "HookedMamba", source: Source, *, layers: Iterable[int] | None = None) -> Timescales:
    """Half-life in tokens of every (channel, state dimension) of some or all layers (the module's algorithm).

    Time as :func:`half_lives`, a layer after another; memory one layer's activations and the results. In a text of one
    token everything is censored. Raises InputError for a layer that does not exist or has no scan, or NaN in delta.
    """
    reading = read(model, source)
    chosen = scan_layers(model, layers)
    parts = []
    for i in chosen:
        delta = finite(reading.value("delta", i), f"delta of layer {i}")
        parts.append(half_lives(delta, model.decay(i).to(delta.device)))
    median, censored = (torch.stack(column).cpu() for column in zip(*parts, strict=True))
    return Timescales(chosen, median, censored, reading.length)


# ---- reach


@dataclass(frozen=True, repr=False)
class Reach(Brief):
    """How far back channels look, averaged over ``queries``.

    ``distance`` ``layers D``: mean distance of |alpha| in tokens; ``beyond`` ``layers D K``: share of Σ|alpha| at
    distances greater than each of ``lags``. Only tokens shown count, not the state before them. A channel that reads
    nothing at all (alpha = 0) has NaN. ``channels`` are those that were looked at.
    """

    layers: tuple[int, ...]
    channels: tuple[int, ...]
    queries: tuple[int, ...]
    lags: tuple[int, ...]
    distance: Float[Tensor, "n D"]
    beyond: Float[Tensor, "n D K"]
    local_below: float
    global_above: float

    @property
    def local(self) -> Float[Tensor, " n"]:
        """Share of each layer's channels whose mean distance is below ``local_below`` tokens."""
        return (self.distance < self.local_below).double().mean(1)

    @property
    def far(self) -> Float[Tensor, " n"]:
        """Share of each layer's channels whose mean distance is above ``global_above`` tokens."""
        return (self.distance > self.global_above).double().mean(1)

    def table(self) -> "pd.DataFrame":
        """A row a layer: mean distance, shares of local and global channels, mass beyond each lag."""
        import pandas as pd

        frame = pd.DataFrame({"layer": self.layers, "mean distance": self.distance.nanmean(1).tolist()})
        frame["local"] = self.local.tolist()
        frame["global"] = self.far.tolist()
        mass = self.beyond.nanmean(1)
        return frame.assign(**{f"beyond {k}": mass[:, j].tolist() for j, k in enumerate(self.lags)})

    def by_channel(self, layer: int) -> "pd.DataFrame":
        """A row a channel of one layer, the farthest first."""
        import pandas as pd

        if layer not in self.layers:
            raise InputError(f"layer {layer!r} was not looked at; there are {', '.join(map(str, self.layers))}")
        i = self.layers.index(layer)
        frame = pd.DataFrame({"channel": self.channels, "mean distance": self.distance[i].tolist()})
        kind = torch.where(self.distance[i] < self.local_below, 0, 1) + (self.distance[i] > self.global_above).int()
        frame["kind"] = [("local", "between", "global")[k] for k in kind.tolist()]
        for j, k in enumerate(self.lags):
            frame[f"beyond {k}"] = self.beyond[i, :, j].tolist()
        return frame.sort_values("mean distance", ascending=False, kind="stable").reset_index(drop=True)

    def figure(self) -> "go.Figure":
        """Mass beyond k tokens against k, a line a layer, plotly."""
        from mambascope.analyses.plots import profiles

        title = f"share of Σ|alpha| beyond k tokens, mean over channels and {len(self.queries)} queries"
        names = [f"layer {i}" for i in self.layers]
        figure = profiles(self.beyond.nanmean(1), self.lags, title, "k, tokens", "share beyond")
        for trace, name in zip(figure.data, names, strict=True):
            trace.update(name=name)  # type: ignore[attr-defined]
        return figure.update_xaxes(type="log")


@torch.no_grad()
def reach(
    model: "HookedMamba",
    source: Source,
    *,
    layers: Iterable[int] | None = None,
    channels: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    local_below: float = 4,
    global_above: float = 64,
) -> Reach:
    """How far back each channel looks: mean distance of |alpha| and mass beyond k tokens (the module's algorithm).

    ``queries`` default to eight positions spread over the second half of the text, its last among them; ``channels``
    to all. Time O(layers queries L D N); memory one row.

    Raises
    ------
    InputError: layer, channel or query that does not exist, an empty list of them, thresholds out of order, NaN.
    CacheError: a hook edited the recurrence in a layer, so that its kernel is not what happened.
    """
    if not 0 < local_below <= global_above:
        raise InputError(f"thresholds need 0 < local_below <= global_above, got {local_below} and {global_above}")
    reading = read(model, source)
    chosen, length = scan_layers(model, layers), reading.length
    picked = channel_list(channels, model.cfg.d_inner)
    at = _queries(length, queries)
    lags = tuple(2**i for i in range(max(1, math.ceil(math.log2(max(length, 2))))))
    distances, masses = [], []
    for i in chosen:
        each = [_measure(_row(reading, i, t, picked), lags) for t in at]
        distances.append(torch.stack([d for d, _ in each]).nanmean(0))
        masses.append(torch.stack([m for _, m in each]).nanmean(0))
    distance, beyond = torch.stack(distances).cpu(), torch.stack(masses).cpu()
    return Reach(chosen, tuple(picked), at, lags, distance, beyond, local_below, global_above)


def _row(reading: Reading, layer: int, query: int, channels: list[int]) -> Float[Tensor, "S D"]:
    weights = reading.cache.effective_kernel(layer, query, channels=channels).weights
    return (weights[0] if reading.cache.has_batch_dim else weights)[: query + 1]


def channel_list(channels: Any, width: int) -> list[int]:
    """Channels (None: all; numbers in Python's notation, or a slice) as numbers from 0."""
    index = channel_index(channels, width, torch.device("cpu"))
    return list(range(width)) if index is None else index.tolist()


def _queries(length: int, queries: Sequence[int] | None) -> tuple[int, ...]:
    if queries is None:
        half = length // 2
        return tuple(sorted({half + round((i + 1) * (length - half) / 8) - 1 for i in range(8)} - {-1}))
    at = tuple(position_index(length, t, "query") for t in queries)
    if not at:
        raise InputError("the list of queries is empty; leave queries out to take eight of the second half")
    return at


def _measure(alpha: Float[Tensor, "S D"], lags: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean distance ``D`` and mass beyond each lag ``D K`` of one row whose query is its last token."""
    size = alpha.abs().double()
    total = size.sum(0)  # D
    away = torch.arange(alpha.shape[0] - 1, -1, -1, device=alpha.device, dtype=torch.float64)
    share = size / total  # S D; NaN where a channel reads nothing
    beyond = torch.stack([share[: max(0, alpha.shape[0] - 1 - k)].sum(0) for k in lags], 1)  # D K
    return away @ share, beyond.masked_fill_((total == 0)[:, None], math.nan)

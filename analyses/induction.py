"""Does the model repeat what it has read, and which layer looks back one period?

After Olsson et al. (2209.11895), with Mamba's hidden attention (Ali et al., 2403.01590) in place of attention:

1. Draw rows of N random tokens and repeat each once (see :mod:`mambascope.analyses.repeats`).
2. Loss of the second copy against the first: what the model recalls.
3. For each layer, alpha[t, s] reduced over channels (mean |alpha|), each query's row divided by its sum: the share
   of its reading that t spends on s. Of an attention layer the mean pattern of its heads; a feed-forward layer reads
   its own token.
4. Average over the queries t of the second copy at each lag t - s: the *profile*. Lag N is the same token in the
   first copy (offset 0), lag N - 1 the token that followed it (offset 1, attention's induction target), lag N - 2
   offset 2, where Mamba's conv can move it (2410.06672): so the whole profile is reported.
5. The same on rows whose second half is drawn afresh: the control, what a lag gets without any repetition. A layer
   that matches prefixes has an excess over it; an untrained model has none.

Cost: two forward passes and one map a layer for each row, O(rows · layers · N² · D · N_state).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambascope.analyses.kernels import Reduction
from mambascope.analyses.repeats import repeated_tokens, scores
from mambascope.brief import Brief
from mambascope.errors import InputError
from mambascope.hooks.effective_path import Through

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["Induction", "induction_score", "passage_score"]


@dataclass(frozen=True, repr=False)
class Induction(Brief):
    """Recall of repeated random tokens.

    ``loss`` ``2N-1`` nats by position, averaged over rows (of the tokens after the first); ``profile`` and
    ``control`` ``layers lags``: mean share of a second-copy query's reading at each lag 0…2N-1 (with BOS 2N);
    ``noise`` ``layers lags``: standard error over rows of profile - control. ``tokens`` are the rows.
    """

    n: int
    loss: Float[Tensor, " T"]
    profile: Float[Tensor, "layers lags"]
    control: Float[Tensor, "layers lags"]
    noise: Float[Tensor, "layers lags"]
    tokens: Int[Tensor, "R L"]
    reduce: Reduction

    @property
    def first_loss(self) -> float:
        """Nats per token of the first copy (its first token apart, in models without BOS)."""
        return float(self.loss[: -self.n].mean())

    @property
    def second_loss(self) -> float:
        """Nats per token of the second copy, from its second token on: what could be recalled."""
        return float(self.loss[-self.n + 1 :].mean())

    @property
    def excess(self) -> Float[Tensor, "layers lags"]:
        """profile - control: the share that repetition alone explains."""
        return self.profile - self.control

    def at_offset(self, offset: int) -> Float[Tensor, " layers"]:
        """The excess at the source t - N + offset: 0 the same token, 1 the one after it."""
        lag = self.n - offset
        if not 0 <= lag < self.profile.shape[1]:
            raise InputError(f"offset {offset} is lag {lag}, outside the profile's lags 0…{self.profile.shape[1] - 1}")
        return self.excess[:, lag]

    @property
    def prefix_matching(self) -> Float[Tensor, " layers"]:
        """Olsson's score by layer: the excess share on the token after the earlier occurrence (offset 1)."""
        return self.at_offset(1)

    def best(self, window: int = 3) -> list[tuple[int, float]]:
        """(offset, excess) of each layer's largest excess among the offsets -window…window."""
        offsets = [o for o in range(-window, window + 1) if 0 <= self.n - o < self.profile.shape[1]]
        near = torch.stack([self.at_offset(o) for o in offsets])  # offsets layers
        value, at = near.max(0)
        return [(offsets[i], v) for i, v in zip(at.tolist(), value.tolist(), strict=True)]

    def table(self) -> "pd.DataFrame":
        """A row a layer: excess at offsets 0, 1, 2, and where it is largest among -3…3 (``noise``: standard error)."""
        import pandas as pd

        frame = pd.DataFrame({"layer": range(self.profile.shape[0])})
        for offset in (0, 1, 2):
            frame[f"offset {offset}"] = self.at_offset(offset).tolist()
        best = self.best()
        frame["best offset"] = [offset for offset, _ in best]
        frame["best"] = [value for _, value in best]
        frame["noise"] = [float(self.noise[i, self.n - offset]) for i, (offset, _) in enumerate(best)]
        return frame

    def figure(self) -> "go.Figure":
        """The profile of every layer by offset, control subtracted, plotly."""
        from mambascope.analyses.plots import profiles

        offsets = [self.n - lag for lag in range(self.profile.shape[1])]
        title = f"where the second copy looks: source t − {self.n} + offset, control subtracted"
        return profiles(self.excess, offsets, title, "offset (0: same token, 1: the next)", "excess share")


@torch.no_grad()
def induction_score(
    model: "HookedMamba",
    n: int = 32,
    *,
    rows: int = 4,
    seed: int = 0,
    reduce: Reduction = "mean_abs",
    pool: Int[Tensor, " P"] | None = None,
    through: Through = "scan",
) -> Induction:
    """Loss on repeated random tokens, and where each layer's hidden attention looks in the second copy.

    ``n`` tokens a copy, ``rows`` rows. ``reduce``: over channels; "signed" shares divide by Σ|alpha|. ``through``:
    sources are what the scan reads, or with ``"conv"`` the tokens that the convolution mixes into that.
    Raises InputError as :func:`repeated_tokens` does, and for maps that do not fit.
    """
    tokens = repeated_tokens(model, n, rows, seed=seed, pool=pool)
    other = repeated_tokens(model, n, rows, seed=seed, pool=pool, repeat=False)
    return _score(model, tokens, other, n, reduce, through)


@torch.no_grad()
def passage_score(
    model: "HookedMamba",
    passages: Sequence[str],
    *,
    reduce: Reduction = "mean_abs",
    through: Through = "scan",
) -> Induction:
    """The same for passages of text, each repeated once; the control reads another of the passages first.

    All are cut to the length of the shortest. Raises InputError for fewer than two passages.
    """
    if isinstance(passages, str) or len(passages) < 2:
        raise InputError("passage_score compares each passage with another one: give at least two texts")
    rows = [row[1:] if bos else row for text in passages for [row], bos in [model.encode_texts([text])]]
    n = min(len(row) for row in rows)
    if n < 2:
        raise InputError("a passage has fewer than two tokens; give longer texts")
    copies = torch.tensor([row[:n] for row in rows], device=model.device)
    tokens = torch.cat([copies, copies], 1)
    other = torch.cat([copies.roll(1, 0), copies], 1)
    return _score(model, tokens, other, n, reduce, through)


def _score(
    model: "HookedMamba", tokens: Tensor, other: Tensor, n: int, reduce: Reduction, through: Through
) -> Induction:
    same = _profiles(model, tokens, n, reduce, through)  # rows layers lags
    fresh = _profiles(model, other, n, reduce, through)
    difference, rows = same - fresh, len(tokens)
    noise = difference.std(0) / rows**0.5 if rows > 1 else torch.full_like(difference[0], float("nan"))
    loss = scores(model, tokens).loss.mean(0)
    return Induction(n, loss, same.mean(0), fresh.mean(0), noise, tokens, reduce)


def _profiles(
    model: "HookedMamba", tokens: Tensor, n: int, reduce: Reduction, through: Through
) -> Float[Tensor, "R layers lags"]:
    """Steps 3 and 4 for each row."""
    out = []
    for row in tokens.split(1):  # one map at a time
        _, cache = model.run_with_cache(row, return_type=None)
        maps = [_map(cache, i, letter, reduce, through) for i, letter in enumerate(model.cfg.layers)]
        out.append(torch.stack([lag_profile(weights, n) for weights in maps]))
    return torch.stack(out)


def _map(cache: Any, layer: int, letter: str, reduce: Reduction, through: Through) -> Float[Tensor, "L L"]:
    """What each position reads of each other in a layer."""
    if letter in "aw":
        return cache["pattern", layer][0].mean(0)
    if letter == "f":
        return torch.eye(cache.recording.shape[1], device=cache.device)
    return cache.hidden_attention(layer, reduce, through=through)[0]


def lag_profile(weights: Float[Tensor, "L L"], n: int) -> Float[Tensor, " L"]:
    """Mean share of the last ``n`` queries' reading at each lag; a lag that no query has gets 0."""
    length = weights.shape[0]
    share = weights / weights.abs().sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    queries = torch.arange(length - n, length, device=weights.device)
    lag = queries[:, None] - torch.arange(length, device=weights.device)  # n L
    seen = lag >= 0
    total = weights.new_zeros(length).index_add_(0, lag[seen], share[queries][seen])
    count = weights.new_zeros(length).index_add_(0, lag[seen], torch.ones_like(share[queries][seen]))
    return total / count.clamp_min(1)

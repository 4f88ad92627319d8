"""One text at a glance: what the model expects, what its layers write and hold, what the last token reads.

1. Read the text once, everything readable (:func:`mambascope.analyses.source.read`).
2. Layer by layer, so that each block is recomputed once: delta (:mod:`gating`), state norms (:mod:`states`), and
   the last token's row of the effective kernel (:mod:`kernels`).
3. The loss of every token, its best guesses, and the logit lens (:mod:`logits`).
4. The best guess after that token traced back through all layers (:mod:`relevance`), where the run can be traced.
"""

import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import mambascope
from mambascope.analyses.gating import Gating, gating_of, layer_gating
from mambascope.analyses.kernels import Reduction, Sources, row_of, sources_of
from mambascope.analyses.logits import LogitLens, TokenPredictions, logit_lens, predictions
from mambascope.analyses.relevance import Relevance, token_relevance
from mambascope.analyses.source import Reading, Source, position_index, read
from mambascope.analyses.states import StateNorms, layer_norms
from mambascope.brief import Brief
from mambascope.errors import CacheError, InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["Overview", "scope"]


@dataclass(frozen=True, repr=False)
class Overview(Brief):
    """Everything that ``mambascope scope`` shows of one text. ``about``: model, sizes, versions, as plain values.

    ``relevance`` is None where the best guess cannot be traced back (a hook edited what the equations rest on, or a
    projection was exchanged); ``untraced`` then says why.
    """

    about: dict[str, Any]
    ids: tuple[int, ...]
    predictions: TokenPredictions
    gating: Gating
    states: StateNorms
    lens: LogitLens
    sources: Sources
    relevance: Relevance | None
    untraced: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """One text a token."""
        return self.predictions.labels

    @property
    def start(self) -> int:
        """Position of the first token shown."""
        return self.predictions.start

    def table(self) -> "pd.DataFrame":
        """A row a token: position, token, loss, guesses, mean delta, mean state norm."""
        frame = self.predictions.table()
        frame["delta"] = self.gating.delta.mean(0).tolist()
        frame["state norm"] = self.states.norm.mean(0).tolist()
        return frame

    def figures(self) -> "dict[str, go.Figure]":
        """The maps, by name."""
        found = {
            "delta": self.gating.figure(),
            "state norm": self.states.figure(),
            "logit lens": self.lens.figure(),
            "sources": self.sources.figure(),
        }
        return found if self.relevance is None else {**found, "relevance": self.relevance.figure()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``about``, one entry a token, the layer × token maps. What is unknown is None."""
        guesses = self.predictions.next
        rows = zip(
            self.ids, self.labels, _plain(self.predictions.loss), _plain(self.predictions.next.entropy), strict=True
        )
        delta, norm = _plain(self.gating.delta.mean(0)), _plain(self.states.norm.mean(0))
        tokens = []
        for i, (token, text, loss, entropy) in enumerate(rows):
            best = zip(guesses.top[i].tolist(), self.predictions.guesses[i], _plain(guesses.p[i]), strict=True)
            tokens.append(
                {
                    "position": self.start + i,
                    "id": token,
                    "text": text,
                    "loss": loss,
                    "entropy": entropy,
                    "next": [{"id": a, "text": b, "p": p} for a, b, p in best],
                    "delta": delta[i],
                    "state_norm": norm[i],
                }
            )
        lens = self.lens
        return {
            "about": self.about,
            "tokens": tokens,
            "layers": {
                "delta": _plain(self.gating.delta),
                "open_share": _plain(self.gating.open_share),
                "closed_share": _plain(self.gating.closed_share),
                "selectivity": _plain(self.gating.selectivity),
                "state_norm": _plain(self.states.norm),
                "logit_lens": {
                    "rows": lens.rows,
                    "guess": [list(row) for row in lens.guesses],
                    "p": _plain(lens.p),
                    "next_logp": _plain(lens.logp),
                    "next_rank": lens.rank.tolist(),
                },
            },
            "sources": {
                "query": self.start + self.sources.query,
                "reduce": self.sources.reduce,
                "amount": _plain(self.sources.amount),
                "carry": _plain(self.sources.carry),
                "error": _plain(self.sources.error),
            },
            "relevance": self._relevance(),
        }

    def _relevance(self) -> dict[str, Any]:
        found = self.relevance
        if found is None:
            return {"untraced": self.untraced}
        target = {"name": found.target.name, "query": self.start + found.target.query, "value": found.target.value}
        parts = {"stream": _plain(found.stream), "bias": _plain(found.bias.sum(1)), "carry": _plain(found.carry)}
        return {"target": target, "rule": found.rule, **parts}

    def html(self) -> str:
        """One page that needs no network; see :mod:`mambascope.analyses.report`."""
        from mambascope.analyses.report import page

        return page(self)

    def save(self, path: str | Path) -> Path:
        """Write the page, whole or not at all. InputError if it cannot be written."""
        from mambascope.analyses.report import save

        return save(self, path)


def _plain(values: Tensor) -> Any:
    """Lists of numbers; NaN and infinity, which JSON lacks, become None."""

    def clean(x: Any) -> Any:
        if isinstance(x, list):
            return [clean(v) for v in x]
        return x if math.isfinite(x) else None

    return clean(values.tolist())


@torch.no_grad()
def scope(
    model: "HookedMamba",
    source: Source,
    *,
    top: int = 5,
    query: int = -1,
    reduce: Reduction = "mean_abs",
    max_tokens: int | None = None,
) -> Overview:
    """The overview of one text (the module's algorithm).

    ``top`` guesses a token; ``query``: whose sources are shown (default: the last token), reduced over channels by
    ``reduce``; ``max_tokens``: show the last ones only, with the state of all before them (no number changes).
    Cost: two forward passes, O(layers L D N) for the kernel row, O(layers L M V) for the lens, and a backward pass.

    Raises InputError, CacheError as the parts do.
    """
    reading = read(model, source, max_tokens=max_tokens)
    query = position_index(reading.length, query, "query")
    gates, norms, rows = [], [], []
    for i in range(reading.n_layers):
        gates.append(layer_gating(reading, i))  # reads delta, so the block is recomputed once for all three
        norms.append(layer_norms(reading, i))
        rows.append(row_of(reading, i, query))
    found = predictions(model, reading, top=min(top, model.cfg.n_tokens))
    relevance, untraced = None, ""
    try:
        relevance = token_relevance(model, reading, query=query)
    except (CacheError, InputError) as error:
        untraced = str(error)
    return Overview(
        _about(reading, found),
        tuple(reading.tokens.tolist()),
        found,
        gating_of(reading, gates),
        StateNorms(torch.stack(norms), reading.labels, reading.start),
        logit_lens(model, reading),
        sources_of(rows, reduce),
        relevance,
        untraced,
    )


def _about(reading: Reading, found: TokenPredictions) -> dict[str, Any]:
    model, cfg = reading.model, reading.model.cfg
    loss = found.mean_loss
    return {
        "model": cfg.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": cfg.n_layers,
        "d_model": cfg.d_model,
        "d_inner": cfg.d_inner,
        "d_state": cfg.d_state,
        "vocabulary": cfg.n_tokens,
        "tokens": reading.length,
        "tokens_before": reading.start,
        "bos": reading.cache.recording.bos,
        "mean_loss": None if math.isnan(loss) else loss,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": reading.cache.recording.backend,
        "mambascope": mambascope.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

"""What the model expects: the loss of every token, its best guesses, and the same read off every layer.

The logit lens (nostalgebraist, "interpreting GPT: the logit lens", 2020):

1. Take the residual stream after block i, ``L M`` (and the embedding, before any block).
2. Put it through the final norm and the unembedding as if the model ended there: logits ``L V``.
3. Keep the best tokens, and the probability and rank of the token that really comes next; drop the logits.

The last row is the model's own prediction. Positions go in chunks, so that length × vocabulary is never held.
A position t predicts token t+1; the loss of token t is -log p(token t | tokens before it), in nats.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambascope.analyses.labels import short, token_labels
from mambascope.analyses.source import Reading, Source, read
from mambascope.brief import Brief
from mambascope.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["LogitLens", "Predictions", "TokenPredictions", "logit_lens", "predictions"]

_CHUNK = 1 << 23  # logits held at a time: 32 MB in float32, three times over


@dataclass(frozen=True, repr=False)
class Predictions(Brief):
    """What distributions over the vocabulary say, for ``R`` positions.

    ``top`` ``R k`` ids, best first, with probabilities ``p`` ``R k``; ``entropy`` ``R`` in nats; of the token that
    really comes: ``logp`` ``R`` in nats and ``rank`` ``R`` (0 = best); NaN and -1 where none is known.
    """

    top: Int[Tensor, "R k"]
    p: Float[Tensor, "R k"]
    entropy: Float[Tensor, " R"]
    logp: Float[Tensor, " R"]
    rank: Int[Tensor, " R"]


def read_out(model: "HookedMamba", normed: Float[Tensor, "R M"], targets: Int[Tensor, " R"], k: int) -> Predictions:
    """Unembed the normalised residual in chunks; ``targets`` holds -1 where no next token is known."""
    normed, targets = normed.to(model.device), targets.to(model.device)  # a cache may lie elsewhere
    size = max(1, _CHUNK // model.cfg.d_vocab)
    parts: list[tuple[Tensor, ...]] = []
    for a in range(0, normed.shape[0], size):
        goal = targets[a : a + size]
        logits = model.unembed(normed[a : a + size])
        logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)  # r V
        best = logp[:, : model.cfg.n_tokens].topk(k, -1)  # rows beyond n_tokens are padding of the matrix
        known = goal >= 0
        mine = logp.gather(1, goal.clamp_min(0)[:, None])[:, 0]
        rank = (logp > mine[:, None]).sum(-1)
        entropy = -logp.exp().mul_(logp).sum(-1)
        nan = torch.full_like(mine, float("nan"))
        parts.append(
            (best.indices, best.values.exp(), entropy, torch.where(known, mine, nan), torch.where(known, rank, -1))
        )
    return Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def next_tokens(reading: Reading) -> Int[Tensor, " L"]:
    """For each position the token that comes next, -1 at the last."""
    return torch.cat([reading.tokens[1:], reading.tokens.new_full((1,), -1)])


def final_normed(reading: Reading) -> Float[Tensor, "L M"]:
    """The unembedding's input as the run computed it, hooks of the final norm included."""
    weight = reading.model.ln_final.weight
    return reading.value("ln_final.hook_normalized").to(weight.device) * weight


def _check_top(model: "HookedMamba", top: int) -> None:
    if isinstance(top, bool) or not isinstance(top, int) or not 1 <= top <= model.cfg.n_tokens:
        raise InputError(f"top must be an integer from 1 to the {model.cfg.n_tokens} tokens, got {top!r}")


# ---- the model's own prediction


@dataclass(frozen=True, repr=False)
class TokenPredictions(Brief):
    """Loss and best guesses at every token.

    ``loss`` ``L``: nats, NaN for a first token that nothing predicts; ``next`` (at position t: of token t+1).
    """

    loss: Float[Tensor, " L"]
    next: Predictions
    labels: tuple[str, ...]
    guesses: tuple[tuple[str, ...], ...]
    start: int = 0

    @property
    def mean_loss(self) -> float:
        """Nats per token over the tokens that have a loss; NaN if none has."""
        return float(self.loss.nanmean())

    def table(self) -> "pd.DataFrame":
        """A row a token: loss, and the best guesses for what follows with their probabilities."""
        import pandas as pd

        frame = pd.DataFrame({"position": range(self.start, self.start + len(self.labels)), "token": self.labels})
        frame["loss"] = self.loss.tolist()
        for i in range(self.next.top.shape[1]):
            frame[f"next {i + 1}"] = [guess[i] for guess in self.guesses]
            frame[f"p {i + 1}"] = self.next.p[:, i].tolist()
        return frame

    def figure(self) -> "go.Figure":
        """Loss by token, plotly."""
        from mambascope.analyses.plots import token_bars

        return token_bars(self.loss, self.labels, "loss of each token", "nats", start=self.start)


@torch.no_grad()
def predictions(model: "HookedMamba", source: Source, *, top: int = 5) -> TokenPredictions:
    """Loss of every token in nats, and the ``top`` guesses for the next one.

    -log p(token t | earlier tokens): the numbers of ``model(..., return_type="loss", loss_per_token=True)``, one
    position later. Time O(L M V); memory a chunk of logits. Raises InputError for a ``top`` beyond the vocabulary.
    """
    _check_top(model, top)
    reading = read(model, source)
    found = read_out(model, final_normed(reading), next_tokens(reading), top)
    first = found.logp.new_full((1,), float("nan"))
    if reading.before is not None:
        logits = reading.before.to(found.logp.dtype)
        first = -logits.log_softmax(-1)[reading.tokens[:1].to(logits.device)]
    loss = torch.cat([first, -found.logp[:-1]])
    guesses = tuple(token_labels(model, row) for row in found.top)
    return TokenPredictions(loss, found, reading.labels, guesses, reading.start)


# ---- by layer


@dataclass(frozen=True, repr=False)
class LogitLens(Brief):
    """The logit lens of a text: row 0 reads the embedding, row i the stream after block i - 1.

    Shapes ``layers+1 L``: ``top`` ids and ``p`` their probability; ``logp`` (nats) and ``rank`` of the token that
    really comes next (NaN and -1 at the last position); ``entropy`` nats. ``guesses`` are ``top`` as text.
    """

    top: Int[Tensor, "n1 L"]
    p: Float[Tensor, "n1 L"]
    logp: Float[Tensor, "n1 L"]
    rank: Int[Tensor, "n1 L"]
    entropy: Float[Tensor, "n1 L"]
    labels: tuple[str, ...]
    guesses: tuple[tuple[str, ...], ...]
    start: int = 0

    @property
    def rows(self) -> list[str]:
        """A name a row."""
        return ["embed", *(str(i) for i in range(self.top.shape[0] - 1))]

    def table(self) -> "pd.DataFrame":
        """A row a token: the best guess for what follows in every layer."""
        import pandas as pd

        frame = pd.DataFrame({"position": range(self.start, self.start + len(self.labels)), "token": self.labels})
        return frame.assign(**{f"layer {row}": self.guesses[i] for i, row in enumerate(self.rows)})

    def hover(self) -> list[list[str]]:
        """What to say of every cell."""

        def about(guess: str, p: float, logp: float, rank: int) -> str:
            known = f", next: p {math.exp(logp):.3f}, rank {rank}" if rank >= 0 else ""
            return f"guess {short(guess)} ({p:.3f}){known}"

        columns = (self.p.tolist(), self.logp.tolist(), self.rank.tolist())
        rows = zip(self.guesses, *columns, strict=True)
        return [[about(*cell) for cell in zip(*row, strict=True)] for row in rows]

    def figure(self) -> "go.Figure":
        """Layer × token map of the next token's probability, the best guess written in each cell, plotly."""
        from mambascope.analyses.plots import token_map

        title = "logit lens: probability of the token that comes next, read off each layer"
        cells = [[short(g, 9) for g in row] for row in self.guesses]
        return token_map(
            self.logp.exp(), self.labels, title, "p", rows=self.rows, hover=self.hover(), cells=cells, start=self.start
        )


@torch.no_grad()
def logit_lens(model: "HookedMamba", source: Source) -> LogitLens:
    """Read the next token off every layer (the logit lens; the module's algorithm).

    Time O(layers L M V); memory a chunk of logits. On an untrained model every row is near uniform.
    """
    reading = read(model, source)
    goal = next_tokens(reading)
    rows = []
    for i in range(reading.n_layers):
        rows.append(read_out(model, model.ln_final(reading.value("resid_pre", i).to(model.device)), goal, 1))
    rows.append(read_out(model, final_normed(reading), goal, 1))
    top = torch.stack([row.top[:, 0] for row in rows])
    return LogitLens(
        top,
        torch.stack([row.p[:, 0] for row in rows]),
        torch.stack([row.logp for row in rows]),
        torch.stack([row.rank for row in rows]),
        torch.stack([row.entropy for row in rows]),
        reading.labels,
        tuple(token_labels(model, row) for row in top),
        reading.start,
    )

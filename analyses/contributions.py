"""Who writes a logit: each layer's and each source token's direct contribution, in logits, adding up exactly.

1. A target: the logit of a token at a query, or the difference of two. With the final norm's scale *frozen* at its
   value on this text, the target is linear in the residual stream: direction = ln_final weight · (W_U[a] - W_U[b]) /
   scale, ``M``.
2. resid = embedding + Σ_i mixer_out_i, so each layer's contribution is mixer_out_i · direction.
3. Each layer's splits once more, exactly: mixer_out = W_out ((y + D u) · SiLU(z)) + bias, and y is the effective kernel
   applied to what tokens wrote, y[t] = Σ_s alpha[t, s] u[s] + carry. So with g = (W_outᵀ direction) · SiLU(z[t]):

       scan     Σ_d g[d] alpha[t, s, d] u[s, d]           of each source token s
       skip     Σ_d g[d] D[d] u[t, d]                     the query itself, past the scan
       carry    Σ_d g[d] carry[d]                         the state before the text
       bias     out_proj's bias · direction

*Direct* contributions: what a layer read from earlier layers is not traced back to them; :mod:`mambascope.analyses.
relevance` does that. A source token s is where the scan wrote; through the conv its u holds up to K tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.labels import token_labels, visible
from mambascope.analyses.source import Reading, Source, every_layer, finite, position_index, read
from mambascope.brief import Brief
from mambascope.errors import CacheError, InputError
from mambascope.hooks.shares import check_direction

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["LogitContributions", "Target", "logit_contributions", "target_of"]

Token = int | str
"""An id, or a text that is one token."""


@dataclass(frozen=True)
class Target:
    """A number read off the final residual stream at one position: ``value`` = resid[query] · ``direction`` ``M``."""

    query: int
    name: str
    direction: Float[Tensor, " M"]
    value: float


def _token_id(model: "HookedMamba", token: Token, what: str) -> int:
    if isinstance(token, str):
        return model.to_single_token(token)
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < model.cfg.n_tokens:
        raise InputError(f"{what} {token!r} is no id of the vocabulary of {model.cfg.n_tokens} tokens, and no text")
    return token


def target_of(
    reading: Reading,
    query: int = -1,
    answer: Token | None = None,
    wrong: Token | None = None,
    direction: Tensor | None = None,
) -> Target:
    """The logit of ``answer`` at ``query`` (default: of the model's best guess), less that of ``wrong`` if given, or
    the residual stream along a ``direction`` ``M``. The final norm's scale is frozen.

    Raises InputError for a token outside the vocabulary, both kinds of target at once, a direction of another size or
    with NaN; CacheError where a hook edited the final norm.
    """
    model = reading.model
    query = position_index(reading.length, query, "query")
    last = final_stream(reading)[query]  # M
    if direction is not None:
        if answer is not None or wrong is not None:
            raise InputError("give a direction, or tokens (answer, wrong), not both")
        vector = check_direction(direction, model.cfg.d_model, "d_model").to(last)
        return Target(query, "along the direction", vector, float(last.double() @ vector.double()))
    weight = model.ln_final.weight.detach().to(last)
    scale = reading.value("ln_final.hook_scale")[query].to(last)
    normed = reading.value("ln_final.hook_normalized")[query].to(last)
    if bool(((normed * scale - last).abs() > _rounding(model) * last.abs().amax().clamp_min(1e-30)).any()):
        raise CacheError("a hook edited ln_final.hook_normalized, so the logits are not those of the residual stream")
    W_U = model.unembed.weight.detach()
    if answer is None:
        answer = int((W_U[: model.cfg.n_tokens].to(last) @ (normed * weight)).argmax())
    tokens = [_token_id(model, answer, "answer")]
    if wrong is not None:
        tokens.append(_token_id(model, wrong, "wrong"))
    column = W_U[tokens[0]].to(last) if wrong is None else W_U[tokens[0]].to(last) - W_U[tokens[1]].to(last)
    vector = column * weight / scale
    label = [repr(visible(t)) for t in token_labels(model, tokens)]
    name = f"logit of {label[0]}" + (f" − {label[1]}" if wrong is not None else "")
    return Target(query, name, vector, float(normed.double() @ (weight.double() * column.double())))


def _rounding(model: "HookedMamba") -> float:
    """How far sums of what was recorded may lie apart, relative to their terms: float32 gives 1e-6."""
    return max(1e-4, 16 * torch.finfo(model.dtype).eps)


def final_stream(reading: Reading) -> Float[Tensor, "L M"]:
    """The residual stream before the final norm."""
    last = reading.n_layers - 1
    value = finite(reading.value("resid_post", last), f"resid_post of layer {last}")
    return value.to(torch.promote_types(value.dtype, torch.float32))


@dataclass(frozen=True, repr=False)
class LogitContributions(Brief):
    """Direct contributions to a target, in its units (logits).

    ``scan`` ``layers S``: of each source token through each layer's scan; ``skip``, ``carry``, ``bias`` ``layers``;
    ``embed``: of the query's own embedding. All of them add up to ``target.value`` with the absolute ``error``.
    """

    target: Target
    scan: Float[Tensor, "n S"]
    skip: Float[Tensor, " n"]
    carry: Float[Tensor, " n"]
    bias: Float[Tensor, " n"]
    embed: float
    labels: tuple[str, ...]
    start: int = 0

    @property
    def by_layer(self) -> Float[Tensor, " n"]:
        """mixer_out · direction of each layer."""
        return self.scan.sum(1) + self.skip + self.carry + self.bias

    @property
    def by_token(self) -> Float[Tensor, " S"]:
        """Each source token's direct contribution through the scans of all layers."""
        return self.scan.sum(0)

    @property
    def total(self) -> float:
        """Everything added up."""
        return float(self.by_layer.sum()) + self.embed

    @property
    def error(self) -> float:
        """|total - target|, in logits."""
        return abs(self.total - self.target.value)

    def table(self) -> "pd.DataFrame":
        """A row a layer (and the embedding): scan, skip, carry, bias, and their sum."""
        import pandas as pd

        frame = pd.DataFrame({"layer": ["embed", *map(str, range(len(self.skip)))]})
        for name in ("scan", "skip", "carry", "bias"):
            value = self.scan.sum(1) if name == "scan" else getattr(self, name)
            frame[name] = [0.0, *value.tolist()]
        return frame.assign(total=[self.embed, *self.by_layer.tolist()])

    def tokens(self) -> "pd.DataFrame":
        """A row a source token: its contribution through all layers, and through each."""
        import pandas as pd

        frame = pd.DataFrame({"position": range(self.start, self.start + len(self.labels)), "token": self.labels})
        frame["total"] = self.by_token.tolist()
        return frame.assign(**{f"layer {i}": row.tolist() for i, row in enumerate(self.scan)})

    def figure(self) -> "go.Figure":
        """Layer × source token map, signed, plotly."""
        from mambascope.analyses.plots import token_map

        title = f"{self.target.name} at {self.start + self.target.query}: direct contributions through the scans"
        return token_map(self.scan, self.labels, title, "logits", log=True, signed=True, start=self.start)


@torch.no_grad()
def logit_contributions(
    model: "HookedMamba",
    source: Source,
    *,
    answer: Token | None = None,
    wrong: Token | None = None,
    query: int = -1,
    direction: Float[Tensor, " M"] | None = None,
) -> LogitContributions:
    """Each layer's and each source token's direct contribution to a logit, or a difference of logits.

    The final norm's scale is held at its value on this text (the module's algorithm); the parts then add up to the
    logit within rounding. ``answer`` and ``wrong``: ids or texts of one token; ``direction`` ``M`` instead reads the
    final residual stream along it. Time O(layers L D N), memory one row of a layer's kernel.

    Raises
    ------
    InputError: as :func:`target_of`; a layer without a scan; NaN in a layer.
    CacheError: a hook edited something between a layer's y and the logits that the parts do not account for.
    """
    reading = read(model, source)
    target = target_of(reading, query, answer, wrong, direction)
    parts = [_layer(reading, i, target) for i in every_layer(model)]
    scan, skip, carry, bias = (torch.stack(column) for column in zip(*parts, strict=True))
    first = reading.value("resid_pre", 0)[target.query].double()
    embed = float(first @ target.direction.double())
    found = LogitContributions(
        target, scan, skip, carry, bias, embed, reading.labels[: target.query + 1], reading.start
    )
    size = float(scan.abs().sum() + skip.abs().sum() + carry.abs().sum() + bias.abs().sum()) + abs(embed)
    if found.error > _rounding(model) * size:
        raise CacheError(
            f"the contributions differ from the target by {found.error:.1e} of {size:.1e}: a hook edited the residual "
            "stream between two blocks; analyse the run without that hook"
        )
    return found


def _layer(reading: Reading, layer: int, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scan ``S``, skip, carry and bias of one layer, float64."""
    found = reading.cache.source_contributions(layer, target.query, target.direction, space="resid")
    values = (found.amounts, found.skip, found.before, found.constant)
    scan, skip, carry, bias = (v[0] if reading.cache.has_batch_dim else v for v in values)
    return scan[: target.query + 1].cpu(), skip.cpu(), carry.cpu(), bias.cpu()

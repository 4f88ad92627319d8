"""Where a logit comes from, traced through every layer: relevance of every token's residual stream, conserved.

Layer-wise relevance for Mamba (MambaLRP, Jafari et al., 2406.07592), by gradients through held gates:

1. A target: a logit, a difference of logits, or a direction, at one query (:func:`mambascope.analyses.contributions.
   target_of`; the final norm's scale is held).
2. G_n = its gradient at the last residual stream: the direction at the query, 0 elsewhere.
3. Back through one block after another, with everything that selects, gates and normalises held (:mod:`mambascope.
   analyses.relevance_block`, which names the gate's rules): G_i from G_{i+1}.
4. Relevance of token s at layer i: R_i[s] = G_i[s] · resid_i[s].

Conserved: Σ_s R_{i+1} = Σ_s (R_i + bias_i) + carry_i, where bias_i is what the block's biases add (conv, projections)
at each position and carry_i what the state before the text does. Neither is part of a token, so both are listed apart;
``absorbed`` gives each bias to the position at which it acts instead, and then every row adds up to the target (less
the carries). ``defect`` says how well the sum holds, per layer. A row tells *where the information sits* at that
depth: the last row is all at the query, the first is what each input token contributes in the end.

Cost: O(layers L (D N + M D)), memory one block's activations.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.contributions import Target, Token, final_stream, target_of
from mambascope.analyses.relevance_block import Rule, check_rule, frozen_block
from mambascope.analyses.source import Reading, Source, every_layer, finite, read
from mambascope.brief import Brief
from mambascope.errors import CacheError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["Relevance", "token_relevance"]


@dataclass(frozen=True, repr=False)
class Relevance(Brief):
    """Relevance to ``target``, in its units.

    ``stream`` ``layers+1 L``: row i of the residual stream that enters block i, the last row of the one that leaves the
    last; ``bias`` ``layers L``, ``carry`` ``layers``: what each block's biases and earlier state take; ``rule``: the
    gate's.
    """

    target: Target
    rule: Rule
    stream: Float[Tensor, "n1 L"]
    bias: Float[Tensor, "n L"]
    carry: Float[Tensor, " n"]
    labels: tuple[str, ...]
    start: int = 0

    @property
    def tokens(self) -> Float[Tensor, " L"]:
        """Each input token's relevance: the row of the embedding."""
        return self.stream[0]

    @property
    def absorbed(self) -> Float[Tensor, "n1 L"]:
        """``stream`` with every later block's bias terms given to the positions where they act."""
        later = self.bias.flip(0).cumsum(0).flip(0)  # n L
        return self.stream + torch.cat([later, torch.zeros_like(later[:1])])

    @property
    def defect(self) -> Float[Tensor, " n"]:
        """|Σ R_{i+1} - Σ R_i - Σ bias_i - carry_i| of each layer, relative to the larger of |target| and Σ|R_{i+1}|."""
        total = self.stream.sum(1)
        size = self.stream[1:].abs().sum(1).clamp_min(abs(self.target.value)).clamp_min(1e-30)
        return (total[1:] - total[:-1] - self.bias.sum(1) - self.carry).abs() / size

    def table(self) -> "pd.DataFrame":
        """A row a token: its relevance at the embedding, and in every layer's residual stream."""
        import pandas as pd

        frame = pd.DataFrame({"position": range(self.start, self.start + len(self.labels)), "token": self.labels})
        frame["relevance"] = self.tokens.tolist()
        return frame.assign(**{f"after {i}": self.stream[i + 1].tolist() for i in range(len(self.bias))})

    def by_layer(self) -> "pd.DataFrame":
        """A row a block: relevance leaving it, what biases and earlier state take, entering it, the defect."""
        import pandas as pd

        total = self.stream.sum(1)
        columns = {"leaving": total[1:], "bias": self.bias.sum(1), "carry": self.carry, "entering": total[:-1]}
        frame = pd.DataFrame({"layer": range(len(self.bias)), **{k: v.tolist() for k, v in columns.items()}})
        return frame.assign(defect=self.defect.tolist())

    def figure(self) -> "go.Figure":
        """Depth × token map, signed, in logarithmic colours, plotly."""
        from mambascope.analyses.plots import token_map

        title = f"{self.target.name} at {self.start + self.target.query}: relevance by depth, {self.rule} gate"
        rows = ["embed", *(str(i) for i in range(len(self.bias)))]
        return token_map(
            self.stream, self.labels, title, "relevance", rows=rows, log=True, signed=True, start=self.start
        )


@torch.no_grad()
def token_relevance(
    model: "HookedMamba",
    source: Source,
    *,
    answer: Token | None = None,
    wrong: Token | None = None,
    query: int = -1,
    direction: Float[Tensor, " M"] | None = None,
    rule: Rule = "half",
) -> Relevance:
    """Relevance of every token at every depth for a logit (default: of the best guess), a difference of two, or a
    ``direction`` ``M`` of the final residual stream; the module's algorithm.

    ``rule``: "half" is MambaLRP's; "frozen" gives the exact linear decomposition with all gates held, which predicts
    interventions under held gates.

    Raises
    ------
    InputError: an unknown rule; as :func:`~mambascope.analyses.contributions.target_of`; a layer without a scan; NaN.
    CacheError: a hook edited something that the equations do not account for (named); edits of delta, B, C, u_select
        and norm scales are honoured, since those are held.
    """
    check_rule(rule)
    reading = read(model, source)
    layers = every_layer(model)
    target = target_of(reading, query, answer, wrong, direction)
    stop = target.query + 1
    unedited_stream(reading, stop)
    last = final_stream(reading)
    g = torch.zeros_like(last)[None]  # 1 L M
    g[0, target.query] = target.direction
    rows, biases, carries = [(g[0].double() * last.double()).sum(-1)], [], []
    for i in reversed(layers):
        block = frozen_block(reading, i)
        g, bias, carry = block.pull(g.to(block.r), rule)
        rows.append((g[0].double() * block.r.double()).sum(-1))
        biases.append(bias[0])
        carries.append(carry[0])
    stream = torch.stack(rows[::-1])[:, :stop].cpu()
    bias, carry = torch.stack(biases[::-1])[:, :stop].double().cpu(), torch.stack(carries[::-1]).double().cpu()
    return Relevance(target, rule, stream, bias, carry, reading.labels[:stop], reading.start)


def unedited_stream(reading: Reading, stop: int) -> None:
    """CacheError if a hook changed the residual stream between two blocks, InputError if it is not finite there."""
    for i in range(reading.n_layers - 1):
        left = finite(reading.value("resid_post", i)[:stop], f"resid_post of layer {i}")
        entered = reading.value("resid_pre", i + 1)[:stop]
        if left is entered or torch.equal(left, entered.to(left)):
            continue
        at = int((left != entered).any(-1).nonzero()[0])
        raise CacheError(
            f"blocks.{i + 1}.hook_resid_pre was edited at position {at}, so what enters layer {i + 1} is not what "
            f"layer {i} left; analyse the run without that hook"
        )

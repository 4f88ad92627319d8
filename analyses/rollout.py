"""Token-to-token flow through the whole model: of what a token's last residual stream holds, how much came from where.

Both ways are signed, and exact in the sense that a row and its rest add up to 1; they differ in what they hold.

``"shares"``, in the manner of attention rollout (Abnar & Zuidema, 2005.00928), with signs:

1. In each block the residual stream after it is a sum: the stream before it, what each earlier token's conv input x[s]
   adds through conv, scan and gate (delta, B, C, SiLU factors, the gate and the norm's scale held), and a rest
   (biases, the state before the text).
2. P[t, s] is the share of s in that sum: its part's component along resid_post[t], over |resid_post[t]|². A row of P
   and its rest add up to 1.
3. Roll the layers up: P_n … P_2 P_1. A layer only asks *how much* of its stream comes from s, not whether that part
   is what the next layer reads; so this is an average over uses.

``"gradients"``, through held gates: the derivative of resid[t] · resid[t] / |resid[t]|² (one factor held) with respect
to each token's embedding, times that embedding, through all blocks held as in :mod:`mambascope.analyses.
relevance_block`. It follows what later layers really read; ``rule`` is the gate's.

Biases (of the conv above all) can hold more of a stream than the tokens do. They belong to no token and make up the
rest; with ``biases="tokens"`` each goes to the position at which it acts instead, and the rest is what the state before
the text adds.

Cost: shares O(layers L² D N K) as kernel maps; gradients O(layers queries L (D N + M D)). Memory: the map.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope import ops
from mambascope.analyses.contributions import final_stream
from mambascope.analyses.relevance import unedited_stream
from mambascope.analyses.relevance_block import FrozenBlock, Rule, check_rule, frozen_block
from mambascope.analyses.source import Reading, Source, every_layer, position_index, read
from mambascope.brief import Brief
from mambascope.errors import InputError, nearest
from mambascope.memory import require_bytes

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["Flow", "token_flow"]

Method = Literal["shares", "gradients"]
Biases = Literal["rest", "tokens"]
_METHODS = ("shares", "gradients")
_BIASES = ("rest", "tokens")
_HELD = 1 << 24  # elements of a Q L D tensor in the backward pass: 64 MB in float32, several at a time


@dataclass(frozen=True, repr=False)
class Flow(Brief):
    """``weights`` ``Q L``: the signed share of each source token's embedding (with ``biases="tokens"``, also of the
    biases that act there) in the last residual stream of each query, 0 after the query; ``rest`` ``Q``: of what belongs
    to no token. Rows and rest add up to 1."""

    method: Method
    rule: Rule
    biases: Biases
    queries: tuple[int, ...]
    weights: Float[Tensor, "Q L"]
    rest: Float[Tensor, " Q"]
    labels: tuple[str, ...]
    start: int = 0

    @property
    def error(self) -> float:
        """How far rows and rest are from 1, relative to the sum of magnitudes in the row."""
        size = self.weights.abs().sum(1) + self.rest.abs()
        return float(((self.weights.sum(1) + self.rest - 1).abs() / size.clamp_min(1)).max())

    def by_lag(self) -> Float[Tensor, " L"]:
        """Mean weight at each distance t - s over the queries that reach so far back; NaN where none does."""
        at = torch.tensor(self.queries)[:, None] - torch.arange(self.weights.shape[1])  # Q L
        seen = at >= 0
        total = self.weights.new_zeros(self.weights.shape[1]).index_add_(0, at[seen], self.weights[seen])
        count = torch.zeros_like(total).index_add_(0, at[seen], torch.ones_like(self.weights[seen]))
        return total / torch.where(count > 0, count, torch.nan)

    def table(self, query: int = -1) -> "pd.DataFrame":
        """A row a source token of one query (an index into ``queries``), the largest weight first."""
        import pandas as pd

        i = position_index(len(self.queries), query, "query")
        stop = self.queries[i] + 1
        frame = pd.DataFrame({"position": range(self.start, self.start + stop), "token": self.labels[:stop]})
        frame["weight"] = self.weights[i, :stop].tolist()
        order = self.weights[i, :stop].abs().argsort(descending=True, stable=True).tolist()
        return frame.loc[order].reset_index(drop=True)

    def figure(self) -> "go.Figure":
        """The map, query down and source across; of some queries only, a row each. Signed,
        in logarithmic colours, plotly."""
        from mambascope.analyses.plots import pair_map, token_map

        how = "rolled-up shares" if self.method == "shares" else f"gradients through held gates, {self.rule} rule"
        title = f"flow from embeddings to the last residual stream: {how}"
        look: dict[str, Any] = {"log": True, "signed": True, "start": self.start}
        if self.queries == tuple(range(len(self.labels))):
            return pair_map(self.weights, self.labels, title, "share", **look)
        rows = [f"{self.start + t}" for t in self.queries]
        return token_map(self.weights, self.labels, title, "share", rows=rows, **look).update_yaxes(title="query")


@torch.no_grad()
def token_flow(
    model: "HookedMamba",
    source: Source,
    *,
    method: Method = "shares",
    queries: Sequence[int] | None = None,
    rule: Rule = "frozen",
    biases: Biases = "rest",
) -> Flow:
    """How much of each query's last residual stream came from each token's embedding (the module's algorithms).

    ``queries``: positions, all by default. ``rule``: the gate's, for gradients; shares always hold the gate.
    ``biases``: listed in the rest, or given to the positions where they act.

    Raises
    ------
    InputError: an unknown method, rule or place for biases, "half" with shares, queries outside the text or none, a
        layer without a scan, NaN, a map that does not fit.
    CacheError: a hook edited something that the equations do not account for (named).
    """
    if method not in _METHODS:
        raise InputError(f"method {method!r} is unknown{nearest(str(method), _METHODS)}; known: {', '.join(_METHODS)}")
    if biases not in _BIASES:
        raise InputError(f"biases={biases!r} is unknown{nearest(str(biases), _BIASES)}; known: {', '.join(_BIASES)}")
    check_rule(rule)
    if method == "shares" and rule != "frozen":
        raise InputError(f"rolled-up shares hold the gate; rule={rule!r} needs method='gradients'")
    reading = read(model, source)
    every_layer(model)
    length = reading.length
    asked = range(length) if queries is None else queries
    at = tuple(position_index(length, t, "query") for t in asked)
    if not at:
        raise InputError("the list of queries is empty; leave queries out to take all")
    _check_size(reading, len(at), method)
    unedited_stream(reading, max(at) + 1)
    absorb = biases == "tokens"
    found = _rolled(reading, at, absorb) if method == "shares" else _pulled(reading, at, rule, absorb)
    weights, rest = (v.cpu() for v in found)
    return Flow(method, rule, biases, at, weights, rest, reading.labels, reading.start)


def _check_size(reading: Reading, queries: int, method: Method) -> None:
    rows = reading.length if method == "shares" else queries
    need = 8 * rows * reading.length * (4 if method == "shares" else 2)
    way_out = "take a shorter text" if method == "shares" else "ask for fewer queries"
    what = f"the flow of {rows:,} x {reading.length:,} tokens"
    require_bytes(need, reading.model.device, what, way_out, InputError)


# ---- rolled-up shares


def _rolled(reading: Reading, at: tuple[int, ...], absorb: bool) -> tuple[Tensor, Tensor]:
    first = reading.value("resid_pre", 0)
    flow = torch.eye(reading.length, dtype=torch.float64, device=first.device)
    rest = flow.new_zeros(reading.length)
    for i in range(reading.n_layers):
        share, own = block_shares(frozen_block(reading, i), reading.value("resid_post", i), absorb)
        flow, rest = share @ flow, own + share @ rest
    return flow[list(at)], rest[list(at)]


def block_shares(
    block: FrozenBlock, after: Float[Tensor, "L M"], absorb: bool
) -> tuple[Float[Tensor, "L L"], Float[Tensor, " L"]]:
    """Step 2 for one block: P and the rest, float64."""
    length = block.x.shape[0]
    after = after.to(block.r)
    along = after / after.double().pow(2).sum(-1, keepdim=True).clamp_min(1e-300).to(after)  # L M
    read_out = (along @ block.W_out) * block.gate  # L D: what y + D u is worth to each query
    share = torch.diag((block.r.double() * along.double()).sum(-1))
    others = block.u.clone()  # what no token wrote into u
    for back, wrote in _writes(block, absorb):
        others -= wrote
        share[:, : length - back] += _signed_map(block, wrote, read_out)[:, back:]
        skip = (read_out * block.D * wrote).double().sum(-1)  # L
        share.diagonal(-back).add_(skip[back:])
    inputs = (others[None], block.delta[None], block.A, block.B[None], block.C[None])
    y = ops.selective_scan(*inputs, h0=block.h0[None]).y[0]
    rest = ((y + block.D * others) * read_out).double().sum(-1)
    last = along.double() @ block.b_out.double()
    return (share + torch.diag(last), rest) if absorb else (share, rest + last)


def _writes(block: FrozenBlock, absorb: bool) -> Iterator[tuple[int, Tensor]]:
    """What the token ``back`` steps earlier puts into each step's u, ``L D``; with ``absorb`` also what biases put
    there, as of the step's own token."""
    length, width = block.x.shape
    taps = block.taps.shape[1]
    x = block.x if absorb else block.x - block.b_in[:width]
    for back in range(min(taps, length)):
        wrote = torch.zeros_like(x)
        wrote[back:] = block.factor[back:] * block.taps[:, taps - 1 - back] * x[: length - back]
        yield back, wrote + block.factor * block.b_conv if absorb and back == 0 else wrote


def _signed_map(block: FrozenBlock, wrote: Tensor, read_out: Tensor) -> Tensor:
    """Σ_d read_out[t, d] alpha[t, s, d] wrote[s, d], ``L L`` float64."""
    mean = ops.kernel_map(
        block.delta[None], block.A, block.B[None], block.C[None],
        reduce="signed", gain=wrote[None], read=read_out[None],
    )[0]  # fmt: skip
    return mean.double() * wrote.shape[1]


# ---- gradients through held gates


def _pulled(reading: Reading, at: tuple[int, ...], rule: Rule, absorb: bool) -> tuple[Tensor, Tensor]:
    last = final_stream(reading)  # L M
    width = max(reading.model.cfg.d_inner, last.shape[1])
    size = max(1, _HELD // (reading.length * width))
    weights, rests = [], []
    for begin in range(0, len(at), size):
        some = torch.tensor(at[begin : begin + size], device=last.device)
        stop = int(some.max()) + 1
        here = last[some]
        g = last.new_zeros(len(some), stop, last.shape[1])  # Q L M
        g[torch.arange(len(some), device=last.device), some] = here / here.pow(2).sum(-1, keepdim=True)
        rest = torch.zeros(len(some), dtype=torch.float64, device=last.device)
        row = torch.zeros(len(some), reading.length, dtype=torch.float64, device=last.device)
        r = last[:stop]
        for i in reversed(range(reading.n_layers)):
            block = frozen_block(reading, i).upto(stop)
            g, bias, carry = block.pull(g.to(block.r), rule)
            rest = rest + carry.double() + (0 if absorb else bias.double().sum(-1))
            if absorb:
                row[:, :stop] += bias
            r = block.r
        row[:, :stop] += torch.einsum("qlm,lm->ql", g, r)
        weights.append(row)
        rests.append(rest)
    return torch.cat(weights), torch.cat(rests)

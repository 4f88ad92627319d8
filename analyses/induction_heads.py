"""Where an induction layer looks, measured: the offset between what a query reads and the earlier occurrence.

    python -m mambascope.analyses.induction_heads

For a model of the induction heads task (2312.00752: a special token at p, its target at p + 1, the special token again
at the end, the query):

1. Draw rows of the task and take the query's row of each layer's hidden attention, reduced over channels.
2. Divide it by its sum: the share of its reading that the query spends on each token.
3. Average the share at p + offset over rows. The control is the same with p exchanged between rows.

Through ``"scan"`` a source is what the state was given at that step; the convolution had mixed K tokens into that, so
the token itself lies up to K - 1 steps earlier. ``"conv"`` asks for the tokens of x instead. Text models are asked with
passages that are repeated (:func:`mambascope.analyses.induction.passage_score`).
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.tasks.induction import InductionHeads
from mambascope.brief import Brief
from mambascope.errors import InputError
from mambascope.hooks.effective_path import Through
from mambascope.ops.maps import Reduction

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["PASSAGES", "InductionPair", "induction_pair"]

PASSAGES = (
    "The old lighthouse keeper walked down to the harbour every morning, carrying a lantern, two letters and a wooden "
    "box that nobody had ever opened.",
    "In the spring of that year the committee bought a printing press from a merchant, and three engravers were hired "
    "to teach the apprentices.",
    "When the river froze, the children of the village skated as far as the mill, where the miller's wife sold them "
    "hot milk and small cakes.",
    "The first map of the island was drawn by a surgeon, who had been left there with a broken leg, a telescope and a "
    "very patient dog.",
)
"""Short passages for text models; what they say does not matter, only that no model has learnt them by heart."""


@dataclass(frozen=True, repr=False)
class InductionPair(Brief):
    """``share`` and ``control`` ``layers offsets``: how much of its reading the query spends on p + offset."""

    offsets: tuple[int, ...]
    share: Float[Tensor, "layers offsets"]
    control: Float[Tensor, "layers offsets"]
    rows: int
    length: int
    reduce: Reduction
    through: Through

    @property
    def excess(self) -> Float[Tensor, "layers offsets"]:
        """share - control."""
        return self.share - self.control

    def best(self) -> tuple[int, int, float]:
        """Layer, offset and share of the largest excess."""
        layer, at = divmod(int(self.excess.argmax()), len(self.offsets))
        return layer, self.offsets[at], float(self.share[layer, at])

    def table(self) -> "pd.DataFrame":
        """A row an offset, a column a layer: the share; the control beside it."""
        import pandas as pd

        frame = pd.DataFrame({"offset": self.offsets})
        for i in range(self.share.shape[0]):
            frame[f"layer {i}"] = self.share[i].tolist()
            frame[f"control {i}"] = self.control[i].tolist()
        return frame

    def figure(self) -> "go.Figure":
        """The excess by offset, a line a layer, plotly."""
        from mambascope.analyses.plots import profiles

        title = f"where the query looks, through the {self.through}: source p + offset, control subtracted"
        return profiles(self.excess, self.offsets, title, "offset (0: the special token, 1: its target)", "share")


@torch.no_grad()
def induction_pair(
    model: "HookedMamba",
    *,
    rows: int = 16,
    length: int = 128,
    seed: int = 0,
    reduce: Reduction = "mean_abs",
    through: Through = "scan",
    window: int = 6,
) -> InductionPair:
    """Shares at the offsets -window … window of the induction heads task with the model's own vocabulary.

    Cost: one forward pass and one row a layer. Raises InputError for fewer than two rows or a length under 3.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 2:
        raise InputError(f"rows must be an integer ≥ 2 (the control exchanges rows), got {rows!r}")
    task = InductionHeads(model.cfg.d_vocab)
    tokens = task.sample(seed, rows, length).tokens.to(model.device)
    p = (tokens == model.cfg.d_vocab - 1).int().argmax(1)  # rows
    _, cache = model.run_with_cache(tokens, return_type=None)
    offsets = torch.arange(-window, window + 1, device=tokens.device)
    share, control = [], []
    for layer in range(model.cfg.n_layers):
        weights = cache.hidden_attention(layer, reduce, through=through, rows=slice(-1, None))[:, 0].abs()  # rows L
        weights = weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        share.append(_mean_at(weights, p[:, None] + offsets))
        control.append(_mean_at(weights, p.roll(1)[:, None] + offsets))
    names = tuple(offsets.tolist())
    return InductionPair(names, torch.stack(share), torch.stack(control), rows, length, reduce, through)


def _mean_at(weights: Tensor, places: Tensor) -> Tensor:
    """The mean over rows at each offset; places outside the text, and the query itself, are left out."""
    inside = (places >= 0) & (places < weights.shape[1] - 1)
    value = weights.gather(1, places.clamp(0, weights.shape[1] - 1)) * inside
    return value.sum(0) / inside.sum(0).clamp_min(1)


def main() -> int:
    """Measure both embedded models and print what came out."""
    import mambascope
    from mambascope.analyses.induction import passage_score

    model = mambascope.load("induction-2l", device="cpu")
    for through in ("scan", "conv"):
        found = induction_pair(model, through=through)
        layer, offset, share = found.best()
        print(f"induction-2l, through the {through}: layer {layer} reads p + {offset}, share {share:.3f}")
        print(found.table().round(3).to_string(index=False))
    text = mambascope.load("lm-mini", device="cpu")
    for through in ("scan", "conv"):
        score = passage_score(text, PASSAGES, through=through)
        print(f"\nlm-mini, {len(PASSAGES)} passages of {score.n} tokens repeated, through the {through}:")
        print(f"loss {score.first_loss:.3f} nats a token in the first copy, {score.second_loss:.3f} in the second")
        print(score.table().round(4).to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())

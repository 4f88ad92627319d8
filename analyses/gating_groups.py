"""What delta does at which token: the gate by token, by position, and by word class, against chance.

1. Of a layer take the mean over channels of log delta, one number a token; log, because delta spans decades.
2. Group the tokens: by their text, by their place in the text (octaves of the position), by word class (a coarse,
   rule-made class: function word, name, number, punctuation, …), or by labels of your own.
3. How much the grouping explains: eta² = variance between groups / total variance, in 0…1.
4. Chance: eta² grows with the number of groups even for labels without meaning. The same with shuffled labels, many
   times, gives the level that chance reaches, and p = the share of shuffles that reach eta².

What is shuffled matters. A class that is a function of the token is dealt anew over the *distinct tokens*, so that
two copies of a token stay together: that delta depends on the token at all does not pass for a meaning of classes.
Texts and positions are dealt anew over the positions.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mambascope.analyses.source import Source, finite, read, scan_layers
from mambascope.brief import Brief
from mambascope.errors import InputError, nearest

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["GatingGroups", "gates_by", "word_class"]

Grouping = Literal["token", "position", "class"]
_GROUPINGS = ("token", "position", "class")
_SHOWN = 40

_WORDS = (
    "a an the this that these those and or but nor so yet if because as while although though than of in on at by for "
    "with from to into onto over under about after before between through during without within against upon i you he "
    "she it we they me him her us them my your his its our their mine yours who whom whose which what is am are was "
    "were be been being have has had having do does did will would shall should can could may might must not no there "
    "when where how why all any each some such only own same too very"
)
_FUNCTION_WORDS = frozenset(_WORDS.split())


def word_class(text: str) -> str:
    """A token's class by its text alone: special, blank, line break, number, punctuation, function word, name
    (capitalised), word, or piece (of a word that began before it)."""
    bare = text.strip()
    if re.fullmatch(r"<\|.*\|>|\[\d+\]", bare):
        return "special"
    if not bare:
        return "line break" if "\n" in text else "blank"
    if not any(c.isalnum() for c in bare):
        return "punctuation"
    if any(c.isdigit() for c in bare):
        return "number"
    if bare.lower() in _FUNCTION_WORDS and (text != bare or len(bare) > 1):
        return "function word"
    if bare[0].isupper():
        return "name"
    return "word" if text[:1].isspace() else "piece"


def _octave(position: int) -> str:
    """The position's octave, as a range: 0, 1, 2–3, 4–7, …"""
    if position < 2:
        return str(position)
    low = 2 ** int(math.log2(position))
    return f"{low}–{2 * low - 1}"


@dataclass(frozen=True, repr=False)
class GatingGroups(Brief):
    """log delta by group.

    ``groups`` G names and ``count`` ``G`` tokens in each; ``mean`` ``layers G``: mean of log delta (natural
    logarithm) less the layer's mean over the text; ``explained`` ``layers``: eta²; ``chance`` ``layers``: its mean
    over ``shuffles`` shuffles of the labels; ``p`` ``layers``: share of shuffles (and the real one) that reach it.
    """

    by: str
    layers: tuple[int, ...]
    groups: tuple[str, ...]
    count: Int[Tensor, " G"]
    mean: Float[Tensor, "n G"]
    explained: Float[Tensor, " n"]
    chance: Float[Tensor, " n"]
    p: Float[Tensor, " n"]
    shuffles: int

    def table(self) -> "pd.DataFrame":
        """A row a group, the widest open first: tokens in it, mean log delta by layer."""
        import pandas as pd

        frame = pd.DataFrame({self.by: self.groups, "tokens": self.count.tolist(), "mean": self.mean.mean(0).tolist()})
        frame = frame.assign(**{f"layer {i}": self.mean[j].tolist() for j, i in enumerate(self.layers)})
        return frame.sort_values("mean", ascending=False, kind="stable").reset_index(drop=True)

    def by_layer(self) -> "pd.DataFrame":
        """A row a layer: share of variance explained, what shuffled labels explain, and p."""
        import pandas as pd

        columns = {"explained": self.explained, "chance": self.chance, "p": self.p}
        return pd.DataFrame({"layer": self.layers, **{name: value.tolist() for name, value in columns.items()}})

    def figure(self) -> "go.Figure":
        """Layer × group map of log delta around the layer's mean, the most frequent groups, plotly."""
        from mambascope.analyses.plots import token_map

        most = self.count.argsort(descending=True, stable=True)[:_SHOWN]
        order = most[self.mean[:, most].mean(0).argsort(descending=True)]
        names = [f"{self.groups[i]} ({int(self.count[i])})" for i in order.tolist()]
        more = f", the {_SHOWN} most frequent of {len(self.groups)}" if len(self.groups) > _SHOWN else ""
        title = f"log delta by {self.by}, around each layer's mean{more}"
        rows = [str(i) for i in self.layers]
        return token_map(self.mean[:, order], names, title, "log delta", rows=rows, signed=True)


@torch.no_grad()
def gates_by(
    model: "HookedMamba",
    source: Source,
    by: Grouping | Sequence[str] = "class",
    *,
    layers: Iterable[int] | None = None,
    shuffles: int = 200,
    seed: int = 0,
) -> GatingGroups:
    """delta by token, position, word class, or labels of your own (one a token), and how much they explain.

    Labels of your own are dealt anew over positions. Time: one layer's activations after another, and
    O(shuffles · layers · L). See the module's algorithm; classes need a tokenizer to mean anything.

    Raises InputError for an unknown grouping, labels of another length than the text, fewer than one shuffle, NaN.
    """
    if isinstance(shuffles, bool) or not isinstance(shuffles, int) or shuffles < 1:
        raise InputError(f"shuffles must be a positive integer, got {shuffles!r}")
    reading = read(model, source)
    chosen = scan_layers(model, layers)
    name, labels, over_types = _labels(by, reading.labels, reading.start)
    groups = tuple(dict.fromkeys(labels))
    number = {g: i for i, g in enumerate(groups)}
    index = torch.tensor([number[x] for x in labels])
    logs = []
    for i in chosen:
        delta = finite(reading.value("delta", i), f"delta of layer {i}")
        logs.append(delta.double().clamp_min(torch.finfo(delta.dtype).tiny).log().mean(1).cpu())
    value = torch.stack(logs)  # n L
    value = value - value.mean(1, keepdim=True)
    count = torch.bincount(index, minlength=len(groups))
    mean = torch.zeros(len(chosen), len(groups), dtype=torch.float64).index_add_(1, index, value) / count
    generator = torch.Generator().manual_seed(seed)
    deal = _dealer(index, reading.tokens.cpu() if over_types else torch.arange(len(index)), generator)
    explained = _explained(value, index, len(groups))
    dealt = torch.stack([_explained(value, deal(), len(groups)) for _ in range(shuffles)])  # shuffles n
    p = (1 + (dealt >= explained - 1e-12).sum(0)) / (1 + shuffles)
    return GatingGroups(name, chosen, groups, count, mean, explained, dealt.mean(0), p, shuffles)


def _labels(by: Grouping | Sequence[str], tokens: tuple[str, ...], start: int) -> tuple[str, list[str], bool]:
    """The grouping's name, a label a token, and whether labels are functions of the token."""
    if not isinstance(by, str):
        labels = [str(x) for x in by]
        if len(labels) != len(tokens):
            raise InputError(f"there are {len(labels)} labels for a text of {len(tokens)} tokens")
        return "label", labels, False
    if by not in _GROUPINGS:
        raise InputError(f"grouping {by!r} is unknown{nearest(by, _GROUPINGS)}; known: {', '.join(_GROUPINGS)}")
    if by == "class":
        return by, [word_class(t) for t in tokens], True
    return by, list(tokens) if by == "token" else [_octave(start + i) for i in range(len(tokens))], False


def _dealer(index: Tensor, units: Tensor, generator: torch.Generator) -> Callable[[], Tensor]:
    """A function that deals the labels anew over units (positions or distinct tokens), each time otherwise."""
    _, unit = units.unique(return_inverse=True)
    of_unit = torch.zeros(int(unit.max()) + 1, dtype=torch.long).index_copy_(0, unit, index)
    return lambda: of_unit[torch.randperm(len(of_unit), generator=generator)][unit]


def _explained(value: Float[Tensor, "n L"], index: Int[Tensor, " L"], groups: int) -> Float[Tensor, " n"]:
    """eta² of centred values, ``n``; 0 where there is no variance."""
    count = torch.bincount(index, minlength=groups).clamp_min(1)
    sums = torch.zeros(value.shape[0], groups, dtype=value.dtype).index_add_(1, index, value)
    total = value.pow(2).sum(1)
    between = (sums.pow(2) / count).sum(1)
    rounding = value.shape[1] * 1e-20
    return torch.where(total > rounding, between / total.clamp_min(rounding), torch.zeros_like(total))

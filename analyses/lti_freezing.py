"""The cost of freezing selectivity: how much of this model is a plain convolution, in nats.

1. The loss of the model on a text or a sample of texts, token by token.
2. Hold delta, or B, or C, or all three of layer i at constant values (by default their mean over the same tokens):
   with all three the layer's scan is the convolution of :mod:`mambascope.analyses.lti`. Conv, skip and gate stay.
3. The rise in loss, in nats per token, and its standard error over tokens (taken as independent).
4. The yardstick: the same with the scan's output removed (y = 0). Where that costs something, 1 - frozen / removed is
   the share of the scan's worth that a plain convolution keeps: 1 all of it, 0 none.
5. The same with all chosen layers at once.

A rise within a few standard errors of 0 says nothing. In an untrained model all are.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.lti import Selection, is_text_sample, mean_selection, rows_of
from mambascope.analyses.source import Reading, Source, read, scan_layers
from mambascope.brief import Brief
from mambascope.errors import InputError
from mambascope.model.head import next_token_losses

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["PARTS", "FreezingCost", "freezing_cost"]

PARTS = ("delta", "B", "C", "all", "removed")
"""What is frozen: one of the three, all three, or (the yardstick) the scan's output removed."""

_SITES = {"delta": ("hook_delta",), "B": ("hook_B",), "C": ("hook_C",), "all": ("hook_delta", "hook_B", "hook_C")}


@dataclass(frozen=True, repr=False)
class FreezingCost(Brief):
    """Rises in loss, nats per token.

    ``loss``: of the model as it is, over ``tokens`` predicted tokens. ``rise`` and ``error`` (its standard error)
    ``layers parts``, with the parts of :data:`PARTS`; ``together``, ``together_error`` ``parts``: all layers at once.
    """

    layers: tuple[int, ...]
    loss: float
    tokens: int
    rise: Float[Tensor, "n P"]
    error: Float[Tensor, "n P"]
    together: Float[Tensor, " P"]
    together_error: Float[Tensor, " P"]

    @property
    def kept(self) -> Float[Tensor, " n"]:
        """Share of each scan's worth that a plain convolution keeps, 1 - all / removed; NaN where removing the scan
        costs less than four standard errors, so that there is nothing to keep."""
        return _kept(self.rise, self.error)

    @property
    def kept_together(self) -> float:
        """The same with all chosen layers at once."""
        return float(_kept(self.together[None], self.together_error[None]))

    def table(self) -> "pd.DataFrame":
        """A row a layer, and one for all at once: the rise for each part, and the share kept."""
        import pandas as pd

        rows = torch.cat([self.rise, self.together[None]])
        frame = pd.DataFrame({"layer": [*map(str, self.layers), "all at once"]})
        frame = frame.assign(**{part: rows[:, j].tolist() for j, part in enumerate(PARTS)})
        frame["error"] = torch.cat([self.error, self.together_error[None]])[:, PARTS.index("all")].tolist()
        return frame.assign(kept=[*self.kept.tolist(), self.kept_together])

    def figure(self) -> "go.Figure":
        """Rise in loss by layer, a group of bars for delta, B, C and all three, plotly."""
        from mambascope.analyses.effective_plots import layer_bars

        title = f"what freezing costs: rise over {self.loss:.3f} nats per token, one layer at a time"
        return layer_bars(self.rise[:, :4], self.layers, PARTS[:4], title, "nats per token", errors=self.error[:, :4])


def _kept(rise: Tensor, error: Tensor) -> Tensor:
    frozen, removed = rise[:, PARTS.index("all")], rise[:, PARTS.index("removed")]
    worth = removed > 4 * error[:, PARTS.index("removed")]
    return torch.where(worth, 1 - frozen / removed.clamp_min(1e-300), torch.full_like(removed, math.nan))


@torch.no_grad()
def freezing_cost(
    model: "HookedMamba",
    source: Source | Sequence[Source],
    *,
    selection: Selection | None = None,
    layers: Iterable[int] | None = None,
) -> FreezingCost:
    """The rise in loss when delta, B, C of one layer, or of all, are held constant (the module's algorithm).

    ``source``: a text, texts, or ids ``R L``. ``selection``: what to hold them at, by default the mean over these very
    tokens (pass one of other texts to keep the two apart). Time: for each layer five runs of the blocks from it on, and
    five of all, one text at a time; memory one text's cache.

    Raises InputError for caches (they cannot be run again), texts of fewer than two tokens, layers without a scan, a
    Selection that does not fit.
    """
    if not is_text_sample(source):
        raise InputError("freezing runs the model again: give texts or ids, not a cache or a Reading")
    chosen, rows = scan_layers(model, layers), rows_of(source)
    if selection is None:
        selection = mean_selection(model, source, layers=chosen)
    selection.check(model)
    hooks = {i: {part: _hooks(i, part, selection) for part in PARTS} for i in chosen}
    every = {part: [h for i in chosen for h in hooks[i][part]] for part in PARTS}
    clean: list[Tensor] = []
    grid: list[list[list[Tensor]]] = [[[] for _ in PARTS] for _ in range(len(chosen) + 1)]
    for row in rows:
        reading = read(model, row)
        clean.append(_losses(reading, [], model.cfg.n_layers - 1))
        for j, part in enumerate(PARTS):
            for k, i in enumerate(chosen):
                grid[k][j].append(_losses(reading, hooks[i][part], i))
            grid[-1][j].append(_losses(reading, every[part], min(chosen)))
    loss = torch.cat(clean)
    pairs = torch.tensor([[_rise(loss, torch.cat(losses)) for losses in line] for line in grid], dtype=torch.float64)
    rise, error = pairs[..., 0], pairs[..., 1]
    return FreezingCost(chosen, float(loss.mean()), loss.numel(), rise[:-1], error[:-1], rise[-1], error[-1])


def _hooks(layer: int, part: str, selection: Selection) -> list[tuple[str, Callable[..., Tensor]]]:
    values = dict(zip(("hook_delta", "hook_B", "hook_C"), selection.of(layer), strict=True))
    if part == "removed":
        return [(f"blocks.{layer}.mixer.hook_y", lambda y, hook: torch.zeros_like(y))]

    def held(value: Tensor) -> Callable[..., Tensor]:
        return lambda now, hook: torch.empty_like(now).copy_(value)

    return [(f"blocks.{layer}.mixer.{site}", held(values[site])) for site in _SITES[part]]


def _losses(reading: Reading, hooks: list[Any], first: int) -> Float[Tensor, " T"]:
    """The loss of every predicted token, with hooks in blocks from ``first`` on: only those are run again."""
    model, tokens = reading.model, reading.tokens[None]
    if tokens.shape[1] < 2:
        raise InputError("the loss needs at least two tokens: one to predict from, one to predict")
    stream = reading.value("resid_pre", first)[None]
    with model.hooks(fwd_hooks=hooks):
        last = model(stream, start_at_layer=first, stop_at_layer=model.cfg.n_layers)
    return next_token_losses(model, model.ln_final(last[:, :-1]), tokens[:, 1:]).double().flatten().cpu()


def _rise(clean: Tensor, frozen: Tensor) -> tuple[float, float]:
    difference = frozen - clean
    error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else math.nan
    return float(difference.mean()), error

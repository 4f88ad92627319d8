"""What is watched inside a model while it trains, so that a sudden drop can be seen and dated.

- ``induction_first``, ``induction_second``: nats a token on the first and second copy of random tokens (Olsson et al.,
  2209.11895; :mod:`mambascope.analyses.repeats`), the second from its second token on; ``induction_gain``: their
  difference, 0 without recall.
- ``prefix_matching``: the largest excess, over layers and offsets -3 … 3, of the hidden attention on what followed the
  earlier occurrence (:mod:`mambascope.analyses.induction`), where every layer has hidden attention, or attention.
- ``in_context``: mean loss near token 500 less mean loss near token 50 (Olsson's in-context score, negative once
  context helps), on held-out text; of shorter windows at 90 % and 9 % of their length.
- ``state_norm_i``: root mean square of every element of layer i's states after a row; a growing state shows here. Of
  attention the keys and values.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from mambascope.analyses.induction import induction_score
from mambascope.analyses.repeats import repeated_tokens, scores
from mambascope.model import HookedMamba

__all__ = ["Fall", "inside_metrics", "largest_fall", "state_metrics"]

_N = 64
_ROWS = 8
_WINDOW = 512
_MAPPED = "mawf"  # letters of the layers that have a map from token to token


@dataclass(frozen=True)
class Fall:
    """The largest fall of a metric between two evaluations in a row."""

    key: str
    steps: tuple[int, int]
    values: tuple[float, float]
    share: float  # of the metric's range over training: near 1 where one interval holds all of the change

    def __str__(self) -> str:
        (a, b), (x, y) = self.steps, self.values
        where = f"between steps {a:,} and {b:,} ({self.share:.0%} of its range)"
        return f"largest fall of {self.key}: {x:.4f} to {y:.4f} {where}"


def largest_fall(evaluations: Sequence[dict[str, float]], key: str) -> Fall | None:
    """Where a metric fell most between two evaluations; None with fewer than two, or if it never fell."""
    points = [(int(row["step"]), row[key]) for row in evaluations if key in row]
    falls = [(a[1] - b[1], a, b) for a, b in itertools.pairwise(points)]
    if not falls or (best := max(falls))[0] <= 0:
        return None
    fall, (before, x), (after, y) = best
    values = [value for _, value in points]
    return Fall(key, (before, after), (x, y), fall / (max(values) - min(values)))


def inside_metrics(held: dict[str, np.ndarray]) -> Callable[[nn.Module], dict[str, float]]:
    """A function model -> the module's metrics, on the first windows of the held-out streams."""
    length = min([_WINDOW, *(len(ids) - 1 for ids in held.values())]) if held else 0
    rows = [
        ids[a : a + length + 1]
        for ids in held.values()
        for a in range(0, len(ids) - length, length)[: max(1, 32 // len(held))]
    ]
    windows = torch.from_numpy(np.stack(rows).astype(np.int64)) if rows and length >= 20 else None  # windows L+1

    def metrics(model: nn.Module) -> dict[str, float]:
        if not isinstance(model, HookedMamba):
            return {}
        with torch.autocast(model.device.type, enabled=False):  # small, and read from caches: in the weights' dtype
            values = induction_metrics(model)
            if windows is not None:
                values |= {"in_context": in_context_score(model, windows)} | state_metrics(model, windows[:8, :-1])
        return values

    return metrics


@torch.no_grad()
def induction_metrics(model: HookedMamba) -> dict[str, float]:
    """Recall of random tokens read twice, and where the layers look; the same rows every time."""
    n = min(_N, model.cfg.n_tokens - 4)
    if n < 2:
        return {}
    loss = scores(model, repeated_tokens(model, n, _ROWS)).loss.double()
    first, second = float(loss[:, :-n].mean()), float(loss[:, -n + 1 :].mean())
    found = {"induction_first": first, "induction_second": second, "induction_gain": first - second}
    if set(model.cfg.layers) <= set(_MAPPED):
        best = induction_score(model, min(n, 24), rows=2).best()
        found["prefix_matching"] = max(value for _, value in best)
    return found


@torch.no_grad()
def in_context_score(model: nn.Module, windows: Int64[Tensor, "rows L1"]) -> float:
    """Mean loss around the late position less that around the early one, over the windows' rows, in nats."""
    length = windows.shape[1] - 1
    late, early = (500, 50) if length >= 510 else (int(0.9 * length), int(0.09 * length))
    reach = max(1, length // 51)  # some positions either side, since one is noisy
    device = next(model.parameters()).device
    total = torch.zeros(length, dtype=torch.float64)
    for part in windows.split(8):
        part = part.to(device)
        logits = model(part[:, :-1].contiguous(), return_type="logits")
        total += F.cross_entropy(logits.float().mT, part[:, 1:], reduction="none").double().sum(0).cpu()
    loss = total / len(windows)

    def near(at: int) -> float:
        return float(loss[max(0, at - reach) : at + reach + 1].mean())

    return near(late) - near(early)


@torch.no_grad()
def state_metrics(model: nn.Module, tokens: Int64[Tensor, "B L"]) -> dict[str, float]:
    """Root mean square of each layer's states after these rows."""
    if not isinstance(model, HookedMamba):
        return {}
    _, state = model(tokens.to(model.device), return_type="logits", logits_to_keep=1, return_state=True)
    norms = {}
    for i, layer in enumerate(state.layers):
        values = [value.detach().float().flatten() for value in layer.tensors().values() if value.is_floating_point()]
        parts = torch.cat(values)
        if parts.numel():  # a feed-forward layer has none
            norms[f"state_norm_{i}"] = float(parts.square().mean().sqrt())
    return norms

"""How much a layer remembers: the norm of its state after every token, without ever holding all states.

1. Take h in windows of consecutive steps from the cache (recomputed from the nearest stored state, 2312.00752,
   equation 2a: h[t] = A_bar[t] h[t-1] + B_bar[t] u[t]).
2. Reduce each window over channels and state dimensions: ||h[t]|| = sqrt(sum_{d,n} h[t, d, n]²).
3. Keep the norms, drop the window.

A norm says how much is stored, not what: states late in a text are nearly parallel, so compare directions only
after centring.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.source import Reading, Source, read
from mambascope.brief import Brief
from mambascope.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["StateNorms", "layer_norms", "state_norms"]

_WINDOW = 1 << 22
"""Elements of h held at a time: 16 MB in float32."""


@dataclass(frozen=True, repr=False)
class StateNorms(Brief):
    """``norm`` ``layers L``: the Frobenius norm of each layer's state after each token."""

    norm: Float[Tensor, "n L"]
    labels: tuple[str, ...]
    start: int = 0

    def table(self) -> "pd.DataFrame":
        """A row a token: the norm in every layer, and their mean."""
        import pandas as pd

        frame = pd.DataFrame({"position": range(self.start, self.start + len(self.labels)), "token": self.labels})
        frame["mean"] = self.norm.mean(0).tolist()
        return frame.assign(**{f"layer {i}": self.norm[i].tolist() for i in range(self.norm.shape[0])})

    def figure(self) -> "go.Figure":
        """Layer × token map on a logarithmic colour scale, plotly."""
        from mambascope.analyses.plots import token_map

        return token_map(self.norm, self.labels, "state norm after each token", "‖h‖", log=True, start=self.start)


@torch.no_grad()
def state_norms(model: "HookedMamba", source: Source) -> StateNorms:
    """‖h[t]‖ of every layer and token.

    Time: one more forward pass; memory: a window of 16 MB. Raises InputError where a state is NaN or infinite.
    """
    reading = read(model, source)
    return StateNorms(
        torch.stack([layer_norms(reading, i) for i in range(reading.n_layers)]), reading.labels, reading.start
    )


def layer_norms(reading: Reading, layer: int, window: int = _WINDOW) -> Float[Tensor, " L"]:
    """‖h[t]‖ of one layer, window by window."""
    cfg = reading.model.cfg
    steps = max(1, window // (cfg.d_inner * cfg.d_state))
    steps = steps // 64 * 64 or steps  # windows that begin at a stored state cost no run-up
    parts = [
        torch.linalg.vector_norm(reading.window("h", layer, a, min(a + steps, reading.length)), dim=(1, 2))
        for a in range(0, reading.length, steps)
    ]
    norms = torch.cat(parts)
    bad = ~torch.isfinite(norms)
    if bool(bad.any()):
        raise InputError(f"the state of layer {layer} is NaN or infinite from position {int(bad.nonzero()[0])} on")
    return norms

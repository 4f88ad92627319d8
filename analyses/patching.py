"""Where does the answer live? Put the clean run's activation into the corrupted run, one place at a time.

Activation patching (causal tracing, Meng et al., 2202.05262; logit difference as in Wang et al., 2211.00593):

1. Run a clean and a corrupted text of the same length; the metric is logit[right] - logit[wrong] at the last token.
2. For every layer i and position t: run the corrupted text, with the activation at (i, t) replaced by the clean one.
3. Restoration = (metric - corrupted) / (clean - corrupted): 0 nothing came back, 1 all of it did.

The runs are :func:`mambascope.sweep`'s, which computes only what a place can change; it also takes several texts,
other metrics and sites side by side, and files. What is restored need not be *the* cause elsewhere: necessary is not
portable.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.labels import token_labels, visible
from mambascope.analyses.logits import final_normed
from mambascope.analyses.source import Reading, Source, read
from mambascope.brief import Brief
from mambascope.errors import CacheError, InputError
from mambascope.hooks.metrics import LogitDifference
from mambascope.hooks.sweeps import sweep

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["Patching", "patch"]


@dataclass(frozen=True, repr=False)
class Patching(Brief):
    """Restoration by layer and position.

    ``restored`` ``layers L``: 0 as corrupted, 1 as clean. ``clean`` and ``corrupted``: the metric of the two
    runs, in logits. ``labels``: the clean tokens; ``corrupted_labels``: the corrupted ones. ``site``: what was patched.
    """

    restored: Float[Tensor, "n L"]
    clean: float
    corrupted: float
    site: str
    labels: tuple[str, ...]
    corrupted_labels: tuple[str, ...]
    answers: tuple[str, str]

    @property
    def columns(self) -> list[str]:
        """A label a position, ``clean|corrupted`` where the texts differ."""
        pairs = zip(self.labels, self.corrupted_labels, strict=True)
        return [a if a == b else f"{a}|{b}" for a, b in pairs]

    def table(self) -> "pd.DataFrame":
        """A row a position: restoration from every layer."""
        import pandas as pd

        frame = pd.DataFrame({"position": range(len(self.labels)), "token": self.columns})
        return frame.assign(**{f"layer {i}": self.restored[i].tolist() for i in range(self.restored.shape[0])})

    def figure(self) -> "go.Figure":
        """Layer × position map, plotly."""
        from mambascope.analyses.plots import token_map

        right, wrong = (visible(a) for a in self.answers)
        title = f"restoring {self.site}: logit {right!r} − {wrong!r}, 0 corrupted, 1 clean"
        return token_map(self.restored, self.columns, title, "restored", signed=True)


@torch.no_grad()
def patch(
    model: "HookedMamba",
    clean: Source,
    corrupted: Source,
    answers: tuple[str | int, str | int],
    *,
    site: str = "resid_pre",
) -> Patching:
    """Restore the clean activation at each layer and position of the corrupted run (the module's algorithm).

    ``answers``: right and wrong next token (a text that is one token, or an id). ``site``: a hook point that every
    block has (``"resid_pre"``, ``"mixer_in"``, ``"delta"``, ``"u"``, ``"y"``, …) or ``"h"``, the state after a token.
    Time: O(layers² L² D N) in batches, a quarter of running everything.

    Warns where the two texts hardly differ in the metric, so that restoration is noise.

    Raises
    ------
    InputError: texts of different token counts (both named); the same metric on both; answers that are not one token.
    CacheError: a cache that the model as it is now does not reproduce.
    HookError, UnknownNameError: a site that no block has or that cannot be patched by position.
    """
    good, bad = read(model, clean), read(model, corrupted)
    if good.length != bad.length:
        raise InputError(
            f"the clean text has {good.length} tokens, the corrupted one {bad.length}; patching puts position t into "
            "position t, so change words for words of as many tokens"
        )
    if torch.equal(good.tokens, bad.tokens):
        raise InputError("both texts are the same, so there is nothing to restore; choose a corruption")
    found = sweep(model, good.tokens, bad.tokens, LogitDifference(*answers), site)
    right, wrong = (found.metric[which][0] for which in ("right", "wrong"))
    if found.clean == found.corrupted:
        raise InputError(
            f"both texts give a logit difference of {found.clean:.4g}, so there is nothing to restore; "
            "choose a corruption that changes the answer"
        )
    for name, reading, now in (("clean", good, found.clean), ("corrupted", bad, found.corrupted)):
        _check(model, name, reading, now, right, wrong)
    texts = token_labels(model, [right, wrong])
    restored = found.score[0, :, :, 0].float()
    return Patching(
        restored, found.clean, found.corrupted, found.sites[0], good.labels, bad.labels, (texts[0], texts[1])
    )


def _check(model: "HookedMamba", name: str, reading: Reading, now: float, right: int, wrong: int) -> None:
    """CacheError if a cache shows another answer than the model gives now."""
    logits = model.unembed(final_normed(reading)[-1])[: model.cfg.n_tokens].double()
    then, spread = float(logits[right] - logits[wrong]), float(logits.std())
    if not abs(now - then) < 1e-3 * max(spread, abs(then)) + 1e-6:
        raise CacheError(
            f"the {name} run gave a metric of {then:.4g}, the same tokens now give {now:.4g}: its cache was made "
            "with hooks, weights or a starting state that are not in force here; give the text instead"
        )

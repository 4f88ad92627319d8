"""Where does the answer live? Put the clean run's activation into the corrupted run, one place at a time.

Activation patching (causal tracing, Meng et al., 2202.05262; logit difference as in Wang et al., 2211.00593):

1. Run a clean and a corrupted text of the same length; the metric is logit[right] - logit[wrong] at the last token.
2. For every layer i and position t: run the corrupted text, with the activation at (i, t) replaced by the clean one.
3. Restoration = (metric - corrupted) / (clean - corrupted): 0 nothing came back, 1 all of it did.

A run of layer i starts from the corrupted residual stream entering block i, so earlier blocks are not run again, and
positions go in batches. What is restored need not be *the* cause elsewhere: necessary is not portable.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambascope.analyses.labels import token_labels, visible
from mambascope.analyses.logits import final_normed
from mambascope.analyses.source import Reading, Source, read
from mambascope.errors import CacheError, HookError, InputError
from mambascope.hooks.points import LAZY, resolve_name

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mambascope.model import HookedMamba

__all__ = ["Patching", "patch"]

_TOKENS = 1 << 13  # batch × length of one patched run
_STATES = 64  # clean states held at a time
_TINY = 0.1  # of the spread of the logits: below it the two texts hardly differ in the metric


@dataclass(frozen=True)
class Patching:
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
    Time: O(layers² L² D N) in batches (for ``"h"`` one run a place).

    Warns where the two texts hardly differ in the metric, so that restoration is noise.

    Raises
    ------
    InputError: texts of different token counts (both named); the same metric on both; answers that are not one token.
    CacheError: a corrupted cache that the model as it is now does not reproduce.
    HookError, UnknownNameError: a site that no block has or that cannot be patched by position.
    """
    good, bad = read(model, clean), read(model, corrupted)
    if good.length != bad.length:
        raise InputError(
            f"the clean text has {good.length} tokens, the corrupted one {bad.length}; patching puts position t into "
            "position t, so change words for words of as many tokens"
        )
    right, wrong = (_token(model, a) for a in answers)
    tail = _site(model, site)
    before, spread = _metric(model, good, right, wrong)
    after, _ = _metric(model, bad, right, wrong)
    scale = before - after
    if scale == 0:
        raise InputError(
            f"both texts give a logit difference of {before:.4g}, so there is nothing to restore; "
            "choose a corruption that changes the answer"
        )
    if abs(scale) < _TINY * spread:
        warnings.warn(
            f"clean and corrupted differ by {scale:.2g} logits, where logits spread by {spread:.2g}: "
            "restoration divides by this and is mostly noise",
            stacklevel=3,  # past no_grad's wrapper
        )
    again = float(_run(model, bad.value("resid_pre", 0)[None], 0, [], right, wrong))
    if not abs(again - after) < 1e-3 * max(spread, abs(after)) + 1e-6:
        raise CacheError(
            f"the corrupted run gave a metric of {after:.4g}, the same tokens now give {again:.4g}: its cache was made "
            "with hooks, weights or a starting state that are not in force here; give the text instead"
        )
    rows = []
    for i in range(model.cfg.n_layers):
        run = _patched_states if tail == "mixer.hook_h" else _patched
        rows.append((run(model, good, bad, i, tail, right, wrong) - after) / scale)
    texts = token_labels(model, [right, wrong])
    name = tail.removeprefix("mixer.").removeprefix("hook_")
    return Patching(torch.stack(rows), before, after, name, good.labels, bad.labels, (texts[0], texts[1]))


def _token(model: "HookedMamba", answer: str | int) -> int:
    if isinstance(answer, str):
        return model.to_single_token(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < model.cfg.n_tokens:
        raise InputError(f"answer {answer!r} is neither a text nor an id of the vocabulary of {model.cfg.n_tokens}")
    return answer


def _site(model: "HookedMamba", site: str) -> str:
    """The hook point's name within a block."""
    tail = resolve_name(f"blocks.0.hook_{site.removeprefix('hook_')}", list(model.hook_dict)).split(".", 2)[2]
    if tail in LAZY and tail != "mixer.hook_h":
        raise HookError(
            f"{tail} has no single value a position to put in; patch 'delta', 'B', 'u_write' or 'h' instead"
        )
    return tail


def _difference(logits: Tensor, right: int, wrong: int) -> Tensor:
    return (logits[..., right] - logits[..., wrong]).to(torch.promote_types(logits.dtype, torch.float32))


def _metric(model: "HookedMamba", reading: Reading, right: int, wrong: int) -> tuple[float, float]:
    """The logit difference at the last token, and the spread of the logits there."""
    logits = model.unembed(final_normed(reading)[-1])[: model.cfg.n_tokens]
    return float(_difference(logits, right, wrong)), float(logits.float().std())


def _patched(
    model: "HookedMamba", good: Reading, bad: Reading, layer: int, tail: str, right: int, wrong: int
) -> Tensor:
    """The metric with position t of one layer restored, for every t: ``L``."""
    name = f"blocks.{layer}.{tail}"
    resid, new = bad.value("resid_pre", layer).to(model.device), good.value(name).to(model.device)  # L M, L …
    out = []
    for places in torch.arange(bad.length, device=resid.device).split(max(1, _TOKENS // bad.length)):

        def put(value: Tensor, hook: Any, places: Tensor = places) -> Tensor:
            value = value.clone()
            value[torch.arange(len(places), device=value.device), places] = new[places].to(value.dtype)
            return value

        batch = resid.expand(len(places), -1, -1)
        out.append(_run(model, batch, layer, [(name, put)], right, wrong))
    return torch.cat(out)


def _patched_states(
    model: "HookedMamba", good: Reading, bad: Reading, layer: int, tail: str, right: int, wrong: int
) -> Tensor:
    """As :func:`_patched`, for the state after each token: an edit of the recurrence, one run each."""
    resid = bad.value("resid_pre", layer)[None]
    out = []
    states = good.window("h", layer, 0, 0)
    for t in range(bad.length):
        if t % _STATES == 0:
            states = good.window("h", layer, t, min(t + _STATES, bad.length))  # W D N
        h = states[t % _STATES][None]  # 1 D N
        hooks = [(f"blocks.{layer}.{tail}[{t}]", lambda value, hook, h=h: h.to(value))]
        out.append(_run(model, resid, layer, hooks, right, wrong))
    return torch.cat(out)


def _run(
    model: "HookedMamba", resid: Tensor, layer: int, hooks: list[tuple[str, Callable[..., Any]]], right: int, wrong: int
) -> Tensor:
    logits = model.run_with_hooks(resid, start_at_layer=layer, logits_to_keep=1, fwd_hooks=hooks)
    return _difference(logits[:, -1], right, wrong)

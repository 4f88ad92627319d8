"""Random tokens repeated twice (Olsson et al., 2209.11895, section "prefix matching"), and how a model does on them.

A row is [BOS] x_1 … x_N x_1 … x_N with x drawn from the ordinary tokens: without replacement where there are N of
them (then what followed x_i is determined), else with. The first copy can only be guessed; the second can be
recalled from its second token on. The best loss there is 0 nats; without memory it is that of the first copy.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mambascope.brief import Brief
from mambascope.errors import InputError

if TYPE_CHECKING:
    from mambascope.model import HookedMamba

__all__ = ["Scores", "ordinary_tokens", "repeated_tokens", "scores"]


def ordinary_tokens(model: "HookedMamba") -> Int[Tensor, " P"]:
    """Every id of the vocabulary but BOS and EOS."""
    ids = torch.arange(model.cfg.n_tokens)
    special = {model.cfg.bos_token_id, model.cfg.eos_token_id} - {None}
    return ids[~torch.isin(ids, torch.tensor(sorted(x for x in special if x is not None), dtype=torch.long))]


def repeated_tokens(
    model: "HookedMamba",
    n: int,
    rows: int,
    *,
    seed: int = 0,
    pool: Int[Tensor, " P"] | None = None,
    repeat: bool = True,
) -> Int[Tensor, "R L"]:
    """``rows`` rows of ``n`` random tokens twice over, ``L = 2n`` (one more where the model was trained with BOS).

    ``pool`` are the ids to draw from (default: all ordinary ones). ``repeat=False`` draws the second half afresh:
    the control. The first halves of both are the same for the same seed.

    Raises InputError for n < 2 (nothing to recall), rows < 1, or a pool of fewer than two tokens of the vocabulary.
    """
    for name, value, least in (("n", n, 2), ("rows", rows, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be an integer ≥ {least}, got {value!r}")
    pool = ordinary_tokens(model) if pool is None else torch.as_tensor(pool)
    if pool.ndim != 1 or len(pool) < 2 or int(pool.min()) < 0 or int(pool.max()) >= model.cfg.n_tokens:
        raise InputError(
            f"the pool must hold at least two ids of the vocabulary of {model.cfg.n_tokens}, got {len(pool)} ids"
        )
    generator = torch.Generator().manual_seed(seed)
    first = _draw(pool, n, rows, generator)
    second = first if repeat else _draw(pool, n, rows, generator)
    parts = [first, second]
    if model.cfg.prepend_bos and model.cfg.bos_token_id is not None:
        parts.insert(0, torch.full((rows, 1), model.cfg.bos_token_id))
    return torch.cat(parts, 1)


def _draw(pool: Tensor, n: int, rows: int, generator: torch.Generator) -> Tensor:
    if n <= len(pool):
        return torch.stack([pool[torch.randperm(len(pool), generator=generator)[:n]] for _ in range(rows)])
    return pool[torch.randint(len(pool), (rows, n), generator=generator)]


@dataclass(frozen=True, repr=False)
class Scores(Brief):
    """Every predicted token, ``R L-1``: its loss in nats, and whether the model's best guess was right."""

    loss: Float[Tensor, "R L1"]
    correct: Bool[Tensor, "R L1"]


@torch.no_grad()
def scores(model: "HookedMamba", tokens: Int[Tensor, "R L"], *, tokens_at_once: int = 1 << 14) -> Scores:
    """Next-token loss and correctness of many rows, a few rows at a time; never holds length × vocabulary."""
    from mambascope.analyses.logits import read_out

    rows = max(1, tokens_at_once // tokens.shape[1])
    losses, correct = [], []
    for part in tokens.split(rows):
        part = part.to(model.device)
        _, cache = model.run_with_cache(part, return_type=None, names_filter="ln_final.hook_normalized")
        normed = cache["ln_final.hook_normalized"][:, :-1] * model.ln_final.weight  # R L-1 M
        found = read_out(model, normed.reshape(-1, normed.shape[-1]), part[:, 1:].reshape(-1), 1)
        losses.append(-found.logp.view(part.shape[0], -1))
        correct.append((found.top[:, 0] == part[:, 1:].reshape(-1)).view(part.shape[0], -1))
    return Scores(torch.cat(losses), torch.cat(correct))

"""What an edit puts where: into a stream, or as a hook with a different position in every row."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.positions import at
from mambascope.hooks.sweeps.over import STATE, Edit, Grid
from mambascope.hooks.sweeps.starts import Ready

__all__ = ["Patches"]


class Patches:
    """The clean values of edits, those channels of them that each edit replaces."""

    def __init__(self, model: Runnable, grid: Grid) -> None:
        self._masks = {site: grid.masks(site, model) for site in grid.sites}

    def whole(self, site: str) -> bool:
        """Whether edits of a site replace all channels."""
        return self._masks[site] is None

    def masked(self, site: str, edits: Sequence[Edit], ready: Ready, new: Tensor, old: Tensor) -> Tensor:
        """``new`` in each edit's channels, ``old`` in the others; ``E B …`` both."""
        masks = self._masks[site]
        if masks is None:
            return new
        mine = masks[ready.indices([e.group for e in edits])][:, None]  # E 1 width
        return torch.where(mine[..., None] if site == STATE else mine, new, old)

    def streams(self, stream: Tensor, edits: Sequence[Edit], ready: Ready) -> Tensor:
        """Copies of the stream ``B L M``, each from its edit's start on and with its value in it, as tokens ``T M``.

        An edit's are those of its pairs, one after the other.
        """
        length = stream.shape[1]
        starts = tuple(ready.start(e.position) for e in edits)
        columns = tuple(ready.column(e.position) for e in edits)
        tokens = ready.indices.made(("tokens", starts), lambda: _tokens(starts, ready.pairs, length))
        rows = stream.flatten(0, 1)[tokens]  # T M
        for site, some in by_site(edits):
            mine = [edits[i] for i in some]
            value = ready.values(site, mine[0].layer, [e.position for e in mine])  # E B M
            if site == "hook_mixer_out":  # it is added to the stream that entered the block
                entered = ready.base.resid[mine[0].layer]
                value = entered[:, ready.indices([columns[i] for i in some])].transpose(0, 1) + value
            key = ("places", starts, columns, tuple(some))
            places = ready.indices.made(key, lambda some=some: _places(starts, columns, some, ready.pairs, length))
            new = value.to(rows.dtype)
            if not self.whole(site):
                new = self.masked(site, mine, ready, new, rows[places].view(new.shape))
            rows.index_copy_(0, places, new.flatten(0, 1))
        return rows

    def states(self, edits: Sequence[Edit], ready: Ready) -> Tensor:
        """The states that edits of one layer put in, ``E B D N``."""
        layer, positions = edits[0].layer, [e.position for e in edits]
        new = ready.values(STATE, layer, positions)
        return new if self.whole(STATE) else self.masked(STATE, edits, ready, new, ready.own_states(layer, positions))

    def hooks(self, layer: int, edits: Sequence[Edit], ready: Ready, start: int) -> list[Any]:
        """One hook a site for a batch of ``E·B`` rows from column ``start`` on, with each row's own position."""
        batch, hooks = ready.pairs, []
        for site, some in by_site(edits):
            on = [e.site == site for e in edits for _ in range(batch)]
            places = [ready.column(e.position) - start if e.site == site else 0 for e in edits for _ in range(batch)]
            mine = [edits[i] for i in some]
            value = ready.values(site, layer, [e.position for e in mine])  # E B …
            rows = None if all(on) else ready.indices([i for i, here in enumerate(on) if here])

            def put(
                old: Tensor,
                hook: Any,
                site: str = site,
                mine: list[Edit] = mine,
                value: Tensor = value,
                rows: Tensor | None = rows,
            ) -> Tensor:
                kept = (old if rows is None else old[rows]).unflatten(0, (len(mine), batch))
                new = self.masked(site, mine, ready, value.to(old.dtype), kept).flatten(0, 1)
                if rows is None:
                    return new
                out = old.clone()
                out[rows] = new
                return out

            put.edits = True  # type: ignore[attr-defined]
            hooks.append((at(f"blocks.{layer}.{site}", places, None if all(on) else on), put))
        return hooks


def _tokens(starts: Sequence[int], pairs: int, length: int) -> Tensor:
    """The numbers of the tokens in a batch of ``pairs`` texts, for suffixes from these columns on, pair by pair."""
    return torch.cat([torch.arange(b * length + s, (b + 1) * length) for s in starts for b in range(pairs)])


def _places(starts: Sequence[int], columns: Sequence[int], some: Sequence[int], pairs: int, length: int) -> Tensor:
    """Where in those the edits' columns stand, for some of the edits, pair by pair."""
    sizes = torch.tensor([length - s for s in starts])
    first = (sizes * pairs).cumsum(0) - sizes * pairs  # of each edit
    at = first + torch.tensor(columns) - torch.tensor(starts)
    which = torch.tensor(some)
    return (at[which, None] + torch.arange(pairs) * sizes[which, None]).flatten()


def by_site(edits: Sequence[Edit]) -> list[tuple[str, list[int]]]:
    """The sites of some edits, and the numbers of those at each."""
    found: dict[str, list[int]] = {}
    for i, e in enumerate(edits):
        found.setdefault(e.site, []).append(i)
    return list(found.items())

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

    def write(self, rows: Tensor, edits: Sequence[Edit], ready: Ready, start: int) -> None:
        """Into copies of the stream, ``E B S M`` from column ``start`` on, write each edit's value."""
        for site, some in by_site(edits):
            mine = [edits[i] for i in some]
            value = ready.values(site, mine[0].layer, [e.position for e in mine])  # E B M
            each, places = ready.indices(some), ready.indices([ready.column(e.position) - start for e in mine])
            if site == "hook_mixer_out":  # it is added to the stream that entered the block
                value = ready.base.resid[mine[0].layer][:, start + places].transpose(0, 1) + value
            old = rows[each, :, places]
            rows[each, :, places] = self.masked(site, mine, ready, value.to(rows.dtype), old)

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


def by_site(edits: Sequence[Edit]) -> list[tuple[str, list[int]]]:
    """The sites of some edits, and the numbers of those at each."""
    found: dict[str, list[int]] = {}
    for i, e in enumerate(edits):
        found.setdefault(e.site, []).append(i)
    return list(found.items())

"""What patched runs start from: a group of pairs, read once.

Of the corrupted text the residual stream entering every block is kept and, every ``interval`` tokens, the states of all
layers; of the clean text what will be put in.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambascope.errors import InputError
from mambascope.hooks.model_protocol import Runnable
from mambascope.hooks.sweeps.over import STATE, Grid
from mambascope.hooks.sweeps.texts import Group
from mambascope.hooks.sweeps.watch import WINDOW, Watch
from mambascope.memory import require_bytes

__all__ = ["AFTER", "BEFORE", "Indices", "Ready", "read"]

_SPACING = 64  # tokens between kept states, at most: what a window of states is computed from
BEFORE, AFTER = "hook_resid_pre", ("hook_mixer_out", "hook_resid_post")


class Indices:
    """Lists of numbers as tensors on a device, each sent there once: sending waits for the device's work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[Any, Tensor] = {}

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        key = tuple(numbers)
        return self.made(key, lambda: torch.tensor(key, dtype=torch.long))

    def made(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, on the device; the same again for the same key."""
        if key not in self._known:
            self._known[key] = make().to(self._device)
        return self._known[key]


@dataclass
class Ready:
    """A group of pairs, read once: what the patched runs start from and what is put into them."""

    model: Runnable
    group: Group
    interval: int
    base: Watch
    clean: Watch
    base_logits: Tensor  # B k V
    clean_logits: Tensor
    indices: Indices
    _conv: tuple[int, Tensor] | None = None  # a layer, and what its conv has read before every start

    @property
    def pairs(self) -> int:
        return len(self.group.rows)

    def tensors(self) -> list[Tensor]:
        """All that patched runs are computed from, but weights."""
        return [*self.base.tensors(), *self.clean.tensors()]

    def over(self, tensors: Sequence[Tensor]) -> "Ready":
        """The same with other tensors, in the order of `tensors`."""
        rest = iter(tensors)
        return dataclasses.replace(self, base=self.base.over(rest), clean=self.clean.over(rest), _conv=None)

    def bare(self) -> "Ready":
        """The same without any of its tensors' values."""
        none = self.base_logits.new_empty(0)
        rest = self.over([x.new_empty(0) for x in self.tensors()])
        return dataclasses.replace(rest, base_logits=none, clean_logits=none)

    def column(self, position: int) -> int:
        """The corrupted text's column of a position (negative ones count from the end)."""
        return position % self.group.corrupted.shape[1]

    def start(self, position: int) -> int:
        """The column from which an edit at a position is run."""
        return self.column(position) // self.interval * self.interval

    def after(self, layer: int) -> Tensor:
        """The corrupted run's stream that leaves a block, ``B L M``."""
        return self.base.leaving(layer, self.model.cfg.n_layers)

    def values(self, site: str, layer: int, positions: Sequence[int]) -> Tensor:
        """The clean run's values ``P B …`` at these positions."""
        columns = [p % self.group.clean.shape[1] for p in positions]
        if site == STATE:
            return _states(self, self.clean, layer, columns)
        name = f"blocks.{layer}.{site}"
        if name in self.clean.values:
            found = self.clean.values[name]
        elif site == BEFORE:
            found = self.clean.resid[layer]
        else:
            found = self.clean.leaving(layer, self.model.cfg.n_layers)
        return found[:, self.indices(columns)].transpose(0, 1)

    def own_states(self, layer: int, positions: Sequence[int]) -> Tensor:
        """The corrupted run's states ``P B D N`` at these positions."""
        return _states(self, self.base, layer, [self.column(p) for p in positions])

    def entering(self, layer: int, start: int, rows: int) -> Any:
        """The corrupted run's state of a layer before column ``start``, for so many edits; None at the start."""
        if start == 0:
            return None
        tensors = {"ssm": self.base.state(layer, start), "conv": self._conv_state(layer, start)}
        if rows != 1:
            tensors = {name: x.repeat(rows, 1, 1) for name, x in tensors.items()}
        return self.model.state_from_tensors(tensors)

    def _conv_state(self, layer: int, start: int) -> Tensor:
        """The conv's inputs before a column, ``B D K-1``: for all columns that suffixes start at, computed together."""
        width, length, cfg = self.model.cfg.d_conv - 1, self.group.corrupted.shape[1], self.model.cfg
        if width == 0:
            return torch.empty(self.pairs, cfg.d_inner, 0, dtype=self.model.dtype, device=self.model.device)
        if self._conv is None or self._conv[0] != layer:
            starts = range(0, length, self.interval)
            columns = [c - width + k for c in starts for k in range(width)]
            stream = self.base.resid[layer][:, self.indices([max(0, c) for c in columns])]
            before = self.indices([int(c < 0) for c in columns]).bool()  # the text
            x = self.model.conv_inputs(layer, stream, self.base.backend).masked_fill(before[:, None], 0.0)
            self._conv = layer, x.unflatten(1, (len(starts), width)).permute(1, 0, 3, 2).contiguous()  # S B D K-1
        return self._conv[1][start // self.interval]


def _states(ready: Ready, watch: Watch, layer: int, columns: list[int]) -> Tensor:
    low = min(columns)
    found = watch.states(ready.model, layer, low, max(columns) + 1)
    return found[:, ready.indices([c - low for c in columns])].transpose(0, 1)


def read(
    model: Runnable, group: Group, grid: Grid, interval: int, keep: int | None, hooked: bool, indices: Indices
) -> Ready:
    """Run both texts of a group. ``hooked``: with hooks of the user's own, so that nothing can be computed again."""
    n = model.cfg.n_layers
    derived = (BEFORE, "hook_resid_post") if not hooked else ()
    tails = {site for site in grid.sites if site != STATE and site not in derived}
    if STATE in grid.sites and hooked:
        tails |= set(WINDOW)
    _check_memory(model, group, min(interval, _SPACING), len(tails))
    end, names = f"blocks.{n - 1}.hook_resid_post", {f"blocks.{i}.{t}" for i in grid.layers for t in tails}
    if group.clean.shape == group.corrupted.shape and not hooked:  # both at once
        both = Watch(names, min(interval, _SPACING), end=end)
        logits = model(torch.cat([group.corrupted, group.clean]), recorder=both, logits_to_keep=keep)
        half = len(group.rows)
        base, clean = both.rows(slice(half)), both.rows(slice(half, None))
        return Ready(model, group, interval, base, clean, logits[:half], logits[half:], indices)
    base = Watch(set(), min(interval, _SPACING), end=end)
    clean = Watch(names, min(max(interval, 16), _SPACING), end=end)
    base_logits = model(group.corrupted, recorder=base, logits_to_keep=keep)
    clean_logits = model(group.clean, recorder=clean, logits_to_keep=keep)
    return Ready(model, group, interval, base, clean, base_logits, clean_logits, indices)


def _check_memory(model: Runnable, group: Group, interval: int, sites: int) -> None:
    cfg, (batch, length) = model.cfg, group.corrupted.shape
    values = length * (2 * cfg.d_model + cfg.d_inner * sites)
    states = (-(-length // interval)) * cfg.d_inner * cfg.d_state
    need = 4 * batch * cfg.n_layers * (values + states)
    way_out = "sweep fewer sites at a time, fewer pairs, or a shorter text"
    require_bytes(need, model.device, "what a sweep starts from", way_out, InputError)

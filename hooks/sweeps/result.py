"""What a sweep found: a number for every site, layer, position and group of channels, with its labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float
from torch import Tensor

from mambascope.brief import Brief
from mambascope.hooks.sweeps.file import read_sweep_file
from mambascope.hooks.sweeps.over import Grid

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Sweep", "load_sweep"]


@dataclass(frozen=True, repr=False)
class Sweep(Brief):
    """The metric of every patched run, and of the clean and the corrupted text.

    ``values`` ``sites layers positions groups``, float64: the metric with the clean value put into the corrupted run
    there; NaN where it is not ``done`` yet. ``tokens``: a label a position. ``computed``: edits that this call ran,
    the others came from the file. Of an attribution the values are *predictions* of the same numbers.
    """

    values: Float[Tensor, "s n p g"]
    done: Bool[Tensor, "s n p g"]
    clean: float
    corrupted: float
    grid: Grid
    tokens: tuple[str, ...]
    metric: dict[str, Any]
    computed: int = 0

    @property
    def change(self) -> Float[Tensor, "s n p g"]:
        """What each edit did to the metric."""
        return self.values - self.corrupted

    @property
    def score(self) -> Float[Tensor, "s n p g"]:
        """0 as corrupted, 1 as clean; NaN where both texts give the same metric."""
        scale = self.clean - self.corrupted
        return self.change / (scale if scale else float("nan"))

    @property
    def complete(self) -> bool:
        return bool(self.done.all())

    @property
    def sites(self) -> tuple[str, ...]:
        """Short names of the sites."""
        return tuple(s.removeprefix("mixer.").removeprefix("hook_") for s in self.grid.sites)

    def table(self) -> "pd.DataFrame":
        """A row an edit: site, layer, position, token, (channels,) metric ``value``, its ``change``, ``score``."""
        import pandas as pd

        index = pd.MultiIndex.from_product(
            [self.sites, self.grid.layers, range(len(self.grid.positions)), range(self.values.shape[3])]
        )
        frame = pd.DataFrame({"site": index.get_level_values(0), "layer": index.get_level_values(1)})
        at = index.get_level_values(2)
        frame["position"] = [self.grid.positions[i] for i in at]
        frame["token"] = [self.tokens[i] for i in at]
        if self.grid.channels is not None:
            frame["channels"] = [_name(self.grid.channels[i]) for i in index.get_level_values(3)]
        columns = {"value": self.values, "change": self.change, "score": self.score}
        return frame.assign(**{name: column.flatten().numpy() for name, column in columns.items()})


def _name(group: tuple[int, ...]) -> str:
    """``5``, ``0…7`` or ``1,4,9``."""
    if len(group) > 1 and list(group) == list(range(group[0], group[-1] + 1)):
        return f"{group[0]}…{group[-1]}"
    return ",".join(map(str, group))


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep's file, finished or not; SweepError if it is none."""
    manifest, values, done = read_sweep_file(path)
    asked, about = manifest["asked"], manifest["about"]
    channels = asked["channels"]
    grid = Grid(
        tuple(asked["sites"]),
        tuple(asked["layers"]),
        tuple(asked["positions"]),
        None if channels is None else tuple(map(tuple, channels)),
    )
    return Sweep(
        values.view(grid.shape),
        done.view(grid.shape),
        about["clean metric"],
        about["corrupted metric"],
        grid,
        tuple(about["tokens"]),
        asked["metric"],
    )

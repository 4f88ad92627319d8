"""Where the activations that an intervention holds come from: a model, with the weights that it had then."""

from typing import Any

from mambascope.errors import HookError
from mambascope.hooks.weights import WeightsSeen

__all__ = ["Origin"]


class Origin:
    """A model and its weights as a cache saw them. Weights that changed since are refused whenever it is asked."""

    def __init__(self, model: Any, seen: WeightsSeen, who: str) -> None:
        self.model, self._seen = model, seen
        self.check(who)

    def check(self, who: str) -> None:
        """HookError, naming ``who`` and a weight, unless the model's weights are still those."""
        name = self._seen.changed_anywhere(self.model)
        if name is not None:
            raise HookError(
                f"{who} holds activations of weights that are no more: {name} of {self.model.cfg.name!r} was changed, "
                "trained or moved since they were recorded; record them again, or, to put the old ones into the model "
                "as it is now, use dataclasses.replace(edit, source=None)"
            )

    def weight_hash(self, who: str) -> str:
        """The hash of those weights; HookError as `check`."""
        self.check(who)
        return self.model.weight_hash()

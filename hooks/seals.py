"""Whether a recording is still what the run computed: what a cache handed out may have been edited in place."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from mambascope.errors import CacheError

if TYPE_CHECKING:
    from mambascope.hooks.recorder import BlockRecord, Recording

__all__ = ["Seals"]


class Seals:
    """The versions of a recording's tensors, as torch counts their edits; for as long as the cache holds them.

    A cache returns what it stores, not copies, and computes from it. Edits that torch does not count (through
    ``.data``, numpy, or of inference tensors) are seen only by the comparison that a replay makes of its result.
    """

    def __init__(self, recording: "Recording") -> None:
        self._held = list(_tensors(recording))
        self._versions = {id(t): _version(t) for _, t in self._held}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """More of them: what a replay computed."""
        self._versions |= {id(t): _version(t) for t in tensors}

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """These are let go."""
        for t in tensors:
            self._versions.pop(id(t), None)

    def check(self, name: str, *tensors: Tensor | None) -> None:
        """CacheError if one of them was edited in place since."""
        for t in tensors:
            if t is not None and self._versions.get(id(t), -1) not in (-1, _version(t)):
                raise CacheError(
                    f"{name} was edited in place after this cache was recorded, so it is not what the run computed; "
                    "run the model again, and edit a .clone() of what a cache returns"
                )

    def check_source(self, block: "BlockRecord") -> None:
        """The same of what a block's other activations are computed from."""
        for name, t in _source(block):
            self.check(name, t)

    def check_all(self) -> None:
        """The same of everything that the recording holds: before it is copied or written."""
        for name, t in self._held:
            self.check(name, t)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _tensors(recording: "Recording") -> Iterator[tuple[str, Tensor]]:
    yield from recording.top.items()
    yield from recording.gradients.items()
    for block in recording.blocks.values():
        yield from block.stored.items()
        yield from _source(block)


def _source(block: "BlockRecord") -> Iterator[tuple[str, Tensor]]:
    yield from block.exposed.items()
    if block.x is not None:
        yield f"blocks.{block.layer}.hook_resid_pre", block.x
    if block.anchors is not None:
        yield f"blocks.{block.layer}.mixer.hook_h", block.anchors.states
    if block.state is not None:
        yield from ((f"the state that block {block.layer} began with", t) for t in block.state.tensors().values())

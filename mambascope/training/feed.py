"""Batches on their way to the device: checked, and on a GPU made one step ahead while the device works."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from mambascope.model.inputs import check_ids
from mambascope.training.sampler import Batch, Batches

__all__ = ["Feed"]


class Feed:
    """``feed(step)`` is ``batches(step)``, its token ids checked against ``vocabulary`` (None: not at all).

    For a GPU a thread of its own makes the next step's batch in page-locked memory, so that neither drawing it nor
    copying it holds up the device. The batches are the same: each is a function of its step.
    """

    def __init__(self, batches: Batches, vocabulary: int | None, device: torch.device, steps: int) -> None:
        self._batches, self._vocabulary, self._steps = batches, vocabulary, steps
        self._pin = device.type == "cuda"
        self._pool = ThreadPoolExecutor(1) if self._pin else None
        self._next: tuple[int, Future[Batch]] | None = None

    def close(self) -> None:
        """End the thread; what it was making is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Batch:
        if self._pool is None:
            return self._make(step)
        ready = (
            self._next[1] if self._next is not None and self._next[0] == step else self._pool.submit(self._make, step)
        )
        batch = ready.result()
        self._next = (step + 1, self._pool.submit(self._make, step + 1)) if step + 1 < self._steps else None
        return batch

    def _make(self, step: int) -> Batch:
        batch = self._batches(step)
        if self._vocabulary is not None:
            check_ids(batch.tokens, self._vocabulary, f"the batch of step {step}: tokens")
        if not self._pin:
            return batch
        return Batch(batch.tokens.pin_memory(), batch.targets.pin_memory())

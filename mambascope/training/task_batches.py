"""Batches of a generated task, and over which of their tokens the loss is taken."""

import torch
from torch import Tensor

from mambascope.analyses.tasks import Sample, Task
from mambascope.training.recipe import TrainSettings
from mambascope.training.sampler import IGNORED, Batch, Batches

__all__ = ["TaskBatches", "last_only"]


class TaskBatches:
    """Fresh rows of a task at every step, a function of (seed, step).

    The rows of ``task.steps_at_once`` steps are drawn in one call, so that drawing costs little a step; targets are the
    last positions that the task ever asks for, or all of them (``loss`` "all": every next token as well).
    """

    def __init__(self, task: Task, settings: TrainSettings, seed: int) -> None:
        self._task, self._settings, self._seed = task, settings, seed
        self._block: tuple[int, Sample] | None = None

    def __call__(self, step: int) -> Batch:
        settings, size = self._settings, self._task.steps_at_once
        first = step - step % size
        if self._block is None or self._block[0] != first:
            rows = settings.batch * size
            self._block = (first, self._task.sample((self._seed, 0, first), rows, settings.length))
        a = (step - first) * settings.batch
        sample = self._block[1]
        tokens, targets = sample.tokens[a : a + settings.batch], sample.targets[a : a + settings.batch]
        if settings.loss == "all":
            targets = with_next_tokens(tokens, targets)
        else:
            keep = 1 if settings.loss == "last" else self._task.scored(settings.length)
            targets = targets[:, -keep:].contiguous()
        return Batch(tokens, targets)


def with_next_tokens(tokens: Tensor, targets: Tensor) -> Tensor:
    """``targets``, and the next token wherever nothing is asked."""
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)], 1)
    return torch.where(targets == IGNORED, following, targets)


def last_only(batches: Batches) -> Batches:
    """The same batches with the target of the last position alone."""

    def batch(step: int) -> Batch:
        whole = batches(step)
        return Batch(whole.tokens, whole.targets[:, -1:].contiguous())

    return batch

"""A training step as one CUDA graph: for models so small that launching kernels takes longer than running them."""

from collections.abc import Callable

import torch
from torch import Tensor

from mambascope.training.sampler import Batch

__all__ = ["StepGraph"]

_WARMUP = 3


class StepGraph:
    """Records ``step`` once and replays it on each new batch, which is copied into the recorded input.

    ``step`` must leave its work on the device: no reading back, and an optimizer made with ``capturable=True`` whose
    learning rate is a tensor. It starts by dropping the gradients, so that the recording owns their memory. The first
    three calls run as they are (kernels compile, the optimizer makes its state); the fourth records. All are steps.
    """

    def __init__(self, step: Callable[[Batch], tuple[Tensor, Tensor]], device: torch.device) -> None:
        self._step, self._device = step, device
        self._calls = 0
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch | None = None
        self._results: tuple[Tensor, Tensor] | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One step; returns copies of loss and gradient norm, on the device."""
        if self._batch is None:
            self._batch = Batch(batch.tokens.to(self._device), batch.targets.to(self._device))
        else:
            self._batch.tokens.copy_(batch.tokens, non_blocking=True)
            self._batch.targets.copy_(batch.targets, non_blocking=True)
        if self._calls < _WARMUP:
            self._calls += 1
            now = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(now)
            with torch.cuda.stream(self._stream):
                loss, norm = self._step(self._batch)
            now.wait_stream(self._stream)
            return loss.clone(), norm.clone()
        if self._graph is None or self._results is None:
            self._graph = torch.cuda.CUDAGraph()
            # thread_local: the thread that makes the next batch may allocate page-locked memory meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._results = self._step(self._batch)
        self._graph.replay()
        loss, norm = self._results
        return loss.clone(), norm.clone()

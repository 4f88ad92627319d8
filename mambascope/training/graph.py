"""A training step as one CUDA graph: for models so small that launching kernels takes longer than running them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mambascope.errors import InputError
from mambascope.training.head import answer_loss
from mambascope.training.sampler import Batch

__all__ = ["GradientGraph", "StepGraph"]

_WARMUP = 3


class StepGraph:
    """Records ``step`` once and replays it on each new batch, which is copied into the recorded input.

    ``step`` must leave its work on the device: no reading back, and an optimizer made with ``capturable=True`` whose
    learning rate is a tensor. It starts by dropping the gradients, so that the recording owns their memory. The first
    three calls run as they are (kernels compile, the optimizer makes its state); the fourth records. All are steps.
    With ``report`` a step that cannot be recorded is told to it, with the reason, and runs as it is from then on;
    without, it is an error.

    Recordings on several streams may be replayed at the same time: each is made on the stream that it is used on (the
    default one excepted, where nothing can be recorded) and has a cuBLAS workspace of its own. torch keeps one for each
    stream, and by itself records everything on one stream: products that sum over parts would share their scratch.
    """

    def __init__(
        self,
        step: Callable[[Batch], tuple[Tensor, Tensor]],
        device: torch.device,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._report, self._refused = report, False
        self._step, self._device = step, device
        self._calls = 0
        now = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device) if now == torch.cuda.default_stream(device) else now
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
            return self._as_it_is(self._batch)
        if self._results is None and not self._refused:
            self._record(self._batch)
        if self._graph is None or self._results is None:
            return self._as_it_is(self._batch)
        self._graph.replay()
        loss, norm = self._results
        return loss.clone(), norm.clone()

    def _as_it_is(self, batch: Batch) -> tuple[Tensor, Tensor]:
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            loss, norm = self._step(batch)
        now.wait_stream(self._stream)
        return loss.clone(), norm.clone()

    def _record(self, batch: Batch) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the thread that makes the next batch may allocate page-locked memory meanwhile
            _drop_workspaces()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                results = self._step(batch)
        except RuntimeError as error:
            if self._report is None:
                raise
            self._refused = True  # nothing of the step was done, and nothing of it is kept
            self._report(f"a step cannot be recorded ({str(error).splitlines()[0]}); it runs kernel by kernel")
            return
        finally:
            _drop_workspaces()  # the recording's own lies in its memory, which nobody else is given
        self._graph, self._results = graph, results


def _drop_workspaces() -> None:
    """Let cuBLAS be given new scratch by the next product, as torch does around the graphs of its compiler."""
    torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportAttributeAccessIssue]


class GradientGraph:
    """A model's loss and gradients as one CUDA graph for one shape of batch: no launch waits for Python.

    ``gradients(batch)`` gives the loss, on the device, and leaves every parameter's gradient in its ``.grad``, which is
    overwritten by the next call and not added to: clone what must last. An optimizer may step between calls, since
    weights are read where they lie. Holds the memory of one step for as long as it lives. The first three calls run as
    they are. InputError without an NVIDIA GPU, for another shape, and where a weight was moved since it was recorded.
    """

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor] = answer_loss) -> None:
        self.model, self.loss = model, loss
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise InputError(f"a CUDA graph needs a model on an NVIDIA GPU, this one is on {device}")
        self._graph, self._shape = StepGraph(self._step, device), None
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []
        self._places: list[int] = []

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(self.model, batch)
        loss.backward()
        self._gradients = [(p, p.grad) for p in self.model.parameters()]
        return loss.detach(), loss.detach()

    def __call__(self, batch: Batch) -> Tensor:
        shape = (batch.tokens.shape, batch.targets.shape)
        if self._shape not in (None, shape):
            raise InputError(f"recorded for tokens and targets {self._shape}, got {shape}; make one for each shape")
        places = [p.data_ptr() for p in self.model.parameters()]
        if self._shape is not None and places != self._places:
            raise InputError("a weight lies elsewhere than when the step was recorded; make a new GradientGraph")
        self._shape, self._places = shape, places
        loss = self._graph(batch)[0]
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return loss

"""How fast a training step could be: its matrix products and its scans alone, at the rates this device really reaches.

1. Every linear layer costs three products a step (output, gradient of the input, gradient of the weight); the
   unembedding is one of them. Each distinct shape is timed once, in the dtype that the step uses.
2. Every Mamba mixer costs one scan, forward and backward, at the step's own shape; timed once a distinct shape, on a
   GPU as one recorded graph, so that the cost of launching is not counted as the kernel's.
3. Every other mixer costs what it does besides its linear layers (attention: scores, softmax and values), if it says
   what that is (``Mixer.core``), forward and backward; timed once a kind.
4. floor = their sum. What a step takes beyond it is norms, convolutions, the softmax, the optimizer, and waiting.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mambascope import ops
from mambascope.model.mixer import MambaMixer
from mambascope.model.mixers.base import Mixer

__all__ = ["Floor", "measure_floor"]


@dataclass(frozen=True)
class Floor:
    """Seconds a step of the matrix products, of the scans and of other mixers' cores, and the tokens of a step."""

    products: float
    scans: float
    tokens: int
    cores: float = 0.0

    @property
    def seconds(self) -> float:
        return self.products + self.scans + self.cores

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def __str__(self) -> str:
        parts = f"matrix products {1e3 * self.products:.2f} ms, scans {1e3 * self.scans:.2f} ms"
        if self.cores:
            parts += f", other mixers {1e3 * self.cores:.2f} ms"
        return f"floor: {self.tokens_per_second:,.0f} tokens/s (a step: {parts})"


def measure_floor(
    model: nn.Module, batch: int, length: int, *, scored: int | None = None, dtype: torch.dtype = torch.float32
) -> Floor:
    """Time the products and scans of one training step on the model's device.

    ``scored``: positions a row whose logits are made (all by default); ``dtype``: what the products run in. Costs a
    few steps' time and the memory of one layer.
    """
    device = next(model.parameters()).device
    rows = batch * length
    shapes: Counter[tuple[int, int, int]] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            here = batch * scored if scored is not None and name == "unembed" else rows
            shapes[here, module.in_features, module.out_features] += 1
    mixers = Counter(
        (m.cfg.d_inner, m.cfg.d_state) for m in model.modules() if isinstance(m, MambaMixer)
    )  # distinct shapes of the scan
    products = sum(n * _products(*shape, device, dtype) for shape, n in shapes.items())
    scans = sum(n * _scan(batch, length, *shape, device, dtype) for shape, n in mixers.items())
    others = Counter(type(m) for m in model.modules() if isinstance(m, Mixer) and not isinstance(m, MambaMixer))
    cores = 0.0
    for kind, n in others.items():
        core = next(m for m in model.modules() if type(m) is kind).core(batch, length, dtype)
        cores += 0.0 if core is None else n * _seconds(core, device)
    return Floor(products, scans, rows, cores)


def _products(rows: int, inner: int, outer: int, device: torch.device, dtype: torch.dtype) -> float:
    x, w, g = (
        torch.randn(*shape, device=device, dtype=dtype) for shape in ((rows, inner), (outer, inner), (rows, outer))
    )

    def step() -> None:
        torch.mm(x, w.t())
        torch.mm(g, w)
        torch.mm(g.t(), x)

    return _seconds(step, device)


def _scan(batch: int, length: int, D: int, N: int, device: torch.device, dtype: torch.dtype) -> float:
    def leaf(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=kind, requires_grad=True)

    u, raw, z = (leaf(batch, length, D) for _ in range(3))
    B, C = leaf(batch, length, N), leaf(batch, length, N)
    A = (-torch.rand(D, N, device=device) - 0.5).requires_grad_()
    skip, dy = leaf(D, kind=torch.float32), torch.randn(batch, length, D, device=device, dtype=dtype)
    inputs = (u, raw, A, B, C, skip, z)

    def step() -> None:
        out = ops.selective_scan(*inputs, dt_softplus=True)
        torch.autograd.grad(out.y, inputs, dy)

    return _seconds(step, device)


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    """The median of some runs; on a GPU of a recorded graph of four, by its own clock."""
    if device.type != "cuda":
        step()
        took = []
        for _ in range(3):
            start = time.perf_counter()
            step()
            took.append(time.perf_counter() - start)
        return sorted(took)[1]
    side, inside = torch.cuda.Stream(device), 4
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()  # kernels compile before the recording
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inside):
            step()
    took = []
    for _ in range(4):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1e3 / inside)
    return sorted(took)[1]

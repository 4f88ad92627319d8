"""Whole-model timings at 130m size on a GPU, with a correctness gate first.

python -m tests.bench.bench_gpu_model [--csv FILE] [--only PART …]
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from mambascope.config import MambaConfig
from mambascope.model import HookedMamba

LAYERS, WIDTH, INNER, VOCAB, RANK = 24, 768, 1536, 50280, 48
DEVICE = "cuda"


def build(dtype: torch.dtype, layers: int = LAYERS) -> HookedMamba:
    torch.manual_seed(0)
    model = HookedMamba(MambaConfig(d_model=WIDTH, n_layers=layers, d_vocab=VOCAB), device=DEVICE, dtype=dtype)
    return model.requires_grad_(False)


def ids(batch: int, length: int, seed: int = 0, vocabulary: int = VOCAB) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def milliseconds(fn: Callable[[], Any], repeats: int = 15, warm: int = 3) -> float:
    """Median by CUDA events; each call starts on an idle device."""
    for _ in range(warm):
        fn()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


class Table:
    """Rows of what was measured, and the bar beside it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, str, str]] = []

    def add(self, what: str, value: float, bar: str = "", passed: bool | None = None) -> None:
        verdict = "" if passed is None else "pass" if passed else "FAIL"
        self.rows.append((what, value, bar, verdict))
        print(f"{what:64s} {value:12.4g}  {bar:14s} {verdict}", flush=True)

    def at_most(self, what: str, value: float, bar: float) -> None:
        self.add(what, value, f"<= {bar:g}", value <= bar)

    def at_least(self, what: str, value: float, bar: float) -> None:
        self.add(what, value, f">= {bar:g}", value >= bar)

    def write(self, path: Path) -> None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        import triton

        about = [torch.cuda.get_device_name(), torch.__version__, triton.__version__, commit]
        with path.open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["what", "value", "bar", "verdict", "device", "torch", "triton", "commit"])
            writer.writerows([what, f"{value:.5g}", bar, verdict, *about] for what, value, bar, verdict in self.rows)


def eager(model: HookedMamba, fn: Callable[[], Any]) -> Any:
    model.graphs.enabled = False
    try:
        return fn()
    finally:
        model.graphs.enabled = True


@torch.no_grad()
def gate_graphs(table: Table) -> bool:
    """A replayed pass gives the eager pass' bits: logits, losses, states, in pieces, after weight edits."""
    good = True

    def same(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
        nonlocal good
        equal = bool(torch.equal(a, b))
        good &= equal
        if not equal:
            table.add(f"gate: graph = eager, {what}", (a.double() - b.double()).abs().max().item(), "0", False)

    for dtype in (torch.bfloat16, torch.float32):
        model = build(dtype, 4)
        for batch, length in ((1, 64), (1, 65), (2, 1000), (8, 2048)):
            x = ids(batch, length)
            want, state = eager(model, lambda x=x: model(x, return_state=True))
            for seed in (0, 1, 0):
                got, after = model(ids(batch, length, seed), return_state=True)
            name = f"{dtype} {batch} x {length}"
            if model.explain_path()[0].form != "graph":
                table.add(f"gate: {name} was not recorded: {model.explain_path()[0]}", 0, "", False)
                good = False
            same(name, got, want)
            same(f"{name} h", after.ssm, state.ssm)
            same(f"{name} conv", after.conv, state.conv)
            more = eager(model, lambda x=x, state=state: model(x, state=state, return_type="loss"))
            for _ in range(3):
                got = model(x, state=state, return_type="loss")
            same(f"{name} continued, loss", got, more)
            model.blocks[1].mixer.in_proj.weight.mul_(1.5)  # in place: the recording reads it
            model.blocks[0].mixer.A_log.data.add_(0.1)
            got = model(x)
            if model.explain_path()[0].form == "graph":
                table.add(f"gate: {name}: without states a shape of its own", 0, "", False)
            got = model(x)
            same(f"{name} after an edit", got, eager(model, lambda x=x: model(x)))
            model.blocks[1].mixer.out_proj.weight.data = model.blocks[1].mixer.out_proj.weight.data.flip(0).clone()
            for _ in range(2):
                got = model(x)
            same(f"{name} after reassigning", got, eager(model, lambda x=x: model(x)))
        with torch.inference_mode():
            want = eager(model, lambda x=x: model(x, logits_to_keep=1))
            for _ in range(2):
                got = model(x, logits_to_keep=1)
            same("inference mode", got, want)
        long = ids(1, 70000)
        want = eager(model, lambda: model(long, logits_to_keep=3))
        for _ in range(2):
            got = model(long, logits_to_keep=3)
        same(f"{dtype} in pieces", got, want)
    print(f"graphs = eager bits: {'yes' if good else 'NO'}", flush=True)
    return good


@torch.no_grad()
def forwards(table: Table) -> None:
    for dtype, batch, length, bar in (
        (torch.bfloat16, 1, 2048, 4.0),
        (torch.bfloat16, 8, 2048, 14.0),
        (torch.float32, 1, 2048, None),
    ):
        model = build(dtype)
        x = ids(batch, length)
        name = f"{str(dtype)[6:]} {batch} x {length}"
        slow = eager(model, lambda model=model, x=x: milliseconds(lambda: model(x), 7))
        table.add(f"forward {name}, eager, ms", slow)
        fast = milliseconds(lambda model=model, x=x: model(x))
        if bar is None:
            table.add(f"forward {name}, ms", fast)
        else:
            table.at_most(f"forward {name}, ms", fast, bar)
        products = milliseconds(Products(model, batch * length).forward)
        table.add(f"its matrix products {name}, ms", products)


class Products:
    """The model's own matrix products, replayed as one graph: the floor."""

    def __init__(self, model: HookedMamba, rows: int) -> None:
        self.weights = [
            [m.in_proj.weight, m.x_proj.weight, m.dt_proj.weight, m.out_proj.weight]
            for m in (block.mixer for block in model.blocks)
        ]
        self.head = model.unembed.weight
        self.inputs = [torch.randn(rows, n, device=DEVICE, dtype=model.dtype) for n in (WIDTH, INNER, RANK, INNER)]
        self._run()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()

    def _run(self) -> None:
        for layer in self.weights:
            for x, w in zip(self.inputs, layer, strict=True):
                F.linear(x, w)
        F.linear(self.inputs[0], self.head)

    def forward(self) -> None:
        self.graph.replay()


PARTS: dict[str, Callable[[Table], Any]] = {"forwards": forwards}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--only", nargs="*", choices=[*PARTS, "gate"])
    options = parser.parse_args()
    table = Table()
    begin = time.perf_counter()
    if not gate_graphs(table):
        sys.exit("the correctness gate failed: no timings")
    print(f"gate took {time.perf_counter() - begin:.1f} s", flush=True)
    for name, part in PARTS.items():
        if options.only is None or name in options.only:
            part(table)
    if options.csv:
        table.write(options.csv)


if __name__ == "__main__":
    main()

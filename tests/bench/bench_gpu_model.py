"""Whole-model timings at 130m size on a GPU: correctness gate first, then medians by CUDA events, bars beside them.

    python -m tests.bench.bench_gpu_model [--csv FILE] [--only PART …] [--limit SECONDS] [--anyway]

The gate: a replayed pass gives the bits of the eager one (logits, states, what a cache keeps, after edits of weights),
a hook that returns None changes no bit, a step is as near to float64 as the whole text, gradients of joined blocks as
near as those of the operators one by one. It runs in processes beside others that compile what the timings need; the
timings begin when all are done. Every timed call is the public one, starts on an idle device and includes its host
time. The CSV is written after every row; what the limit left out is said.
"""

import argparse
import copy
import csv
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mambascope import ops
from mambascope.config import MambaConfig
from mambascope.model import HookedMamba, State
from mambascope.training.graph import GradientGraph
from mambascope.training.head import answer_loss
from mambascope.training.sampler import Batch

LAYERS, WIDTH, INNER, VOCAB, RANK = 24, 768, 1536, 50280, 48
DEVICE = "cuda"


_built: dict[torch.dtype, HookedMamba] = {}


def build(dtype: torch.dtype, layers: int = LAYERS) -> HookedMamba:
    """A model with frozen random weights, made on the GPU."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = HookedMamba(MambaConfig(d_model=WIDTH, n_layers=layers, d_vocab=VOCAB), dtype=dtype)
    return model.requires_grad_(False)


def full(dtype: torch.dtype) -> HookedMamba:
    """The one model of 24 layers of a dtype; the other dtype's goes."""
    if dtype not in _built:
        _built.clear()
        gc.collect()
        torch.cuda.empty_cache()
        _built[dtype] = build(dtype)
    return _built[dtype]


def ids(batch: int, length: int, seed: int = 0, vocabulary: int = VOCAB) -> Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def milliseconds(fn: Callable[[], Any], repeats: int = 11, warm: int = 3) -> float:
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


def peak(fn: Callable[[], Any]) -> float:
    """The most bytes allocated while a call runs, in MB."""
    fn(), fn(), gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = fn()
    torch.cuda.synchronize()
    del held
    return torch.cuda.max_memory_allocated() / 1e6


class Table:
    """Rows of what was measured, and the bar beside it."""

    def __init__(self, path: Path | None = None) -> None:
        self.rows: list[tuple[str, float, str, str]] = []
        self.path = path

    def add(self, what: str, value: float, bar: str = "", passed: bool | None = None) -> None:
        verdict = "" if passed is None else "pass" if passed else "FAIL"
        self.rows.append((what, value, bar, verdict))
        print(f"{what:66s} {value:12.4g}  {bar:10s} {verdict}", flush=True)
        if self.path is not None:
            self.write(self.path)

    def at_most(self, what: str, value: float, bar: float) -> None:
        self.add(what, value, f"<= {bar:g}", value <= bar)

    def at_least(self, what: str, value: float, bar: float) -> None:
        self.add(what, value, f">= {bar:g}", value >= bar)

    def write(self, path: Path) -> None:
        import triton

        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = os.environ.get("BENCH_COMMIT") or subprocess.run(head, capture_output=True, text=True).stdout.strip()
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


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


class Gate:
    """Collects comparisons, and the names of those that failed."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.count = 0

    def same(self, what: str, a: Tensor, b: Tensor) -> None:
        self.need(what, torch.equal(a, b))

    def need(self, what: str, fine: bool) -> None:
        self.count += 1
        if not fine:
            self.failed.append(what)


def form(model: HookedMamba) -> str:
    return model.explain_path()[0].form


@torch.no_grad()
def gate_graphs(gate: Gate, dtype: torch.dtype) -> None:
    """A replayed pass gives the eager pass' bits: logits, losses, states, caches, in pieces, after weight edits."""
    model = build(dtype, 3)
    for batch, length in ((1, 65), (2, 1000)):
        x, name = ids(batch, length), f"{dtype} {batch} x {length}"
        want, state = eager(model, lambda x=x: model(x, return_state=True))
        for seed in (0, 1, 0):
            got, after = model(ids(batch, length, seed), return_state=True)
        gate.need(f"{name} is recorded", form(model) == "graph")
        gate.same(f"{name}, logits", got, want)
        gate.same(f"{name}, h", after.ssm, state.ssm)
        gate.same(f"{name}, conv", after.conv, state.conv)
        more = eager(model, lambda x=x, state=state: model(x, state=state, return_type="loss"))
        for _ in range(3):
            got = model(x, state=state, return_type="loss")
        gate.same(f"{name}, continued", got, more)
        hooked = model.run_with_hooks(x, fwd_hooks=[("blocks.1.mixer.hook_delta", lambda v, hook: None)])
        gate.need(f"{name} with a hook is not recorded", form(model) != "graph")
        gate.same(f"{name}, a hook that returns None", hooked, want)
        _gate_edits(gate, model, x, name)
        _gate_cache(gate, model, x, name)
        model.blocks[1].mixer.in_proj.weight.mul_(1.5)  # in place: the recording reads it
        model.blocks[0].mixer.A_log.data.add_(0.1)
        for _ in range(2):
            got = model(x)
        gate.same(f"{name}, after an edit", got, eager(model, lambda x=x: model(x)))
        model.blocks[1].mixer.out_proj.weight.data = model.blocks[1].mixer.out_proj.weight.data.flip(0).clone()
        for _ in range(3):
            got = model(x)
        gate.same(f"{name}, after reassigning", got, eager(model, lambda x=x: model(x)))
    long = ids(1, 70000)
    want = eager(model, lambda: model(long, logits_to_keep=3))
    for _ in range(2):
        got = model(long, logits_to_keep=3)
    gate.same(f"{dtype} in pieces", got, want)


def _gate_edits(gate: Gate, model: HookedMamba, x: Tensor, name: str) -> None:
    """Blocks around an edited one replayed, and its scan fused around the edited state: the bits of neither.

    Also where the hook runs the model, whose recordings share their memory.
    """
    read = ("blocks.1.mixer.hook_y", lambda v, hook: None)  # which opens the scan

    def change(v: Tensor, hook: Any) -> Tensor:
        return v * 0.5 + 0.1

    depth: list[int] = []

    def nested(v: Tensor, hook: Any) -> Tensor:
        if not depth:
            depth.append(1)
            model(x), model(x[:, :50])
            depth.pop()
        return change(v, hook)

    sites = ("mixer.hook_h[40]", "hook_resid_pre[40]", "mixer.hook_h[0:70:23]", "hook_resid_post")
    for site, edit in [*((site, change) for site in sites), ("mixer.hook_h[40]", nested)]:
        hook = (f"blocks.1.{site}", edit)
        want = eager(model, lambda hook=hook: model.run_with_hooks(x, fwd_hooks=[hook, read]))
        for turn in range(6):  # the last ones from recordings of all that is not open
            got = model.run_with_hooks(x, fwd_hooks=[hook])
            gate.same(f"{name}, {site} edited by {edit.__name__}, pass {turn}", got, want)
        gate.need(f"{name}, {site} edited: other blocks are recorded", model.explain_path()[2].form == "graph")


def _gate_cache(gate: Gate, model: HookedMamba, x: Tensor, name: str) -> None:
    want, cache = eager(model, lambda: model.run_with_cache(x))
    for _ in range(3):
        got, kept = model.run_with_cache(x)
    gate.need(f"{name}, a cache is recorded", form(model) == "graph")
    gate.same(f"{name}, cached, logits", got, want)
    for n, value in cache.recording.top.items():
        gate.same(f"{name}, cached, {n}", kept.recording.top[n], value)
    for i, block in cache.recording.blocks.items():
        mine = kept.recording.blocks[i]
        gate.same(f"{name}, cached, input of block {i}", mine.x, block.x)
        gate.same(f"{name}, cached, states of block {i}", mine.anchors.states, block.anchors.states)
    gate.same(f"{name}, a delta read", kept["delta", 1], cache["delta", 1])


@torch.no_grad()
def gate_steps(gate: Gate, dtype: torch.dtype) -> None:
    """Steps against float64, beside the whole text on the ordinary path; the same bits twice."""
    model, x = build(dtype, 4), ids(2, 24)
    exact = copy.deepcopy(model).double()
    exact.backend = "reference"
    want, truth = exact(x, return_state=True)
    whole, after = eager(model, lambda: model(x, return_state=True))
    state: State | None = None
    far = 0.0
    for t in range(x.shape[1]):
        logits, state = model.step(x[:, t], state)
        far = max(far, relative(logits, want[:, t]))
    gate.need("steps run by the step kernels", form(model) == "step")
    assert state is not None
    bar = 2 * max(relative(whole, want), 1e-6)
    gate.need(f"{dtype} step, logits: {far:.1e}, bar {bar:.1e}", far <= bar)
    for n in ("ssm", "conv"):
        mine, theirs = (relative(getattr(s, n), getattr(truth, n)) for s in (state, after))
        gate.need(f"{dtype} step, {n}: {mine:.1e}, whole text {theirs:.1e}", mine <= 2 * max(theirs, 1e-6))
    first = model.step(x[:, 0], state)
    for _ in range(10):
        again = model.step(x[:, 0], state)
        gate.same(f"{dtype} step twice", first[0], again[0])
        gate.same(f"{dtype} step twice, h", first[1].ssm, again[1].ssm)
    ordinary = eager(model, lambda: model.generate(x, 12))
    gate.need(f"{dtype} greedy text", bool((model.generate(x, 12) == ordinary).float().mean() > 0.9))
    many = list(range(30))  # more stop tokens than recordings look for: these texts are drawn outside of them
    for options in ({"temperature": 0.8}, {"temperature": 1.2, "top_k": 50}, {"temperature": 1.0, "top_p": 0.9}):
        for seed in (5, 6):
            drawn, outside = (model.generate(x, 40, seed=seed, stop_tokens=s, **options) for s in ([], many))
            gate.same(f"{dtype} drawn text {options}", drawn[:, : outside.shape[1]], outside)


@torch.no_grad()
def gate_products(gate: Gate, dtype: torch.dtype) -> None:
    """The model's float32 products against float64: no further off than 1e-6 of the largest entry."""
    for rows, depth, width in ((2048, WIDTH, 2 * INNER), (1999, INNER, WIDTH), (300, WIDTH, VOCAB)):
        x, w = torch.randn(rows, depth, device=DEVICE), torch.randn(width, depth, device=DEVICE)
        found = relative(ops.linear(x, w, backend="triton"), x.double() @ w.double().t())
        gate.need(f"fp32 product {rows} x {depth} x {width}, error {found:.1e}", found <= 1e-6)


class Products:
    """The model's own matrix products, replayed as one graph: the floor."""

    def __init__(self, model: HookedMamba, rows: int, backward: bool = False) -> None:
        layers = [block.mixer for block in model.blocks]
        weights = [[m.in_proj.weight, m.x_proj.weight, m.dt_proj.weight, m.out_proj.weight] for m in layers]
        self.weights = [w.detach() for layer in weights for w in layer] + [model.unembed.weight.detach()]
        self.inputs = {n: torch.randn(rows, n, device=DEVICE, dtype=model.dtype) for n in (WIDTH, INNER, RANK)}
        widths = {w.shape[0] for w in self.weights} if backward else set()
        self.grads = {n: torch.randn(rows, n, device=DEVICE, dtype=model.dtype) for n in widths}
        self._run()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()

    def _run(self) -> None:
        for w in self.weights:
            x = self.inputs[w.shape[1]]
            F.linear(x, w)
            if self.grads:
                g = self.grads[w.shape[0]]
                torch.mm(g, w), torch.mm(g.t(), x)

    def __call__(self) -> None:
        self.graph.replay()


@torch.no_grad()
def forwards(table: Table) -> None:
    model = full(torch.bfloat16)
    for batch, bar in ((1, 4.0), (8, 14.0)):
        x, name = ids(batch, 2048), f"forward bf16 {batch} x 2048"
        table.at_most(f"{name}, ms", milliseconds(lambda x=x: model(x)), bar)
        table.add(f"{name}, its matrix products, ms", milliseconds(Products(model, batch * 2048), 5))
        table.add(f"{name}, without graphs, ms", eager(model, lambda x=x: milliseconds(lambda: model(x), 3, 2)))


@torch.no_grad()
def caches(table: Table) -> None:
    x = ids(1, 2048)
    for dtype in (torch.bfloat16, torch.float32):
        model, name = full(dtype), {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        plain, everything = milliseconds(lambda m=model: m(x)), milliseconds(lambda m=model: m.run_with_cache(x))
        table.add(f"{name} 1 x 2048 plain forward, ms", plain)
        if dtype == torch.float32:
            table.at_most("fp32 open forward of 2,048 tokens (run_with_cache, no filter), ms", everything, 15.0)
            table.add("fp32 1 x 2048, its matrix products by cuBLAS, ms", milliseconds(Products(model, 2048), 5))
        else:
            table.add("bf16 open forward of 2,048 tokens, ms", everything)
        table.at_most(f"{name} run_with_cache / plain", everything / plain, 1.1)
        before, after = peak(lambda m=model: m(x)), peak(lambda m=model: m.run_with_cache(x))
        table.add(f"{name} plain forward, peak MB", before)
        table.at_most(f"{name} run_with_cache, peak memory / plain", after / before, 1.5)


@torch.no_grad()
def generation(table: Table) -> None:
    model = full(torch.bfloat16)
    speeds = {}
    for position in (100, 100_000):
        x = ids(1, position)
        _, state = model(x[:, :-1], return_state=True, return_type=None)

        def run(n: int, x: Tensor = x, state: State = state) -> None:
            model.generate(x[:, -1:], n, state=state)

        run(300)
        few, many = (milliseconds(lambda n=n: run(n), 5, 1) for n in (128, 640))
        speeds[position] = (many - few) / 512 * 1e3
        table.add(f"generation bf16 batch 1 at position {position:,}, us a token", speeds[position])
    table.at_least("generation bf16 batch 1, tokens/s", 1e6 / speeds[100], 3000)
    slower = speeds[100_000] / speeds[100] - 1
    table.at_most("time a token at 100,000 against 100, %", abs(slower) * 100, 5.0)
    x = ids(8, 100)
    few, many = (milliseconds(lambda n=n: model.generate(x, n), 3, 1) for n in (64, 192))
    table.add("generation bf16 batch 8, tokens/s of all rows", 8 * 128e3 / (many - few))
    x = ids(1, 100)
    few, many = (milliseconds(lambda n=n: model.generate(x, n, 1.0, seed=0), 3, 1) for n in (32, 96))
    table.add("generation bf16 batch 1, sampled, tokens/s", 64e3 / (many - few))


@torch.no_grad()
def induction(table: Table) -> None:
    import mambascope

    model = mambascope.load("induction-2l", device=DEVICE)
    x = ids(1, 1 << 20, vocabulary=16)
    ms = milliseconds(lambda: model(x, logits_to_keep=1), 5)
    table.at_most("2^20 tokens through induction-2l, last logits, ms", ms, 50)


@torch.no_grad()
def million(table: Table) -> None:
    model, x = full(torch.bfloat16), ids(1, 1 << 20)
    model(x[:, : 1 << 16], logits_to_keep=1)
    ms = milliseconds(lambda: model(x, logits_to_keep=1), 2, 0)
    table.add("2^20 tokens at 130m size bf16, one sequence, tokens/s", (1 << 20) / ms * 1e3)


@torch.no_grad()
def windows(table: Table) -> None:
    model, x = full(torch.bfloat16), ids(1, 131072)
    cache = model.run_with_cache(x, names_filter="blocks.12.mixer.hook_h", return_type=None)[1]
    h = cache["blocks.12.mixer.hook_h"]
    for at in (70000, 37, 131000):
        ms = milliseconds(lambda at=at: h[:, at : at + 64])
        table.at_most(f"64 states of one layer at position {at:,} of 131,072, ms", ms, 1.0)


def backwards(table: Table) -> None:
    """Through the model's own loss, and through the chunked head that training uses."""
    model, x = full(torch.bfloat16).requires_grad_(True), ids(8, 2048)
    batch = Batch(x, torch.cat([x[:, 1:], torch.full_like(x[:, :1], -100)], 1))

    leaves = list(model.parameters())

    def both(loss: Callable[[], Tensor]) -> None:
        for parameter in leaves:  # not zero_grad, which walks through all modules
            parameter.grad = None
        loss().backward()

    ways = {
        "the training head": lambda: answer_loss(model, batch),
        "its own loss": lambda: model(x, return_type="loss"),
    }
    times = {}
    for name, loss in ways.items():
        times[name] = milliseconds(lambda loss=loss: both(loss), 3, 2)
        table.add(f"forward + backward bf16 8 x 2048, {name}, ms", times[name])
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    both(ways["its own loss"])
    again = [p.grad for p in model.parameters() if p.grad is not None]
    table.add("forward + backward twice: same bits", 1, "= 1", all(map(torch.equal, first, again)))
    del first, again
    model.zero_grad(set_to_none=True)
    products = milliseconds(Products(model, 8 * 2048, backward=True), 3)
    table.add("forward + backward, its matrix products, ms", products)
    table.at_most("forward + backward / its matrix products", min(times.values()) / products, 2.2)
    recorded = GradientGraph(model)
    took = milliseconds(lambda: recorded(batch), 5, 5)
    table.add("forward + backward bf16 8 x 2048, the training head, recorded, ms", took)
    table.at_most("forward + backward, recorded / its matrix products", took / products, 2.2)
    kept = [p.grad.clone() for p in leaves if p.grad is not None]
    both(ways["the training head"])
    again = [p.grad for p in leaves if p.grad is not None]
    table.add("forward + backward recorded and eager: same bits", 1, "= 1", all(map(torch.equal, kept, again)))
    del recorded, kept, again
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)


PARTS: dict[str, Callable[[Table], Any]] = {
    "forwards": forwards,
    "caches": caches,
    "generation": generation,
    "backwards": backwards,
    "induction": induction,
    "windows": windows,
    "million": million,
}


def gate_gradients(gate: Gate, dtype: torch.dtype) -> None:
    """Gradients of the loss, blocks joined, and operators one by one, against float64; twice the same bits."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = HookedMamba(MambaConfig(d_model=WIDTH, n_layers=2, d_vocab=1000), dtype=dtype)
    exact = HookedMamba(model.cfg, device=DEVICE, dtype=torch.float64, backend="torch")
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    leaves, names = list(model.parameters()), [name for name, _ in model.named_parameters()]
    for length in (65, 1000):
        x = ids(2, length, vocabulary=1000)
        truth = torch.autograd.grad(exact(x, return_type="loss"), list(exact.parameters()))
        found, again = (torch.autograd.grad(model(x, return_type="loss"), leaves) for _ in range(2))
        look = ("blocks.0.mixer.hook_u", lambda value, hook: None)
        apart = torch.autograd.grad(model.run_with_hooks(x, return_type="loss", fwd_hooks=[look]), leaves)
        for name, a, b, other, want in zip(names, found, again, apart, truth, strict=True):
            what = f"{dtype} 2 x {length}, gradient of {name}"
            gate.same(f"{what}, twice", a, b)
            bar = max(1e-5 if dtype == torch.float32 else 3e-2, 2 * relative(other, want))
            gate.need(f"{what}: {relative(a, want):.1e}, bar {bar:.1e}", relative(a, want) <= bar)


def compile_text(dtype: torch.dtype, batch: int) -> None:
    """What forwards, caches and windows launch."""
    model, x = build(dtype, 2), ids(batch, 2048)
    with torch.no_grad():
        for _ in range(2):
            model(x, logits_to_keep=1)
            model.run_with_cache(x, logits_to_keep=1)
        cache = model.run_with_cache(x, names_filter="blocks.1.mixer.hook_h", return_type=None)[1]
        cache["blocks.1.mixer.hook_h"][:, 70:134]


def compile_tokens(dtype: torch.dtype, batch: int) -> None:
    """What generation launches."""
    model, x = build(dtype, 2), ids(batch, 100)
    model.generate(x, 40)
    model.generate(x, 4, 1.0, seed=0)
    model.generate(x[:, -1:], 3, state=model(x, return_state=True, return_type=None)[1])


def compile_backward(dtype: torch.dtype, batch: int) -> None:
    model, x = build(dtype, 2).requires_grad_(True), ids(batch, 2048)
    for _ in range(2):
        model(x, return_type="loss").backward()


def compile_pieces(dtype: torch.dtype, batch: int) -> None:
    import mambascope

    model, narrow = build(dtype, 2), mambascope.load("induction-2l", device=DEVICE)
    with torch.no_grad():
        model(ids(batch, 60_000), logits_to_keep=1)
        narrow(ids(batch, 1 << 20, vocabulary=16), logits_to_keep=1)


def _gated(check: Callable[[Gate, torch.dtype], None], dtype: torch.dtype) -> tuple[int, list[str]]:
    gate = Gate()
    check(gate, dtype)
    return gate.count, gate.failed


def _compiled(work: Callable[[torch.dtype, int], None], dtype: torch.dtype, batch: int) -> tuple[int, list[str]]:
    work(dtype, batch)
    return 0, []


def prepare(table: Table, limit: float) -> bool:
    """The gate, and all compilation, side by side in processes; whether every comparison was made and was good."""
    wide, half = torch.float32, torch.bfloat16
    begin, count, failed = time.perf_counter(), 0, []
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        waiting = {}
        for work, dtype, batch in (
            (compile_text, half, 1), (compile_text, half, 8), (compile_text, wide, 1), (compile_tokens, half, 1),
            (compile_tokens, half, 8), (compile_backward, half, 8), (compile_pieces, half, 1),
        ):  # fmt: skip
            waiting[pool.submit(_compiled, work, dtype, batch)] = f"{work.__name__} {dtype} {batch}"
        for check in (gate_graphs, gate_steps, gate_gradients):
            for dtype in (half, wide):
                waiting[pool.submit(_gated, check, dtype)] = f"{check.__name__} {dtype}"
        waiting[pool.submit(_gated, gate_products, wide)] = "gate_products"
        try:
            for done in as_completed(waiting, timeout=limit):
                name = waiting[done]
                try:
                    made, bad = done.result()
                except Exception as error:  # a gate that cannot run has failed
                    made, bad = 1, [f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"]
                count += made
                failed += [f"{name}: {what}" for what in bad]
                print(f"  {name}: {made} comparisons, {time.perf_counter() - begin:.0f} s", flush=True)
        except TimeoutError:
            failed += [f"no answer within {limit:.0f} s: {name}" for done, name in waiting.items() if not done.done()]
            for process in list((pool._processes or {}).values()):
                process.kill()
    for what in failed:
        print(f"  FAILED {what}", flush=True)
    table.add(f"gate: {count} comparisons, failed", len(failed), "= 0", not failed)
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(PARTS))
    parser.add_argument("--anyway", action="store_true", help="timings although the gate failed (the CSV shows that)")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which no further part begins")
    options = parser.parse_args()
    table, begin = Table(options.csv), time.perf_counter()
    if not prepare(table, options.limit * 0.6) and not options.anyway:
        sys.exit("the correctness gate failed: no timings")
    for name, part in PARTS.items():
        if options.only is not None and name not in options.only:
            continue
        if time.perf_counter() - begin > options.limit:
            print(f"left out for lack of time: {name}", flush=True)
            continue
        gc.collect()
        torch.cuda.empty_cache()
        try:
            part(table)
        except RuntimeError as error:  # out of memory, most of all: the other parts do not depend on it
            table.add(f"{name}: {type(error).__name__}, {str(error).splitlines()[0][:80]}", 0, "", False)
    print(f"done in {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""What sweeps and attribution cost, each against its alternatives, interleaved in one process.

    python -m tests.bench.bench_sweeps [--device cuda] [--layers 24] [--width 768] [--length 64] [--positions 32]
        [--text 1024] [--peer] [--rounds 3] [--cpu-time] [--csv FILE]

A correctness gate comes first: the sweep against naive runs (1e-5 of the largest
value, or twice what naive runs in other batches differ by), attribution's state contraction against float64.
Then, ratios of medians; on a GPU of the third time and later, from recordings, and apart of the first of a shape:

- a residual-stream sweep of layers × positions against the same sweep with every run in full: edits batched, either a
  layer's positions at a time or as many rows as a block takes (the faster counts); a state sweep against it;
- with ``--peer``: against the same sweep written with nnsight on transformers' Mamba (its PyTorch path);
- attribution at resid_pre, u, delta, B, C and h of all layers and positions of a text against one forward + backward
  of the same metric: time and peak memory.
"""

import argparse
import csv
import gc
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mambascope as ms
from mambascope.config import MambaConfig
from mambascope.hooks.sweeps.engine import _TOKENS
from mambascope.model import HookedMamba

VOCAB = 50280
SITES = ["resid_pre", "u", "delta", "B", "C", "h"]
METRIC = ms.LogitDifference(11, 12)


def build(layers: int, width: int, device: str, vocab: int) -> HookedMamba:
    torch.manual_seed(0)
    model = HookedMamba(MambaConfig(d_model=width, n_layers=layers, d_vocab=vocab, dt_max=0.5), device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj.weight")):
                p.mul_(2)  # lively, but not so that rounding grows from layer to layer
    return model


def texts(length: int, vocab: int, device: str) -> tuple[Tensor, Tensor]:
    clean = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    corrupted = clean.clone()
    for p in (1, length // 3, length // 2):
        corrupted[:, p] = (corrupted[:, p] + 7) % vocab
    return clean, corrupted


def put(old: Tensor, hook: Any, mine: Tensor, where: Tensor, new: Tensor) -> Tensor:
    old = old.clone()
    old[mine, where] = new
    return old


def naive(model: HookedMamba, clean: Tensor, corrupted: Tensor, positions: list[int], rows: int) -> Tensor:
    """A residual-stream sweep with every run in full: ``layers × positions``; ``rows`` edits in a batch."""
    n = model.cfg.n_layers
    names = [f"blocks.{i}.hook_resid_pre" for i in range(n)]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=names)
        edits = [(i, p) for i in range(n) for p in positions]
        found = []
        for a in range(0, len(edits), rows):
            some = edits[a : a + rows]
            hooks = []
            for i in sorted({i for i, _ in some}):
                mine = torch.tensor([j for j, (layer, _) in enumerate(some) if layer == i], device=clean.device)
                where = torch.tensor([p for layer, p in some if layer == i], device=clean.device)
                new = cache[names[i]][0, where]

                def put(
                    old: Tensor, hook: Any, mine: Tensor = mine, where: Tensor = where, new: Tensor = new
                ) -> Tensor:
                    old = old.clone()
                    old[mine, where] = new
                    return old

                hooks.append((names[i], put))
            logits = model.run_with_hooks(corrupted.expand(len(some), -1), fwd_hooks=hooks, logits_to_keep=1)[:, -1]
            found.append((logits[:, 11] - logits[:, 12]).double().cpu())
    return torch.cat(found).view(n, -1)


def peer_sweep(peer: Any, clean: Tensor, corrupted: Tensor, positions: list[int]) -> Tensor:
    """The same with nnsight on transformers' model: a trace a layer, all positions in its batch."""
    where = torch.tensor(positions, device=clean.device)
    rows = torch.arange(len(positions), device=clean.device)
    batch = corrupted.expand(len(positions), -1)
    found = []
    layers = len(peer.backbone.layers)
    with torch.no_grad():
        for i in range(layers):
            with peer.trace(clean):
                source = peer.backbone.embeddings.output if i == 0 else peer.backbone.layers[i - 1].output
                value = source[0, where].clone().save()
            with peer.trace(batch):
                target = peer.backbone.embeddings.output if i == 0 else peer.backbone.layers[i - 1].output
                target[rows, where] = value
                logits = peer.output.logits[:, -1].save()
            found.append((logits[:, 11] - logits[:, 12]).double())
    return torch.stack(found)


def peer_of(model: HookedMamba) -> Any:
    from nnsight import NNsight
    from transformers import MambaConfig as HfConfig
    from transformers import MambaForCausalLM

    cfg = model.cfg
    config = HfConfig(
        vocab_size=cfg.d_vocab, hidden_size=cfg.d_model, state_size=16, num_hidden_layers=cfg.n_layers, use_cache=False
    )
    peer = MambaForCausalLM(config).eval()
    names = dict(peer.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            source = name.replace("blocks.", "backbone.layers.").replace("ln_final", "backbone.norm_f")
            source = source.replace("embed.weight", "backbone.embeddings.weight") if name == "embed.weight" else source
            names[source].copy_(p)
    return NNsight(peer.to(model.device))


def seconds(
    cases: dict[str, Callable[[], object]], rounds: int, device: str, cpu_time: bool = False
) -> dict[str, float]:
    """Median seconds after two rounds that are not counted (the second makes recordings), the cases taken in turn."""
    clock = time.process_time if cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 2):
        for name, fn in cases.items():
            gc.collect()
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            fn()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ > 1:
                times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def unrecorded(model: HookedMamba, fn: Callable[[], object]) -> Callable[[], object]:
    """The same without recordings: what the first of a shape costs."""

    def run() -> None:
        model.graphs.enabled = False
        try:
            fn()
        finally:
            model.graphs.enabled = True

    return run


def peak(fn: Callable[[], object], device: str) -> float:
    """MB above what was held before. On a CPU: of the process's high-water mark, so call it in a fresh one."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fn()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3


def peak_apart(what: str) -> float:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.bench_sweeps", *sys.argv[1:], "--only", what]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def gate_contraction(device: str) -> float:
    """The largest error of the device's contraction against float64, relative to its largest entry."""
    from mambascope import ops
    from tests.ops.test_adjoint import case, contract

    worst = 0.0
    for shape, boundaries in (((1, 130, 96, 16), 64), ((2, 1000, 64, 16), 64)):
        x = case(*shape)
        truth = contract(x, torch.float64, boundaries, "reference")
        backend, _ = ops.resolve_backend("auto", device, torch.float32)
        way: Any = backend
        y = {k: v.to(device) for k, v in x.items()}
        y["delta"] = y["delta1"]
        got = contract(y, torch.float32, boundaries, way).double().cpu()
        worst = max(worst, float((got - truth).abs().max() / truth.abs().max()))
    return worst


def forward_backward(model: HookedMamba, tokens: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    logits = model(tokens, logits_to_keep=1)[:, -1]
    (logits[:, 11] - logits[:, 12]).mean().backward()
    model.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    for name, value in (
        ("layers", 24), ("width", 768), ("length", 64), ("positions", 32), ("text", 1024), ("rounds", 3),
        ("vocab", VOCAB),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--only", choices=("attribution", "plain"), help="print the peak memory of one of the two")
    parser.add_argument("--attribution-first", action="store_true")
    parser.add_argument(
        "--cpu-time", action="store_true", help="the process's own time: for a busy machine, one thread"
    )
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*mostly noise")
    device = args.device
    model = build(args.layers, args.width, device, args.vocab)
    if args.only:
        short, long = texts(8, args.vocab, device), texts(args.text, args.vocab, device)
        run = {
            "attribution": lambda x: ms.attribute(model, *x, METRIC, SITES),
            "plain": lambda x: forward_backward(model, x[1]),
        }[args.only]
        run(short)
        print(peak(lambda: run(long), device))
        return
    report = Report(args, device)
    parts = [measure_attribution, measure_sweeps] if args.attribution_first else [measure_sweeps, measure_attribution]
    for part in (*parts, measure_peer):
        part(model, args, report)


class Report:
    """Prints every number when it is known, and writes what is known so far."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        shape = f"{args.layers}x{args.width}, {args.length} tokens, {args.positions} positions"
        self.rows: list[tuple[str, Any]] = [("device", name), ("torch", torch.__version__), ("shape", shape)]
        self.path: Path | None = args.csv

    def __call__(self, name: str, value: float) -> None:
        print(f"{name:56} {value:12.5g}", flush=True)
        self.rows.append((name, value))
        if self.path is not None:
            with self.path.open("w", newline="") as out:
                csv.writer(out).writerows([("what", "value"), *self.rows])


def positions_of(args: argparse.Namespace) -> list[int]:
    stride = args.length // args.positions
    return list(range(stride - 1, args.length, stride))[: args.positions]


def measure_sweeps(model: HookedMamba, args: argparse.Namespace, report: Report) -> None:
    device = args.device
    clean, corrupted = texts(args.length, args.vocab, device)
    positions = positions_of(args)
    over = {"positions": positions}
    most = max(1, min(args.positions * args.layers, _TOKENS.get(device, _TOKENS["cuda"]) // args.length))

    ours = ms.sweep(model, clean, corrupted, METRIC, over).values[0, :, :, 0]
    by_layer = naive(model, clean, corrupted, positions, args.positions)
    size = float(by_layer.abs().max())
    noise = float((naive(model, clean, corrupted, positions, most) - by_layer).abs().max()) / size
    apart = float((ours - by_layer).abs().max()) / size
    report("gate: sweep against naive, relative", apart)
    report("      naive against naive in other batches", noise)
    if not apart < max(1e-5, 2 * noise):
        raise SystemExit("red: no timings without correctness")

    cases: dict[str, Callable[[], object]] = {
        "sweep resid": lambda: ms.sweep(model, clean, corrupted, METRIC, over),
        "naive, largest batches": lambda: naive(model, clean, corrupted, positions, most),
        "naive, a layer at a time": lambda: naive(model, clean, corrupted, positions, args.positions),
        "sweep h": lambda: ms.sweep(model, clean, corrupted, METRIC, {**over, "sites": ["h"]}),
    }
    if device == "cuda":
        cases["sweep resid, first of its shape"] = unrecorded(model, cases["sweep resid"])
        cases["sweep h, first of its shape"] = unrecorded(model, cases["sweep h"])
    t = seconds(cases, args.rounds, device, args.cpu_time)
    for name, value in t.items():
        report(f"s: {name}", value)
    later = ms.sweep(model, clean, corrupted, METRIC, over).values[0, :, :, 0]
    drift = float((later - ours).abs().max()) / size
    report("gate: the last sweep against the first", drift)
    if not drift < 1e-6:
        raise SystemExit("red: these timings are of something that is not correct")
    least = min(t["naive, a layer at a time"], t["naive, largest batches"])
    report("sweep resid / naive (bar 0.35)", t["sweep resid"] / least)
    report("sweep h / sweep resid (bar 2)", t["sweep h"] / t["sweep resid"])
    if device == "cuda":
        report("MB held by recordings", model.repeats.held / 1e6)
        report("sweep resid, first of its shape / naive", t["sweep resid, first of its shape"] / least)


def measure_peer(model: HookedMamba, args: argparse.Namespace, report: Report) -> None:
    if not args.peer:
        return
    clean, corrupted = texts(args.length, args.vocab, args.device)
    positions = positions_of(args)
    torch.backends.cudnn.allow_tf32 = False  # transformers' convolution would use it
    peer = peer_of(model)
    ours = ms.sweep(model, clean, corrupted, METRIC, {"positions": positions}).values[0, :, :, 0]
    found = peer_sweep(peer, clean, corrupted, positions).cpu()
    apart = float((found - ours).abs().max() / ours.abs().max())
    report("gate: nnsight on transformers against ours, relative", apart)
    if not apart < 1e-4:
        raise SystemExit("red: nnsight's sweep is another one")
    cases: dict[str, Callable[[], object]] = {
        "sweep resid": lambda: ms.sweep(model, clean, corrupted, METRIC, {"positions": positions}),
        "nnsight": lambda: peer_sweep(peer, clean, corrupted, positions),
    }
    t = seconds(cases, args.rounds, args.device, args.cpu_time)
    for name, value in t.items():
        report(f"s: {name}, beside nnsight", value)
    report("sweep resid / nnsight on transformers (bar 0.1)", t["sweep resid"] / t["nnsight"])


def measure_attribution(model: HookedMamba, args: argparse.Namespace, report: Report) -> None:
    device = args.device
    clean, corrupted = texts(args.text, args.vocab, device)
    cases = {
        "forward + backward": lambda: forward_backward(model, corrupted),
        "attribution": lambda: ms.attribute(model, clean, corrupted, METRIC, SITES),
        "attribution h": lambda: ms.attribute(model, clean, corrupted, METRIC, "h"),
    }
    first = unrecorded(model, cases["attribution"])
    timed = {**cases, "attribution, first of its shape": first} if device == "cuda" else cases
    t = seconds(timed, args.rounds, device, args.cpu_time)
    for name, value in t.items():
        report(f"s: {name}, {args.text} tokens", value)
    report("attribution / forward + backward, time (bar 3)", t["attribution"] / t["forward + backward"])
    if device == "cuda":
        whole = t["attribution, first of its shape"] / t["forward + backward"]
        report("attribution, first of its shape / forward + backward, time", whole)
        report("MB held by recordings, of sweeps too", model.repeats.held / 1e6)
        memory = [peak(first, device), peak(cases["forward + backward"], device)]
    else:
        memory = [peak_apart(what) for what in ("attribution", "plain")]
    for name, value in zip(("attribution", "forward + backward"), memory, strict=True):
        report(f"MB: {name}, {args.text} tokens", value)
    report("attribution / forward + backward, memory (bar 2)", memory[0] / memory[1] if memory[1] else float("nan"))
    error = gate_contraction(device)
    report("gate: contraction against float64", error)
    if not error < 1e-5:
        raise SystemExit("red: these timings are of something that is not correct")


if __name__ == "__main__":
    main()

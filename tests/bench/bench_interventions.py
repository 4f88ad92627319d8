"""What an intervention costs beside the plain forward, at 130m size or smaller, cases taken in turn in one process.

    python -m tests.bench.bench_interventions --device cuda [--cases state,residual] [--limit SECONDS] [--csv FILE]

Medians and minima of the forward pass with one intervention, beside the plain pass in turn, and their ratios; every row
is printed and written as soon as it is there. The weights are random: times do not depend on them. Last the gate: a
state edit at another position in every row against its closed form in float64, and a knockout against the run in which
those tokens write nothing.
"""

import argparse
import csv
import gc
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mambascope as ms
from mambascope.config import MambaConfig
from mambascope.model import HookedMamba
from tests.bench.origin import commit

WIDTH, VOCAB = 768, 50280
iv = ms.interventions


def build(layers: int, device: str, dtype: torch.dtype) -> HookedMamba:
    torch.manual_seed(0)
    with torch.device(device):  # drawn where they are used
        return HookedMamba(MambaConfig(d_model=WIDTH, n_layers=layers, d_vocab=VOCAB)).to(device=device, dtype=dtype)


def gate(device: str) -> None:
    """SystemExit unless edits do what their closed forms say, on the path that is about to be timed."""
    torch.manual_seed(1)
    model = HookedMamba(MambaConfig(d_model=64, n_layers=2, d_vocab=100)).to(device)
    with torch.no_grad():
        for p in (model.blocks[1].mixer.in_proj.weight, model.blocks[1].mixer.x_proj.weight):
            p.mul_(4)
    tokens = torch.randint(0, 100, (8, 300), device=device)
    with torch.no_grad():
        _, plain = model.run_with_cache(tokens)
        for where in ([0, 3, 64, 100, 130, 131, 298, 299], [150] * 8):
            worst = _state_error(model, tokens, plain, where)
            print(f"gate: state edits at {where}: {worst:.1e}")
            if not worst < 1e-5:
                sys.exit(f"the state edit is {worst:.1e} off its closed form")
        y: list[Tensor] = []
        hooks = [iv.knockout(1, [5, 9], slice(100, None)), ("blocks.1.mixer.hook_y", lambda v, hook: y.append(v))]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        hooks = [
            ("blocks.1.mixer.hook_u_write[5]", lambda v, hook: v * 0),
            ("blocks.1.mixer.hook_u_write[9]", lambda v, hook: v * 0),
            ("blocks.1.mixer.hook_y", lambda v, hook: y.append(v)),
        ]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    off = float((y[0][:, 100:] - y[1][:, 100:]).abs().max() / y[1].abs().max())
    kept = float((y[0][:, :100] - plain["y", 1][:, :100]).abs().max() / y[1].abs().max())
    print(f"gate: knockout: targets {off:.1e}, the others {kept:.1e}; path {model.explain_path()[1].backend}")
    if not max(off, kept) < 1e-5:
        sys.exit("the knockout is not the run without those writes")


def _state_error(model: HookedMamba, tokens: Tensor, plain: Any, where: list[int]) -> float:
    cfg, y = model.cfg, []
    e = torch.randn(len(where), cfg.d_inner, cfg.d_state, device=tokens.device)
    site = ms.at("blocks.1.mixer.hook_h", where)
    hooks = [(site, lambda h, hook: h + e), ("blocks.1.mixer.hook_y", lambda v, hook: y.append(v))]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    change, A, worst = y[0].double() - plain["y", 1].double(), model.decay(1).double(), 0.0
    for b, t in enumerate(where):
        delta, C = plain["delta", 1][b, t + 1 :].double(), plain["C", 1][b, t:].double()
        since = torch.cat([torch.zeros_like(plain["delta", 1][b, :1]).double(), delta.cumsum(0)])
        wanted = (C[:, None] * torch.exp(A * since[..., None]) * e[b].double()).sum(-1)
        worst = max(worst, float((change[b, t:] - wanted).abs().max() / wanted.abs().max()))
    return worst


def cases_of(model: HookedMamba, length: int, batch: int) -> dict[str, Callable[[], object]]:
    """The plain run and the runs with one intervention, the most asked for first."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (batch, length), generator=generator).to(model.device)
    layer, t = model.cfg.n_layers // 2, length // 2
    h, resid = f"blocks.{layer}.mixer.hook_h", f"blocks.{layer}.hook_resid_pre"
    spread = [(b * length) // batch + 1 for b in range(batch)]
    held: dict[str, Any] = {}

    def patch(site: str) -> Any:
        if site not in held:
            held[site] = iv.patch(f"{site}[{t}]", model.run_with_cache(ids, names_filter=[site])[1])
        return held[site]

    def run(edit: Any) -> Any:
        return model.run_with(ids, edit, logits_to_keep=1)

    def hooked(fn: Any) -> Any:
        return model.run_with_hooks(ids, fwd_hooks=[(f"{h}[{t}]", fn)], logits_to_keep=1)

    one, rows = iv.decay(layer, t, 0.5), iv.decay(layer, spread, 0.5)
    four = iv.decay(layer, [[t // 2, t, t + 5, length - 1]] * batch, 0.5)
    knock = iv.knockout(layer, [t // 2], slice(t, None))
    conv = iv.knockout(layer, [t // 2], slice(t, None), through="conv")
    return {
        "plain": lambda: model(ids, logits_to_keep=1),
        "state edit": lambda: run(one),
        "residual patch": lambda: run(patch(resid)),
        "state patch": lambda: run(patch(h)),
        "state edits, other positions in every row": lambda: run(rows),
        "knockout": lambda: run(knock),
        "knockout through the conv": lambda: run(conv),
        "state edits at 4 tokens": lambda: run(four),
        "state edit by a function": lambda: hooked(lambda value, hook: value * 0.5),
        "state read": lambda: hooked(lambda value, hook: None),
    }


def compile_ahead(cells: list[str], length: int, names: list[str]) -> list[Any]:
    """Compile for every case in a process of its own (forked before CUDA starts), into Triton's cache on disk."""
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_compile, args=(cell, length, name)) for cell in cells for name in names]
    for job in jobs:
        job.start()
    return jobs


def wait_for(jobs: list[Any], until: float) -> None:
    for job in jobs:
        job.join(max(0.0, until - time.perf_counter()))
        if job.is_alive():
            job.terminate()


def _compile(cell: str, length: int, name: str) -> None:
    dtype, batch = cell.split(":")
    model = build(2, "cuda", getattr(torch, dtype))
    with torch.no_grad():
        case = cases_of(model, length, int(batch))[name]
        for _ in range(2):
            case()


def warm(cases: dict[str, Callable[[], object]], model: HookedMamba) -> str:
    """Run every case until nothing compiles and nothing is recorded any more; the forms of the last."""
    for fn in cases.values():
        for _ in range(3):
            fn()
    return "+".join(sorted({path.form for path in model.explain_path()}))


def timed(cases: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, tuple[float, float]]:
    """Median and smallest milliseconds, the cases taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()
    for _ in range(repeats):
        for name, fn in cases.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            fn()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    gc.enable()
    return {name: (statistics.median(values), min(values)) for name, values in times.items()}


COLUMNS = (
    *("commit", "device", "torch", "dtype", "batch", "length", "layers", "case"),
    *("ms", "plain_ms", "ratio", "min_ms", "plain_min_ms", "min_ratio"),
)
NAMES = (
    *("state edit", "residual patch", "state patch", "state edits, other positions in every row", "knockout"),
    *("knockout through the conv", "state edits at 4 tokens", "state edit by a function", "state read"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--cells", default="float32:1,bfloat16:1,float32:8,bfloat16:8", help="dtype:batch, in order")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cases", default="", help="parts of names; the plain run is always there")
    parser.add_argument("--limit", type=float, default=float("inf"), help="begin nothing new after so many seconds")
    parser.add_argument("--compile", type=float, default=0, help="seconds for compiling in parallel first")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    start, rows, left, cells = time.perf_counter(), [], [], args.cells.split(",")
    wanted = [part for part in args.cases.split(",") if part] or [""]
    names = [n for n in NAMES if n in wanted or any(part in n for part in wanted if part not in NAMES)]
    jobs = compile_ahead(cells, args.length, ["plain", *names]) if args.compile else []
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    models = {cell: build(args.layers, args.device, getattr(torch, cell.split(":")[0])) for cell in cells}
    wait_for(jobs, start + args.compile)
    print(f"[{time.perf_counter() - start:5.1f} s] {'compiled ahead' if jobs else 'models built'}", flush=True)
    for name in names:
        for cell, model in models.items():
            if time.perf_counter() - start > args.limit:
                left.append(f"{cell} {name}")
                continue
            dtype, batch = cell.split(":")
            with torch.no_grad():
                every = cases_of(model, args.length, int(batch))
                cases = {"plain": every["plain"], name: every[name]}
                form = warm(cases, model)
                took = timed(cases, args.repeats, args.device)
            (plain, least), (a, b) = took["plain"], took[name]
            print(
                f"[{time.perf_counter() - start:5.1f} s] {cell} x {args.length}, {name}: median {a:.3f} ms, plain "
                f"{plain:.3f}, ratio {a / plain:.3f}; smallest {b:.3f}, {least:.3f}, {b / least:.3f}; {form}",
                flush=True,
            )
            about = [commit(), device, torch.__version__, dtype, batch, args.length, args.layers, name]
            rows.append([*about, *(round(x, 4) for x in (a, plain, a / plain, b, least, b / least))])
            if args.csv:  # after every row, so that what is done is kept
                with args.csv.open("w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerows([COLUMNS, *rows])
    edits = [row for row in rows if row[7] == "state edit"]
    print("bar, one state edit at most 1.15 x plain:", ", ".join(f"{r[3]} x{r[4]}: {r[10]:.3f}" for r in edits))
    if left:
        print("left out for lack of time:", "; ".join(left), flush=True)
    if time.perf_counter() - start < args.limit:
        gate(args.device)


if __name__ == "__main__":
    main()

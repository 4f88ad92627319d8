"""The drop-ins beside what they replace: ``accelerate`` beside transformers, ``selective_scan_fn`` beside mamba_ssm.

    python tests/bench/bench_drop_in.py [--csv FILE] [--anchor DIR] [--only scan|model] [--threads N] [--limit SECONDS]
        [--first BxL …]

On a CPU: a small model plain and accelerated, and what the layout ``B D L`` costs the scan. On a GPU: a correctness
gate, then the scan at the shapes of the other benchmarks, transposes included, with mamba_ssm's CUDA function in the
same run; the bar is 1.0 in every cell. ``--anchor`` names the folder of a built ``mamba_ssm`` (an importable one is
taken as it is); without one there is no verdict, and the table says so.
"""

import argparse
import csv
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from math import exp, log
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

import mambascope as ms
from mambascope import ops
from tests.bench import bench_scan_gpu as gpu

CUDA = torch.cuda.is_available()
RED, PLAIN = gpu.RED, gpu.PLAIN
ORDER = (0, 1, 2, 3, 4, 5, 6, 7)  # of bench_scan_gpu's problem, what selective_scan_fn takes
TIMED = (0, 1, 3, 4, 6)  # those with a time axis


def turned(x: list[Tensor | None], *, lying: bool = False) -> list[Tensor]:
    """u, delta, A, B, C, D, z, bias with ``B D L`` in shape, and in memory unless ``lying`` as ours."""
    return [_leaf(x[i], i in TIMED, lying) for i in ORDER]  # type: ignore[arg-type]


def _leaf(t: Tensor, timed: bool, lying: bool) -> Tensor:
    t = t.contiguous().transpose(1, 2) if timed else t
    return (t if lying else t.contiguous()).detach().requires_grad_()


def clock(call: Callable[[], Any], seconds: float = 1.5, least: int = 5) -> float:
    """Median milliseconds on the host's clock."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or (time.perf_counter() - begin < seconds and len(times) < 200):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


# --- accelerate beside transformers ---


def model_calls(model: Any, tokens: Tensor) -> dict[str, Callable[[], Any]]:
    short = tokens[:, :16]

    def forward() -> Any:
        with torch.no_grad():
            return model(tokens, use_cache=False).logits

    def train() -> Any:
        return torch.autograd.grad(model(tokens, labels=tokens, use_cache=False).loss, list(model.parameters()))

    def generate() -> Any:
        return model.generate(short, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)

    return {"forward": forward, "forward + backward": train, "generate 32": generate}


def model_times() -> list[dict[str, Any]]:
    import transformers

    transformers.logging.set_verbosity_error()
    size = {"hidden_size": 768, "num_hidden_layers": 24} if CUDA else {"hidden_size": 256, "num_hidden_layers": 4}
    batch, length = (1, 512) if CUDA else (2, 256)
    rows = []
    for family in ("Mamba", "FalconMamba"):
        torch.manual_seed(0)
        config = getattr(transformers, family + "Config")(vocab_size=1000, **size)
        model = getattr(transformers, family + "ForCausalLM")(config).to(gpu.DEVICE).eval()
        tokens = torch.randint(1, 1000, (batch, length), device=gpu.DEVICE)
        calls = model_calls(model, tokens)
        plain, texts = calls["forward"](), calls["generate 32"]()
        before = {what: clock(call) for what, call in calls.items()}
        with ms.accelerate(model):
            apart = float((calls["forward"]() - plain).abs().max() / plain.abs().max())
            same = bool(torch.equal(calls["generate 32"](), texts))
            after = {what: clock(call) for what, call in calls.items()}
        shape = f"{size['hidden_size']} wide, {size['num_hidden_layers']} layers, {batch} x {length}"
        verdict = f"logits within {apart:.1e}, " + ("same tokens" if same else f"{RED}other tokens{PLAIN}")
        print(f"{family}, {shape}: {verdict}", flush=True)
        for what in calls:
            ratio = before[what] / after[what]
            print(f"  {what:20} {before[what]:9.1f} ms {after[what]:9.1f} ms   {ratio:.1f} x", flush=True)
            row = {"what": f"{family} {what}", "shape": shape, "theirs ms": before[what], "ours ms": after[what]}
            rows.append(row | {"x": ratio, "logits apart": apart, "same tokens": same})
    return rows


# --- selective_scan_fn ---


def cpu_scan_times() -> list[dict[str, Any]]:
    """What the layout costs: our own call on ``B L D``, the drop-in on ``B D L``, and on views of ``B L D``."""
    rows = []
    print("selective_scan_fn, D 1536, N 16, fp32: ops.selective_scan on B L D; B D L; B D L that lies as B L D (ms)")
    for batch, length in ((1, 512), (1, 2048), (8, 256)):
        x = gpu.problem(batch, length, gpu.CHANNELS, gpu.STATES, torch.float32, padded=False)
        leaves = [turned(x, lying=lying) for lying in (False, True)]
        own = [t.detach().requires_grad_() for t in x if t is not None]
        dy = torch.randn(batch, length, gpu.CHANNELS)
        dy_turned = dy.transpose(1, 2).contiguous()

        def scan(u: Any, raw: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any) -> Tensor:
            return ops.selective_scan(u, raw, A, B, C, D, z, dt_bias=bias, dt_softplus=True).y

        def forward(call: Callable[[], Any]) -> float:
            with torch.no_grad():
                return clock(call, 1.0)

        def both(arguments: list[Tensor], call: Callable[..., Tensor], grad: Tensor) -> float:
            return clock(lambda: torch.autograd.grad(call(*arguments), arguments, grad), 1.0)

        def drop_in(*arguments: Any) -> Any:
            return ops.selective_scan_fn(*arguments, delta_softplus=True)

        row: dict[str, Any] = {"what": "scan", "shape": f"{batch} x {length}"}
        row["fwd B L D"] = forward(lambda: scan(*own))
        row["fwd B D L"] = forward(lambda: drop_in(*leaves[0]))
        row["fwd lying"] = forward(lambda: drop_in(*leaves[1]))
        row["f+b B L D"] = both(own, scan, dy)
        row["f+b B D L"] = both(leaves[0], drop_in, dy_turned)
        row["f+b lying"] = both(leaves[1], drop_in, dy.transpose(1, 2))
        cells = " ".join(f"{k} {v:.1f}" for k, v in row.items() if isinstance(v, float))
        print(f"  {row['shape']:>10}: {cells}", flush=True)
        rows.append(row)
    return rows


CASES = (
    (2, 65, 1536, 16, "fp32", False),
    (2, 65, 1536, 16, "bf16", False),
    (1, 300, 1000, 16, "bf16", False),
    (3, 63, 33, 7, "fp32", False),
    (2, 40, 48, 16, "fp16", True),
    (1, 1, 64, 16, "fp32", False),
)
"""Of the gate: B, L, D, N, dtype, and whether without D, z, bias and softplus."""


def check(batch: int, length: int, channels: int, states: int, dtype: str, bare: bool) -> list[str]:
    """Complaints: outputs, last state and gradients against the float64 recurrence; two runs; the other layout."""
    bad = []
    kind = gpu.DTYPES[dtype]
    x = gpu.problem(batch, length, channels, states, kind, bare=bare, padded=False)
    options = {"delta_softplus": not bare, "return_last_state": True}
    results = []
    for lying in (False, False, True):
        leaves = [None if x[i] is None else _leaf(x[i], i in TIMED, lying) for i in ORDER]  # type: ignore[arg-type]
        out, last = ops.selective_scan_fn(*leaves, **options)  # type: ignore[arg-type]
        torch.manual_seed(7)
        dout, dlast = torch.randn(out.shape, device=out.device).to(kind), torch.randn_like(last)
        given = [t for t in leaves if t is not None]
        grads = torch.autograd.grad([out, last], given, [dout, dlast])
        results.append([out.detach(), last.detach(), *grads])
    bound = torch.zeros(batch, -(-length // 64), channels, states, device=gpu.DEVICE)
    seeds = [dout.transpose(1, 2).float(), dlast, bound]
    names = ["out", "last_state", *(gpu.NAMES[i] for i in ORDER if x[i] is not None)]
    exact, rough = (gpu.plain(x, 64, d, seeds) for d in (torch.float64, torch.float32))
    for truth in (exact, rough):
        del truth[2], truth[-1]  # boundary states, dh0
    kept = [0, 1, *(2 + i for i in ORDER if x[i] is not None)]
    for name, a, twice, other, i in zip(names, *results, kept, strict=True):
        b, c = exact[i], rough[i]
        if a.shape != b.shape:
            b, c = b.transpose(1, 2), c.transpose(1, 2)
        bar = max(1e-6, 2 * gpu.error(c, b))
        if a.dtype != torch.float32:
            bar += torch.finfo(a.dtype).eps / 2 * 1.1
        what = f"{batch} x {length} x {channels} {dtype} {name}"
        if not gpu.error(a, b) <= bar:
            bad.append(f"{what}: error {gpu.error(a, b):.1e}, bar {bar:.1e}")
        if not gpu.same(a, twice):
            bad.append(f"{what}: other bits in a second run")
        if not gpu.error(other, b) <= bar:
            bad.append(f"{what}: error {gpu.error(other, b):.1e} where it lies as ours, bar {bar:.1e}")
    return bad


def one_job(job: tuple[Any, ...]) -> list[str]:
    """A case of the gate, or the first calls of a timed cell: they compile its kernels, into Triton's cache on disk."""
    try:
        if len(job) == len(CASES[0]):
            return check(*job)
        batch, length, dtype = job
        for call in our_calls(batch, length, gpu.DTYPES[dtype]).values():
            call(0)
        torch.cuda.synchronize()
        return []
    except Exception as fault:
        return [f"{' x '.join(map(str, job))}: {type(fault).__name__}: {str(fault)[:300]}"]


def gate(cells: list[tuple[int, int, str]], workers: int) -> list[str]:
    """Complaints of all cases. On a GPU in several processes, with what the timed cells will launch compiled there."""
    if not CUDA:
        return [line for case in CASES for line in one_job(case)]
    start = time.time()
    compiled = {(batch, 512 if batch == 1 else 64, dtype) for batch, _, dtype in cells}  # whatever L is
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        bad = [line for found in pool.map(one_job, [*compiled, *CASES]) for line in found]
    print(f"gate and compilation: {time.time() - start:.0f} s", flush=True)
    return bad


def our_calls(batch: int, length: int, dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    sets = 1 if batch * length > 65536 else 3
    problems = [gpu.problem(batch, length, gpu.CHANNELS, gpu.STATES, dtype, padded=False) for _ in range(sets)]
    leaves = [turned(x) for x in problems]
    lying = [turned(x, lying=True) for x in problems]
    grads = [torch.randn(batch, gpu.CHANNELS, length, device=gpu.DEVICE).to(dtype) for _ in problems]

    def forward(i: int) -> Any:
        with torch.no_grad():
            return ops.selective_scan_fn(*leaves[i % sets], delta_softplus=True)

    def of_views(i: int) -> Any:
        with torch.no_grad():
            return ops.selective_scan_fn(*lying[i % sets], delta_softplus=True)

    def both(i: int) -> Any:
        x = leaves[i % sets]
        return torch.autograd.grad(ops.selective_scan_fn(*x, delta_softplus=True), x, grads[i % sets])  # type: ignore[arg-type]

    return {"fwd": forward, "fwd lying": of_views, "f+b": both}


def one_row(batch: int, length: int, name: str, anchor: Any) -> dict[str, Any]:
    """Microseconds of one cell; eager calls of ours and of the anchor take turns."""
    row: dict[str, Any] = {"what": "scan", "B": batch, "L": length, "dtype": name}
    where = f"{batch} x {length} {name}"
    calls = our_calls(batch, length, gpu.DTYPES[name])
    theirs = {} if anchor is None else gpu.anchor_calls(anchor, batch, length, gpu.DTYPES[name])
    for what in calls:
        with gpu.surviving(f"{where} {what}"):
            ours, others = [], []
            for _ in range(3):
                ours.append(gpu.timed(calls[what], budget=0.15))
                if what in theirs:
                    others.append(gpu.timed(theirs[what], budget=0.15))
            row[what] = median(ours)
            if others:
                row[f"anchor {what}"] = median(others)
                row[f"x {what}"] = row[f"anchor {what}"] / row[what]
    for what in ("fwd", "f+b") if batch * length <= 20000 else ():
        with gpu.surviving(f"{where} {what} in a graph"):
            row[f"{what} graph"] = gpu.graphed(calls[what])
    for what, recorded in zip(("fwd", "f+b"), gpu.RECORDED[batch, length][name], strict=True):
        if what in row:
            row[f"recorded x {what}"] = recorded / row[what]
    return row


def gpu_scan_times(
    cells: list[tuple[int, int, str]], anchor: Any, limit: float, started: float
) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each."""
    print("microseconds, medians; ratio to mamba_ssm in this run, and to its times as recorded on an H100 earlier")
    head = ("shape", "type", "fwd", "graph", "lying", "f+b", "graph", "anchor fwd", "f+b", "x fwd", "x f+b", "recorded")
    print("  " + " ".join(f"{h:>10}" for h in head), flush=True)
    keys = ("fwd", "fwd graph", "fwd lying", "f+b", "f+b graph", "anchor fwd", "anchor f+b", "x fwd", "x f+b")
    rows: list[dict[str, Any]] = []
    for batch, length, name in cells:
        if time.time() - started > limit:
            print(f"  {RED}out of time before {batch} x {length} {name}{PLAIN}", flush=True)
            break
        row = one_row(batch, length, name, anchor)
        torch.cuda.empty_cache()
        shown = [f"{batch}x{length}", name, *(_cell(row, key) for key in keys)]
        shown.append(f"{_cell(row, 'recorded x fwd')},{_cell(row, 'recorded x f+b')}")
        print("  " + " ".join(f"{c:>10}" for c in shown), flush=True)
        rows.append(row)
        yield rows
    _verdict(rows, anchor)


def _cell(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return "-"
    return f"{row[key]:.2f}" if "x " in key else f"{row[key]:.0f}"


def _verdict(rows: list[dict[str, Any]], anchor: Any) -> None:
    if anchor is None:
        print(f"{RED}no anchor, no verdict{PLAIN}")
        return
    found = [row[key] for row in rows for key in ("x fwd", "x f+b") if key in row]
    if len(found) < 4 * len(gpu.SHAPES):
        print(f"{RED}no verdict: {4 * len(gpu.SHAPES) - len(found)} of the cells are missing{PLAIN}")
    if not found:
        return
    below = sum(x < 1 for x in found)
    mean = exp(sum(map(log, found)) / len(found))
    verdict = "every cell at or above 1.0" if not below else f"{RED}{below} of {len(found)} cells below 1.0{PLAIN}"
    print(f"{verdict}; geometric mean {mean:.2f}")


def save(path: str, rows: list[dict[str, Any]], passed: bool | None) -> None:
    about = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": gpu.commit(),
        "gate": {True: "passed", False: "FAILED", None: "not run"}[passed],
    }
    fields = list(dict.fromkeys([*about, *(key for row in rows for key in row)]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            writer.writerow(about | {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default=os.path.join(os.environ.get("OUT", "."), "bench_drop_in.csv"))
    parser.add_argument("--anchor", help="folder of a built mamba_ssm")
    parser.add_argument("--only", choices=("scan", "model"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--first", nargs="+", default=[], metavar="BxL", help="shapes to time before the others")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes of the GPU's gate")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which no further shape is timed")
    arguments = parser.parse_args()
    started = time.time()
    torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {arguments.threads} thread(s)"
    print(f"{device}, torch {torch.__version__}, commit {gpu.commit()}", flush=True)
    rows: list[dict[str, Any]] = []
    passed = None
    if arguments.only != "model":
        cells = [(*shape, dtype) for shape in gpu.in_order(arguments.first) for dtype in ("fp32", "bf16")]
        bad = gate(cells, arguments.workers)
        passed = not bad
        print(f"gate: {'passed' if passed else RED + 'FAILED: times are of unverified kernels' + PLAIN}", flush=True)
        for line in bad[:20]:
            print(f"  {line}")
        if CUDA:
            for rows in gpu_scan_times(cells, gpu.find_anchor(arguments.anchor), arguments.limit, started):
                save(arguments.csv, rows, passed)
        else:
            rows += cpu_scan_times()
    if arguments.only != "scan":
        rows += model_times()
    save(arguments.csv, rows, passed)
    print(f"written: {arguments.csv}; {time.time() - started:.0f} s")
    return 1 if passed is False else 0


if __name__ == "__main__":
    raise SystemExit(main())

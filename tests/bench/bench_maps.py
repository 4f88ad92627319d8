"""Effective kernels of one layer at 130m size (D = 1536, N = 16), float32: maps, rows, columns; time and memory.

    python -m tests.bench.bench_maps [--device cuda|cpu] [--threads 2] [--repeats 7] [--limit SECONDS] [--csv FILE]

First the gate, at the sizes that are timed: maps, rows and columns against float64 on the plain torch path, on steps
from tame to those that make A_bar vanish; a red gate reports no time. Then, in one process and in turn: ours, the plain
torch tiles (what this repository did before) and TransformerLens' own method, called with the tensors that its hooks
would hold (256 tokens on a GPU, 64 on a CPU: it needs O(B D N L²) memory), and a whole model's cache, where the first
map of a layer recomputes the block and the second does not. The cells of the bars come first; past the limit the rest
is left out, and named. On a GPU the kernels are compiled by processes side by side before that.
"""

import argparse
import csv
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mambascope import ops
from mambascope.ops.maps import REDUCTIONS
from tests.bench.origin import commit

D, N, R, K = 1536, 16, 48, 4
BAR = 1e-5
PLANS = {  # other cuts and kernels than the table's choice, for comparison
    "64 x 64": {"tile": 64, "warps": 4},
    "portable kernels": {"hopper": False},
}
LAST_BAR = "torch tiles, against TransformerLens"
"""The last cell that a bar is about; a model's cache comes next."""
Tensors = dict[str, Tensor]


def layer(length: int, device: str, scale: float = 0.1, channels: int = D, seed: int = 0) -> Tensors:
    """delta, A, B, C as a model has them: B and C slices of one product."""
    g = torch.Generator(device).manual_seed(seed)
    low = torch.randn(1, length, R + 2 * N, generator=g, device=device)
    return {
        "delta": scale * torch.rand(1, length, channels, generator=g, device=device) ** 3,
        "A": -torch.arange(1.0, N + 1, device=device) * (0.5 + torch.rand(channels, N, generator=g, device=device)),
        "B": low[..., R : R + N],
        "C": low[..., R + N :],
    }


def path(length: int, device: str, channels: int = D) -> dict[str, Tensor]:
    g = torch.Generator(device).manual_seed(1)
    return {
        "gain": torch.rand(1, length, channels, generator=g, device=device),
        "taps": torch.randn(channels, K, generator=g, device=device),
    }


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).abs().max() / truth.double().abs().max())


def gate(device: str) -> dict[str, float]:
    """Relative errors, the largest of each case."""
    found: dict[str, float] = {}
    length, channels = (2048, D) if device == "cuda" else (512, 96)
    cases = [("scan", scale) for scale in (1e-6, 0.1, 20.0)] + [("conv", 0.1)]
    for name, scale in cases:
        given: Any = layer(length, device, scale, channels) | (path(length, device, channels) if name == "conv" else {})
        exact: Any = {k: v.double() for k, v in given.items()}
        whole, key = ops.kernel_map(**given), f"{name} delta ≤ {scale:g}"
        for rows, cols in ((slice(length // 2, length // 2 + 40), slice(None)), (slice(-40, None), slice(0, 64))):
            truth = ops.kernel_map(**exact, rows=rows, cols=cols, backend="torch")
            if truth.any():  # with large steps everything is forgotten there
                found[f"map {key} rows {rows.start}"] = error(whole[:, rows, cols], truth)
                found[f"window {key} rows {rows.start}"] = error(ops.kernel_map(**given, rows=rows, cols=cols), truth)
        row, column = {"query": length - 1}, {"source": 3}
        found[f"row {key}"] = error(ops.kernel_row(**given, **row).weights, ops.kernel_row(**exact, **row).weights)
        found[f"column {key}"] = error(ops.kernel_column(**given, **column), ops.kernel_column(**exact, **column))
    given = odd(device)
    exact = {k: v.double() for k, v in given.items()}
    for reduce in REDUCTIONS:  # sizes that are no powers of two, and every reduction
        found[f"map odd {reduce}"] = error(
            ops.kernel_map(**given, reduce=reduce), ops.kernel_map(**exact, reduce=reduce, backend="torch")
        )
    return found


def odd(device: str) -> Any:
    """700 tokens, 100 channels of 7 states, with gains and what queries read."""
    x, g = layer(700, device, 0.05, 100), torch.Generator(device).manual_seed(2)
    some = {"A": x["A"][:, :7], "B": x["B"][..., :7], "C": x["C"][..., :7]}
    more = {name: torch.randn(1, 700, 100, generator=g, device=device) for name in ("gain", "read")}
    return x | some | more


def clock(device: str, call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds."""
    call()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def above(device: str, call: Callable[[], object]) -> float:
    """Peak MB beyond what was there, the result included; on a CPU of a process of its own (see ``memory_of``)."""
    if device != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


_MEMORY = """
import torch
from tests.bench.bench_maps import layer
from mambascope import ops
from mambascope.ops.maps import REDUCTIONS
torch.set_num_threads(2)
x = layer({length}, "cpu")
ops.kernel_map(**layer(80, "cpu"), backend="{backend}")
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
held = status("VmRSS")
kept = ops.kernel_map(**x, backend="{backend}")
print((status("VmHWM") - held) / 1e3)
"""


def memory_of(length: int, backend: str) -> float:
    """MB by which the peak of a fresh process rises over a map on the CPU."""
    code = _MEMORY.format(length=length, backend=backend)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def transformer_lens(x: Tensors) -> Callable[[], Tensor]:
    """TransformerLens' own ``compute_effective_attention``, reduced over channels, on the tensors of its hooks."""
    from transformer_lens.model_bridge.generalized_components.ssm_mixer import SSMMixerBridge

    delta, A, B, C = x["delta"], x["A"], x["B"], x["C"]
    sizes = SimpleNamespace(ssm_state_size=N, time_step_rank=R)
    self = SimpleNamespace(config=SimpleNamespace(), original_component=sizes, A_log=torch.log(-A))
    self._s6_terms = MethodType(SSMMixerBridge._s6_terms, self)
    cache = {
        "blocks.0.mixer.x_proj.hook_out": torch.cat([B.new_zeros(1, B.shape[1], R), B, C], -1),
        "blocks.0.mixer.dt_proj.hook_out": delta + torch.log(-torch.expm1(-delta)),  # softplus of it is delta
    }

    def call() -> Tensor:
        M: Tensor = SSMMixerBridge.compute_effective_attention(self, cache, 0, include_dt_scaling=True)  # type: ignore[arg-type]
        return M.abs().mean(1)

    return call


def cells(device: str) -> dict[str, tuple[int, Callable[[], Callable[[], Any]]]]:
    """What is timed, by name: its length, and what makes its call; the cells of the bars first."""

    def map_of(length: int, reduce: str = "mean_abs", conv: bool = False, backend: str = "auto") -> Callable[[], Any]:
        given: Any = layer(length, device) | (path(length, device) if conv else {})
        return lambda: ops.kernel_map(**given, reduce=reduce, backend=backend)  # type: ignore[arg-type]

    def row_of(length: int) -> Callable[[], Any]:
        given: Any = layer(length, device)
        return lambda: ops.kernel_row(**given, query=length - 1)

    def column_of(length: int) -> Callable[[], Any]:
        given: Any = layer(length, device)
        return lambda: ops.kernel_column(**given, source=0)

    cuda = device == "cuda"
    usual, peer, long = (2048, 256, 131072) if cuda else (512, 64, 8192)
    found: dict[str, tuple[int, Callable[[], Callable[[], Any]]]] = {
        "map": (usual, lambda: map_of(usual)),
        "row, long": (long, lambda: row_of(long)),
        "map, long": (8192 if cuda else 1024, lambda: map_of(8192 if cuda else 1024)),
        "map, against TransformerLens": (peer, lambda: map_of(peer)),
        "TransformerLens": (peer, lambda: transformer_lens(layer(peer, device))),
        "torch tiles, against TransformerLens": (peer, lambda: map_of(peer, backend="torch")),
        "map through the convolution": (usual, lambda: map_of(usual, conv=True)),
        "row": (usual, lambda: row_of(usual)),
        "column": (usual, lambda: column_of(usual)),
    }
    if cuda:
        for label, plan in PLANS.items():
            found[f"map, {label}"] = (usual, lambda plan=plan: planned(layer(usual, device), plan))
        found["map, long, 64 x 64"] = (8192, lambda: planned(layer(8192, device), PLANS["64 x 64"]))
    found["column, long"] = (long, lambda: column_of(long))
    for reduce in ("signed", "rms", "max"):
        found[f"map, {reduce}"] = (usual, lambda reduce=reduce: map_of(usual, reduce))
    found["map, torch tiles"] = (usual, lambda: map_of(usual, backend="torch"))
    return found


def planned(x: Any, changes: dict[str, Any]) -> Callable[[], Any]:
    """A map cut in another way than the default."""
    from mambascope.ops.maps import triton
    from mambascope.ops.maps.problem import problem

    p, whole = problem(**x, gain=None, taps=None, read=None), range(x["delta"].shape[1])
    plan = triton.plan_of(p, whole, whole)._replace(**changes)

    def call() -> Tensor:
        return triton.kernel_map(p, "mean_abs", whole, whole, plan)

    apart = error(call(), ops.kernel_map(**x))
    if not apart <= BAR:
        raise SystemExit(f"{plan} is {apart:.1e} off the default")
    return call


@torch.no_grad()
def whole_cache(device: str, length: int) -> list[dict[str, Any]]:
    """From the cache of a model: the first map of a layer recomputes its block, the second has it; a view of a map has
    asked the cache already. Medians over layers."""
    from mambascope.config import MambaConfig
    from mambascope.model import HookedMamba

    torch.manual_seed(0)
    cfg = MambaConfig(d_model=768, n_layers=6, d_vocab=1000)
    model = HookedMamba(cfg, device=device)
    tokens = torch.randint(0, 1000, (1, length), device=device)
    _, cache = model.run_with_cache(tokens, return_type=None)

    def took(call: Callable[[], object]) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    times: dict[str, list[float]] = {}
    for number in range(cfg.n_layers):
        view = cache.attention_view(number)
        for label, call in (
            ("cache, its block computed again", lambda number=number: cache["delta", number]),
            ("cache.hidden_attention, block at hand", lambda number=number: cache.hidden_attention(number)),
            ("attention_view, first", lambda view=view: view.window(None, None)),
            ("attention_view, again", lambda view=view: view.window(None, None)),
        ):
            times.setdefault(label, []).append(took(call))
    _, cache = model.run_with_cache(tokens, return_type=None)
    again = [took(lambda number=number: cache.hidden_attention(number)) for number in range(cfg.n_layers)]
    times["cache.hidden_attention, block recomputed"] = again
    middle = {
        label: sorted(values[1:])[(len(values) - 1) // 2] for label, values in times.items()
    }  # the first warms up
    return [{"what": label, "length": length, "ms": round(ms, 4), "MB": None} for label, ms in middle.items()]


def compiled_side_by_side(names: list[str]) -> dict[str, Any]:
    """One process a kind of call, so that the compiler's work is on disk before anything is timed."""
    command = [sys.executable, "-m", "tests.bench.bench_maps", "--warm"]
    return {name: subprocess.Popen([*command, name], stdout=subprocess.DEVNULL) for name in names}


def wait(running: dict[str, Any], names: list[str]) -> None:
    """Until these are compiled."""
    for name in names:
        if running[name].wait() != 0:
            raise SystemExit(f"the call {name!r} failed; run: python -m tests.bench.bench_maps --warm {name!r}")


def show(row: dict[str, Any]) -> None:
    memory = "" if row["MB"] is None else f" {row['MB']:9.1f} MB"
    print(f"{row['what']:38s} L={row['length']:<7d} {row['ms']:10.3f} ms{memory}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no cell is begun")
    parser.add_argument("--csv")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(args.threads)
    cuda, todo = args.device == "cuda", cells(args.device)
    running: dict[str, Any] = {}
    if args.warm:
        if args.warm == "cache":
            whole_cache(args.device, 256)
        elif args.warm.startswith("odd "):
            ops.kernel_map(**odd(args.device), reduce=args.warm.removeprefix("odd "))  # type: ignore[arg-type]
        else:
            todo[args.warm][1]()()
        return 0
    if cuda:
        kinds = ["map", "row", "column", "map through the convolution", *(f"map, {label}" for label in PLANS)]
        kinds += [f"map, {reduce}" for reduce in ("signed", "rms", "max")] + [f"odd {r}" for r in REDUCTIONS]
        running = compiled_side_by_side(["cache", *kinds])
        torch.zeros(1, device="cuda")  # meanwhile: what this process will need
        import transformer_lens.model_bridge.generalized_components.ssm_mixer  # noqa: F401

        wait(running, kinds)
    errors = gate(args.device)
    if cuda:
        wait(running, ["cache"])  # a whole model compiles longest
    worst, passed = max(errors, key=lambda k: errors[k]), sum(e <= BAR for e in errors.values())
    print(f"gate: {passed} of {len(errors)} within {BAR:g}; worst {worst} {errors[worst]:.1e}", flush=True)
    if passed < len(errors):
        print({k: f"{e:.1e}" for k, e in errors.items() if not e <= BAR})
        return 1
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {args.threads} threads"
    about = {"gate": f"{passed}/{len(errors)}", "device": where, "versions": f"torch {torch.__version__}"}
    about["commit"] = commit()
    print(", ".join(about.values()), flush=True)
    rows: list[dict[str, Any]] = []
    left: list[str] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append({**row, **about})
        show(row)
        if args.csv:  # after every cell: whoever stops this keeps what there is
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

    def past(name: str) -> bool:
        if time.perf_counter() - began > args.limit:
            left.append(name)
        return name in left

    for name, (length, make) in todo.items():
        if past(name):
            continue
        call = make()
        slow = "torch" in name or "Transformer" in name or length > 4096
        mb = above(args.device, call) if cuda else memory_of(length, "auto") if name == "map" else None
        ms = clock(args.device, call, 3 if slow else args.repeats)
        keep({"what": name, "length": length, "ms": round(ms, 4), "MB": mb})
        del call
        if name == LAST_BAR and not past("the cache of a model"):
            for row in whole_cache(args.device, 2048 if cuda else 512):
                keep(row)
    if LAST_BAR in left:
        left.append("the cache of a model")
    if left:
        print(f"left out, past {args.limit:g} s: {', '.join(left)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

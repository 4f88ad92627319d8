"""Effective kernels of one layer at 130m size (D = 1536, N = 16), float32: maps, rows, columns; time and memory.

    python -m tests.bench.bench_maps [--device cuda|cpu] [--threads 2] [--repeats 7] [--quick] [--csv FILE]

First the gate, at the sizes that are timed: maps, rows and columns against float64 on the plain torch path, on steps
from tame to those that make A_bar vanish; a red gate reports no time. Then, in one process and in turn: ours, the plain
torch tiles (what this repository did before) and TransformerLens' own method, called with the tensors that its hooks
would hold (256 tokens on a GPU, 64 on a CPU: it needs O(B D N L²) memory). Last a whole model's cache: the first map of
a layer recomputes the block, the second does not.
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
from mambascope.config import MambaConfig
from mambascope.model import HookedMamba

D, N, R, K = 1536, 16, 48, 4
BAR = 1e-5
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
    sizes = [(2048, D)] if device == "cuda" else [(512, 96)]
    for scale in (1e-6, 0.1, 20.0):
        for length, channels in sizes:
            x = layer(length, device, scale, channels)
            for name, extra in (("scan", {}), ("conv", path(length, device, channels))):
                given: Any = {**x, **extra}
                exact: Any = {k: v.double() for k, v in given.items()}
                for rows, cols in ((slice(length // 2, length // 2 + 40), None), (slice(-40, None), slice(0, 64))):
                    truth = ops.kernel_map(**exact, rows=rows, cols=cols, backend="torch")
                    if truth.any():
                        key = f"map {name} delta ≤ {scale:g} rows {rows.start}"
                        whole = ops.kernel_map(**given)[:, rows, cols or slice(None)]
                        found[key] = error(whole, truth)
                        found[key + " window"] = error(ops.kernel_map(**given, rows=rows, cols=cols), truth)
                at = length - 1
                key = f"{name} delta ≤ {scale:g}"
                found["row " + key] = error(
                    ops.kernel_row(**given, query=at).weights, ops.kernel_row(**exact, query=at).weights
                )
                found["column " + key] = error(
                    ops.kernel_column(**given, source=3), ops.kernel_column(**exact, source=3)
                )
    return found


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


def maps(device: str, lengths: list[int], repeats: int, rows: list[dict[str, Any]]) -> None:
    for length in lengths:
        x: Any = layer(length, device)
        few = max(3, repeats // 2) if length > 2048 else repeats
        for name, extra in (("scan", {}), ("conv", path(length, device))):
            given: Any = {**x, **extra}
            for reduce in ("mean_abs", "signed") if length == 2048 and name == "scan" else ("mean_abs",):

                def call(given: Any = given, reduce: Any = reduce) -> Tensor:
                    return ops.kernel_map(**given, reduce=reduce)

                mb = above(device, call) if device == "cuda" else memory_of(length, "auto") if name == "scan" else None
                rows.append(
                    {"what": f"map {name} {reduce}", "length": length, "ms": clock(device, call, few), "MB": mb}
                )


def lines(device: str, lengths: list[int], repeats: int, rows: list[dict[str, Any]]) -> None:
    for length in lengths:
        x: Any = layer(length, device)
        for name, call in (
            ("row", lambda x=x, at=length - 1: ops.kernel_row(**x, query=at)),
            ("column", lambda x=x: ops.kernel_column(**x, source=0)),
        ):
            mb = above(device, call) if device == "cuda" else None
            rows.append({"what": name, "length": length, "ms": clock(device, call, repeats), "MB": mb})


def peers(device: str, repeats: int, rows: list[dict[str, Any]]) -> None:
    for length in (64 if device == "cpu" else 256, 512 if device == "cpu" else 2048):
        x: Any = layer(length, device)
        ways: dict[str, Callable[[], Tensor]] = {
            "ours": lambda x=x: ops.kernel_map(**x),
            "torch tiles": lambda x=x: ops.kernel_map(**x, backend="torch"),
        }
        if length <= 256:
            ways["TransformerLens"] = transformer_lens(x)
            apart = error(ways["TransformerLens"](), ways["ours"]())
            print(f"TransformerLens at {length} differs from ours by {apart:.1e}")
        for name, call in ways.items():
            mb = above(device, call) if device == "cuda" else None
            few = repeats if name == "ours" else 3
            rows.append({"what": f"against: {name}", "length": length, "ms": clock(device, call, few), "MB": mb})


@torch.no_grad()
def whole_cache(device: str, length: int, rows: list[dict[str, Any]]) -> None:
    """From the cache of a model: the first map of a layer recomputes its block, the second has it."""
    torch.manual_seed(0)
    cfg = MambaConfig(d_model=768, n_layers=3, d_vocab=1000)
    model = HookedMamba(cfg, device=device)
    tokens = torch.randint(0, 1000, (1, length), device=device)
    _, cache = model.run_with_cache(tokens, return_type=None)
    for label, layer_number in (("warm-up", 0), ("first", 1), ("again", 1)):

        def call(number: int = layer_number) -> Tensor:
            return cache.hidden_attention(number)

        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        rows.append(
            {"what": f"cache.hidden_attention, {label}", "length": length, "ms": 1e3 * (time.perf_counter() - start)}
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the sizes of the bars alone")
    parser.add_argument("--csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    errors = gate(args.device)
    worst = max(errors, key=lambda k: errors[k])
    passed = sum(e <= BAR for e in errors.values())
    print(f"gate: {passed} of {len(errors)} within {BAR:g}; worst {worst} {errors[worst]:.1e}")
    if not all(e <= BAR for e in errors.values()):
        print({k: f"{e:.1e}" for k, e in errors.items() if not e <= BAR})
        return 1
    rows: list[dict[str, Any]] = []
    lengths = ([2048, 8192] if args.quick else [256, 512, 1024, 2048, 8192]) if cuda else [512]
    maps(args.device, lengths, args.repeats, rows)
    lines(args.device, [2048, 131072] if cuda else [512], args.repeats, rows)
    peers(args.device, args.repeats, rows)
    whole_cache(args.device, 2048 if cuda else 512, rows)
    where = (
        torch.cuda.get_device_name()
        if cuda
        else f"{platform.processor() or platform.machine()}, {args.threads} threads"
    )
    print(f"{where}, torch {torch.__version__}")
    for row in rows:
        mb = row.get("MB")
        print(
            f"{row['what']:36s} L={row['length']:<7d} {row['ms']:10.3f} ms"
            + (f" {mb:9.1f} MB" if mb is not None else "")
        )
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, ["what", "length", "ms", "MB", "device", "torch"])
            writer.writeheader()
            writer.writerows({**row, "device": where, "torch": torch.__version__} for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

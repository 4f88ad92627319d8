"""Timings of the numba kernels, one layer at 130m size (D = 1536, N = 16, K = 4, M = 768), float32.

    python -m tests.bench.bench_cpu [--threads 1 2] [--cpus "" haswell] [--rounds 30] [--csv FILE]

First the gate: outputs and gradients against the float64 recurrence; a red gate reports no time. Then medians and
minima in ms over rounds in which all cases take turns, and the time of the first use: compiled, and from numba's cache.
Each CPU name ("" is this machine's own) runs in a process of its own, with `NUMBA_CPU_NAME` and an empty
`NUMBA_CPU_FEATURES`: without the latter numba adds this machine's instructions to the name. Only a quiet machine gives
medians worth reading; the minima survive company.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mambascope.ops import cpu
from mambascope.ops.scan import reference
from tests.bench.origin import commit

D, N, K, M = 1536, 16, 4, 768
LENGTHS = (1, 64, 512)
BAR = 2e-6


class Layer:
    """The tensors of one layer, strided as the model gives them."""

    def __init__(self, length: int, channels: int = D) -> None:
        torch.manual_seed(0)
        xz, low = torch.randn(1, length, 2 * channels), torch.randn(1, length, 48 + 2 * N)
        self.x, z = xz.split(channels, -1)
        u, raw = torch.randn(1, length, channels), torch.randn(1, length, channels) - 3
        A = -torch.exp(torch.rand(channels, N) * 2.7)
        _, B, C = low.split([48, N, N], -1)
        h0 = torch.randn(1, channels, N)
        self.scan = (u, raw, A, B, C, torch.randn(channels), z, None, h0, None)
        self.conv = (self.x, torch.randn(channels, K), torch.randn(channels), torch.randn(1, channels, K - 1), None)
        self.residual, self.gain = torch.randn(1, length, M), torch.randn(M)
        self.dy, self.dh = torch.randn(1, length, channels), torch.randn(1, channels, N)

    def forward(self, boundaries: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        return cpu.scan_forward(*self.scan, dt_softplus=True, boundaries=boundaries)

    def backward(self, entering: Tensor) -> dict[str, Tensor | None]:
        return cpu.scan_backward(*self.scan, entering, self.dy, self.dh, None, dt_softplus=True, boundaries=64)

    def cases(self) -> dict[str, Callable[[], object]]:
        entering = self.forward(64)[2]
        assert entering is not None
        u, raw, A, B, *_ = self.scan
        delta = cpu.softplus_forward(raw)
        gate_input, h0 = self.scan[6], self.scan[8]
        return {
            "scan forward": self.forward,
            "scan forward, states kept": lambda: self.forward(64),
            "scan backward": lambda: self.backward(entering),
            "conv + SiLU forward": lambda: cpu.conv_forward(*self.conv, silu=True),
            "conv + SiLU backward": lambda: cpu.conv_backward(*self.conv, self.dy, None, silu=True),
            "norm": lambda: cpu.norm_forward(self.residual, self.gain, 1e-5, expose=False),
            "norm, exposed": lambda: cpu.norm_forward(self.residual, self.gain, 1e-5, expose=True),
            "softplus": lambda: cpu.softplus_forward(raw),
            "gate": lambda: cpu.gate_forward(u, gate_input),
            "states of 16 steps": lambda: cpu.state_window(u[:, :16], delta[:, :16], A, B[:, :16], h0),
        }


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).detach().abs().max() / truth.detach().abs().max())


def gate() -> dict[str, float]:
    """Errors against float64, of every kernel that is timed."""
    layer = Layer(130, 100)
    u, raw, A, B, C, skip, z, _, h0, _ = (None if v is None else v.double().requires_grad_() for v in layer.scan)
    y, h, entering = reference.scan(u, F.softplus(raw), A, B, C, h0, None, 64)  # type: ignore[arg-type]
    y = (y + skip * u) * F.silu(z)  # type: ignore[arg-type, operator]
    inputs = {"u": u, "delta": raw, "A": A, "B": B, "C": C, "D": skip, "z": z, "h0": h0}
    truth = torch.autograd.grad((y, h), list(inputs.values()), (layer.dy.double(), layer.dh.double()))  # type: ignore[arg-type]
    found = layer.forward(64)
    gradients = layer.backward(found[2])  # type: ignore[arg-type]
    errors = {"y": error(found[0], y), "h_last": error(found[1], h), "h_boundary": error(found[2], entering)}  # type: ignore[arg-type]
    errors |= {"d" + k: error(gradients["d" + k], t) for k, t in zip(inputs, truth, strict=True)}  # type: ignore[arg-type]
    x, weight, bias, state = (v.double().requires_grad_() for v in layer.conv[:4])
    full = torch.cat((state, x.transpose(1, 2)), 2)
    conv = F.silu(F.conv1d(full, weight[:, None], bias, groups=100)).transpose(1, 2)
    errors["conv"] = error(cpu.conv_forward(*layer.conv, silu=True)[0], conv)
    conv_truth = torch.autograd.grad(conv, (x, weight, bias, state), layer.dy.double())
    conv_found = cpu.conv_backward(*layer.conv, layer.dy, None, silu=True)
    for k, t in zip(("dx", "dweight", "dbias", "dstate"), conv_truth, strict=True):
        errors["conv " + k] = error(conv_found[k], t)  # type: ignore[arg-type]
    residual = layer.residual.double()
    norm = F.rms_norm(residual, (M,), layer.gain.double(), 1e-5)
    errors["norm"] = error(cpu.norm_forward(layer.residual, layer.gain, 1e-5, expose=False)[0], norm)
    return errors


def timings(length: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median and minimum in ms, the cases in turn."""
    cases = Layer(length).cases()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for call in cases.values():
        call()
    for _ in range(rounds if length > 1 else 20 * rounds):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


FIRST_USE = """
import time, torch, numba
from tests.bench.bench_cpu import Layer
layer = Layer(64)
start = time.process_time()
layer.forward(); layer.cases()["conv + SiLU forward"](); layer.cases()["norm"]()
middle = time.process_time()
for call in layer.cases().values(): call()
print(middle - start, time.process_time() - middle)
"""


def as_cpu(name: str) -> dict[str, str]:
    """The environment in which numba compiles for that processor, and in which freed memory stays with the process.

    glibc may give back a freed result and take its pages afresh at the next call, or not, as its history has it: 2 to
    4 ms a backward call that come and go from process to process, and are no property of the kernels."""
    steady = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    return {**steady, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""} if name else steady


def first_use(name: str) -> dict[str, tuple[float, float]]:
    """CPU seconds until a forward pass, then until all kernels have run once: compiled, then from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**as_cpu(name), "NUMBA_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        runs = [
            subprocess.run(
                [sys.executable, "-c", FIRST_USE], env=environment, capture_output=True, text=True, check=True
            )
            for _ in range(2)
        ]
    seconds = [[float(word) for word in run.stdout.split()] for run in runs]
    return {
        "first forward (s): compiled, cached": (seconds[0][0], seconds[1][0]),
        "the other kernels (s): compiled, cached": (seconds[0][1], seconds[1][1]),
    }


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def one_cpu(threads: list[int], rounds: int, out: Path | None) -> int:
    """The gate and the table for the CPU name of this process."""
    import llvmlite.binding
    import numba

    name = os.environ.get("NUMBA_CPU_NAME") or llvmlite.binding.get_host_cpu_name()
    errors = gate()
    worst = max(errors, key=lambda k: errors[k])
    print(f"\n{name}: worst error against float64 {errors[worst]:.1e} ({worst}), bar {BAR:.0e}")
    if errors[worst] > BAR:
        print("red: no timings", {k: f"{e:.1e}" for k, e in errors.items()})
        return 1
    rows: list[dict[str, object]] = []
    for count in threads:
        torch.set_num_threads(count)
        for length in LENGTHS:
            for case, (median, least) in timings(length, rounds).items():
                rows.append({"threads": count, "L": length, "kernel": case, "median": median, "min": least})
    rows += [
        {"threads": 1, "L": 64, "kernel": case, "median": a, "min": b}
        for case, (a, b) in first_use(os.environ.get("NUMBA_CPU_NAME", "")).items()
    ]
    for row in rows:
        print(f"{row['threads']} thr  L={row['L']:<4} {row['kernel']:<42} {row['median']:8.3f} {row['min']:8.3f}")
    facts = {"cpu": name, "device": processor(), "torch": torch.__version__, "numba": numba.__version__}
    facts |= {"python": platform.python_version(), "commit": commit()}
    if out is not None:
        new = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *facts])
            if new:
                writer.writeheader()
            writer.writerows({**row, **facts} for row in rows)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cpus", nargs="+", default=["", "haswell"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        return one_cpu(args.threads, args.rounds, args.csv)
    common = ["--threads", *map(str, args.threads), "--rounds", str(args.rounds)]
    common += ["--csv", str(args.csv)] if args.csv else []
    command = [sys.executable, "-m", "tests.bench.bench_cpu", "--here", *common]
    codes = [subprocess.run(command, env=as_cpu(name), check=False).returncode for name in args.cpus]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())

"""Builds mamba_ssm's CUDA selective scan from a checkout of its source, as the anchor of the GPU benchmarks.

    git clone https://github.com/state-spaces/mamba
    python tests/bench/build_anchor.py mamba --out anchor
    python tests/bench/bench_scan_gpu.py --anchor anchor

Wants nvcc and ninja; about two and a half minutes on 16 cores. The compiler's options are those of the source's own
set-up, for this machine's GPU only. ``anchor`` holds the extension and the Python file that calls it, nothing else of
the package.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from torch.utils import cpp_extension

_PYTHON = ("ops/selective_scan_interface.py", "ops/triton/layer_norm.py", "utils/torch.py", "utils/determinism.py")
_NVCC = (
    "-O3 -std=c++17 -U__CUDA_NO_HALF_OPERATORS__ -U__CUDA_NO_HALF_CONVERSIONS__ -U__CUDA_NO_BFLOAT16_OPERATORS__ "
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__ -U__CUDA_NO_BFLOAT162_OPERATORS__ -U__CUDA_NO_BFLOAT162_CONVERSIONS__ "
    "--expt-relaxed-constexpr --expt-extended-lambda --use_fast_math"
)


def build(source: Path, out: Path) -> Path:
    """The path of the built extension; RuntimeError from torch with the compiler's words if it cannot be built."""
    sources = sorted((source / "csrc" / "selective_scan").glob("*.c*"))
    sources = [p for p in sources if p.suffix in (".cpp", ".cu")]
    if not sources:
        raise FileNotFoundError(f"{source} holds no csrc/selective_scan/*.cu: is it a checkout of mamba's source?")
    for name in _PYTHON:
        target = out / "mamba_ssm" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / "mamba_ssm" / name, target)
    for folder in ("", "ops", "ops/triton", "utils"):
        (out / "mamba_ssm" / folder / "__init__.py").touch()
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    work = out / "build"
    work.mkdir(exist_ok=True)
    cpp_extension.load(
        "selective_scan_cuda",
        [str(p) for p in sources],
        extra_cflags=["-O3", "-std=c++17"],
        extra_cuda_cflags=_NVCC.split(),
        extra_include_paths=[str(sources[0].parent)],
        build_directory=str(work),
        is_python_module=True,
    )
    built = out / "selective_scan_cuda.so"
    shutil.copyfile(work / "selective_scan_cuda.so", built)
    shutil.rmtree(work)
    return built


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkout of state-spaces/mamba")
    parser.add_argument("--out", type=Path, default=Path("anchor"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("the CUDA extension is built for the GPU of this machine; there is none")
        return 2
    started = time.time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    built = build(arguments.source, arguments.out)
    sys.path.insert(0, str(arguments.out))
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore[import-not-found]

    u = torch.randn(1, 8, 16, device="cuda")
    B = torch.randn(1, 4, 16, device="cuda")
    y = selective_scan_fn(u, u, -torch.rand(8, 4, device="cuda"), B, B, delta_softplus=True)
    print(f"{built}: {built.stat().st_size / 2**20:.1f} MiB, {time.time() - started:.0f} s, runs: {y.isfinite().all()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

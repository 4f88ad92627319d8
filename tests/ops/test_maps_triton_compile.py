"""The Triton kernels of the effective kernels compiled for sm_90 without a GPU: they compile, use tensor cores, and do
not spill."""

import json
import os
import subprocess
import sys

from tests.ops.triton_compiler import DRIVER, needs_compiler

pytestmark = needs_compiler()

CALLS = r"""
from mambascope.ops.maps import triton as maps
from mambascope.ops.maps.problem import problem
from mambascope.ops.scan import triton_launch


class Gpu:
    type, index = "cuda", 0


maps.launch = lambda kernel, programs, device, *rest, **options: triton_launch.launch(
    kernel, programs, Gpu, *rest, **options
)
maps.processor_count = lambda device: 132


def inputs(D, conv):
    bld, bln = torch.empty(1, 600, D), torch.empty(1, 600, 16)
    return problem(bld, torch.empty(D, 16), bln, bln, bld if conv else None, torch.empty(D, 4) if conv else None, None)


p, at = inputs(64, False), torch.zeros(1, dtype=torch.int64)
maps.kernel_map(p, "mean_abs", range(600), range(600))
maps._hopper = lambda p: True
maps.kernel_map(p, "mean_abs", range(600), range(600))
maps.line(p, p.C[:, 0], p.B, at, True, p.gain, None)
maps.kernel_map(inputs(64, True), "mean_abs", range(600), range(600), maps.Plan(16, 2, 1, 1))

import triton as package

tool = os.path.join(package.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
found = []
for compiled, _ in triton_launch._compiled.values():
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    found.append([compiled.name, int(numbers[2]) if numbers else 0, "wgmma.mma_async" in compiled.asm["ptx"]])
print("RESULT" + json.dumps(found))
"""


def test_kernels_compile_for_hopper_on_its_tensor_cores() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", DRIVER + CALLS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("RESULT")[1])
    names = {name for name, _, _ in found}
    assert names == {
        *("sums_kernel", "between_kernel", "pair_kernel", "block_kernel", "diagonal_kernel", "finish_kernel"),
        *("total_kernel", "line_kernel", "turn_kernel", "far_kernel"),
    }
    assert any(wgmma for name, _, wgmma in found if name == "pair_kernel")
    assert all(wgmma for name, _, wgmma in found if name == "far_kernel")
    spilling = {name for name, stack, _ in found if stack > 64}
    # a convolution's blocks hold 19 steps of every source; the others fit three to a multiprocessor with a few spills
    assert spilling <= {"diagonal_kernel", "block_kernel"}

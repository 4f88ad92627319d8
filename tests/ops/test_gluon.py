"""The Hopper kernels compiled for sm_90 without a GPU, with the arguments that the host code really passes.

A stand-in for the GPU's driver compiles each launch and keeps what would have been launched, in a process of its own,
because here Triton may be interpreting. What the kernels compute is tested on a GPU: tests/bench/bench_hopper.py.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest

from mambascope.ops.scan import gluon_table as table
from tests.ops.triton_compiler import DRIVER

PROGRAM = (
    DRIVER
    + r"""
from mambascope.ops.scan import gluon, triton_launch


class Gpu:
    type, index = "cuda", 0


def launch(kernel, programs, device, *arguments, **options):
    triton_launch.launch(kernel, programs, Gpu, *arguments, **options)


gluon.launch = launch
gluon.processor_count = lambda device: 132


def scan(batch, length, channels, states, boundaries, dtype, full):
    half = lambda *shape: torch.empty(*shape, dtype=dtype)
    one = lambda *shape: torch.empty(*shape) if full else None
    bln = (half(batch, length, states), half(batch, length, states))
    x = (half(batch, length, channels), half(batch, length, channels), torch.empty(channels, states), *bln)
    z = half(batch, length, channels) if full else None
    lengths = torch.full((batch,), length) if full else None
    x = (*x, one(channels), z, one(channels), one(batch, channels, states), lengths)
    y, h, bound = gluon.scan_forward(*x, dt_softplus=full, boundaries=boundaries)
    if dtype == torch.bfloat16:
        gluon.scan_forward(*x, dt_softplus=full, boundaries=None)
    if channels == 1536 and length < 100:
        lying = [v.mT.contiguous() if v is not None and i in (0, 1, 3, 4, 6) else v for i, v in enumerate(x)]
        out, _, _ = gluon.scan_forward(*lying, dt_softplus=full, boundaries=boundaries, turned=True)
        assert out.shape == (batch, channels, length) and out.dtype == dtype
    if boundaries == 16:
        arriving = (h, bound) if full else (None, None)
        found = gluon.scan_backward(*x, bound, y, *arriving, dt_softplus=full, boundaries=boundaries)
        for name, like in zip(("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddt_bias"), x):
            assert (found[name] is None) == (like is None), name
            assert like is None or found[name].shape == like.shape, name


def all_of_it():
    scan(1, 512, 1536, 16, 16, torch.bfloat16, True)
    scan(8, 48, 1536, 16, 16, torch.bfloat16, True)
    scan(8, 64, 1536, 16, 64, torch.float32, False)
    scan(64, 48, 1536, 16, 64, torch.float32, True)
    scan(1, 2048, 1536, 16, 16, torch.float32, False)
    scan(8, 48, 1000, 7, 64, torch.float16, True)
    scan(2, 100, 40, 1, 16, torch.float32, True)


all_of_it()
kinds, count = len(triton_launch._compiled), len(launched)
all_of_it()
assert len(triton_launch._compiled) == kinds, "a second call of the same kind was not recognised"
assert len(launched) == 2 * count

import triton as package

tool = os.path.join(package.__path__[0], "backends", "nvidia", "bin")
usage = []
for compiled, constants in triton_launch._compiled.values():
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool + "/cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        code = subprocess.run([tool + "/nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    counts = {k: len(re.findall(k, code)) for k in ("LDS.128", "MUFU.EX2", "LDG.E.U16", "LDG.E", "USETMAXREG")}
    usage.append([compiled.name, *(int(n) for n in numbers.groups()), compiled.metadata.shared, counts])
print("RESULT" + json.dumps(usage))
"""
)


def _needs_gluon() -> None:
    for name in ("triton", "triton.backends.nvidia", "triton.experimental.gluon"):
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            found = None
        if found is None:
            pytest.skip(f"{name} is not installed: the Hopper kernels cannot be compiled here")


def test_kernels_compile_for_hopper_without_a_gpu() -> None:
    _needs_gluon()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    usage = json.loads(done.stdout.split("RESULT")[1])
    assert {"forward_kernel", "adjoint_kernel", "backward_kernel", "sum_kernel"} <= {name for name, *_ in usage}
    for name, registers, stack, shared, counts in usage:
        if name == "sum_kernel":
            continue
        if name == "adjoint_kernel":
            assert stack == 0, f"{name}: {registers} registers and {stack} bytes of spilled ones"
            continue
        assert counts["LDS.128"] > 20, f"{name}: the scan's shared loads are not 16 bytes wide: {counts}"
        # The decays of a group of four steps; softplus and gate, where they are fused, come on top.
        assert counts["MUFU.EX2"] >= 32, f"{name}: {counts}"
        # The narrow forward has a multiprocessor to itself: 128 registers a thread.
        room = 100_000 if name == "forward_kernel" and registers > 56 else 75_000
        assert shared <= room, f"{name}: {shared} bytes of shared memory leave no room for the programs beside it"
        assert stack <= 384, f"{name}: {registers} registers and {stack} bytes of spilled ones"
        if name == "forward_kernel":
            assert counts["USETMAXREG"] > 0, "the roles of warps do not share registers out"


@pytest.mark.parametrize("B", [1, 2, 3, 8])
@pytest.mark.parametrize("L", [1, 20, 512, 2048, 16384])
def test_parts_of_the_backward_fill_a_gpu_once_and_are_not_empty(B: int, L: int) -> None:
    plan = table.backward_plan(B, L, 1536, 132)
    programs, tiles = B * 1536 // plan.block * plan.parts, -(-L // table.BACKWARD_TILE)
    assert plan.parts == 1 or programs <= 3 * 132
    edges = [tiles * part // plan.parts for part in range(plan.parts + 1)]
    assert edges[0] == 0
    assert edges[-1] == tiles
    assert all(b > a for a, b in itertools.pairwise(edges))


def test_the_table_takes_the_wide_form_where_programs_abound_and_parts_where_they_lack() -> None:
    half, whole = ([table.forward_plan(B, 2048, 1536, 132, entry) for B in (1, 8, 64)] for entry in (2, 4))
    assert [plan.block for plan in half] == [plan.block for plan in whole] == [16, 32, 32]
    assert half[1] == half[2]
    assert len({*half, *whole}) == 5
    assert whole[1].producer_registers > half[1].producer_registers
    assert table.backward_plan(8, 2048, 1536, 132).block == 32
    assert table.backward_plan(1, 2048, 1536, 132).parts > 1
    assert table.backward_plan(1, 20, 1536, 132).parts == 1
    assert "one pass" in str(table.forward_plan(1, 2048, 1536, 132))
    assert "parts of time" in str(table.backward_plan(1, 2048, 1536, 132))


def test_few_channels_over_a_long_time_are_left_to_the_portable_kernels() -> None:
    assert table.few(1, 1 << 20, 128)
    assert table.few(1, 16384, 768)
    assert not table.few(1, 16384, 1536)
    assert not table.few(1, 512, 128)
    assert not table.few(8, 1 << 20, 1536)

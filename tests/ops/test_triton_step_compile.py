"""The step kernels compiled for sm_90 without a GPU, with and without overlapping launches; see test_triton_compile."""

import json
import os
import subprocess
import sys

from tests.ops.test_triton_compile import PROGRAM
from tests.ops.triton_compiler import needs_compiler

pytestmark = needs_compiler()

STEPS = r"""
from mambascope.ops import step
from mambascope.ops.step import Choice, Head, Layer, Scratch

step.launch = launch


def token(dtype, batch, size, channels, states, rank, width, vocabulary, full):
    new = lambda *shape: torch.empty(shape, dtype=dtype)
    maybe = lambda *shape: new(*shape) if full else None
    joint = rank + 2 * states
    layer = Layer(
        new(size), new(2 * channels, size), maybe(2 * channels), new(channels, width), maybe(channels),
        new(joint, channels), new(channels, rank), new(channels), torch.empty(channels, states),
        torch.empty(channels), new(size, channels), maybe(size), 1e-5, 1e-6 if full else None,
    )
    head = Head(new(size), new(vocabulary, size), new(vocabulary, size), 1e-5)
    choice, scratch = Choice.of(head, batch, 32), Scratch.of(layer, batch)
    resid, ssm, conv = torch.empty(batch, size), torch.empty(batch, channels, states), new(batch, channels, width - 1)
    for overlap in (False, True):
        step._overlaps = lambda device: overlap
        step.layer(layer, resid, ssm, conv, scratch, first=True)
        step.layer(layer, resid, ssm, conv, scratch, first=False)
        for greedy in (choice, None):
            step.head(head, resid, new(batch, vocabulary), greedy)
        step.pick(head, resid, choice)


from mambascope.ops.scan import triton_keep
from mambascope.ops.scan.triton_keep import Place

triton_keep.launch = launch
for kind in (torch.float32, torch.bfloat16):
    address, x = torch.zeros(1, dtype=torch.int64), torch.empty(2, 9, 768, dtype=torch.bfloat16)
    for source in (None, Place(address, 768, kind)):
        for weight in (None, torch.empty(768, dtype=torch.bfloat16)):
            triton_keep.join_kept(x, source, Place(address, 0, kind), weight, 1e-5)
triton_keep.keep_states(torch.empty(2, 3, 1536, 16), torch.empty(2, 1536, 16), Place(address, 99, torch.float32))

token(torch.bfloat16, 1, 768, 1536, 16, 48, 4, 50280, False)
token(torch.float32, 1, 768, 1536, 16, 48, 4, 50280, False)
token(torch.bfloat16, 2, 4096, 8192, 16, 256, 4, 1000, True)
token(torch.float16, 8, 60, 90, 7, 4, 1, 61, True)
usage = []
import triton as package

tool = os.path.join(package.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
for compiled, constants in triton_launch._compiled.values():
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    usage.append([compiled.name, "griddepcontrol" in compiled.asm["ptx"], *(int(n) for n in numbers.groups())])
print("RESULT" + json.dumps(usage))
"""


def test_step_kernels_compile_for_hopper() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = PROGRAM[: PROGRAM.index("def scan(")] + STEPS
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    usage = json.loads(done.stdout.split("RESULT")[1])
    names = {"enter_kernel", "state_kernel", "leave_kernel", "logits_kernel", "pick_kernel"}
    kept = {"_join_kernel", "_keep_kernel"}
    assert {name for name, *_ in usage} == names | kept
    pairs = {(name, overlaps) for name, overlaps, *_ in usage if name not in kept}
    assert pairs == {(n, o) for n in names for o in (False, True)}
    spilling = {name for name, _, _, stack in usage if stack > 64}
    assert spilling <= {"enter_kernel"}, spilling

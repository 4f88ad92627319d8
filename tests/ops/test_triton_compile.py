"""Every kind of Triton kernel compiled for sm_90 without a GPU, with the arguments that the host code really passes.

The interpreter accepts what the compiler refuses. A stand-in for the GPU's driver compiles each launch and keeps what
would have been launched; it runs in a process of its own, because here Triton may be interpreting.
"""

import json
import os
import subprocess
import sys

from tests.ops.triton_compiler import DRIVER, needs_compiler

pytestmark = needs_compiler()

PROGRAM = (
    DRIVER
    + r"""
from mambascope.ops.scan import triton, triton_conv, triton_launch, triton_layers, triton_matmul, triton_norm
from mambascope.ops.scan import triton_conv_backward, triton_loss, triton_sum, triton_window


class Gpu:
    type, index = "cuda", 0


def launch(kernel, programs, device, *arguments, **options):
    triton_launch.launch(kernel, programs, Gpu, *arguments, **options)


own = (triton_conv, triton_conv_backward, triton_layers, triton_loss, triton_matmul, triton_norm, triton_sum)
own += (triton_window,)
for module in (triton, *own):
    module.launch, module.check = launch, lambda *a, **k: None
triton.processor_count = lambda device: 132


def scan(batch, length, channels, states, boundaries, dtype, full):
    half = lambda *shape: torch.empty(*shape, dtype=dtype)
    one = lambda *shape: torch.empty(*shape) if full else None
    bln = (half(batch, length, states), half(batch, length, states))
    x = (half(batch, length, channels), half(batch, length, channels), torch.empty(channels, states), *bln)
    z = half(batch, length, channels) if full else None
    lengths = torch.full((batch,), length) if full else None
    x = (*x, one(channels), z, one(channels), one(batch, channels, states), lengths)
    y, h, bound = triton.scan_forward(*x, dt_softplus=full, boundaries=boundaries)
    arriving = (h, bound) if full else (None, None)
    triton.scan_backward(*x, bound, y, *arriving, dt_softplus=full, boundaries=boundaries)


def layers(dtype):
    x, lengths = torch.empty(2, 40, 96, dtype=dtype), torch.tensor([3, 4])
    for width in (4, 5):
        weight, state = torch.empty(96, width), torch.empty(2, 96, width - 1, dtype=dtype)
        for rest in ((None, None, None), (weight[:, 0], state, lengths)):
            y, new = triton.conv_forward(x, weight, *rest, silu=True)
            triton.conv_backward(x, weight, *rest, y, new, silu=True)
    triton.softplus_forward(x), triton.silu_forward(x), triton.gate_forward(x.float(), x)
    triton.add_norm_forward(x, x.float(), weight[:, 0], 1e-5, expose=True)
    for beside, narrow in ((None, None), (x.float(), dtype)):
        triton.norm_backward(x.float(), weight[:, 0], x, beside, 1e-5, narrow)
    for gradient in (False, True):
        triton.loss_forward(torch.empty(40, 1000, dtype=dtype), torch.zeros(40, dtype=torch.int64), gradient)
    triton.scaled(x, torch.empty(1), torch.float32)
    triton.norm_forward(x, weight[:, 0], 1e-5, expose=True), triton.norm_forward(x, None, 1e-5, expose=False)
    triton.wide_norm_forward(x, weight[:, 0], 1e-5, wide=torch.float32)
    window = (x, x, torch.empty(96, 16), x[:, :, :16], torch.empty(2, 96, 16))
    triton.state_window(*window)
    triton.window_dot(*window, torch.empty(1, 1, 96, 16).expand(*x.shape, 16))


def products():
    for rows in (200, 4096):
        triton.linear_forward(torch.empty(rows, 768), torch.empty(3072, 768), torch.empty(3072) if rows > 200 else None)


def all_of_it():
    products()
    scan(1, 256, 512, 16, 32, torch.bfloat16, True)
    scan(96, 8, 1536, 16, 32, torch.float32, False)
    scan(1, 200, 40, 7, 100, torch.float16, True)
    layers(torch.bfloat16)


def alike(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype
    return type(a) is type(b) and a == b


all_of_it()
first, kinds = list(launched), len(triton_launch._compiled)
launched.clear()
all_of_it()
assert len(triton_launch._compiled) == kinds, "a second call of the same kind was not recognised"
wrong = [a for a, b in zip(first, launched, strict=True) if a[0] != b[0]]
for (name, a), (_, b) in zip(first, launched, strict=True):
    if len(a) != len(b) or not all(alike(p, q) for i, (p, q) in enumerate(zip(a, b)) if i != 6):  # 6: for profilers
        wrong.append(name)

import triton as package

tool = os.path.join(package.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
usage = []
for compiled, constants in triton_launch._compiled.values():
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr)
    usage.append([compiled.name, *(int(n) for n in numbers.groups())] if numbers else [compiled.name, 0, 0])
print("RESULT" + json.dumps({"wrong": [str(w) for w in wrong], "usage": usage}))
"""
)


def test_kernels_compile_for_hopper_and_the_short_way_launches_the_same() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT")[1])
    assert result["wrong"] == []
    names = {name for name, _, _ in result["usage"]}
    assert {
        "forward_kernel",
        "adjoint_kernel",
        "backward_kernel",
        "sum_kernel",
        "_conv_kernel",
        "_conv_walk_kernel",
        "_conv_walk_back_kernel",
        "_loss_kernel",
    } <= names
    spilling = {name for name, _, stack in result["usage"] if stack > 64}
    assert spilling <= {"backward_kernel"}, (
        spilling
    )  # 32 channels a program: a few spills cost less than half a program

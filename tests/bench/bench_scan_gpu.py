"""The portable Triton kernels on a GPU: first a correctness gate at full shapes, then medians.

    python tests/bench/bench_scan_gpu.py [--csv FILE] [--anchor DIR] [--quick] [--only gate|times] [--sweep]
        [--first BxL …]

On a Hopper GPU too these are the portable kernels: the others have `bench_hopper`. The bar is that no cell is slower
than 1.3 times mamba_ssm's CUDA scan, both eager, through the public calls.

The gate compares outputs, states and every gradient with the float64 recurrence, checks that two runs, and the fused
form and its steps apart, give the same bits, and runs its cases in several processes because most of its time is
compilation. A failed case is printed and the others go on; times are marked as unverified then. ``--anchor`` names the
folder of a built ``mamba_ssm`` (or of its extension ``selective_scan_cuda``); an importable one is taken as it is.
"""

import argparse
import csv
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.origin import commit

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "h0", "lengths")
GRADS = ("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddt_bias", "dh0")
CHANNELS, STATES = 1536, 16
SHAPES = [(1, 512), (1, 2048), (8, 2048), (1, 16384), (64, 2048)]
# mamba_ssm 2.3.2 on an H100, measured earlier: microseconds forward, forward + backward.
RECORDED = {
    (1, 512): {"bf16": (26, 149), "fp32": (36, 170)},
    (1, 2048): {"bf16": (70, 375), "fp32": (130, 443)},
    (8, 2048): {"bf16": (451, 2283), "fp32": (882, 2944)},
    (1, 16384): {"bf16": (575, 2656), "fp32": (998, 3303)},
    (64, 2048): {"bf16": (3465, 17986), "fp32": (7377, 25781)},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
RED, PLAIN = ("\033[31m", "\033[0m") if sys.stdout.isatty() else ("", "")


SLOWEST = 1.3
"""Of the portable kernels' times to the anchor's, in any cell."""


def kernels() -> Any:
    from mambascope.ops.scan import triton

    return triton


def portable_only() -> None:
    """From here on this process takes the portable kernels on every GPU."""
    kernels()._hopper_kernels[None] = None


# --- problems and the float64 truth ---


def problem(
    batch: int,
    length: int,
    channels: int,
    states: int,
    dtype: torch.dtype,
    *,
    bare: bool = False,
    wild: bool = False,
    padded: bool = True,
) -> list[Tensor | None]:
    """Operands as the model gives them: x and z are halves of one tensor, B and C slices of another."""
    xz = torch.randn(batch, length, 2 * channels, device=DEVICE)
    low = torch.randn(batch, length, 48 + 2 * states, device=DEVICE)
    raw = torch.randn(batch, length, channels, device=DEVICE) * 0.5
    A = -torch.exp(torch.rand(channels, states, device=DEVICE) * 2.7)
    bias = torch.rand(channels, device=DEVICE) * 3 - 4
    if wild:  # steps from 1e-4 to 50, decay from 1 to exactly 0, outliers in u
        raw = torch.exp(torch.rand_like(raw) * 13.1 - 9.2)
        raw, bias = raw + torch.log(-torch.expm1(-raw)), bias * 0
        A = -torch.arange(1.0, states + 1, device=DEVICE).expand(channels, states).contiguous()
        xz[:, ::7, ::5] *= 100
    if bare:
        raw = F.softplus(raw + bias)
    xz, low, raw = xz.to(dtype), low.to(dtype), raw.to(dtype)
    u, z = xz[:, :, :channels], xz[:, :, channels:]
    B, C = low[:, :, 48 : 48 + states], low[:, :, 48 + states :]
    if bare:
        return [u, raw, A, B, C, None, None, None, None, None]
    if not padded:
        return [u, raw, A, B, C, torch.randn(channels, device=DEVICE), z, bias, None, None]
    lengths = torch.randint(max(1, length // 2), length + 1, (batch,), device=DEVICE)
    h0 = torch.randn(batch, channels, states, device=DEVICE)
    return [u, raw, A, B, C, torch.randn(channels, device=DEVICE), z, bias, h0, lengths]


def plain(x: list[Tensor | None], boundaries: int, dtype: torch.dtype, seeds: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of the sequential recurrence in one dtype; the reverse steps are written out."""
    u, delta, A, B, C, D, z, bias, h0, lengths = (
        t if t is None or t.dtype == torch.int64 else t.detach().to(dtype) for t in x
    )
    assert u is not None
    assert delta is not None
    assert A is not None
    assert B is not None
    assert C is not None
    batch, length, channels = u.shape
    raw = delta if bias is None else delta + bias
    step = raw if bias is None else F.softplus(raw, threshold=60)
    if lengths is not None:
        real = (torch.arange(length, device=DEVICE) < lengths[:, None])[..., None]
        step = torch.where(real, step, 0.0)
    h = u.new_zeros(batch, channels, A.shape[1]) if h0 is None else h0
    hs, ys = [h], []
    for t in range(length):
        h = torch.exp(step[:, t, :, None] * A) * h + (step[:, t] * u[:, t])[..., None] * B[:, t, None]
        hs.append(h)
        ys.append((h * C[:, t, None]).sum(-1))
    core = torch.stack(ys, 1)
    y = core if D is None else core + D * u
    sig = None if z is None else torch.sigmoid(z)
    out = y if z is None else y * z * sig
    bound = torch.stack(hs[0:length:boundaries], 1)
    dout, dh_last, dbound = (s.to(dtype) for s in seeds)
    g = dout if z is None else dout * z * sig
    dz = None if z is None else dout * y * sig * (1 + z * (1 - sig))
    q = dh_last
    dA = torch.zeros_like(A)
    du, dstep, dB, dC = torch.empty_like(u), torch.empty_like(u), torch.empty_like(B), torch.empty_like(C)
    for t in reversed(range(length)):
        q = q + g[:, t, :, None] * C[:, t, None]
        dC[:, t] = (g[:, t, :, None] * hs[t + 1]).sum(1)
        dB[:, t] = (q * (step[:, t] * u[:, t])[..., None]).sum(1)
        through = (q * B[:, t, None]).sum(-1)
        q = q * torch.exp(step[:, t, :, None] * A)
        carried = q * hs[t]
        du[:, t] = through * step[:, t]
        dstep[:, t] = through * u[:, t] + (carried * A).sum(-1)
        dA += (carried * step[:, t, :, None]).sum(0)
        if t % boundaries == 0:
            q = q + dbound[:, t // boundaries]
    if D is not None:
        du += D * g
    if bias is not None:
        dstep = dstep * torch.sigmoid(raw)
    if lengths is not None:
        dstep = torch.where(real, dstep, 0.0)
    dD = None if D is None else (g * u).sum((0, 1))
    dbias = None if bias is None else dstep.sum((0, 1))
    grads = [du, dstep, dA, dB, dC, dD, dz, dbias, q]
    return [out, hs[-1], bound, *(q if v is None else v for v in grads)]


def error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    e = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
    return float("inf") if bool(torch.isnan(e)) else float(e)


# --- the gate ---


def compare(
    batch: int,
    length: int,
    channels: int,
    states: int,
    dtype: str,
    boundaries: int,
    *,
    portable: bool = False,
    one_pass: bool = False,
    hopper: tuple[Any, Any] | None = None,
    **kind: Any,
) -> list[str]:
    """Complaints about one shape (none: it passed), of the kernels that the dispatch takes, of the ``portable`` ones
    (in ``one_pass``), or of the ``hopper`` ones with these forward and backward plans (``boundaries`` 16)."""
    x = problem(batch, length, channels, states, DTYPES[dtype], **kind)
    softplus = x[7] is not None
    k = kernels()
    plans: tuple[Any, Any] = (None, None)
    if hopper is not None:
        from mambascope.ops.scan import gluon

        k, plans = gluon, hopper
    elif portable or one_pass:
        plans = k.forward_plan_of(x[0], x[2], boundaries), k.backward_plan_of(x[0], x[2], boundaries)
    if one_pass:
        steps = -(-length // boundaries) * boundaries
        plans = (
            type(plans[0])(plans[0].block, steps, 1),
            type(plans[1])(plans[1].block, plans[1].segment, plans[1].n_segments, 1, plans[1].n_segments),
        )
    found = list(k.scan_forward(*x, dt_softplus=softplus, boundaries=boundaries, plan=plans[0]))
    seeds = [torch.randn_like(t.float()) for t in found]
    seeds[0] = seeds[0].to(found[0].dtype)
    options = {"dt_softplus": softplus, "boundaries": boundaries, "plan": plans[1]}
    grads = k.scan_backward(*x, found[2], *seeds, **options)
    again = k.scan_backward(*x, found[2], *seeds, **options)
    bad = [f"{n}: other bits in a second run" for n in GRADS if grads[n] is not None and not same(grads[n], again[n])]
    if not same(found[0], k.scan_forward(*x, dt_softplus=softplus, boundaries=boundaries, plan=plans[0])[0]):
        bad.append("y: other bits in a second run")
    exact, rough = (plain(x, boundaries, d, seeds) for d in (torch.float64, torch.float32))
    everything = [*found, *(grads[n] for n in GRADS)]
    for name, a, b, c in zip(("y", "h_last", "h_boundary", *GRADS), everything, exact, rough, strict=True):
        if a is None:
            continue
        bar = max(1e-6, 2 * error(c, b))
        if a.dtype != torch.float32:
            bar += torch.finfo(a.dtype).eps / 2 * 1.1
        e = error(a, b)
        if not e <= bar:
            bad.append(f"{name}: error {e:.1e}, bar {bar:.1e}")
    return bad


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a, b)) and not bool(a.isnan().any())


def check_bits() -> list[str]:
    """Fused equals apart, at shapes of one pass and of chunks."""
    k, bad = kernels(), []
    for batch, length, dtype in ((1, 1000, "bf16"), (48, 65, "bf16"), (1, 1000, "fp32"), (48, 65, "fp32")):
        x = problem(batch, length, CHANNELS, STATES, DTYPES[dtype], padded=False)
        u, raw, A, B, C, D, z, bias, h0, lengths = x
        assert u is not None
        assert raw is not None
        assert D is not None
        assert bias is not None
        fused, h, _ = k.scan_forward(*x, dt_softplus=True, boundaries=None)
        delta = k.softplus_forward(raw.float() + bias)
        y, h2, _ = k.scan_forward(u, delta, A, B, C, None, None, None, h0, lengths, dt_softplus=False, boundaries=None)
        if not same(fused, k.gate_forward(y + D * u.float(), z)) or not same(h, h2):
            bad.append(f"{batch} x {length} {dtype}: fused and apart differ in bits")
        bound = k.scan_forward(*x, dt_softplus=True, boundaries=64)
        if error(bound[0], fused.double()) > 1e-2:
            bad.append(f"{batch} x {length} {dtype}: y changes with boundaries")
    return bad


def check_resume() -> list[str]:
    k, bad = kernels(), []
    x = problem(2, 1000, CHANNELS, STATES, torch.float32)
    x[9] = None
    y, h, _ = k.scan_forward(*x, dt_softplus=True, boundaries=None)
    for cut in (1, 63, 500):
        first = [t[:, :cut] if n in ("u", "delta", "B", "C", "z") else t for n, t in zip(NAMES, x, strict=True)]
        y1, h1, _ = k.scan_forward(*first, dt_softplus=True, boundaries=None)
        rest = [t[:, cut:] if n in ("u", "delta", "B", "C", "z") else t for n, t in zip(NAMES, x, strict=True)]
        rest[8] = h1
        y2, h2, _ = k.scan_forward(*rest, dt_softplus=True, boundaries=None)
        e = max(error(torch.cat((y1, y2), 1), y.double()), error(h2, h.double()))
        if not e <= 2e-6:
            bad.append(f"cut at {cut}: {e:.1e}")
    window = k.state_window(x[0][:, :70], F.softplus(x[1] + x[7])[:, :70], x[2], x[3][:, :70], x[8])  # type: ignore[index]
    sub = [t[:, :70] if n in ("u", "delta", "B", "C", "z") else t for n, t in zip(NAMES, x, strict=True)]
    e = error(window[:, -1], k.scan_forward(*sub, dt_softplus=True, boundaries=None)[1].double())
    bad = bad if e <= 2e-6 else [*bad, f"state_window: {e:.1e}"]
    steps = (x[0][:, :70], F.softplus(x[1] + x[7])[:, :70], x[2], x[3][:, :70], x[8])  # type: ignore[index]
    weight = torch.randn_like(window)
    e = error(k.window_dot(*steps, weight), (window.double() * weight.double()).sum(-1))
    return bad if e <= 2e-6 else [*bad, f"window_dot: {e:.1e}"]


def check_layers(dtype: str) -> list[str]:
    """Convolution (all gradients, states), norm and elementwise against torch in float64."""
    from mambascope.ops import conv, norm

    k, bad, kind = kernels(), [], DTYPES[dtype]
    floor = 1e-6 if dtype == "fp32" else torch.finfo(kind).eps / 2 * 1.1 + 1e-6
    for batch, length, channels, width in ((3, 65, 1000, 4), (2, 2, 40, 8), (2, 63, 1536, 1), (1, 1000, 1536, 4)):
        x = torch.randn(batch, length, 2 * channels, device=DEVICE).to(kind)[:, :, :channels]
        weight, bias = torch.randn(channels, width, device=DEVICE), torch.randn(channels, device=DEVICE)
        state = torch.randn(batch, channels, width - 1, device=DEVICE).to(kind)
        lengths = torch.randint(1, length + 1, (batch,), device=DEVICE)
        y, new = k.conv_forward(x, weight, bias, state, lengths, silu=True)
        leaves = [t.double().requires_grad_() for t in (x, weight, bias, state)]
        exact_y, exact_new = conv.conv_formula(*leaves, lengths, True)
        dy, dnew = torch.randn_like(y), torch.randn_like(new)
        grads = torch.autograd.grad([exact_y, exact_new], leaves, [dy.double(), dnew.double()])
        found = k.conv_backward(x, weight, bias, state, lengths, dy, dnew, silu=True)
        loose = 2e-6 if dtype == "fp32" else 3 * floor  # y is rounded before the SiLU
        parts = [("y", y, exact_y.detach()), ("state", new, exact_new.detach())]
        parts += [(n, found[n], g) for n, g in zip(("dx", "dweight", "dbias", "dstate"), grads, strict=True)]
        for name, a, b in parts:
            if a.numel() and not error(a, b) <= loose:
                bad.append(f"conv {batch}x{length}x{channels} K={width} {name}: {error(a, b):.1e}")
        apart = k.silu_forward(k.conv_forward(x, weight, bias, state, lengths, silu=False)[0])
        if not same(apart, y):
            bad.append(f"conv {batch}x{length}x{channels} K={width}: fused and apart differ in bits")
    for columns in (40, 768, 1000, 5120):
        x, weight = torch.randn(3, 33, columns, device=DEVICE).to(kind), torch.randn(columns, device=DEVICE).to(kind)
        out, normalized, scale = k.norm_forward(x, weight, 1e-5, expose=True)
        exact = norm.norm_formula(x.double(), weight.double(), 1e-5)
        bars = (floor, 1e-6, 1e-6)
        sums = k.add_norm_forward(x.flip(1), x.float(), weight, 1e-5, expose=True)
        apart = (x.flip(1) + x.float(), *k.norm_forward(x.flip(1) + x.float(), weight, 1e-5, expose=True))
        sums += k.add_norm_forward(x.flip(1), x, weight, 1e-5, expose=False)[:2]
        apart += (x.flip(1) + x, k.norm_forward(x.flip(1) + x, weight, 1e-5, expose=False)[0])
        if not all(same(a, b) for a, b in zip(sums, apart, strict=True)):
            bad.append(f"norm {columns}: with the residual, other bits than apart")
        for name, a, b, bar in zip(("out", "norm", "scale"), (out, normalized, scale), exact, bars, strict=True):
            if not error(a, b) <= bar:
                bad.append(f"norm {columns} {name}: {error(a, b):.1e}")
    x = (torch.randn(3, 33, 1000, device=DEVICE) * 8).to(kind)
    for name, a, b, bar in (
        ("softplus", k.softplus_forward(x), F.softplus(x.double(), threshold=60), 1e-6),
        ("silu", k.silu_forward(x), F.silu(x.double()), floor),
        ("gate", k.gate_forward(x.float(), x), x.double() * F.silu(x.double()), floor),
    ):
        if not error(a, b) <= bar:
            bad.append(f"{name}: {error(a, b):.1e}")
    return bad


# name, function, arguments, options; longest compilations first
CASES: list[tuple[str, Callable[..., list[str]], tuple[Any, ...], dict[str, Any]]] = [
    ("1 x 1000, D 1536, N 16, bf16", compare, (1, 1000, 1536, 16, "bf16", 32), {"padded": False}),
    ("1 x 1000, D 1536, N 16, fp32", compare, (1, 1000, 1536, 16, "fp32", 32), {"padded": False}),
    ("2 x 65, D 1000, N 128", compare, (2, 65, 1000, 128, "fp32", 16), {}),
    ("2 x 65, D 500, N 256", compare, (2, 65, 500, 256, "fp32", 16), {}),
    ("1 x 300, D 512, N 256, bf16", compare, (1, 300, 512, 256, "bf16", 64), {"padded": False}),
    ("1 x 1000, D 40, N 64", compare, (1, 1000, 40, 64, "fp32", 64), {}),
    ("2 x 64, D 1536, N 33", compare, (2, 64, 1536, 33, "fp32", 32), {}),
    ("2 x 63, D 1000, N 7", compare, (2, 63, 1000, 7, "fp32", 32), {}),
    ("3 x 1000, D 1000, N 1", compare, (3, 1000, 1000, 1, "fp32", 64), {}),
    ("48 x 65, D 1536, N 16, bf16 (one pass)", compare, (48, 65, 1536, 16, "bf16", 64), {"padded": False}),
    ("48 x 65, D 1536, N 16, fp32 (one pass)", compare, (48, 65, 1536, 16, "fp32", 64), {"padded": False}),
    ("2 x 200, D 1000, N 16, adversarial", compare, (2, 200, 1000, 16, "fp32", 32), {"wild": True}),
    ("2 x 1000, D 40, N 16, fp32, forced one pass", compare, (2, 1000, 40, 16, "fp32", 64), {"one_pass": True}),
    ("2 x 1, D 1536, N 16", compare, (2, 1, 1536, 16, "fp32", 64), {}),
    ("2 x 65, D 512, N 16, bare, bf16", compare, (2, 65, 512, 16, "bf16", 32), {"bare": True}),
    ("1 x 300, D 40, N 16, interval 100", compare, (1, 300, 40, 16, "fp32", 100), {}),
    ("2 x 65, D 40, N 16, fp16", compare, (2, 65, 40, 16, "fp16", 16), {}),
    ("32 x 512, D 512, N 16, bf16", compare, (32, 512, 512, 16, "bf16", 32), {}),
    ("fused = apart", check_bits, (), {}),
    ("split and resume, window", check_resume, (), {}),
    ("layers, bf16", check_layers, ("bf16",), {}),
    ("layers, fp32", check_layers, ("fp32",), {}),
]


def run_case(index: int) -> tuple[int, list[str], float]:
    start = time.time()
    try:
        portable_only()
        torch.manual_seed(index)
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
        torch.backends.cuda.matmul.allow_tf32 = False
        _, function, arguments, options = CASES[index]
        bad = function(*arguments, **options)
        torch.cuda.synchronize()
    except Exception as fault:
        where = traceback.format_exc().strip().splitlines()
        bad = [f"{type(fault).__name__}: {str(fault)[:300]}", *where[-5:-1]]
    torch.cuda.empty_cache()
    return index, bad, time.time() - start


def gate(workers: int) -> bool:
    """Run every case; True if all passed."""
    start, failed, done = time.time(), 0, set()

    def tell(result: tuple[int, list[str], float]) -> None:
        nonlocal failed
        index, bad, seconds = result
        done.add(index)
        failed += bool(bad)
        print(f"  {'ok  ' if not bad else RED + 'FAIL' + PLAIN}  {CASES[index][0]}  ({seconds:.1f} s)", flush=True)
        for line in bad[:8]:
            print(f"        {line}", flush=True)

    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(run_case, i) for i in range(len(CASES))]):
                tell(future.result())
    except Exception as fault:  # a worker died: the rest runs here
        print(f"  {RED}worker processes failed{PLAIN} ({type(fault).__name__}: {fault}); going on in one", flush=True)
    for index in range(len(CASES)):
        if index not in done:
            tell(run_case(index))
    print(f"gate: {len(CASES) - failed} of {len(CASES)} passed in {time.time() - start:.0f} s", flush=True)
    return failed == 0


# --- times ---


def timed(call: Callable[[int], Any], rounds: int = 25, budget: float = 0.6) -> float:
    """Median microseconds of one call, by events around runs of calls that keep the queue filled (4 of them, more if
    they are short); ``call`` gets the number of the input set."""

    def run(calls: int) -> float:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        for i in range(calls):
            call(i)
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1000 / calls

    run(3)
    calls = max(4, min(64, int(3000 / run(4))))
    times, start = [], time.time()
    while len(times) < 5 or (len(times) < rounds and time.time() - start < budget):
        times.append(run(calls))
    return median(times)


def graphed(call: Callable[[int], Any]) -> float:
    """The same in a CUDA graph of four calls, without launch costs."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(2):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(4):
            call(i)
    return timed(lambda _: graph.replay()) / 4


@contextmanager
def surviving(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as fault:
        print(f"  {RED}{what}: {type(fault).__name__}: {str(fault)[:200]}{PLAIN}", flush=True)
    torch.cuda.empty_cache()


def our_calls(batch: int, length: int, dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    """Forward, the same with boundary states, from an initial state, forward + backward; bare kernels, and through the
    public call."""
    from mambascope import ops

    k = kernels()
    sets = 1 if batch * length > 65536 else 3
    inputs, grads = [], []
    for _ in range(sets):
        x = problem(batch, length, CHANNELS, STATES, dtype, padded=False)
        inputs.append(x)
        grads.append(torch.randn(batch, length, CHANNELS, device=DEVICE).to(dtype))
    interval = k.preferred_interval(torch.device(DEVICE), torch.bfloat16, STATES)

    def forward(i: int) -> Any:
        return k.scan_forward(*inputs[i % sets], dt_softplus=True, boundaries=None)

    def with_states(i: int) -> Any:
        return k.scan_forward(*inputs[i % sets], dt_softplus=True, boundaries=64)

    start = torch.randn(batch, CHANNELS, STATES, device=DEVICE)

    def from_state(i: int) -> Any:
        return k.scan_forward(*inputs[i % sets][:8], start, None, dt_softplus=True, boundaries=None)

    def both(i: int) -> Any:
        x = inputs[i % sets]
        _, _, bound = k.scan_forward(*x, dt_softplus=True, boundaries=interval)
        return k.scan_backward(*x, bound, grads[i % sets], None, None, dt_softplus=True, boundaries=interval)

    leaves = [[None if t is None else t.detach().requires_grad_() for t in x] for x in inputs]

    def public(i: int) -> Any:
        u, raw, A, B, C, D, z, bias, _, _ = inputs[i % sets]
        with torch.no_grad():
            return ops.selective_scan(u, raw, A, B, C, D, z, dt_bias=bias, dt_softplus=True, backend="triton")

    def public_both(i: int) -> Any:
        u, raw, A, B, C, D, z, bias, _, _ = x = leaves[i % sets]
        y = ops.selective_scan(u, raw, A, B, C, D, z, dt_bias=bias, dt_softplus=True, backend="triton").y
        return torch.autograd.grad(y, [t for t in x if t is not None], grads[i % sets])

    bare = {"fwd": forward, "fwd+states": with_states, "fwd+h0": from_state, "f+b": both}
    return bare | {"public fwd": public, "public f+b": public_both}


def anchor_calls(anchor: Any, batch: int, length: int, dtype: torch.dtype) -> dict[str, Callable[[int], Any]]:
    """mamba_ssm's selective_scan_fn on its own layout, B D L, on as many input sets as `our_calls`."""
    inputs, leaves, grads = [], [], []
    for _ in range(1 if batch * length > 65536 else 3):
        u, raw, A, B, C, D, z, bias, _, _ = problem(batch, length, CHANNELS, STATES, dtype, padded=False)
        turned = [t.transpose(1, 2).contiguous() for t in (u, raw, B, C, z)]  # type: ignore[union-attr]
        order = (turned[0], turned[1], A, turned[2], turned[3], D, turned[4], bias)
        inputs.append(order)
        leaves.append([t.detach().requires_grad_() for t in order])  # type: ignore[union-attr]
        grads.append(torch.randn_like(turned[0]))

    def forward(i: int) -> Any:
        with torch.no_grad():
            return anchor(*inputs[i % len(inputs)], True)

    def both(i: int) -> Any:
        own = leaves[i % len(leaves)]
        return torch.autograd.grad(anchor(*own, True), own, grads[i % len(grads)])

    return {"fwd": forward, "f+b": both}


def find_anchor(path: str | None) -> Any:
    if path:
        sys.path.insert(0, path)
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore[import-not-found]

        return selective_scan_fn
    except Exception as fault:
        print(f"{RED}no anchor, no verdict{PLAIN}: mamba_ssm's selective scan cannot be imported ({fault})", flush=True)
        return None


def copy_speed() -> float:
    """Bytes a second of a large device copy, read and written."""
    a = torch.empty(1 << 28, device=DEVICE).uniform_()
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / (timed(lambda _: b.copy_(a), budget=0.2) * 1e-6)


def warm_one(job: tuple[int, int, str]) -> str:
    """Compile what one cell's timings, or those of N states (a batch of 0), will launch; Triton keeps it on disk."""
    batch, length, name = job
    try:
        portable_only()
        if batch == 0:
            for call in state_calls(length).values():
                call(0)
        else:
            for call in our_calls(batch, length, DTYPES[name]).values():
                call(0)
        torch.cuda.synchronize()
    except Exception as fault:
        return f"{job}: {type(fault).__name__}: {str(fault)[:200]}"
    return ""


def warm_up(workers: int) -> None:
    start = time.time()
    jobs = [(0, states, "bf16") for states in MANY_STATES] + [(*s, d) for s in SHAPES for d in ("bf16", "fp32")]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for complaint in pool.map(warm_one, jobs):
            if complaint:
                print(f"  does not run: {complaint}", flush=True)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)


def verdict(rows: list[dict[str, Any]], anchor: Any) -> bool | None:
    """Whether no cell is slower than `SLOWEST` times the anchor; None without an anchor or with cells missing."""
    if anchor is None:
        print(f"{RED}no anchor, no verdict{PLAIN}")
        return None
    cells = {
        f"{r['B']} x {r['L']} {r['dtype']} {what}": r[f"public {what}"] / r[f"anchor {what}"]
        for r in rows
        for what in ("fwd", "f+b")
        if f"public {what}" in r and f"anchor {what}" in r
    }
    if len(cells) < 4 * len(SHAPES):
        print(f"{RED}no verdict: {4 * len(SHAPES) - len(cells)} cells are missing{PLAIN}")
        return None
    worst = max(cells, key=lambda cell: cells[cell])
    good = cells[worst] <= SLOWEST
    text = f"slowest cell {worst}: {cells[worst]:.2f} times the anchor's (bar {SLOWEST})"
    print(f"  {'pass' if good else RED + 'FAIL' + PLAIN}  {text}", flush=True)
    return good


def in_order(first: list[str]) -> list[tuple[int, int]]:
    """`SHAPES`, those that are named "BxL" before the others."""
    named = [tuple(int(n) for n in name.split("x")) for name in first]
    unknown = [name for name, shape in zip(first, named, strict=True) if shape not in SHAPES]
    if unknown:
        raise SystemExit(f"--first: no shape of this benchmark is {unknown[0]}; they are {SHAPES}")
    return [*(s for s in SHAPES if s in named), *(s for s in SHAPES if s not in named)]


def times(shapes: list[tuple[int, int]], anchor: Any, limit: float, started: float) -> list[dict[str, Any]]:
    speed = copy_speed()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    print(f"copy {speed / 1e12:.2f} TB/s; microseconds, medians; floor: bytes, exponentials at 16 a clock (1.755 GHz)")
    head = (
        "shape",
        "type",
        "fwd",
        "graph",
        "+states",
        "public",
        "f+b",
        "graph",
        "public",
        "floor",
        "recorded",
        "anchor",
    )
    print("  " + " ".join(f"{h:>10}" for h in head), flush=True)
    rows = []
    for batch, length in shapes:
        for name in ("bf16", "fp32"):
            if time.time() - started > limit:
                print(f"  {RED}out of time before {batch} x {length} {name}{PLAIN}", flush=True)
                return rows
            row: dict[str, Any] = {"B": batch, "L": length, "dtype": name}
            with surviving(f"{batch} x {length} {name}"):
                calls = our_calls(batch, length, DTYPES[name])
                for what, call in calls.items():
                    with surviving(f"{batch} x {length} {name} {what}"):
                        row[what] = timed(call, budget=0.3)
                for what in ("fwd", "f+b"):
                    if batch * length <= 20000:
                        with surviving(f"{batch} x {length} {name} {what} in a graph"):
                            row[f"{what} graph"] = graphed(calls[what])
                del calls
            if anchor is not None:
                with surviving(f"anchor {batch} x {length} {name}"):
                    for what, call in anchor_calls(anchor, batch, length, DTYPES[name]).items():
                        row[f"anchor {what}"] = timed(call, budget=0.3)
            size = 2 if name == "bf16" else 4
            moved = batch * length * (4 * CHANNELS + 2 * STATES) * size
            exponentials = batch * length * CHANNELS * STATES / (16 * processors * 1755)
            row["floor bytes"], row["floor exp"] = moved / speed * 1e6, exponentials
            row["recorded fwd"], row["recorded f+b"] = RECORDED[batch, length][name]
            rows.append(row)

            def show(key: str, row: dict[str, Any] = row) -> str:
                return f"{row[key]:.0f}" if key in row else "-"

            keys = ("fwd", "fwd graph", "fwd+states", "public fwd", "f+b", "f+b graph", "public f+b")
            cells = [f"{batch}x{length}", name, *(show(key) for key in keys)]
            cells.append(f"{row['floor bytes']:.0f},{exponentials:.0f}")
            cells += [f"{row['recorded fwd']},{row['recorded f+b']}", f"{show('anchor fwd')},{show('anchor f+b')}"]
            print("  " + " ".join(f"{c:>10}" for c in cells), flush=True)
    return rows


def sweep(limit: float, started: float) -> list[dict[str, Any]]:
    """bf16 times of plans that the table does not choose, to check its thresholds; its own choice is marked."""
    k, rows = kernels(), []
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    interval = k.REPLAY_INTERVAL
    for batch, length in SHAPES:
        if time.time() - started > limit:
            print(f"  {RED}out of time before the sweep of {batch} x {length}{PLAIN}", flush=True)
            break
        x = problem(batch, length, CHANNELS, STATES, torch.bfloat16, padded=False)
        grad = torch.randn(batch, length, CHANNELS, device=DEVICE).bfloat16()
        bound = k.scan_forward(*x, dt_softplus=True, boundaries=interval)[2]
        own = k.forward_plan_of(x[0], x[2], None), k.backward_plan_of(x[0], x[2], interval)
        segments = length // interval
        found: list[tuple[float, str, str]] = []
        for block in (8, 16, 32):
            for chunks in (1, 2, 4, 8, 16, 32):
                programs = batch * CHANNELS // block * chunks
                if not 2 * processors <= programs <= (48 if chunks > 1 else 400) * processors or segments < chunks:
                    continue
                forward = type(own[0])(block, length // chunks, chunks)
                backward = type(own[1])(block, interval, segments // chunks, chunks, segments)
                for what, plan in (("forward", forward), ("backward", backward)):
                    if what == "backward" and chunks > 1 and programs > 24 * processors:
                        continue
                    with surviving(f"{batch} x {length} {plan}"):
                        if what == "forward":
                            t = timed(
                                lambda _, plan=plan: k.scan_forward(*x, dt_softplus=True, boundaries=None, plan=plan),
                                rounds=9,
                            )
                        else:
                            t = timed(
                                lambda _, plan=plan: k.scan_backward(
                                    *x, bound, grad, None, None, dt_softplus=True, boundaries=interval, plan=plan
                                ),
                                rounds=9,
                            )
                        mark = " *" if plan in own else ""
                        found.append((t, what, f"{block}/{chunks}{mark}"))
                        rows.append({"B": batch, "L": length, "pass": what, "block": block, "chunks": chunks, "us": t})
        for what in ("forward", "backward"):
            line = ", ".join(f"{name} {t:.0f}" for t, w, name in sorted(found) if w == what)
            print(f"  {batch}x{length} {what} (channels/chunks us, * the table's): {line}", flush=True)
    return rows


def layer_times() -> list[dict[str, Any]]:
    k, rows = kernels(), []
    for name in ("bf16", "fp32"):
        with surviving(f"layers {name}"):
            x = torch.randn(8, 2048, 2 * CHANNELS, device=DEVICE).to(DTYPES[name])[:, :, :CHANNELS]
            weight, bias = torch.randn(CHANNELS, 4, device=DEVICE), torch.randn(CHANNELS, device=DEVICE)
            dy = torch.randn(8, 2048, CHANNELS, device=DEVICE).to(DTYPES[name])
            calls = {
                "conv fwd": lambda _: k.conv_forward(x, weight, bias, None, None, silu=True),
                "conv bwd": lambda _: k.conv_backward(x, weight, bias, None, None, dy, None, silu=True),
                "norm fwd": lambda _: k.norm_forward(dy, bias, 1e-5, expose=False),
                "gate fwd": lambda _: k.gate_forward(dy.float(), x),
            }
            row: dict[str, Any] = {"B": 8, "L": 2048, "dtype": name}
            for what, call in calls.items():
                with surviving(what):
                    row[what] = timed(call)
            rows.append(row)
            print(
                "  layers 8x2048 " + name + ": " + ", ".join(f"{w} {row[w]:.0f}" for w in calls if w in row), flush=True
            )
    return rows


MANY_STATES = (16, 64, 128, 256)


def state_calls(states: int) -> dict[str, Callable[[int], Any]]:
    """Forward and backward of 4 x 2048, D = 512, bf16, with N states."""
    k = kernels()
    x = problem(4, 2048, 512, states, torch.bfloat16, padded=False)
    bound = k.scan_forward(*x, dt_softplus=True, boundaries=64)[2]
    back, own = k.backward_plan_of(x[0], x[2], 64), k.forward_plan_of(x[0], x[2], None)
    dy = torch.randn(4, 2048, 512, device=DEVICE).bfloat16()

    def forward(_: int) -> Any:
        return k.scan_forward(*x, dt_softplus=True, boundaries=None, plan=own)

    def backward(_: int) -> Any:
        return k.scan_backward(*x, bound, dy, None, None, dt_softplus=True, boundaries=64, plan=back)

    return {"fwd": forward, "bwd": backward}


def state_times() -> list[dict[str, Any]]:
    """By the number of states: N should cost about N / 16 times what 16 cost."""
    rows = []
    for states in MANY_STATES:
        with surviving(f"N = {states}"):
            row: dict[str, Any] = {"B": 4, "L": 2048, "dtype": "bf16", "states": states}
            row |= {what: timed(call, budget=0.3) for what, call in state_calls(states).items()}
            rows.append(row)
            print(f"  portable, N = {states}: forward {row['fwd']:.0f}, backward {row['bwd']:.0f} us", flush=True)
    return rows


def write(path: str, rows: list[dict[str, Any]], passed: bool | None) -> None:
    import triton

    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "gate": {True: "passed", False: "FAILED", None: "not run"}[passed],
        "D": CHANNELS,
        "N": STATES,
    }
    fields = list(dict.fromkeys([*about, *(key for row in rows for key in row)]))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(
            {**about, **{k: round(v, 1) if isinstance(v, float) else v for k, v in row.items()}} for row in rows
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default=os.path.join(os.environ.get("OUT", "."), "bench_scan_gpu.csv"))
    parser.add_argument("--anchor", help="folder of a built mamba_ssm")
    parser.add_argument("--only", choices=("gate", "times"))
    parser.add_argument("--sweep", action="store_true", help="also time plans that the table does not choose")
    parser.add_argument("--quick", action="store_true", help="three shapes only")
    parser.add_argument("--first", nargs="+", default=[], metavar="BxL", help="shapes to time before the others")
    parser.add_argument("--workers", type=int, default=min(15, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=140.0, help="seconds after which no further shape is timed")
    arguments = parser.parse_args()
    started = time.time()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU; the interpreted tests are in tests/ops/test_triton.py")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {commit()}", flush=True)
    passed = None if arguments.only == "times" else gate(arguments.workers)
    rows: list[dict[str, Any]] = []
    if arguments.only != "gate":
        if passed is False:
            print(f"{RED}the gate failed: these times are of unverified kernels{PLAIN}")
        portable_only()
        warm_up(arguments.workers)
        anchor = find_anchor(arguments.anchor)
        shapes = in_order(arguments.first)[: 3 if arguments.quick else None]
        rows = times(shapes, anchor, arguments.limit, started)
        verdict(rows, anchor)
        rows += state_times() + layer_times()
        write(arguments.csv, rows, passed)
        if arguments.sweep:
            write(arguments.csv.removesuffix(".csv") + "_sweep.csv", sweep(arguments.limit + 150, started), passed)
        print(f"written: {arguments.csv}")
    print(f"total {time.time() - started:.0f} s")
    return 1 if passed is False else 0


if __name__ == "__main__":
    raise SystemExit(main())

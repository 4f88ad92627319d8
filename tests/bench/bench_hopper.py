"""The Hopper scan kernels on a GPU of compute capability 9.x: gate, times beside the portable ones, a sweep of plans.

    python tests/bench/bench_hopper.py [--csv FILE] [--anchor DIR] [--only gate|times|host|sweep] [--limit S]

The gate compares every plan that the table can choose with the float64 recurrence, and bits: of two runs, of the fused
form and its steps apart, of h under different plans and cuts of the text. Times are medians by CUDA events, eager calls
through the public function beside mamba_ssm's (``--anchor``, or an importable one) and ours in a CUDA graph; without an
anchor there is no verdict, and ratios are to mamba_ssm 2.3.2's times on an H100 as recorded in bench_scan_gpu. The
sweep times plans beside the table's own.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from math import exp, log
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from mambascope.ops.scan import gluon_table as table
from tests.bench.bench_scan_gpu import (
    CHANNELS,
    DEVICE,
    DTYPES,
    PLAIN,
    RECORDED,
    RED,
    SHAPES,
    STATES,
    anchor_calls,
    commit,
    compare,
    find_anchor,
    graphed,
    kernels,
    our_calls,
    problem,
    same,
    timed,
    write,
)

BACK = table._BACKWARD
_HALF = {"narrow": table._FORWARD_NARROW, "wide": table._FORWARD_WIDE}
FORWARDS = {
    "fp32": {
        "narrow, float": table._FORWARD_NARROW_FLOAT,
        "wide, float": table._FORWARD_WIDE_FLOAT,
        "many, float": table._FORWARD_MANY_FLOAT,
    },
    "bf16": _HALF,
    "fp16": _HALF,
}
"""Plans of the forward: all that the table can choose. Its backward has one form, in any number of parts of time."""


def cut_time(x: list[Tensor | None], begin: int, end: int) -> list[Tensor | None]:
    timed_ones = (0, 1, 3, 4, 6)
    return [t[:, begin:end] if t is not None and i in timed_ones else t for i, t in enumerate(x)]


BITS = [(1, 1000, "bf16"), (48, 65, "bf16"), (1, 1024, "fp32"), (48, 64, "fp32"), (3, 40, "fp16"), (1, 512, "bf16")]


def check_bits(batch: int, length: int, dtype: str) -> list[str]:
    """Fused = apart; h whatever the plan; split and resume; boundary states do not change y."""
    from mambascope.ops.scan import gluon

    k, bad = kernels(), []
    x = problem(batch, length, CHANNELS, STATES, DTYPES[dtype], padded=False)
    u, raw, A, B, C, D, z, bias, h0, lengths = x
    assert u is not None and raw is not None and D is not None
    y, h, bound = k.scan_forward(*x, dt_softplus=True, boundaries=64)
    delta = k.softplus_forward(raw.float() + bias)
    apart, h2, _ = k.scan_forward(u, delta, A, B, C, None, None, None, h0, lengths, dt_softplus=False, boundaries=None)
    if not same(h, h2):
        bad.append("h of fused and apart differ in bits")
    gated = k.gate_forward(apart + D * u.float(), z)
    if not same(y, gated):
        bad.append(f"fused and apart differ in bits in {int((y != gated).sum())} of {y.numel()} places")
    if not same(y, k.scan_forward(*x, dt_softplus=True, boundaries=None)[0]):
        bad.append("y changes with boundaries")
    for name, plan in FORWARDS[dtype].items():
        other = gluon.scan_forward(*x, dt_softplus=True, boundaries=64, plan=plan)
        if not same(h, other[1]) or not same(bound, other[2]):
            bad.append(f"h differs in bits, {name}")
    for at in (1, 16, 33):
        y1, h1, _ = k.scan_forward(*cut_time(x, 0, at), dt_softplus=True, boundaries=None)
        rest = cut_time(x, at, length)
        rest[8] = h1
        y2, h2, _ = k.scan_forward(*rest, dt_softplus=True, boundaries=None)
        if not same(h2, h) or not same(torch.cat((y1, y2), 1), y):
            bad.append(f"cut at {at}, other bits")
    first, start = x[8], torch.zeros_like(h) if h0 is None else h0
    assert first is None
    window = k.state_window(u[:, :64], delta[:, :64], A, B[:, :64], start)  # type: ignore[index]
    short = k.scan_forward(*cut_time(x, 0, min(64, length)), dt_softplus=True, boundaries=None)[1]
    if not same(window[:, -1], short):
        bad.append("states replayed by the portable kernel have other bits")
    return bad


def check_turned(batch: int, length: int, channels: int, states: int, dtype: str, bare: bool = False) -> list[str]:
    """Inputs that lie as ``B D L``: the same bits, under each plan."""
    from mambascope.ops.scan import gluon

    bad = []
    x = problem(batch, length, channels, states, DTYPES[dtype], bare=bare)
    other = [t.transpose(1, 2).contiguous() if t is not None and i in (0, 1, 3, 4, 6) else t for i, t in enumerate(x)]
    for name, plan in FORWARDS[dtype].items():
        for interval in (None, 16) if length > 100 else (16,):
            options = {"dt_softplus": not bare, "boundaries": interval, "plan": plan}
            y, h, bound = gluon.scan_forward(*x, **options)
            found = gluon.scan_forward(*other, **options, turned=True)
            if not same(found[0], y.to(found[0].dtype).transpose(1, 2)):
                bad.append(f"{name}, every {interval}: y has other bits")
            if not same(found[1], h) or (bound is not None and not same(found[2], bound)):
                bad.append(f"{name}, every {interval}: states have other bits")
    return bad


def check_repeats() -> list[str]:
    """Thirty runs, the same bits."""
    from mambascope.ops.scan import gluon

    bad = []
    for batch, length, dtype in ((8, 2048, "bf16"), (1, 2048, "bf16"), (5, 1111, "fp32"), (1, 512, "fp32")):
        x = problem(batch, length, CHANNELS, STATES, DTYPES[dtype])
        dy = torch.randn(batch, length, CHANNELS, device=DEVICE).to(DTYPES[dtype])
        y0, h0, bound = gluon.scan_forward(*x, dt_softplus=True, boundaries=16)
        first = gluon.scan_backward(*x, bound, dy, h0, None, dt_softplus=True, boundaries=16)
        for _ in range(30):
            y, h, other = gluon.scan_forward(*x, dt_softplus=True, boundaries=16)
            if not (same(y, y0) and same(h, h0) and same(bound, other)):
                bad.append(f"{batch} x {length} {dtype}: forward, other bits")
                break
        for _ in range(15):
            again = gluon.scan_backward(*x, bound, dy, h0, None, dt_softplus=True, boundaries=16)
            wrong = [n for n, v in first.items() if v is not None and not same(v, again[n])]
            if wrong:
                bad.append(f"{batch} x {length} {dtype}: backward, other bits in {wrong}")
                break
    return bad


def check_replays(kind: str, layers: bool) -> list[str]:
    """Replayed calls, of the scan or of the ``layers`` around it, give the bits of ordinary ones, on inputs that no
    replay has seen."""
    from mambascope.ops.scan import triton_packed, triton_replay

    k, bad = kernels(), []

    def flat(result: Any) -> list[Any]:
        return list(result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else (result,))

    def compare(what: str, function: Any, make: Callable[[], list[Any]], **options: Any) -> list[Any]:
        assert isinstance(function, triton_replay.Replayed)
        for _ in range(2):
            function(*make(), **options)
        x = make()
        ordinary, again = flat(function.function(*x, **options)), flat(function(*x, **options))
        if all(replay in (None, function.function) for replay in function.known.values()):
            bad.append(f"{what}: nothing was replayed")
        if any((a is None) != (b is None) or (a is not None and not same(a, b)) for a, b in zip(ordinary, again)):
            bad.append(f"{what}: other bits")
        return ordinary

    dtype = DTYPES[kind]
    if not layers:
        for shape in ((1, 500), (9, 300)):
            for interval in (None, 16, 64):
                make = partial(problem, *shape, CHANNELS, STATES, dtype)
                found = compare(f"scan {shape}", k.scan_forward, make, dt_softplus=True, boundaries=interval)

                def arriving(make: Any = make, found: Any = found) -> list[Any]:
                    x = make()
                    bound = k.scan_forward.function(*x, dt_softplus=True, boundaries=interval)[2]
                    return [*x, bound, torch.randn_like(found[0]), None, None]

                if interval:
                    compare(f"backward {shape}", k.scan_backward, arriving, dt_softplus=True, boundaries=interval)
    else:

        def turned(dtype: Any = dtype) -> list[Any]:
            x = problem(2, 100, 520, STATES, dtype, padded=False)[:8]
            return [t.transpose(1, 2).contiguous() if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(x)]  # type: ignore[union-attr]

        def packed(turned: Any = turned) -> list[Any]:
            x = turned()
            out, _, bound, u, delta, B, C, z, bias = triton_packed.forward.function(*x, **options)
            return [u, delta, x[2], B, C, x[5], z, bias, bound, torch.randn_like(out), None]

        for options in ({"softplus": True, "interval": 16, "lies": lies} for lies in (False, True)):
            for interval in (None, 16):
                compare(f"packed, {options}", triton_packed.forward, turned, **options | {"interval": interval})
            compare(f"packed backward, {options}", triton_packed.backward, packed, **options)

        def conv() -> list[Any]:
            x = torch.randn(3, 100, 2 * CHANNELS, device=DEVICE).to(dtype)[..., :CHANNELS]
            weight = torch.randn(CHANNELS, 4, device=DEVICE)
            return [x, weight, weight[:, 0].contiguous(), torch.randn(3, CHANNELS, 3, device=DEVICE).to(dtype), None]

        compare("conv", k.conv_forward, conv, silu=True)
        grad = [torch.randn(3, 100, CHANNELS, device=DEVICE).to(dtype), None]
        compare("conv backward", k.conv_backward, lambda conv=conv, grad=grad: [*conv(), *grad], silu=True)
        for what in ("silu", "softplus"):
            compare(what, getattr(k, f"{what}_forward"), lambda conv=conv: conv()[:1])
        compare("gate", k.gate_forward, lambda conv=conv: [conv()[0].float(), conv()[0]])
        compare("norm", k.norm_forward, lambda conv=conv: [conv()[0], conv()[2], 1e-5], expose=True)
    return bad


Case = tuple[str, Callable[..., list[str]], tuple[Any, ...], dict[str, Any]]


def cases() -> list[Case]:
    found: list[Case] = []
    forms = [(dtype, form, plan) for dtype in ("fp32", "bf16") for form, plan in FORWARDS[dtype].items()]
    for (dtype, form, forward), parts in zip(forms, (1, 2, 5, 8, 11), strict=True):
        name = f"2 x 700, D 1536, {dtype}, {form}, {parts} parts"
        both = (forward, replace(BACK, parts=parts))
        found.append((name, compare, (2, 700, 1536, 16, dtype, 16), {"hopper": both}))
    for length in (1, 15, 16, 17, 63, 64, 65):
        found.append((f"2 x {length}, D 1536, fp32", compare, (2, length, 1536, 16, "fp32", 16), {}))
    for batch, length, channels, states, dtype, interval, kind in (
        (1, 1000, 1536, 16, "bf16", 64, {"padded": False}),
        (3, 300, 1000, 16, "fp32", 64, {}),
        (2, 200, 40, 16, "fp32", 32, {}),
        (2, 63, 1000, 7, "fp32", 16, {}),
        (3, 300, 1000, 1, "bf16", 64, {}),
        (2, 200, 1000, 16, "fp32", 16, {"wild": True}),
        (2, 200, 1536, 16, "fp32", 128, {"wild": True}),
        (2, 65, 512, 16, "bf16", 32, {"bare": True}),
        (2, 65, 512, 16, "fp32", 16, {"bare": True}),
        (2, 65, 40, 16, "fp16", 16, {}),
        (32, 512, 512, 16, "bf16", 32, {}),
        (48, 65, 1536, 16, "fp32", 64, {}),
    ):
        name = f"{batch} x {length}, D {channels}, N {states}, {dtype}, every {interval} {' '.join(kind)}"
        found.append((name, compare, (batch, length, channels, states, dtype, interval), kind))
    found.append(("1 x 300, D 1536, fp32, portable", compare, (1, 300, 1536, 16, "fp32", 32), {"portable": True}))
    found += [(f"bits, {b} x {n} {dtype}", check_bits, (b, n, dtype), {}) for b, n, dtype in BITS]
    for batch, length, channels, states, dtype in (
        (2, 192, 1536, 16, "fp32"),
        (2, 192, 1536, 16, "bf16"),
        (3, 65, 1000, 16, "fp32"),
        (1, 300, 40, 7, "bf16"),
        (2, 40, 1536, 16, "fp16"),
    ):
        name = f"turned, {batch} x {length}, D {channels}, N {states}, {dtype}"
        found.append((name, check_turned, (batch, length, channels, states, dtype), {}))
    found.append(("turned, bare", check_turned, (2, 65, 520, 16, "bf16", True), {}))
    found.append(("repeats", check_repeats, (), {}))
    every = [(dtype, layers) for dtype in ("bf16", "fp32") for layers in (False, True)]
    found += [(f"replays, {d}{', layers' if layers else ''}", check_replays, (d, layers), {}) for d, layers in every]
    return found


def run_case(index: int) -> tuple[int, list[str], float]:
    start = time.time()
    try:
        torch.manual_seed(index)
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
        torch.backends.cuda.matmul.allow_tf32 = False
        _, function, arguments, options = cases()[index]
        bad = function(*arguments, **options)
        torch.cuda.synchronize()
    except Exception as fault:
        where = traceback.format_exc().strip().splitlines()
        bad = [f"{type(fault).__name__}: {str(fault)[:400]}", *where[-7:-1]]
    torch.cuda.empty_cache()
    return index, bad, time.time() - start


def gate(workers: int, limit: float, match: str = "") -> bool:
    start, failed, every = time.time(), 0, cases()
    order = sorted((i for i in range(len(every)) if match in every[i][0]), key=lambda i: every[i][1] is compare)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(run_case, i) for i in order]
        try:
            for done in as_completed(waiting, timeout=limit):
                index, bad, seconds = done.result()
                failed += bool(bad)
                if bad:
                    print(f"  FAIL  {every[index][0]}  ({seconds:.1f} s)", flush=True)
                    for line in bad[:14]:
                        print(f"        {line}", flush=True)
        except TimeoutError:
            left = [every[i][0] for i, f in zip(order, waiting, strict=True) if not f.done()]
            print(f"  gate: no answer within {limit:.0f} s from {left}", flush=True)
            failed += len(left)
            for process in list((pool._processes or {}).values()):
                process.kill()
    print(f"gate: {len(order) - failed} of {len(order)} passed in {time.time() - start:.0f} s", flush=True)
    return not failed


# --- plans beside the table's ---


def forward_plans(batch: int, dtype: str) -> dict[str, Any]:
    """By name: the table's own, and some that it does not take; registers of a producer / of a finisher."""
    plans = {name: plan for name, plan in FORWARDS[dtype].items() if name.startswith("narrow") == (batch == 1)}
    if batch == 1:
        (own,) = plans.values()
        early = {f"narrow, {n} early": replace(own, producer_early=n) for n in range(3)}
        return plans | {name: plan for name, plan in early.items() if plan != own}
    wide = next(iter(plans.values()))
    plans["80/64, nothing early"] = replace(wide, producer_early=0, finisher_early=0, producer_registers=80)
    plans["96/64"] = replace(FORWARDS["fp32"]["wide, float"], producer_registers=96)
    return plans


def backward_plans(batch: int) -> dict[str, Any]:
    return {f"w{parts}": replace(BACK, parts=parts) for parts in ((4, 8, 11, 16) if batch == 1 else (1, 2))}


def compile_one(job: tuple[int, str, str, str]) -> str:
    batch, kind, name, dtype = job
    from mambascope.ops.scan import gluon

    try:
        x = problem(1, 64, CHANNELS, STATES, DTYPES[dtype], padded=False)
        if kind == "forward":
            for interval in (None, 64):
                gluon.scan_forward(*x, dt_softplus=True, boundaries=interval, plan=forward_plans(batch, dtype)[name])
        else:
            bound = torch.zeros(1, 4, CHANNELS, STATES, device=DEVICE)
            dy = torch.randn(1, 64, CHANNELS, device=DEVICE).to(DTYPES[dtype])
            plan = backward_plans(batch)[name]
            gluon.scan_backward(*x, bound, dy, None, None, dt_softplus=True, boundaries=16, plan=plan)
        torch.cuda.synchronize()
    except Exception as fault:
        return f"{job}: {type(fault).__name__}: {str(fault)[:200]}"
    return ""


def compile_all(workers: int, passes: list[str]) -> None:
    start, jobs = time.time(), []
    for dtype, batch in ((d, b) for d in ("bf16", "fp32") for b in (1, 8)):
        every = {"forward": forward_plans(batch, dtype), "backward": backward_plans(batch)}
        jobs += [(batch, kind, name, dtype) for kind in passes for name in every[kind]]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for complaint in pool.map(compile_one, jobs):
            if complaint:
                print(f"  does not compile or run: {complaint}", flush=True)
    print(f"compiled {len(jobs)} plans in {time.time() - start:.0f} s", flush=True)


def sweep(started: float, limit: float, passes: list[str]) -> list[dict[str, Any]]:
    """Microseconds of each plan; of the forward also with states every 64 steps. The table's own are marked."""
    from mambascope.ops.scan import gluon

    rows = []
    for (batch, length), dtype, kind in ((s, d, k) for k in passes for d in ("fp32", "bf16") for s in SHAPES):
        if time.time() - started > limit:
            print(f"  out of time before the sweep of {batch} x {length} {dtype} {kind}", flush=True)
            continue
        x = problem(batch, length, CHANNELS, STATES, DTYPES[dtype], padded=False)
        dy = torch.randn(batch, length, CHANNELS, device=DEVICE).to(DTYPES[dtype])
        shape = (batch, length, CHANNELS, 132)
        size = DTYPES[dtype].itemsize
        own = table.forward_plan(*shape, size), table.backward_plan(*shape)
        bound = gluon.scan_forward(*x, dt_softplus=True, boundaries=16)[2] if kind == "backward" else None
        measure = graphed if batch * length <= 20000 else partial(timed, budget=0.25)
        line = []
        for name, plan in (forward_plans(batch, dtype) if kind == "forward" else backward_plans(batch)).items():
            row: dict[str, Any] = {"B": batch, "L": length, "dtype": dtype, "pass": kind, "plan": name}

            def forward(_: int, every: int | None = None, plan: Any = plan, x: Any = x) -> Any:
                return gluon.scan_forward(*x, dt_softplus=True, boundaries=every, plan=plan)

            def backward(_: int, plan: Any = plan, x: Any = x, bound: Any = bound, dy: Any = dy) -> Any:
                return gluon.scan_backward(*x, bound, dy, None, None, dt_softplus=True, boundaries=16, plan=plan)

            try:
                row["us"] = measure(forward if kind == "forward" else backward)
                if kind == "forward":
                    row["with states us"] = measure(partial(forward, every=64))
            except Exception as fault:
                line.append((9e9, f"{name} {type(fault).__name__} {str(fault)[:60]}"))
                continue
            more = f" ({row['with states us']:.1f})" if "with states us" in row else ""
            line.append((row["us"], f"{name}{' *' if plan in own else ''} {row['us']:.1f}{more}"))
            rows.append(row)
        print(f"  {batch}x{length} {dtype} {kind}: " + ", ".join(text for _, text in sorted(line)), flush=True)
        del x, dy, bound
        torch.cuda.empty_cache()
    return rows


# --- times ---


def layer_calls() -> dict[str, Callable[[int], Any]]:
    """The other operators of a block, as a model calls them without gradients."""
    from mambascope import ops

    x = torch.randn(1, 512, 2 * CHANNELS, device=DEVICE).bfloat16()
    u, z = x.chunk(2, -1)
    weight, bias = torch.randn(CHANNELS, 1, 4, device=DEVICE).bfloat16(), torch.randn(CHANNELS, device=DEVICE)
    y = torch.randn(1, 512, CHANNELS, device=DEVICE)
    calls: dict[str, Callable[[], Any]] = {
        "causal_conv": lambda: ops.causal_conv(u, weight, bias, activation="silu"),
        "rms_norm": lambda: ops.rms_norm(y, bias, 1e-5),
        "gate": lambda: ops.gate(y, z),
        "softplus": lambda: ops.softplus(u),
        "silu": lambda: ops.silu(u),
    }

    def quiet(call: Callable[[], Any]) -> Callable[[int], Any]:
        def run(_: int) -> Any:
            with torch.no_grad():
                return call()

        return run

    return {what: quiet(call) for what, call in calls.items()}


def host_cost() -> None:
    """Host microseconds of a call at 1 x 512, the device never waited for."""
    for what, call in {**our_calls(1, 512, torch.bfloat16), **layer_calls()}.items():
        for i in range(6):
            call(i)
        torch.cuda.synchronize()
        best = 1e9
        for _ in range(9):
            start = time.perf_counter()
            for i in range(20):
                call(i)
            best = min(best, (time.perf_counter() - start) / 20 * 1e6)
            torch.cuda.synchronize()
        print(f"  host cost at 1x512, {what}: {best:.1f} us", flush=True)


def portable_calls(batch: int, length: int, dtype: torch.dtype) -> tuple[Callable[[int], Any], Callable[[int], Any]]:
    k = kernels()
    x = problem(batch, length, CHANNELS, STATES, dtype, padded=False)
    dy = torch.randn(batch, length, CHANNELS, device=DEVICE).to(dtype)
    f, b = k.forward_plan_of(x[0], x[2], 32), k.backward_plan_of(x[0], x[2], 32)

    def forward(_: int) -> Any:
        return k.scan_forward(*x, dt_softplus=True, boundaries=None, plan=k.forward_plan_of(x[0], x[2], None))

    def both(_: int) -> Any:
        bound = k.scan_forward(*x, dt_softplus=True, boundaries=32, plan=f)[2]
        return k.scan_backward(*x, bound, dy, None, None, dt_softplus=True, boundaries=32, plan=b)

    return forward, both


def warm_one(job: tuple[int, int, str, str]) -> str:
    """Compile what one cell's timings will launch, into Triton's cache on disk."""
    batch, length, name, which = job
    try:
        if which == "portable":
            portable_calls(batch, length, DTYPES[name])[0](0)
            portable_calls(batch, length, DTYPES[name])[1](0)
        else:
            our_calls(batch, length, DTYPES[name])[which](0)
        torch.cuda.synchronize()
    except Exception as fault:
        return f"{job}: {type(fault).__name__}: {str(fault)[:200]}"
    return ""


def warm_up(workers: int, portable: bool) -> None:
    start = time.time()
    shapes = [(1, 512), (1, 2048), (8, 2048), (64, 64)]  # the others take the same kernels
    which = ("portable",) if portable else ("fwd", "fwd+states", "fwd+h0", "f+b")
    jobs = [(b, n, name, w) for w in reversed(which) for b, n in shapes for name in ("bf16", "fp32")]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for complaint in pool.map(warm_one, jobs):
            if complaint:
                print(f"  does not run: {complaint}", flush=True)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)


BARS = {("fwd", "bf16"): 2.1, ("fwd", "fp32"): 3.3, ("f+b", "bf16"): 2.1, ("f+b", "fp32"): 2.1}
"""Geometric means over the shapes of anchor / ours, both eager, through the public calls."""
LEAST = 1.4  # in any cell
COSTS = {"fwd+states": ("states every 64 steps", 0.08), "fwd+h0": ("an initial state, the last one out", 0.03)}
"""More of the forward's time at most, in any cell; the last state is always written."""


def one_row(batch: int, length: int, name: str, anchor: Any) -> dict[str, Any]:
    """Microseconds of one shape and dtype; eager calls of ours and of the anchor take turns."""
    row: dict[str, Any] = {"B": batch, "L": length, "dtype": name}
    calls = our_calls(batch, length, DTYPES[name])
    theirs = {} if anchor is None else anchor_calls(anchor, batch, length, DTYPES[name])
    for what in ("fwd", "f+b"):
        ours, others = [], []
        for _ in range(3):
            ours.append(timed(calls[f"public {what}"], budget=0.3))
            if theirs:
                others.append(timed(theirs[what], budget=0.3))
        row[f"public {what}"] = median(ours)
        if others:
            row[f"anchor {what}"] = median(others)
    small = batch * length <= 20000
    measure = graphed if small else partial(timed, budget=0.2)
    row["f+b graph"] = measure(calls["f+b"])
    beside = {"fwd graph": calls["fwd"], "fwd+states": calls["fwd+states"], "fwd+h0": calls["fwd+h0"]}
    turns = [{what: measure(call) for what, call in beside.items()} for _ in range(3)]
    row |= {what: median(turn[what] for turn in turns) for what in beside}
    if theirs and small:
        try:
            row["anchor fwd graph"] = graphed(theirs["fwd"])
        except Exception as fault:  # whether it can be captured is its own affair
            print(f"  the anchor in a graph: {type(fault).__name__}: {str(fault)[:200]}", flush=True)
    row["recorded fwd"], row["recorded f+b"] = RECORDED[batch, length][name]
    return row


def ratios(row: dict[str, Any], anchor: Any) -> None:
    source = "recorded" if anchor is None else "anchor"
    for what in ("fwd", "f+b"):
        for key, column in ((f"public {what}", ""), (f"{what} graph", " graph"), (f"portable {what}", " portable")):
            theirs = row.get(f"anchor {what} graph") if column == " graph" else None
            if key in row:
                row[f"x {what}{column}"] = (theirs or row[f"{source} {what}"]) / row[key]


def times(started: float, limit: float, anchor: Any, save: Callable[[Any], None]) -> list[dict[str, Any]]:
    """Every cell; the table so far is on disk after each."""
    rows = []
    keys = ("public fwd", "anchor fwd", "fwd graph", "anchor fwd graph", "fwd+states", "fwd+h0")
    keys += ("public f+b", "anchor f+b", "f+b graph")
    print("  " + " ".join(f"{h:>11}" for h in ("shape", "type", *keys, "x fwd", "x f+b", "x graph")), flush=True)
    cells = [(b, n, name) for b, n in SHAPES for name in ("bf16", "fp32")]
    for batch, length, name in cells:
        if time.time() - started > limit:
            print(f"  {RED}out of time before {batch} x {length} {name}{PLAIN}", flush=True)
            break
        try:
            row = one_row(batch, length, name, anchor)
        except Exception as fault:
            print(f"  {batch} x {length} {name}: {type(fault).__name__}: {str(fault)[:300]}", flush=True)
            torch.cuda.empty_cache()
            continue
        ratios(row, anchor)
        shown = [f"{batch}x{length}", name, *(f"{row[k]:.1f}" if k in row else "-" for k in keys)]
        shown += [f"{row['x fwd']:.2f}", f"{row['x f+b']:.2f}", f"{row['x fwd graph']:.2f},{row['x f+b graph']:.2f}"]
        print("  " + " ".join(f"{c:>11}" for c in shown), flush=True)
        rows.append(row)
        save(rows)
        torch.cuda.empty_cache()
    return rows


def portable_times(started: float, limit: float, anchor: Any, rows: list[dict[str, Any]]) -> None:
    """The portable kernels in the same cells."""
    for row in rows:
        if time.time() - started > limit:
            print(f"  {RED}out of time before portable {row['B']} x {row['L']} {row['dtype']}{PLAIN}", flush=True)
            break
        forward, both = portable_calls(row["B"], row["L"], DTYPES[row["dtype"]])
        row["portable fwd"], row["portable f+b"] = timed(forward, budget=0.3), timed(both, budget=0.3)
        del forward, both
        torch.cuda.empty_cache()
        ratios(row, anchor)
        cell = f"{row['B']}x{row['L']} {row['dtype']}"
        print(f"  portable, eager: {cell}: {row['portable fwd']:.1f}, {row['portable f+b']:.1f}", flush=True)


def verdict(rows: list[dict[str, Any]], anchor: Any) -> bool | None:
    """Geometric means and the smallest cell against the bars; None without an anchor or with cells missing."""
    for name in ("bf16", "fp32"):
        for what in ("fwd", "f+b"):
            mine = [r for r in rows if r["dtype"] == name]
            for column in (f"x {what}", f"x {what} graph", f"x {what} portable"):
                found = [r[column] for r in mine if column in r]
                if found:
                    mean = exp(sum(map(log, found)) / len(found))
                    print(f"  {name}: {column}: geometric mean {mean:.2f}, least {min(found):.2f}", flush=True)
    if anchor is None:
        print(f"{RED}no anchor, no verdict: ratios above are to times recorded elsewhere{PLAIN}")
        return None
    if len(rows) < 2 * len(SHAPES):
        print(f"{RED}no verdict: {2 * len(SHAPES) - len(rows)} cells are missing{PLAIN}")
        return None
    passed = True
    for (what, name), bar in BARS.items():
        found = [r[f"x {what}"] for r in rows if r["dtype"] == name]
        mean, least = exp(sum(map(log, found)) / len(found)), min(found)
        good = mean >= bar and least >= LEAST
        passed &= good
        text = f"{what} {name}: geometric mean {mean:.2f} (bar {bar}), least cell {least:.2f} (bar {LEAST})"
        print(f"  {'pass' if good else RED + 'FAIL' + PLAIN}  {text}", flush=True)
    for key, (what, bar) in COSTS.items():
        costs = {f"{r['B']} x {r['L']} {r['dtype']}": r[key] / r["fwd graph"] - 1 for r in rows}
        most = max(costs, key=lambda cell: costs[cell])
        good = costs[most] <= bar
        passed &= good
        text = f"{what}: costs at most {costs[most]:.1%} ({most}; bar {bar:.0%})"
        print(f"  {'pass' if good else RED + 'FAIL' + PLAIN}  {text}", flush=True)
    slowest = min((r[f"x {w} portable"] for r in rows for w in ("fwd", "f+b") if f"x {w} portable" in r), default=None)
    if slowest is not None:
        good = slowest >= 1 / 1.3
        passed &= good
        print(f"  {'pass' if good else RED + 'FAIL' + PLAIN}  portable: least cell {slowest:.2f} (bar {1 / 1.3:.2f})")
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", default=os.path.join(os.environ.get("OUT", "."), "bench_hopper.csv"))
    parser.add_argument("--anchor", help="folder of a built mamba_ssm (build_anchor.py)")
    parser.add_argument("--only", choices=("gate", "times", "host", "sweep"))
    both = ("forward", "backward")
    parser.add_argument("--passes", nargs="+", choices=both, default=list(both), help="what the sweep times")
    parser.add_argument("--no-portable", action="store_true", help="leave the portable kernels' times out")
    parser.add_argument("--gate-limit", type=float, default=150.0, help="seconds for the gate")
    parser.add_argument("--match", default="", help="only the gate's cases with this in their names")
    parser.add_argument("--workers", type=int, default=min(15, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=225.0, help="seconds after which no further shape is timed")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("this benchmark needs a CUDA GPU of compute capability 9.x")
        return 2
    started = time.time()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, commit {commit()}", flush=True)
    passed = None
    if arguments.only in (None, "gate"):
        passed = gate(arguments.workers, arguments.gate_limit, arguments.match)
    rows: list[dict[str, Any]] = []
    if arguments.only in (None, "times"):
        warm_up(arguments.workers, portable=False)
        anchor = find_anchor(arguments.anchor)
        rows = times(started, arguments.limit, anchor, lambda rows: write(arguments.csv, rows, passed))
        verdict(rows, anchor)
        if not arguments.no_portable and time.time() - started < arguments.limit:
            warm_up(arguments.workers, portable=True)
            portable_times(started, arguments.limit, anchor, rows)
            verdict(rows, anchor)
            write(arguments.csv, rows, passed)
    if arguments.only in (None, "host"):
        host_cost()
    if arguments.only in (None, "sweep"):
        compile_all(arguments.workers, arguments.passes)
        found = sweep(started, arguments.limit, arguments.passes)
        write(arguments.csv.removesuffix(".csv") + "_sweep.csv", found, passed)
    print(f"total {time.time() - started:.0f} s")
    return 1 if passed is False else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Replays launch what the ordinary host code launches, with every address from where it belongs.

A stand-in for the GPU's driver notes each launch, in a process of its own, because here Triton may be interpreting.
That replayed kernels give the same bits is tested on a GPU: tests/bench/bench_hopper.py.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.ops.triton_compiler import needs_compiler

pytestmark = needs_compiler()

PROGRAM = r"""
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched = []


class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        launched.append((self.name, x, arguments))

    # as Triton 3.6's own: the driver's function, which replays call without the object around it
    global_scratch_size = profile_scratch_size = 0
    launch_cooperative_grid, launch_pdl = False, True
    direct = 0

    def launch(self, x, y, z, stream, function, cooperative, pdl, scratch, profile, metadata, *more):
        assert (y, z, stream, function, cooperative, pdl, scratch, profile) == (1, 1, 7, 2, False, True, None, None)
        assert more[:3] == (None, None, None)
        Launcher.direct += 1
        launched.append((self.name, x, more[3:]))


class Utils:
    def load_binary(self, *_):
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    utils, launcher_cls = Utils(), Launcher
    device = -1
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: Driver.device)
    get_current_stream = staticmethod(lambda device=None: 7)
    set_current_device = staticmethod(lambda device: None)


driver.set_active(Driver())
torch.cuda.current_device = lambda: -1
from mambascope.ops.scan import triton as scan, triton_conv, triton_layers, triton_launch, triton_packed, triton_replay
from mambascope.ops.scan import triton_conv_backward, triton_norm, triton_sum, triton_turn

launch_as_it_is = triton_launch.launch


class Gpu:
    type, index = "cuda", -1


def launch(kernel, programs, device, *arguments, **options):
    launch_as_it_is(kernel, programs, Gpu, *arguments, **options)


for module in (scan, triton_conv, triton_conv_backward, triton_layers, triton_norm, triton_sum, triton_turn):
    module.launch = launch
    module.check = lambda *_, **__: None
scan.processor_count = lambda device: 132
triton_replay._on_gpu = lambda x: True


def flat(result):
    if isinstance(result, dict):
        return list(result.values())
    return list(result) if isinstance(result, tuple) else [result]


def run(function, args, options):
    launched.clear()
    result = flat(function(*args, **options))
    return result, list(launched)


def compare(name, function, make, **options):
    args = make()
    ordinary, first = run(function.function, args, options)
    before = len(function.known)
    for _ in range(3):
        run(function, make(), options)
    assert len(function.known) == before + 1, f"{name}: its kind was not recognised"
    replay = list(function.known.values())[-1]
    assert replay is not None and replay is not function.function, f"{name}: is not replayed"
    fresh = make()
    results, second = run(function, fresh, options)
    assert len(first) == len(second) > 0, name
    for a, b in zip(ordinary, results, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), name
    places = {}
    for (kernel, grid, old), (kernel2, grid2, new) in zip(first, second, strict=True):
        assert (kernel, grid) == (kernel2, grid2), name
        for a, b in zip(old, new, strict=True):
            if not isinstance(a, torch.Tensor):
                assert a == b and type(a) is type(b), (name, kernel, a, b)
                continue
            tensors = len([t for t in fresh if isinstance(t, torch.Tensor) or t is None])
            owner = [new_t for old_t, new_t in zip(args[:tensors], fresh) if old_t is a]
            owner += [new_t for old_t, new_t in zip(ordinary, results) if old_t is not None and old_t is a]
            views = [  # of a buffer that is shared out among results
                new_t for old_t, new_t in zip(ordinary, results)
                if old_t is not None and old_t.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
            ]
            if views and not owner:
                assert b - views[0].untyped_storage().data_ptr() == a.data_ptr() - a.untyped_storage().data_ptr(), name
                continue
            if owner:
                assert b == owner[0].data_ptr(), (name, kernel)
            elif a.numel():
                assert b % 16 == 0
                apart = b - a.data_ptr()
                assert places.setdefault(a.untyped_storage().data_ptr(), apart) == apart, (name, kernel)
    spans = sorted((at + apart, a_end + apart) for at, a_end, apart in spans_of(first, places))
    assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:])), f"{name}: scratch overlaps"
    return len(first)


def spans_of(launches, places):
    seen = {}
    for _, _, arguments in launches:
        for a in arguments:
            if isinstance(a, torch.Tensor):
                storage = a.untyped_storage()
                if storage.data_ptr() in places:
                    seen[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()
    return [(at, end, places[at]) for at, end in seen.items()]


def scan_inputs(dtype=torch.float32, full=True):
    xz = torch.randn(2, 40, 64).to(dtype)
    low = torch.randn(2, 40, 48).to(dtype)
    x = [xz[..., :32], torch.randn(2, 40, 32).to(dtype), torch.randn(32, 16), low[..., 16:32], low[..., 32:]]
    if not full:
        return [*x, None, None, None, None, None]
    lengths = torch.tensor([40, 3])
    return [*x, torch.randn(32), xz[..., 32:], torch.randn(32), torch.randn(2, 32, 16), lengths]


def backward_inputs(full=True):
    arriving = [torch.randn(2, 32, 16), torch.randn(2, 3, 32, 16)] if full else [None, None]
    return [*scan_inputs(full=full), torch.randn(2, 3, 32, 16), torch.randn(2, 40, 32), *arriving]


def conv_inputs(full=True):
    x = [torch.randn(2, 40, 64)[..., :32], torch.randn(32, 1, 4)]
    if not full:
        return [*x, None, None, None]
    return [*x, torch.randn(32), torch.randn(2, 32, 3), torch.tensor([40, 3])]


class Later(Launcher):  # a later Triton's
    kernel_signature = b""


assert triton_replay._launcher(Later.__new__(Later))[1] == ()
counts = {}
for full in (True, False):
    on = {"dt_softplus": full}
    for boundaries in (None, 16):
        make = lambda: scan_inputs(full=full)
        counts[f"forward {full} {boundaries}"] = compare("scan", scan.scan_forward, make, **on, boundaries=boundaries)
    make = lambda: backward_inputs(full)
    counts[f"backward {full}"] = compare("scan backward", scan.scan_backward, make, **on, boundaries=16)
    if full:
        compare("scan backward, paired", scan.scan_backward, make, **on, boundaries=16, paired=True)
    compare("conv", triton_conv.conv_forward, lambda: conv_inputs(full), silu=full)
    def make():
        x, weight, *rest = conv_inputs(full)
        return [x, weight[:, 0].clone(), *rest, torch.randn(2, 40, 32), torch.randn(2, 32, 3) if full else None]
    compare("conv backward", triton_conv_backward.conv_backward, make, silu=full)
    into = lambda: [*make(), torch.empty(2, 40, 64)]
    compare("conv backward into", triton_conv_backward.conv_backward_into, into, silu=full)
    for shape in ((3, 40), (2, 3, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            norm = lambda: [torch.randn(shape), torch.nn.Parameter(torch.randn(40).to(dtype)), 1e-5]
            compare("norm", triton_layers.norm_forward, norm, expose=full)
            half = lambda: [torch.randn(shape).to(torch.bfloat16), *norm()[1:]]
            if full:
                compare("wide norm", triton_layers.wide_norm_forward, half, wide=torch.float32)
            added = lambda: [torch.randn(shape).to(dtype), *norm()]
            compare("add_norm", triton_layers.add_norm_forward, added, expose=full)


def packed_inputs():
    wide, narrow = [torch.randn(2, 32, 40) for _ in range(3)], [torch.randn(2, 16, 40) for _ in range(2)]
    return [wide[0], wide[1], torch.randn(32, 16), *narrow, torch.randn(32), wide[2], torch.randn(32)]


def packed_backward():
    u, delta, A, B, C, D, z, bias = packed_inputs()
    wide = torch.randn(2, 40, 128).split([32, 32, 32, 16, 16], -1)
    arriving = [torch.randn(2, 3, 32, 16), torch.randn(2, 32, 40), None]
    return [wide[0], wide[1], A, wide[3], wide[4], D, wide[2], bias, *arriving]


for interval in (None, 16):
    options = {"softplus": True, "interval": interval}
    counts[f"packed {interval}"] = compare("packed", triton_packed.forward, packed_inputs, **options)
counts["packed back"] = compare("packed back", triton_packed.backward, packed_backward, softplus=True, interval=16)
arriving = lambda: [torch.randn(2, 3, 32, 16), torch.randn(2, 32, 40), None]
lying = {"softplus": True, "interval": 16, "lies": True}
counts["lying back"] = compare("lying back", triton_packed.backward, lambda: [*packed_inputs(), *arriving()], **lying)
compare("window", scan.state_window, lambda: [*scan_inputs(full=False)[:4], torch.randn(2, 32, 16)])
compare("silu", triton_layers.silu_forward, lambda: [torch.randn(2, 3, 40)])
compare("gate", triton_layers.gate_forward, lambda: [torch.randn(2, 3, 40), torch.randn(2, 3, 80)[..., :40]])
compare("softplus", triton_layers.softplus_forward, lambda: [torch.randn(7)])

# what may not be repeated is not
forward, options = scan.scan_forward, {"dt_softplus": True, "boundaries": None}
left = {}


def last_after(make):
    for _ in range(3):
        run(forward, make(), options)
    return list(forward.known.values())[-1]


def with_(**changes):
    names = ("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "h0", "lengths")
    x = dict(zip(names, scan_inputs()))
    for name, change in changes.items():
        x[name] = change(x)
    return list(x.values())


left["a copy of A"] = last_after(lambda: with_(A=lambda x: x["A"].bfloat16())) is forward.function
left["a copy of u"] = last_after(lambda: with_(u=lambda x: torch.randn(2, 32, 40).transpose(1, 2))) is forward.function
left["one tensor twice"] = last_after(lambda: with_(delta=lambda x: x["u"])) is forward.function
kinds = len(forward.known)
for change in (
    {"u": lambda x: torch.randn(2, 40, 32)},
    {"D": lambda x: x["D"].half()},
    {"z": lambda x: None},
):
    run(forward, with_(**change), options)
left["other strides, dtype, presence"] = len(forward.known) == kinds + 3
for _ in range(3):
    run(forward, with_(), options)
ordinary = [0]


def counted(function):
    def call(*args, **kwargs):
        ordinary[0] += 1
        return function(*args, **kwargs)
    call.__name__ = function.__name__
    return call


forward.forget()
forward.function = counted(forward.function)
for _ in range(4):
    run(forward, with_(), options)
left["the third call and later ones are replays"] = ordinary[0] == 2
run(forward, with_(u=lambda x: torch.randn(2 * 40 * 64 + 1)[1:].view(2, 40, 64)[..., :32]), options)
replay = [v for v in forward.known.values() if v is not None and v is not forward.function][-1]
left["a replay is of aligned tensors"] = replay.aligned and ordinary[0] == 3
replay(*with_(u=lambda x: torch.randn(2 * 40 * 64 + 1)[1:].view(2, 40, 64)[..., :32]))
left["and gives others to the ordinary way"] = ordinary[0] == 4
ordinary[0] = 2
hooked = []
triton.knobs.runtime.launch_enter_hook.add(hooked.append)
run(forward, with_(), options)
left["launch hooks take the ordinary way"] = ordinary[0] == 3
triton.knobs.runtime.launch_enter_hook.remove(hooked.append)
run(forward, with_(), options)
left["and are over when removed"] = ordinary[0] == 3
Driver.device = 5
torch.cuda.current_device = lambda: 5
try:
    run(forward, with_(), options)
except Exception:  # the ordinary way makes the tensors' device the current one, and here there is none
    pass
left["another current device takes the ordinary way"] = ordinary[0] == 4

# without memory
Driver.device, torch.cuda.current_device = -1, lambda: -1
told = []


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("Tried to allocate 7.00 GiB")


run(forward, with_(), options)
replay = [v for v in forward.known.values() if v is not None and v is not forward.function][-1]
replay.__globals__["empty"] = no_memory
before, torch.empty = torch.empty, no_memory
for kind in (with_(), with_(z=lambda x: torch.randn(2, 40, 32))):  # a replay, and a kind that was never seen
    try:
        forward(*kind, **options)
    except torch.OutOfMemoryError as error:
        told.append(str(error))
torch.empty = before
left["out of memory says of what, and how much"] = len(told) == 2 and all(
    t.startswith("scan_forward of tensors (2, 40, 32), (2, 40, 32), (32, 16)") and t.endswith("7.00 GiB") for t in told
)
left["replays launch directly"] = Launcher.direct > 50
print("RESULT" + json.dumps({"counts": counts, "left": left}))
"""


PUBLIC = r"""
from mambascope import ops
from mambascope.ops import conv, elementwise, norm, packed, ready
from mambascope.ops import scan as scan_of_all

scan.scan_forward.forget()  # one of its replays has no memory
ready._on_gpu = lambda x: True
for module in (conv, elementwise, norm, scan_of_all, packed):
    module.choose = lambda *_, **__: "triton"
triton_replay._on_gpu = lambda x: True
x = dict(zip(("u", "delta", "A", "B", "C", "D", "z", "dt_bias", "h0", "lengths"), scan_inputs()))
wide, weight, taps = torch.randn(2, 40, 64), torch.nn.Parameter(torch.randn(64)), torch.randn(64, 1, 4)
half, uneven = torch.nn.Parameter(torch.randn(64).bfloat16()), torch.randn(128)[::2]  # uneven: a copy on the way
turned = packed_inputs()
calls = {
    "scan": lambda **o: ops.selective_scan(**x, dt_softplus=True, **o),
    "conv": lambda **o: ops.causal_conv(wide, taps, **o),
    "conv flat": lambda **o: ops.causal_conv(wide, taps[:, 0].contiguous(), weight, **o),
    "norm": lambda eps=1e-5, **o: ops.rms_norm(wide, weight, eps, **o),
    "norm flat": lambda eps=1e-5, **o: ops.rms_norm(wide[0], None, eps, **o),
    "norm uneven": lambda eps=1e-5, **o: ops.rms_norm(wide, uneven, eps, **o),
    "add norm": lambda eps=1e-5, **o: ops.add_norm(wide.bfloat16(), wide, half, eps, **o),
    "add norm uneven": lambda eps=1e-5, **o: ops.add_norm(wide, wide.bfloat16(), uneven, eps, **o),
    "gate": lambda: ops.gate(wide, wide.bfloat16()),
    "gate uneven": lambda: ops.gate(wide.transpose(1, 2), wide.transpose(1, 2).bfloat16()),
    "silu": lambda: ops.silu(wide),
    "silu flat": lambda: ops.silu(wide[0, 0]),
    "softplus": lambda: ops.softplus(wide.half()),
    "softplus uneven": lambda: ops.softplus(wide.transpose(1, 2)),
    "drop-in": lambda delta_softplus=False: packed.scan(
        *turned, delta_softplus=delta_softplus, key=packed.ready.find(turned, delta_softplus, "auto")[0]
    ),
}
changes = {
    "scan": [{"boundaries": 16}, {"boundaries": 8}],
    "conv": [{"activation": "silu"}],
    "conv flat": [{"activation": "silu"}],
    "norm": [{"eps": 1e-6}, {"expose": True}, {"eps": 1e-6, "expose": True}],
    "norm uneven": [{"eps": 1e-6}, {"expose": True}],
    "add norm": [{"eps": 1e-6}, {"expose": True}],
    "add norm uneven": [{"eps": 1e-6}, {"expose": True}],
    "drop-in": [{"delta_softplus": True}],
}


def looks(result):
    return [None if t is None else (t.shape, t.stride(), t.dtype) for t in flat(result)]


def seen(call, options, grads):
    launched.clear()
    with torch.set_grad_enabled(grads):
        result = call(**options)
        found = looks(tuple(result) if isinstance(result, tuple) else result)
        first = flat(tuple(result) if isinstance(result, tuple) else result)[0]
        if first.requires_grad:
            leaves = [t for t in (*x.values(), weight, half, taps, *turned) if t is not None and t.requires_grad]
            every = torch.autograd.grad(first.float().sum(), leaves, allow_unused=True)
            found += looks(tuple(every))
    arguments = [a for _, _, args in launched for a in args if isinstance(a, float)]
    return found, [(name, grid) for name, grid, _ in launched], arguments


bad = []
for grads in (False, True):
    for t in (x["u"], x["A"], x["D"], x["B"], taps, turned[0], turned[2]):
        t.requires_grad_(grads and t.is_leaf)
    for name, call in calls.items():
        for options in ({}, *changes.get(name, []), {}):
            runs = [seen(call, options, grads) for _ in range(5)]
            if any(run != runs[0] for run in runs):
                other = [run for run in runs if run != runs[0]][0]
                bad.append(f"{name} {options} with gradients {grads}: {other} not {runs[0]}")
known = {
    "scan": scan_of_all._ready, "conv": conv._ready, "norm": norm._ready, "add norm": norm._add_ready,
    "gate": elementwise._gate_ready, "silu": elementwise._silu_ready, "softplus": elementwise._softplus_ready,
    "drop-in": packed.ready,
}
learned = {name: len(ready.known) for name, ready in known.items()}
print("PUBLIC" + json.dumps({"bad": bad, "learned": learned}))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PROGRAM + PUBLIC], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    replays, public = done.stdout.split("RESULT")[1].split("PUBLIC")
    return {**json.loads(replays), **json.loads(public)}


def test_replays_repeat_the_launches_with_new_addresses(found: dict[str, Any]) -> None:
    assert found["counts"]["forward True None"] >= 1
    assert found["counts"]["backward True"] >= 2
    assert found["counts"]["packed None"] >= 3
    assert found["counts"]["packed back"] >= 4
    assert found["counts"]["lying back"] >= 4


def test_what_cannot_be_repeated_faithfully_takes_the_ordinary_way(found: dict[str, Any]) -> None:
    assert [name for name, held in found["left"].items() if not held] == []


def test_calls_that_cannot_be_repeated_are_not_offered_as_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a function wants all of its arguments again; who asks for something ready passes the tensors alone."""
    import torch

    from mambascope.ops.scan import triton_replay

    def changes(x: torch.Tensor, eps: float, *, expose: bool) -> torch.Tensor:
        return x.clone() + eps  # an operation on tensors besides launches

    monkeypatch.setattr(triton_replay, "_on_gpu", lambda x: True)
    function, x = triton_replay.Replayed(changes, 1), torch.ones(3)
    for _ in range(3):
        assert torch.equal(function(x, 0.5, expose=False), x + 0.5)
    kind = triton_replay.kind_of((x,))
    assert function.known[(kind, (0.5,), ("expose", False))] is function.function
    assert function.ready(kind, ("expose", False), rest=(0.5,)) is None


def test_public_calls_do_the_same_the_first_time_and_the_fifth(found: dict[str, Any]) -> None:
    """Results, gradients and launches; with and without gradients, kinds that can be repeated and others, options
    changed in between."""
    assert found["bad"] == []
    assert all(count >= 1 for count in found["learned"].values()), found["learned"]

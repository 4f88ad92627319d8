"""The GPU's way of ``selective_scan_fn``: turning kernels and the packed scan, interpreted, and compiled for sm_90."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import test_triton_compile
import triton.language as tl
from test_compat import ORDER, everything, inputs, restated
from tolerance import assert_within
from triton.runtime.interpreter import InterpretedFunction

from mambascope.errors import BackendError
from mambascope.ops import packed
from mambascope.ops.scan import triton, triton_packed
from mambascope.ops.scan.triton_turn import turn, turn_all

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    "torch.empty gives NaN: what a kernel does not write is seen"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("shape", [(2, 70, 130), (1, 1, 5), (3, 64, 64), (1, 5, 200), (2, 65, 1)])
def test_turning_is_exact(shape: tuple[int, ...]) -> None:
    wide = torch.randn(shape[0], shape[1], 2 * shape[2], device=DEVICE)
    for x in (wide[..., : shape[2]], wide[..., : shape[2]].contiguous(), wide[..., ::2]):
        assert torch.equal(turn(x), x.transpose(1, 2))
        assert torch.equal(turn(x, torch.float16), x.transpose(1, 2).half())
        assert turn(x).is_contiguous()


@pytest.mark.parametrize("wide", [1, 2, 3, 4])
@pytest.mark.parametrize("narrow", [0, 2])
def test_several_in_one_launch(wide: int, narrow: int) -> None:
    sources = [torch.randn(2, 70, 66, device=DEVICE) for _ in range(wide)]
    sources += [torch.randn(2, 3, 66, device=DEVICE) for _ in range(narrow)]
    sizes = [x.shape[1] for x in sources]
    out = torch.full((2, 66, sum(sizes) + 1), 7.0, device=DEVICE)
    turn_all(sources, out[..., :-1].split(sizes, -1), wide)
    assert torch.equal(out[..., :-1], torch.cat([x.transpose(1, 2) for x in sources], -1))
    assert bool((out[..., -1] == 7).all())


class _ReadsAsItLies:
    """In the Hopper kernels' place, which no interpreter runs: the portable ones between two turns."""

    @staticmethod
    def few(*_: int) -> bool:
        return False

    @staticmethod
    def scan_forward(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *rest: Any, **options: Any) -> Any:
        assert options.pop("turned")
        u_, delta_, B_, C_, z_ = (None if x is None else turn(x) for x in (u, delta, B, C, z))
        y, h_last, bound = triton.scan_forward(u_, delta_, A, B_, C_, D, z_, *rest, **options)
        return turn(y, u.dtype), h_last, bound


def on_device(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to(DEVICE) for name, t in x.items()}


@pytest.mark.parametrize(
    ("leave_out", "softplus", "lies"),
    [
        ((), True, False),
        (("z",), True, False),
        (("D",), False, False),
        (("delta_bias",), True, False),
        (("z", "D", "delta_bias"), False, False),
        ((), True, True),
        (("z", "D", "delta_bias"), False, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_scan(
    leave_out: tuple[str, ...], softplus: bool, lies: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lies:
        monkeypatch.setattr(triton_packed, "_hopper", lambda *_: _ReadsAsItLies)
        assert triton_packed.as_it_lies(torch.empty(1, 2, 3), 5, biased=True, softplus=True)
        assert not triton_packed.as_it_lies(torch.empty(1, 2, 3), 5, biased=True, softplus=False)
    x = on_device(inputs(2, 13, 35, 5, leave_out=leave_out, dtype=dtype))
    x["u"] = torch.cat((x["u"], x["u"]), 1)[:, :13]  # a stride of its own

    def scan(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return packed.scan(*(x.get(name) for name in ORDER), delta_softplus=softplus)  # type: ignore[arg-type]

    got = everything(x, scan, dtype)
    truth = everything({n: t.double() for n, t in x.items()}, lambda x: restated(x, torch.float64, softplus), dtype)
    rough = everything(x, lambda x: restated(x, torch.float32, softplus), dtype)
    assert all(got[f"d{name}"].dtype == t.dtype for name, t in x.items())
    for name, t in got.items():
        assert_within(t, truth[name], rough[name], name)
    assert got["out"].is_contiguous() and got["du"].is_contiguous()
    with torch.no_grad():
        out, state = scan(x)
    assert torch.equal(out, got["out"]) and torch.equal(state, got["state"])


def test_only_one_of_the_two_results_has_a_gradient() -> None:
    x = {name: t.requires_grad_() for name, t in on_device(inputs(1, 4, 9, 2)).items()}
    for i in (0, 1):
        wanted = torch.autograd.grad(restated(x, torch.float32, True)[i].sum(), x["delta"])[0]
        found = torch.autograd.grad(packed.scan(*x.values(), delta_softplus=True)[i].sum(), x["delta"])[0]
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_refused_by_name() -> None:
    x = {name: t.requires_grad_() for name, t in on_device(inputs(1, 4, 9, 2)).items()}
    out, _ = packed.scan(*x.values(), delta_softplus=True)
    with pytest.raises(BackendError, match="selective_scan_fn on backend 'triton' has no second derivative"):
        torch.autograd.grad(out.sum(), x["u"], create_graph=True)


@pytest.mark.parametrize("missing", ["u", "delta", "A", "B", "C"])
def test_what_goes_another_way(missing: str) -> None:
    x = on_device(inputs(2, 13, 35, 5))
    assert packed.takes("auto", tuple(x[name] for name in ORDER)) is CUDA  # type: ignore[arg-type]
    bad = x | {missing: None}  # for selective_scan_fn to name
    assert packed.takes("auto", tuple(bad[name] for name in ORDER)) is False  # type: ignore[arg-type]
    narrow = x | {missing: x[missing][:1]}
    assert packed.takes("auto", tuple(narrow[name] for name in ORDER)) is False  # type: ignore[arg-type]


PROGRAM = r"""
from mambascope.ops.scan import triton_turn

triton_turn.launch = launch
for dtype in (torch.bfloat16, torch.float32):
    for channels in (1536, 40, 33):
        wide = [torch.empty(2, channels, 96, dtype=dtype) for _ in range(3)]
        narrow = [torch.empty(2, 16, 96, dtype=dtype) for _ in range(2)]
        triton_turn.turn_all(wide + narrow, [x.transpose(1, 2).contiguous() for x in wide + narrow], 3)
        triton_turn.turn(wide[0], torch.float32)
whole = triton_launch._compiled[next(iter(triton_launch._compiled))][0].asm["ptx"]
print("RESULT" + json.dumps([len(triton_launch._compiled), whole.count("ld.global.v4"), whole.count("st.global.v4")]))
"""


@pytest.mark.skipif(test_triton_compile.pytestmark.args[0], reason="triton has no NVIDIA backend here")
def test_turning_compiles_for_hopper_with_whole_loads_and_stores() -> None:
    setup = test_triton_compile.PROGRAM.split("def scan(")[0]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", setup + PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    kinds, loads, stores = json.loads(done.stdout.split("RESULT")[1])
    assert kinds >= 6 and loads >= 4 and stores >= 4

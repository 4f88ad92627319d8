"""How the CPU kernels are compiled and started: lazily, cached, on torch's threads, after a fork, on older CPUs."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("numba")

from mambascope.errors import BackendError
from mambascope.ops import cpu
from mambascope.ops.cpu import compiling, threads
from mambascope.ops.cpu.conv import conv_forward_units
from mambascope.ops.cpu.elementwise import elementwise_units


def in_fresh_process(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def work() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 200, generator=generator)
    return cpu.conv_forward(x, torch.ones(200, 4), None, None, None, silu=True)[0]


@pytest.fixture
def several_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(threads, "GRAIN", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_nothing_is_imported_or_compiled_before_it_is_needed() -> None:
    out = in_fresh_process(
        """
        import sys, torch
        import mambascope.ops.cpu as cpu
        reason = cpu.supports(torch.device("cpu"), torch.float32, 16, 4)
        print(reason == "", "numba" in sys.modules)
        cpu.softplus_forward(torch.zeros(3))
        from mambascope.ops.cpu.elementwise import elementwise_units
        from mambascope.ops.cpu.scan import scan_forward_units
        print("call" in vars(elementwise_units), "call" in vars(scan_forward_units))
        """
    )
    assert out.split() == ["True", "False", "True", "False"]


SMALL_RUN = """
import torch
from mambascope.ops import cpu
from mambascope.ops.scan import reference
torch.manual_seed(0)
x, A, h0 = torch.randn(2, 40, 20), -torch.rand(20, 7).exp(), torch.randn(2, 20, 7)
B, C = torch.randn(2, 40, 7), torch.randn(2, 40, 7)
rest = (A, B, C, None, None, None, h0, None)
y, h, entering = cpu.scan_forward(x, x - 3, *rest, dt_softplus=True, boundaries=16)
wide = [v.double().requires_grad_() for v in (x, A, B, C, h0)]
X = wide[0]
truth = reference.scan(X, torch.nn.functional.softplus(X - 3), *wide[1:], None, None)[0]
print(float((y - truth).abs().max() / truth.abs().max()) < 1e-6)
seed = torch.randn_like(y)
g = cpu.scan_backward(x, x - 3, *rest, entering, seed, None, None, dt_softplus=True, boundaries=16)
found = [g["du"] + g["ddelta"], g["dA"], g["dB"], g["dC"], g["dh0"]]
exact = torch.autograd.grad(truth, wide, seed.double())
print(all(float((f - e).abs().max() / e.abs().max()) < 4e-6 for f, e in zip(found, exact)))
fused, apart = [cpu.conv_forward(x, torch.ones(20, 4), None, None, None, silu=on)[0] for on in (True, False)]
print(torch.equal(fused, cpu.silu_forward(apart)))
delta = cpu.softplus_forward(x - 3)
print(torch.equal(y, cpu.scan_forward(x, delta, *rest, dt_softplus=False, boundaries=None)[0]))
from numba.core.registry import cpu_target
print("/".join(cpu_target.target_context.codegen().magic_tuple()[1:]))
"""


@pytest.mark.parametrize("name", ["haswell", "nehalem"])
def test_older_cpus(name: str) -> None:
    "no AVX-512; and neither AVX nor fused multiply-add"
    if os.uname().machine != "x86_64":
        pytest.skip("the names are those of x86 processors")
    out = in_fresh_process(
        SMALL_RUN, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=""
    )  # the name alone keeps this CPU's AVX-512
    assert out.split() == ["True"] * 4 + [f"{name}/"]


def test_runs_where_no_cache_folder_can_be_written() -> None:
    out = in_fresh_process(
        """
        import torch
        from numba.core import caching
        def nowhere(self, function):
            raise RuntimeError(f"cannot cache function {function.__name__!r}: no locator available")
        caching.CompileResultCacheImpl.__init__ = nowhere
        from mambascope.ops.cpu.elementwise import elementwise_units, softplus_forward
        print(float(softplus_forward(torch.zeros(1))), elementwise_units.cached)
        """
    )
    assert out.split() == ["0.6931471824645996", "False"]


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_damaged_cache_is_named_and_passed_by(tmp_path: Path, ending: str) -> None:
    code = """
        import torch, warnings
        from mambascope.ops.cpu.elementwise import elementwise_units, softplus_forward
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = float(softplus_forward(torch.zeros(1)))
        print(value, elementwise_units.cached, ["delete numba's *.nbi" in str(w.message) for w in caught])
        """
    assert in_fresh_process(code, NUMBA_CACHE_DIR=str(tmp_path)).split() == ["0.6931471824645996", "True", "[]"]
    files = list(tmp_path.rglob(f"*.{ending}"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert in_fresh_process(code, NUMBA_CACHE_DIR=str(tmp_path)).split() == ["0.6931471824645996", "False", "[True]"]


def test_an_edited_source_file_is_not_answered_from_the_cache() -> None:
    from numba.core import caching, types
    from numba.core.registry import cpu_target

    def key(stamp: str) -> Any:
        body = compiling._stamped(elementwise_units._body, stamp)
        return caching.FunctionCache(body)._index_key((types.int64,), cpu_target.target_context.codegen())

    assert key("a") == key("a") != key("b")
    own = Path(compiling.__file__).parent
    assert compiling._stamp(own) != compiling._stamp(own.parent / "maps")  # inlines from both folders


def test_torch_own_team_is_found_on_linux() -> None:
    if sys.platform != "linux":
        pytest.skip("elsewhere torch has another OpenMP runtime")
    assert threads._openmp() is not None


def test_thread_pool_where_there_is_no_team(monkeypatch: pytest.MonkeyPatch, several_threads: None) -> None:
    expected = work()
    monkeypatch.setattr(threads, "_openmp", lambda: None)
    for _ in range(5):
        assert torch.equal(work(), expected)


def test_many_python_threads_at_once(several_threads: None) -> None:
    expected = work()
    with ThreadPoolExecutor(6) as pool:
        assert all(torch.equal(found.result(), expected) for found in [pool.submit(work) for _ in range(60)])


def test_compiled_once_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = compiling.Kernel(conv_forward_units._body, conv_forward_units.arguments)
    compiled: list[int] = []
    original = compiling.Kernel._compile
    monkeypatch.setattr(compiling.Kernel, "_compile", lambda self: (compiled.append(1), original(self)))
    with ThreadPoolExecutor(4) as pool:
        addresses = {found.result() for found in [pool.submit(lambda: kernel.address) for _ in range(8)]}
    assert len(addresses) == 1
    assert compiled == [1]


def _child(queue: Any, x: torch.Tensor, weight: torch.Tensor) -> None:
    y, _ = cpu.conv_forward(x, weight, None, None, None, silu=True)
    queue.put(y.numpy().tobytes())  # no operator of torch's own: those hang in such a child


def test_a_forked_child_runs(several_threads: None) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    x, weight = torch.randn(2, 300, 200), torch.ones(200, 4)
    expected = cpu.conv_forward(x, weight, None, None, None, silu=True)[0].numpy().tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, x, weight))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()


def test_unfinished_work_is_an_error() -> None:
    class Broken:
        name, arguments = "broken", threads.Arguments("x")

        @staticmethod
        def call(address: int) -> None:
            ctypes.c_int64.from_address(address + 8).value = 3

    with pytest.raises(BackendError, match=r"'broken' finished 3 of 5 units: .*memory"):
        threads.run(Broken, 5, 1, 0)

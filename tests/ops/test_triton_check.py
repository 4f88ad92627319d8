"""The self-check on unknown GPUs: it passes on right kernels, sees wrong ones, runs once, and is heard."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton", reason="triton is not installed (extra 'test')")

import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from mambascope.ops.scan import triton as kernels
from mambascope.ops.scan import triton_check

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not CUDA and not isinstance(tl.sum, InterpretedFunction),
    reason="triton was imported before TRITON_INTERPRET=1 was set, and there is no GPU",
)
DEVICE = torch.device("cuda" if CUDA else "cpu")
PARTS = ("scan_forward", "scan_backward", "conv_forward", "conv_backward")


def bent(part: str) -> Any:
    """The kernels, one result of one of them a thousandth off."""

    def wrong(*args: Any, **options: Any) -> Any:
        found = getattr(kernels, part)(*args, **options)
        if isinstance(found, dict):
            name = next(iter(found))
            return {**found, name: found[name] * 1.001}
        return (found[0] * 1.001, *found[1:])

    return SimpleNamespace(**{name: wrong if name == part else getattr(kernels, name) for name in PARTS})


def test_right_kernels_pass() -> None:
    assert triton_check.complaint(DEVICE, kernels) == ""


@pytest.mark.parametrize("part", PARTS)
def test_wrong_kernels_do_not(part: str) -> None:
    assert "differs from the reference by" in triton_check.complaint(DEVICE, bent(part))


@pytest.fixture
def another_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a later GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_check, "_answers", {})
    return torch.device("cuda", 0)


def test_an_unknown_gpu_is_checked_once_and_a_failure_is_loud(
    another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []
    monkeypatch.setattr(triton_check, "complaint", lambda *a: runs.append(a) or "y differs from the reference by 3e-1")
    with pytest.warns(UserWarning, match=r"kernels of mambascope are not used: their self-check failed on a later GPU"):
        reason = triton_check.trusted(another_gpu, kernels)
    assert "compute capability 12.0" in reason
    assert triton_check.trusted(another_gpu, kernels) == reason
    assert len(runs) == 1


def test_a_tested_gpu_is_not_checked(another_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton_check, "complaint", lambda *_: pytest.fail("checked"))
    assert triton_check.trusted(another_gpu, kernels) == ""

"""What eager calls skip the second time is skipped for tensors of the same kind only."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mambascope.ops import ready

x, w = torch.randn(3, 4), nn.Parameter(torch.randn(4))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def learned() -> tuple[ready.Ready, Callable[..., str]]:
    """A `Ready` that knows x and w, by a function that looks after alignment."""
    own = ready.Ready()

    def repeat(*_: Any) -> str:
        return "again"

    repeat.aligned = True  # type: ignore[attr-defined]
    key, found = own.find((x, None, w), 1.0)
    assert found is None
    own.known[key] = repeat
    assert own.find((x, None, w), 1.0)[1] is repeat  # by its kind, and then at once
    assert len(own.latest.known) == 1
    return own, repeat


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready, "_on_gpu", lambda _: True)


def test_a_known_kind_is_found_without_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    own, repeat = learned()
    monkeypatch.setattr(ready, "kind_of", lambda _: pytest.fail("the kind was read again"))
    assert own.find((x, None, w), 1.0) == (None, repeat)
    assert own.find((torch.randn(3, 4), None, nn.Parameter(torch.randn(4))), 1.0) == (None, repeat)


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.randn(3, 5), None, w),
        (torch.randn(4, 3).t(), None, w),
        (x.double(), None, w),
        (x, None, nn.Parameter(w.detach().double())),
        (x, None, w.detach()),
        (x, w, None),
        (x, w, w),
    ],
)
def test_another_kind_is_not(tensors: tuple[Tensor | None, ...]) -> None:
    own, _ = learned()
    assert own.find(tensors, 1.0)[1] is None


def test_other_flags_or_surroundings_are_not() -> None:
    own, repeat = learned()
    assert own.find((x, None, w), 2.0)[1] is None
    with torch.no_grad():
        assert own.find((x, None, w), 1.0)[1] is None
    with Mode():
        assert own.find((x, None, w), 1.0) == (None, None)
    assert own.find((x, None, w), 1.0)[1] is repeat


def test_a_function_that_depends_on_addresses_is_found_by_its_kind_alone() -> None:
    own, _ = learned()
    own.latest.known.clear()
    for function in own.known.values():
        function.aligned = False  # type: ignore[attr-defined]
    key, found = own.find((x, None, w), 1.0)
    assert found is not None
    assert key is not None
    assert not own.latest.known


def test_without_torchs_guards_kinds_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    own, repeat = learned()
    own.latest.known.clear()
    monkeypatch.setattr(ready, "_Guards", None)
    for _ in range(2):
        key, found = own.find((x, None, w), 1.0)
        assert found is repeat
        assert key is not None


def test_no_more_than_a_few_are_looked_at() -> None:
    own, _ = learned()
    for n in range(1, 30):
        one = torch.randn(n)
        _, where = own.latest.find((one,), ())
        own.latest.learn(where, n)
        assert own.latest.find((one,), ())[0] == n
    (kinds,) = (v for v in own.latest.known.values() if len(v) > 1)
    assert len(kinds) == 8
    assert own.latest.find((torch.randn(1),), ())[0] is None

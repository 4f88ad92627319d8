"""Results show shapes, not numbers."""

from dataclasses import dataclass

import torch

from mambascope.brief import Brief


@dataclass(frozen=True, repr=False)
class Found(Brief):
    values: torch.Tensor
    loss: float
    tokens: tuple[str, ...]
    where: dict[str, int]


def test_a_result_fits_a_line() -> None:
    found = Found(torch.zeros(3, 40), 1 / 3, tuple(f"token {i}" for i in range(40)), {"layer": 3})
    assert repr(found) == ("Found(values=float32[3 40], loss=0.333333, tokens=<40 in a tuple>, where={'layer': 3})")


def test_every_result_of_a_sweep_and_an_analysis_is_brief() -> None:
    import mambascope.analyses as analyses
    from mambascope.hooks.sweeps import Sweep

    kinds = [getattr(analyses, name) for name in analyses.__all__]
    results = [k for k in (*kinds, Sweep) if isinstance(k, type) and hasattr(k, "__dataclass_fields__")]
    long = [k.__name__ for k in results if k.__repr__ is not Brief.__repr__]
    assert len(results) > 20
    assert set(long) <= {"Reading", "Target"}  # what goes in, not what comes out

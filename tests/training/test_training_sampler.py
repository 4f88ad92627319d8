"""Batches are a function of (seed, step); windows tile each source once an epoch; shares are kept."""

import itertools

import numpy as np
import pytest
import torch

from mambascope.errors import ConfigError, InputError
from mambascope.training.sampler import IGNORED, Repeats, TextStream, WindowSampler


def _sampler(seed=3, steps=200, shares=((0.75, 0.25), (0.25, 0.75)), hold=0.0, **more):
    streams = [
        TextStream("a", np.arange(0, 1001, dtype=np.uint16), shares[0]),
        TextStream("b", np.arange(2000, 4000, dtype=np.uint16), shares[1]),
    ]
    return WindowSampler(streams, batch=8, length=10, steps=steps, seed=seed, hold=hold, **more)


def test_targets_are_the_next_tokens_and_windows_stay_in_their_source():
    batch = _sampler()(5)
    assert batch.tokens.shape == batch.targets.shape == (8, 10)
    assert batch.tokens.dtype == torch.int64
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.tokens + 1, batch.targets), "consecutive within one source"


def test_any_order_of_asking_gives_the_same_batches():
    straight = [_sampler()(step).tokens for step in range(60)]
    other = _sampler()
    for step in (59, 3, 30, 0, 59):
        assert torch.equal(other(step).tokens, straight[step])
    assert not torch.equal(_sampler(seed=4)(0).tokens, straight[0])


def test_an_epoch_visits_every_window_once():
    sampler = _sampler(shares=((1.0, 1.0), (0.0, 0.0)))
    per_epoch = 99
    starts = [int(row[0]) for step in range(50) for row in sampler(step).tokens]
    first, second = starts[:per_epoch], starts[per_epoch : 2 * per_epoch]
    assert len(set(first)) == len(set(second)) == per_epoch
    assert len({s % 10 for s in first}) == 1
    assert sorted(first) != first
    assert first != second


def test_shares_move_from_start_to_end():
    sampler = _sampler(steps=1000, hold=0.5)
    part = [
        np.mean([bool(row[0] < 2000) for step in steps for row in sampler(step).tokens])
        for steps in (range(200, 500), range(950, 1000))
    ]
    assert abs(part[0] - 0.75) < 0.05
    assert abs(part[1] - 0.25) < 0.12
    seen = sampler.epochs()
    assert seen["a"] == pytest.approx(8 * 10 * 1000 * 0.625 / 1001, rel=0.05)


def test_bad_sources():
    short = TextStream("short", np.zeros(20, np.uint16), (1.0, 1.0))
    with pytest.raises(InputError, match="'short' has 20 tokens"):
        WindowSampler([short], batch=1, length=10, steps=5, seed=0)
    with pytest.raises(ConfigError, match=r"add up to 1, got sums \[0.75"):
        _sampler(shares=((0.5, 0.5), (0.25, 0.5)))


def test_rows_read_twice_score_what_can_be_recalled():
    repeats = Repeats(1.0, np.arange(5, 4000))
    sampler = WindowSampler(
        [TextStream("a", np.zeros(900, np.uint16), (1.0, 1.0))], batch=4, length=300, steps=3, seed=0, repeats=repeats
    )
    batch = sampler(1)
    assert torch.equal(sampler(1).tokens, batch.tokens)
    assert int(batch.tokens.min()) >= 5
    share = (batch.targets != IGNORED).double().mean()
    assert 0.25 < float(share) < 0.5
    for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        for t in range(300):
            if targets[t] == IGNORED:
                continue
            assert t == 299 or targets[t] == row[t + 1]
            pairs = list(itertools.pairwise(row[: t + 1]))
            assert (row[t], targets[t]) in pairs, "what followed this token before"


def test_blocks_read_twice_grow_over_training():
    stream = TextStream("a", np.zeros(9000, np.uint16), (1.0, 1.0))

    def longest(step: int, limit: tuple[int, int] | None) -> int:
        """The longest run of scored tokens, one less than its block, in the rows of a step."""
        repeats = Repeats(1.0, np.arange(5, 4000), limit)
        rows = WindowSampler([stream], batch=8, length=400, steps=101, seed=0, repeats=repeats)(step).targets != IGNORED
        return max(len(run) for row in rows.tolist() for run in "".join("x" if v else " " for v in row).split())

    assert 6 <= longest(0, (12, 120)) < 12
    assert 16 <= longest(50, (12, 120)) < 38, "half way: the geometric mean"
    assert 60 <= longest(100, (12, 120)) < 120
    assert longest(0, None) >= 120, "half a row from the start"
    assert Repeats(1.0, np.arange(9), (16, 4096)).limit(1.0, 400) == 200, "never more than half a row"


def test_repeats_take_their_share_and_the_sources_the_rest():
    sampler = _sampler(steps=500, repeats=Repeats(0.25, np.arange(5000, 9000)))
    rows = torch.cat([sampler(step).tokens[:, 0] for step in range(500)])
    share = float((rows >= 5000).double().mean())
    assert abs(share - 0.25) < 0.03
    assert sampler.repeated() == int((rows >= 5000).sum()) * 10
    assert sum(n * len(s.ids) for s, n in zip(sampler.streams, sampler.epochs().values(), strict=True)) == (
        500 * 8 * 10 - sampler.repeated()
    )

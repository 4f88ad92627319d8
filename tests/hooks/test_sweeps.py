"""A sweep gives the numbers of running everything in full, and never computes anything twice."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mambascope as ms
from mambascope.errors import HookError, InputError, SweepError, UnknownNameError
from mambascope.hooks import sweeps
from mambascope.hooks.sweeps import file as sweep_file
from mambascope.model import HookedMamba
from tests.conftest import make_model

SITES = ("resid_pre", "mixer_out", "resid_post", "mixer_in", "normalized", "delta", "B", "u", "gated", "h")
pytestmark = pytest.mark.filterwarnings("ignore:.*mostly noise")  # random models hardly tell two texts apart
PIECE = {"cpu": 200, "cuda": 200}
METRIC = ms.LogitDifference(1, 2)


def pair(rows: int = 2, length: int = 19, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    clean = torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))
    corrupted = clean.clone()
    for p in (2, length // 2):
        corrupted[:, p] = (corrupted[:, p] + 3) % 50
    return clean, corrupted


def by_hand(
    model: HookedMamba,
    clean: torch.Tensor,
    corrupted: torch.Tensor,
    site: str,
    layer: int,
    position: int,
    cache: ms.MambaCache | None = None,
) -> torch.Tensor:
    """The logits ``B L V`` of the corrupted text with one clean value in it, the whole model run."""
    with torch.no_grad():
        cache = model.run_with_cache(clean)[1] if cache is None else cache
        name = f"blocks.{layer}.{site}"
        value = cache[name][:, position]
        return model.run_with_hooks(corrupted, fwd_hooks=[(f"{name}[{position}]", lambda old, hook: value)])


def difference(logits: torch.Tensor) -> float:
    return float((logits[:, -1, 1] - logits[:, -1, 2]).mean())


@pytest.mark.parametrize("interval", [1, 4, 19])
def test_it_gives_the_numbers_of_full_runs(model: HookedMamba, interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site, layer and position, whatever the suffixes start from."""
    monkeypatch.setattr(sweeps.engine.Engine, "_interval", lambda self, group: interval)
    clean, corrupted = pair()
    found = ms.sweep(model, clean, corrupted, METRIC, list(SITES))
    assert found.values.shape == (len(SITES), 3, 19, 1)
    assert found.complete
    assert found.computed == found.values.numel()
    worst = 0.0
    _, cache = model.run_with_cache(clean, names_filter=lambda name: True)
    for s, site in enumerate(found.grid.sites):
        for layer in range(3):
            for position in (0, 2, 4, 9, 15, 18):
                want = difference(by_hand(model, clean, corrupted, site, layer, position, cache))
                worst = max(worst, abs(want - float(found.values[s, layer, position, 0])))
    assert worst < 1e-5
    assert float(found.change.abs().max()) > 0.1


def test_the_comparison_above_can_fail() -> None:
    model, (clean, corrupted) = make_model(), pair()
    found = ms.sweep(model, clean, corrupted, METRIC, "resid_pre")
    wrong = difference(by_hand(model, clean, corrupted, "hook_resid_pre", 1, 9))
    assert abs(wrong - float(found.values[0, 1, 10, 0])) > 1e-3


def test_small_batches_and_pieces_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (clean, corrupted) = make_model(), pair(rows=3)
    want = ms.sweep(model, clean, corrupted, METRIC, ["resid_pre", "u", "h"]).values
    for name, size in (("_TOKENS", 40), ("_PIECE", 500)):
        monkeypatch.setattr(sweeps.engine, name, {"cpu": size, "cuda": size})
    monkeypatch.setattr(sweeps.engine, "_LOGITS", 400)
    found = ms.sweep(model, clean, corrupted, METRIC, ["resid_pre", "u", "h"]).values
    assert float((found - want).abs().max()) < 1e-5


@pytest.mark.parametrize("options", [{"mixer_norm_eps": 1e-6}, {"d_conv": 2, "activation": "gelu"}, {"d_conv": 1}])
def test_other_mixers(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps.engine.Engine, "_interval", lambda self, group: 2)
    model, (clean, corrupted) = make_model(**options), pair(rows=1)
    found = ms.sweep(model, clean, corrupted, METRIC, {"sites": ["resid_pre", "h"], "positions": [3, 9]})
    for s, site in enumerate(found.grid.sites):
        for layer in range(3):
            want = difference(by_hand(model, clean, corrupted, site, layer, 9))
            assert abs(want - float(found.values[s, layer, 1, 0])) < 1e-5


def test_bfloat16_agrees_within_its_rounding() -> None:
    model, (clean, corrupted) = make_model(dtype=torch.bfloat16), pair(rows=1)
    found = ms.sweep(model, clean, corrupted, METRIC, {"sites": ["resid_pre", "h"], "positions": [9]})
    wide = ms.sweep(make_model(), clean, corrupted, METRIC, {"sites": ["resid_pre", "h"], "positions": [9]})
    assert float((found.values - wide.values).abs().max()) < 0.2
    predicted = ms.attribute(model, clean, corrupted, METRIC, ["resid_pre", "h"])
    assert bool(predicted.values.isfinite().all())


def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    model, (clean, corrupted) = make_model(), pair()
    ms.sweep(model, clean, corrupted, METRIC, {"layers": [0]})
    assert capsys.readouterr() == ("", "")
    with sweeps.progress.bar("sweep", 3, show=True) as advance:
        advance(2)
    assert "2/3" in capsys.readouterr().err


def test_channels_are_patched_group_by_group() -> None:
    model, (clean, corrupted) = make_model(), pair()
    groups = [[0, 3], range(4, 9), 11]
    over = {"sites": ["resid_pre", "h", "u"], "layers": [1], "positions": [9, 12], "channels": groups}
    found = ms.sweep(model, clean, corrupted, METRIC, over)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        for s, site in enumerate(found.grid.sites):
            for p, position in enumerate((9, 12)):
                for g, group in enumerate(groups):
                    name, which = f"blocks.1.{site}", [group] if isinstance(group, int) else list(group)
                    value = cache[name][:, position]

                    def put(old: torch.Tensor, hook: object, value=value, which=which) -> torch.Tensor:
                        new = old.clone()
                        new[:, which] = value[:, which]
                        return new

                    want = difference(model.run_with_hooks(corrupted, fwd_hooks=[(f"{name}[{position}]", put)]))
                    assert abs(want - float(found.values[s, 0, p, g])) < 1e-5
    assert found.table()["channels"].tolist()[:3] == ["0,3", "4…8", "11"]


def log_probability(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].log_softmax(-1)[:, 7].mean()


def test_metrics_say_what_they_mean() -> None:
    """Each against the full logits of a run by hand."""
    model, (clean, corrupted) = make_model(), pair()
    full = by_hand(model, clean, corrupted, "hook_resid_pre", 1, 9).double()
    with torch.no_grad():
        want_clean = model(clean).double()[:, -1].log_softmax(-1)
    last = full[:, -1].log_softmax(-1)
    losses = -full[:, :-1].log_softmax(-1).gather(-1, corrupted[:, 1:, None])[..., 0]
    two = (full[0, -1, 1] - full[0, -1, 2]) + (full[1, -1, 3] - full[1, -1, 4])
    expected = [
        (METRIC, (full[:, -1, 1] - full[:, -1, 2]).mean()),
        (ms.LogitDifference([1, 3], [2, 4]), two / 2),
        (ms.Probability(7), last[:, 7].exp().mean()),
        (ms.LogProbability(7), last[:, 7].mean()),
        (ms.Rank(7), (last > last[:, 7:8]).sum(-1).double().mean()),
        (ms.KL(), (want_clean.exp() * (want_clean - last)).sum(-1).mean()),
        (ms.Loss(), losses.mean()),
        (ms.Loss(tokens=4), losses[:, -4:].mean()),
        (log_probability, last[:, 7].mean()),
    ]
    for metric, want in expected:
        got = ms.sweep(model, clean, corrupted, metric, {"layers": [1], "positions": [9]})  # type: ignore[arg-type]
        assert abs(float(got.values) - float(want)) < 1e-5, metric
    of_all = ms.sweep(model, clean, corrupted, lambda x: x[:, 3].mean(), {"layers": [1], "positions": [9]}, keep=None)
    assert abs(float(of_all.values) - float(full[:, 3].mean())) < 1e-5


def test_the_score_is_0_as_corrupted_and_1_as_clean() -> None:
    model, (clean, corrupted) = make_model(), pair()
    over = {"layers": [0], "positions": [2, 9]}
    both = clean.clone()
    both[:, 2] = corrupted[:, 2]
    found = ms.sweep(model, both, corrupted, METRIC, over)
    assert abs(float(found.score[0, 0, 0])) < 1e-5
    assert abs(float(found.score[0, 0, 1]) - 1) < 1e-5
    table = found.table()
    assert table.columns.tolist() == ["site", "layer", "position", "token", "value", "change", "score"]
    assert table["token"].tolist()[0] == f"[{int(both[0, 2])}]"
    with pytest.warns(UserWarning, match="mostly noise"):
        same = ms.sweep(model, clean, clean, METRIC, over)
    assert bool(same.score.isnan().all())


def test_texts_of_other_lengths_are_paired_from_an_end() -> None:
    model = make_model()
    clean = [[5, 6, 7, 8, 9, 10], [1, 2, 3, 4], [9, 9, 8, 7, 6]]
    corrupted = [[6, 7, 8, 11, 10], [1, 2, 5, 4], [9, 9, 1, 7, 6]]
    with pytest.raises(InputError, match=r"row 0: 6 and 5\). Say align='end' .* or pad"):
        ms.sweep(model, clean, corrupted, METRIC)
    found = ms.sweep(model, clean, corrupted, METRIC, ["resid_pre", "h"], align="end")
    assert found.grid.positions == (-4, -3, -2, -1)
    for s, site in enumerate(found.grid.sites):
        for layer, p in ((0, -2), (1, -4), (2, -1)):
            values = []
            for good, bad in zip(clean, corrupted, strict=True):
                with torch.no_grad():
                    _, cache = model.run_with_cache(torch.tensor([good]))
                    name = f"blocks.{layer}.{site}"
                    value = cache[name][:, len(good) + p]
                    hooks = [(f"{name}[{p}]", lambda old, hook, value=value: value)]
                    values.append(difference(model.run_with_hooks(torch.tensor([bad]), fwd_hooks=hooks)))
            assert abs(sum(values) / 3 - float(found.values[s, layer, p + 4, 0])) < 1e-5
    from_start = ms.sweep(model, clean, corrupted, METRIC, align="start")
    assert from_start.grid.positions == (0, 1, 2, 3)


def test_hooks_in_force_take_part() -> None:
    """With hooks of the user's own the sweep runs whole texts, so that their positions mean what they say."""
    model, (clean, corrupted) = make_model(), pair()
    hooks = [("blocks.2.hook_resid_pre[5]", lambda old, hook: old * 2), ("blocks.0.mixer.hook_u[3]", _half)]
    with model.hooks(fwd_hooks=hooks):
        found = ms.sweep(model, clean, corrupted, METRIC, ["resid_pre", "h"])
        for s, site in enumerate(found.grid.sites):
            for layer, p in ((0, 9), (1, 4), (2, 5), (2, 18)):
                want = difference(by_hand(model, clean, corrupted, site, layer, p))
                assert abs(want - float(found.values[s, layer, p, 0])) < 1e-5
        with pytest.raises(InputError, match="hooks are in force"):
            ms.sweep(model, clean, corrupted, METRIC, file="never.sweep")
    assert not model.hook_dict["blocks.2.hook_resid_pre"].live


def _half(old: torch.Tensor, hook: object) -> torch.Tensor:
    return old * 0.5


# ---- the file

SCRIPT = """
    import os, signal, sys
    import mambascope as ms
    from mambascope.hooks import sweeps
    from tests.conftest import make_model
    from tests.hooks.test_sweeps import METRIC, PIECE, counted, pair
    sweeps.engine._PIECE = PIECE
    path, log, last = sys.argv[1], sys.argv[2], int(sys.argv[3])
    def before(count):
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
    sweeps.engine.Engine.run = counted(log, before)
    ms.sweep(make_model(), *pair(), METRIC, ["resid_pre", "h"], file=path)
"""


def counted(log: str | Path, before: Callable[[int], None] = lambda count: None) -> Callable[..., torch.Tensor]:
    """``Engine.run`` that notes every piece it is asked for."""
    run, count = sweeps.engine.Engine.run, 0

    def noted(self: sweeps.engine.Engine, numbers: list[int]) -> torch.Tensor:
        nonlocal count
        before(count)
        count += 1
        with open(log, "a") as out:
            out.write(" ".join(map(str, numbers)) + "\n")
        return run(self, numbers)

    return noted


def test_killed_half_way_it_gives_the_same_file_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, killed, run = tmp_path / "straight.sweep", tmp_path / "killed.sweep", sweeps.engine.Engine.run
    monkeypatch.setattr(sweeps.engine, "_PIECE", PIECE)
    monkeypatch.setattr(sweeps.engine.Engine, "run", counted(tmp_path / "log0"))
    small(straight, over=["resid_pre", "h"])
    pieces = (tmp_path / "log0").read_text().splitlines()
    half = len(pieces) // 2
    assert half > 3
    root = Path(__file__).resolve().parents[2]
    args = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(killed), str(tmp_path / "log1"), str(half)]
    ended = subprocess.run(args, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False)
    assert ended.returncode == -signal.SIGKILL
    debris = [tmp_path / f".killed.sweep.0{i}.unfinished" for i in range(2)]  # as a kill amid a write leaves
    for file in debris:
        file.write_bytes(b"half")
    partial = ms.load_sweep(killed)
    assert 0 < int(partial.done.sum()) < partial.done.numel()
    assert not partial.complete
    assert bool(partial.values[~partial.done].isnan().all())
    monkeypatch.setattr(sweeps.engine.Engine, "run", run)
    monkeypatch.setattr(sweeps.engine.Engine, "run", counted(tmp_path / "log1"))
    small(killed, over=["resid_pre", "h"])
    assert killed.read_bytes() == straight.read_bytes()
    assert sorted((tmp_path / "log1").read_text().splitlines()) == sorted(pieces)
    assert not list(tmp_path.glob(".*"))  # neither temporaries nor locks are left


def small(path: Path, **options: object) -> ms.Sweep:
    model, (clean, corrupted) = make_model(), pair()
    return ms.sweep(model, clean, corrupted, METRIC, **{"over": "resid_pre", **options}, file=path)  # type: ignore[arg-type]


def test_a_finished_file_is_not_computed_again(tmp_path: Path) -> None:
    first = small(tmp_path / "a.sweep")
    again = small(tmp_path / "a.sweep")
    read = ms.load_sweep(tmp_path / "a.sweep")
    assert (first.computed, again.computed) == (57, 0)
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.values, read.values)
    assert read.table().equals(first.table())
    assert (read.clean, read.corrupted, read.metric) == (
        first.clean,
        first.corrupted,
        {"metric": "LogitDifference", "right": [1, 1], "wrong": [2, 2]},
    )


def test_a_file_of_other_inputs_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "a.sweep"
    small(path)
    before = path.read_bytes()
    with pytest.raises(SweepError, match=r'sites: the file has \["hook_resid_pre"\], this call \["mixer.hook_u"\]'):
        small(path, over="u")
    model, (clean, corrupted) = make_model(seed=5), pair()
    with pytest.raises(SweepError, match="weights: the file has"):
        ms.sweep(model, clean, corrupted, METRIC, file=path)
    with pytest.raises(SweepError, match=r"clean\[0\]\[2\]: the file has.*metric: the file has"):
        ms.sweep(make_model(), corrupted, clean, ms.Probability(3), file=path)
    late = pair()[1].clone()
    late[1, -1] += 1
    with pytest.raises(
        SweepError, match=rf"corrupted\[1\]\[18\]: the file has {late[1, -1] - 1}, this call {late[1, -1]}[;)]"
    ):
        ms.sweep(make_model(), pair()[0], late, METRIC, file=path)
    assert path.read_bytes() == before
    with pytest.raises(SweepError, match="is a folder"):
        small(tmp_path)
    with pytest.raises(SweepError, match="file must be a path, got int"):
        small(3)  # type: ignore[arg-type]
    path.write_bytes(b"something else")
    with pytest.raises(SweepError, match="cannot be read"):
        small(path)
    with pytest.raises(SweepError, match="is no folder"):
        small(tmp_path / "none" / "a.sweep")


def test_a_full_disk_leaves_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.sweep"
    monkeypatch.setattr(sweeps.engine, "_PIECE", PIECE)
    whole = small(tmp_path / "b.sweep")
    write, left = sweep_file.write_tensors, 4

    def full(*args: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep_file, "write_tensors", full)
    with pytest.raises(SweepError, match="No space left.*what was done before is in it"):
        small(path)
    monkeypatch.setattr(sweep_file, "write_tensors", write)
    partial = ms.load_sweep(path)
    assert 0 < int(partial.done.sum()) < 57
    rest = small(path)
    assert rest.computed == 57 - int(partial.done.sum())
    assert path.read_bytes() == (tmp_path / "b.sweep").read_bytes()
    assert torch.equal(rest.values, whole.values)


def test_interrupted_it_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.sweep"
    monkeypatch.setattr(sweeps.engine, "_PIECE", PIECE)
    run, left = sweeps.engine.Engine.run, 3

    def stopped(self: object, numbers: list[int]) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return run(self, numbers)  # type: ignore[arg-type]

    monkeypatch.setattr(sweeps.engine.Engine, "run", stopped)
    with pytest.raises(KeyboardInterrupt) as stop:
        small(path)
    assert "of 57 edits done; the same call goes on from there" in stop.value.__notes__[0]
    done = int(ms.load_sweep(path).done.sum())
    assert done > 0
    left = 0  # never again
    assert small(path).computed == 57 - done


def test_two_sweeps_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sweep"
    held = sweep_file.SweepFile(path, {}, {}, 1)
    try:
        with pytest.raises(SweepError, match="being written by another sweep"):
            small(path)
    finally:
        held.close()
    path.unlink()
    assert small(path).complete


# ---- bad input


def no_number(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 0]


def test_metrics_that_are_none() -> None:
    model, (clean, corrupted) = make_model(), pair()
    with pytest.raises(InputError, match=r"no_number returned a tensor of shape \(2,\); it must return one number"):
        ms.sweep(model, clean, corrupted, no_number)
    with pytest.raises(InputError, match="returned str"):
        ms.sweep(model, clean, corrupted, lambda logits: "high")
    with pytest.raises(InputError, match="the metric is nan on the clean text"):
        ms.sweep(model, clean, corrupted, lambda logits: logits.mean() * float("nan"))
    calls = 0

    def later(logits: torch.Tensor) -> float:
        nonlocal calls
        calls += 1
        return float("nan") if calls > 5 else 1.0 + calls

    with pytest.raises(InputError, match=r"the metric is nan with hook_resid_pre of layer 0 patched at position 1"):
        ms.sweep(model, clean, corrupted, later)
    with pytest.raises(InputError, match="must be one of mambascope.hooks.metrics or a function"):
        ms.sweep(model, clean, corrupted, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="LogitDifference: answer 50 is neither"):
        ms.sweep(model, clean, corrupted, ms.LogitDifference(50, 1))
    with pytest.raises(InputError, match="3 answers for 2 pairs"):
        ms.sweep(model, clean, corrupted, ms.Rank([1, 2, 3]))
    with pytest.raises(InputError, match="reads the last 20 positions, the shortest text has 19"):
        ms.sweep(model, clean, corrupted, ms.Loss(tokens=19))


def test_places_that_are_none() -> None:
    model, (clean, corrupted) = make_model(), pair()

    def over(**options: object) -> None:
        ms.sweep(model, clean, corrupted, METRIC, options)

    with pytest.raises(UnknownNameError, match="no hook point is called"):
        over(sites="attention")
    with pytest.raises(HookError, match="hook_A_bar has no single value"):
        over(sites="A_bar")
    with pytest.raises(HookError, match="the layers to sweep go in layers="):
        over(sites="blocks.1.hook_resid_pre")
    with pytest.raises(InputError, match="layer 3 is outside the model's 3 layers"):
        over(layers=[0, 3])
    with pytest.raises(InputError, match=r"position 19 is outside 0…18"):
        over(positions=[19])
    with pytest.raises(InputError, match="channel 24 is outside 0…23"):
        over(channels=[24])
    with pytest.raises(InputError, match="over has no 'layer', did you mean 'layers'"):
        over(layer=[0])
    with pytest.raises(InputError, match="row 1: 60 is no id"):
        ms.sweep(model, [[1, 2], [3, 60]], [[1, 2], [3, 4]], METRIC)
    with pytest.raises(InputError, match="2 clean texts and 1 corrupted"):
        ms.sweep(model, clean, corrupted[:1], METRIC)


# ---- the walk


def test_one_walk_calls_every_layer_once_for_all_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (clean, corrupted) = make_model(), pair()
    monkeypatch.setattr(sweeps.engine.Engine, "_interval", lambda self, group: 4)
    replay, calls = model.replay_lanes, []

    def noted(layer: int, stream: torch.Tensor, shapes: list[tuple[int, int]], *rest: object) -> torch.Tensor:
        calls.append((layer, list(shapes)))
        return replay(layer, stream, shapes, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "replay_lanes", noted)
    ms.sweep(model, clean, corrupted, METRIC, "resid_pre")
    lanes = [(4, 19), (4, 15), (4, 11), (4, 7), (3, 3)]  # positions in each, and tokens of a row; two pairs
    assert calls == [(i, [(2 * n * (i + 1), length) for n, length in lanes]) for i in range(3)]


def test_groups_smaller_than_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few edits, over lanes and layers as they come, and blocks given less than a lane."""
    model, (clean, corrupted) = make_model(), pair()
    over = ["resid_pre", "h", "mixer_out", "u"]
    want = ms.sweep(model, clean, corrupted, METRIC, over)
    monkeypatch.setattr(sweeps.engine.Engine, "_interval", lambda self, group: 4)
    monkeypatch.setattr(sweeps.engine, "_PIECE", {"cpu": 300, "cuda": 300})
    monkeypatch.setattr(sweeps.engine, "_TOKENS", {"cpu": 90, "cuda": 90})
    found = ms.sweep(model, clean, corrupted, METRIC, over)
    assert float((found.values - want.values).abs().max()) < 1e-5
    with torch.no_grad():
        engine = sweeps.engine.Engine(model, sweeps.pairs_of(model, clean, corrupted), found.grid, METRIC, 1)
    pieces = engine.pieces()
    assert sorted(i for piece in pieces for i in piece) == list(range(found.values.numel()))
    starts = [{engine.ready[0].start(found.grid.edit(i).position) for i in piece} for piece in pieces]
    assert max(map(len, starts)) > 1  # a piece may hold several lanes
    assert min(map(len, pieces)) < 19 < found.values.numel()
    run, left = sweeps.engine.Engine.run, len(pieces) // 2

    def stopped(self: sweeps.engine.Engine, numbers: list[int]) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return run(self, numbers)

    straight, cut = tmp_path / "straight.sweep", tmp_path / "cut.sweep"
    ms.sweep(model, clean, corrupted, METRIC, over, file=straight)
    monkeypatch.setattr(sweeps.engine.Engine, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        ms.sweep(model, clean, corrupted, METRIC, over, file=cut)
    rest = ms.sweep(model, clean, corrupted, METRIC, over, file=cut)
    assert 0 < rest.computed < found.values.numel()
    assert cut.read_bytes() == straight.read_bytes()


HOLDER = """
    import sys
    from mambascope.hooks.sweeps.file import SweepFile
    held = SweepFile(sys.argv[1], {}, {}, 1)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_file_that_another_process_writes_is_refused_until_that_one_is_gone(tmp_path: Path) -> None:
    path, root = tmp_path / "a.sweep", Path(__file__).resolve().parents[2]
    args = [sys.executable, "-c", textwrap.dedent(HOLDER), str(path)]
    env = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(args, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SweepError, match="being written by another sweep; wait for it, or give another file"):
            small(path)
        other.kill()  # its lock goes with it
    assert other.returncode == -signal.SIGKILL
    path.unlink()
    assert small(path).complete
    assert not list(tmp_path.glob(".*"))

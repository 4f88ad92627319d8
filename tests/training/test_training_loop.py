"""The trainer on a stand-in model: it learns, resumes to the bit, survives a kill, stops at NaN."""

import csv
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mambascope.errors import InputError, LoadError
from mambascope.training.bar import training_bar
from mambascope.training.checkpoint import latest_checkpoint, load_checkpoint
from mambascope.training.floor import Floor
from mambascope.training.head import answer_loss
from mambascope.training.loop import TrainingError, learning_rate, make_optimizer, train
from mambascope.training.recipe import TrainSettings
from mambascope.training.sampler import Batch


def counting(step: int) -> Batch:
    """Rows that count upwards modulo 16 from a random start: learnable to zero loss."""
    start = torch.randint(16, (4, 1), generator=torch.Generator().manual_seed(step))
    rows = (start + torch.arange(9)) % 16
    return Batch(rows[:, :-1], rows[:, 1:])


def settings(**changes) -> TrainSettings:
    values = {"steps": 40, "batch": 4, "length": 8, "lr": 1e-2, "warmup": 4, "weight_decay": 0.1, "log_every": 4}
    return TrainSettings(**(values | {"checkpoint_every": 8, "evaluate_every": 8} | changes))


def quiet(_: str) -> None:
    return None


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns_and_writes_its_curve(tiny, tmp_path):
    lines: list[str] = []
    result = train(
        tiny(), counting, settings(steps=200, lr=3e-2), tmp_path, recipe={"a": 1}, report=lines.append,
        evaluate=lambda model: {"loss": answer_loss(model, counting(999)).item()},
    )  # fmt: skip
    assert result.finished
    assert result.step == 200
    assert result.rows[0]["loss"] > 2.0 > 0.7 > result.rows[-1]["loss"]
    assert result.evaluations[-1]["step"] == 200
    assert result.evaluations[-1]["loss"] < 0.7
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in result.rows]
    assert json.loads((tmp_path / "curve.json").read_text())["evaluations"] == result.evaluations
    assert any("tokens/s" in line and "step 200/200" in line for line in lines)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000192", "step-00000200"]


def test_resume_equals_one_run_to_the_bit(tiny, tmp_path):
    whole, part, again = tiny(), tiny(), tiny(seed=9)
    straight = train(whole, counting, settings(), tmp_path / "a", recipe={}, report=quiet)
    stopped = train(part, counting, settings(), tmp_path / "b", recipe={}, report=quiet, minutes=0.0)
    assert stopped.step == 4
    assert not stopped.finished
    resumed = train(again, counting, settings(), tmp_path / "b", recipe={}, report=quiet, resume=True)
    assert same(whole, again)
    assert [row["loss"] for row in resumed.rows] == [row["loss"] for row in straight.rows]
    other = tiny()
    train(other, counting, settings(lr=1.1e-2), tmp_path / "c", recipe={}, report=quiet)
    assert not same(whole, other), "the comparison can fail"


_KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from conftest import TinyRecurrent
from test_training_loop import counting, settings
from mambascope.training.loop import train
def report(line):
    print(line, flush=True)
train(TinyRecurrent(), counting, settings(steps=100_000), sys.argv[2], recipe={}, report=report)
"""


def test_kill_nine_loses_at_most_one_interval(tiny, tmp_path):
    command = [sys.executable, "-c", _KILLED, str(Path(__file__).parent), str(tmp_path)]
    seen = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                seen = int(line.split()[1].split("/")[0].replace(",", ""))
            if seen >= 100:
                break
        os.kill(process.pid, signal.SIGKILL)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    step = load_checkpoint(newest, tiny())["step"]
    assert step >= seen - 8
    reached = settings(steps=100_000, log_every=8)
    model = tiny()
    result = train(model, counting, reached, tmp_path, recipe={}, report=quiet, resume=True, minutes=0.0)
    assert result.step == step + 8
    assert [row["step"] for row in result.rows][:3] == [4, 8, 12]


def test_an_unfinished_checkpoint_is_never_taken(tiny, tmp_path):
    train(tiny(), counting, settings(steps=8), tmp_path, recipe={}, report=quiet)
    (tmp_path / "checkpoints" / ".part-00000016").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-00000008"  # pyright: ignore[reportOptionalMemberAccess]
    (tmp_path / ".curve.csv.0123abcd.unfinished").write_text("of a killed writer")
    (tmp_path / "checkpoints" / ".part-00000999").mkdir()
    train(tiny(), counting, settings(), tmp_path, recipe={}, report=quiet, resume=True)
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == [".lock"]


def test_nan_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path):
    def poisoned(model, batch):
        poisoned.step += 1
        return answer_loss(model, batch) * (math.nan if poisoned.step > 18 else 1.0)

    poisoned.step = 0
    with pytest.raises(TrainingError, match=r"step 18: loss nan.*The last good checkpoint is step-00000016"):
        train(tiny(), counting, settings(), tmp_path, recipe={}, report=quiet, loss=poisoned)
    model = tiny()
    assert load_checkpoint(latest_checkpoint(tmp_path), model)["step"] == 16  # pyright: ignore[reportArgumentType]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    straight = tiny()
    train(straight, counting, settings(), tmp_path / "b", recipe={}, report=quiet)
    train(model, counting, settings(), tmp_path, recipe={}, report=quiet, resume=True)
    assert same(straight, model)


def test_a_full_disk_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    """Writes fail from the second checkpoint on, as on a disk that has filled up."""
    real = os.fsync

    def full(descriptor):
        if (tmp_path / "checkpoints" / ".part-00000016").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        TrainingError, match=r"step 16: .* No space left on device; .*checkpoint is step-00000008; make"
    ):
        train(tiny(), counting, settings(), tmp_path, recipe={}, report=quiet)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000008"]
    straight, model = tiny(), tiny()
    train(straight, counting, settings(), tmp_path / "b", recipe={}, report=quiet)
    train(model, counting, settings(), tmp_path, recipe={}, report=quiet, resume=True)
    assert same(straight, model)


def test_a_disk_without_room_is_refused_before_the_first_step(tiny, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"checkpoints need \d.* below .*, where 1.0 KB are free; make room"):
        train(tiny(), counting, settings(), tmp_path, recipe={}, report=quiet)


def test_progress_and_floor_are_told(tiny, tmp_path):
    lines, steps = [], []
    floor = Floor(products=1e-9, scans=0.0, tokens=32)
    train(
        tiny(), counting, settings(steps=12), tmp_path, recipe={}, report=lines.append, progress=steps.append,
        floor=lambda: floor,
    )  # fmt: skip
    assert steps == [4, 8, 12]
    assert str(floor) in lines
    assert any("% of the floor)" in line for line in lines)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert json.loads((newest / "progress.json").read_text())["floor"]["products"] == 1e-9


def test_a_floor_that_cannot_be_measured_is_said_and_stops_nothing(tiny, tmp_path):
    def floor() -> Floor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    lines: list[str] = []
    result = train(tiny(), counting, settings(steps=8), tmp_path, recipe={}, report=lines.append, floor=floor)
    assert result.finished
    assert "the floor could not be measured (CUDA out of memory.); training without its share" in lines


def test_a_bar_on_a_terminal_and_plain_lines_elsewhere(monkeypatch, capsys):
    with training_bar(3) as (report, progress):
        report("step 1/3")
        assert progress is None
    assert capsys.readouterr().out == "step 1/3\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with training_bar(3) as (report, progress):
        report("[b] step 2/3")
        assert progress is not None
        progress(2)
    out = capsys.readouterr().out
    assert "[b] step 2/3" in out, "never markup"
    assert "2/3" in out.replace("[b] step 2/3", "")


def test_who_may_write(tiny, tmp_path):
    train(tiny(), counting, settings(steps=8), tmp_path, recipe={"train": {"lr": 1}}, report=quiet)
    with pytest.raises(InputError, match=r"already holds a training .step-00000008.; go on with --resume"):
        train(tiny(), counting, settings(), tmp_path, recipe={}, report=quiet)
    with pytest.raises(InputError, match=r"another recipe; train.lr: 1 before, 2 now"):
        train(tiny(), counting, settings(), tmp_path, recipe={"train": {"lr": 2}}, report=quiet, resume=True)
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another training is writing to"):
            train(tiny(), counting, settings(), tmp_path, recipe={}, report=quiet, resume=True)


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_named(tiny, tmp_path):
    train(tiny(), counting, settings(steps=8), tmp_path, recipe={}, report=quiet)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    with pytest.raises(LoadError, match=r"embed.weight is \(16, 8\), the model has \(16, 4\)"):
        load_checkpoint(folder, tiny(width=4))
    with pytest.raises(LoadError, match="belongs to another model"):
        load_checkpoint(folder, torch.nn.Linear(2, 2))
    (folder / "weights.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(LoadError, match=r"weights.safetensors cannot be read"):
        load_checkpoint(folder, tiny())


def test_the_schedule_by_hand():
    cosine = settings(steps=14, lr=1.0, warmup=4, lr_floor=0.1)
    assert [learning_rate(cosine, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(cosine, 4) == pytest.approx(1.0)
    assert learning_rate(cosine, 9) == pytest.approx(0.1 + 0.9 * 0.5)
    assert learning_rate(cosine, 13) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.9)))
    assert learning_rate(settings(schedule="constant"), 39) == 1e-2


def test_decay_spares_vectors(tiny):
    model = tiny()
    decayed, free = make_optimizer(model, settings()).param_groups
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert {p.ndim for p in free["params"]} == {1}
    assert {p.ndim for p in decayed["params"]} == {2}


def test_masked_targets_are_not_scored(tiny):
    model, batch = tiny(), counting(0)
    masked = Batch(batch.tokens, batch.targets.clone().index_fill_(1, torch.arange(7), -100))
    last = Batch(batch.tokens, batch.targets[:, -1:])
    assert answer_loss(model, masked).item() == pytest.approx(answer_loss(model, last).item(), rel=1e-6)
    assert answer_loss(model, masked).item() != pytest.approx(answer_loss(model, batch).item(), rel=1e-3)


def test_minutes_is_a_budget_not_a_limit_on_the_result(tiny, tmp_path):
    started = time.perf_counter()
    result = train(tiny(), counting, settings(steps=10**6), tmp_path, recipe={}, report=quiet, minutes=0.01)
    assert 0 < result.step < 10**6
    assert time.perf_counter() - started < 20
    assert latest_checkpoint(tmp_path).name == f"step-{result.step:08d}"  # pyright: ignore[reportOptionalMemberAccess]

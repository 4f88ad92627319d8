"""Sweeps: what a file means, what is run, retried and never repeated; the same results in processes and on Ray."""

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from mambascope.errors import BackendError, ConfigError, InputError, LoadError, UnknownNameError
from mambascope.training import executors
from mambascope.training.command import main
from mambascope.training.executors import in_turns, local_processes, ray_cluster
from mambascope.training.files import only_writer
from mambascope.training.sweep import Job, SweepError, load_sweep, run_sweep, sweep_names
from mambascope.training.worker import read_result, run_one

SWEEP = """
name = "tiny"
description = "Two seeds of a model of nothing"
[recipe]
name = "parity"
description = "x"
licence = "CC0"
seed = 0
[recipe.model]
d_model = 8
n_layers = 1
d_vocab = 2
d_state = 2
[recipe.train]
steps = 60
batch = 4
length = 8
lr = 1e-2
log_every = 5
checkpoint_every = 10
evaluate_every = 30
[recipe.task]
name = "parity"
evaluate_sequences = 20
[[vary]]
seed = [1, 2]
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(SWEEP)
    return path


def quiet(_: str) -> None:
    return None


class Inline:
    """An executor that runs jobs here; ``failing``: attempts that go wrong, by name."""

    def __init__(self, **failing: int) -> None:
        self.failing, self.ran = failing, []

    def __call__(self, jobs: list[Job], retries: int, report) -> None:
        for job in jobs:
            for _ in range(1 + retries):
                job.attempts += 1
                self.ran.append(job.name)
                if job.attempts > self.failing.get(job.name, 0):
                    run_one(job.folder, job.run, report)
                    break
                job.error = "it broke"


def test_runs_are_the_product_of_what_varies(file) -> None:
    file.write_text(SWEEP + '"model.d_conv" = [1, 4]\n[[vary]]\n"train.lr" = 0.5\n')
    sweep = load_sweep(file, {"train.steps": 7, "model.d_model": 16})
    assert [run.name for run in sweep.runs] == [
        "seed=1,d_conv=1", "seed=1,d_conv=4", "seed=2,d_conv=1", "seed=2,d_conv=4", "lr=0.5",
    ]  # fmt: skip
    assert [run.recipe.seed for run in sweep.runs] == [1, 1, 2, 2, 0]
    assert sweep.runs[1].recipe.model.d_conv == 4
    assert {run.recipe.train.steps for run in sweep.runs} == {7}
    assert {run.recipe.model.d_inner for run in sweep.runs} == {32}, "what follows from a change is derived afresh"
    assert sweep.runs[4].recipe.train.lr == 0.5


def test_every_sweep_of_the_package_holds_together() -> None:
    for name in sweep_names():
        sweep = load_sweep(name)
        assert sweep.name == name
        assert sweep.description
        assert len(sweep.runs) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[[vary]]", "[[very]]"), "unknown key 'very', did you mean 'vary'"),
        (("seed = [1, 2]", "seed = [1, 1]"), "more than one run 'seed=1'"),
        (
            ("seed = [1, 2]", '"train.step" = [1, 2]'),
            r"run step=1, \[train\]: unknown key 'step', did you mean 'steps'",
        ),
        (("seed = [1, 2]", '"seed.x" = 3'), "'seed.x' cannot be set, 'seed' is no table"),
        (("[[vary]]", "[vary]"), r"vary must be written as \[\[vary\]\] tables"),
        (('[recipe.task]\nname = "parity"', '[recipe.task]\nname = "pair"'), "no task 'pair'"),
    ],
)
def test_a_sweep_that_does_not_hold_together_is_named(file, change, message) -> None:
    assert change[0] in SWEEP
    file.write_text(SWEEP.replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_sweep(file)


def test_other_recipes_than_tables(file) -> None:
    file.write_text('recipe = "induction-2l"\n[[vary]]\nseed = [1, 2]\n')
    assert load_sweep(file).runs[1].recipe.train.steps == 20_000
    file.write_text('recipe = "none.toml"\n')
    with pytest.raises(LoadError, match=r"cannot read recipe .*none.toml"):
        load_sweep(file)
    file.write_text('name = "x"\n')
    with pytest.raises(ConfigError, match="lacks recipe"):
        load_sweep(file)
    with pytest.raises(UnknownNameError, match="there is no sweep 'nothing'"):
        load_sweep("nothing")


def test_finished_runs_are_never_repeated_and_failed_ones_are(file, tmp_path) -> None:
    sweep, out = load_sweep(file, {"train.steps": 10, "train.evaluate_every": 10}), tmp_path / "out"
    first = Inline(**{"seed=2": 3})
    with pytest.raises(SweepError, match=r"1 of 2 runs did not finish in 3 attempts: seed=2: it broke.*table.csv"):
        run_sweep(sweep, out, first, report=quiet)
    assert first.ran == ["seed=1", "seed=2", "seed=2", "seed=2"]
    assert "failed" in (out / "table.csv").read_text()
    second = Inline(**{"seed=2": 1})
    table = run_sweep(sweep, out, second, report=quiet)
    assert second.ran == ["seed=2", "seed=2"]
    assert table["status"].tolist() == ["finished before", "finished"]
    assert table["attempts"].tolist() == [0, 2]
    assert {"seed", "steps", "loss", "accuracy_8", "best_loss_8", "seconds"} <= set(table.columns)
    third = Inline()
    assert run_sweep(sweep, out, third, report=quiet)["loss"].tolist() == table["loss"].tolist()
    assert third.ran == []
    with pytest.raises(InputError, match=r"another recipe; train.steps: 10 before, 60 now"):
        run_sweep(load_sweep(file, {"train.evaluate_every": 10}), out, third, report=quiet)
    (out / "seed=1" / "result.json").write_text("{")
    with pytest.raises(LoadError, match="delete it and the run is made again"):
        run_sweep(sweep, out, third, report=quiet)


def test_two_executors_on_one_folder(file, tmp_path) -> None:
    pytest.importorskip("fcntl")
    with only_writer(tmp_path / "out"), pytest.raises(InputError, match="another training is writing to"):
        run_sweep(load_sweep(file), tmp_path / "out", Inline(), report=quiet)


def test_a_killed_worker_is_tried_again_and_ends_where_an_undisturbed_one_does(file, tmp_path) -> None:
    file.write_text(SWEEP.replace("[1, 2]", "[1]"))
    sweep, out, lines = load_sweep(file, {"train.steps": 300}), tmp_path / "out", []
    victim = out / "seed=1"

    def kill() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for child in psutil.Process().children():
                try:
                    mine = str(victim) in child.cmdline()
                except psutil.Error:
                    continue
                if mine and list((victim / "checkpoints").glob("step-*")):
                    os.kill(child.pid, signal.SIGKILL)
                    return
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    table = run_sweep(sweep, out, local_processes(2), report=lines.append)
    killer.join()
    assert (table["status"].tolist(), table["attempts"].tolist()) == (["finished"], [2])
    assert any(line.startswith("seed=1: killed by signal 9") and line.endswith("trying again") for line in lines)
    assert "resumed at step" in (victim / "log.txt").read_text()
    found = read_result(victim)
    assert found is not None
    straight = run_one(tmp_path / "here", json.loads((victim / "run.json").read_text()), quiet)
    assert (found["loss"], found["evaluation"]) == (straight["loss"], straight["evaluation"]), "to the bit"


def test_runs_of_one_process_take_turns_and_change_nothing(file, tmp_path) -> None:
    sweep = load_sweep(file)
    table = run_sweep(sweep, tmp_path / "out", in_turns(2), report=quiet)
    assert table["status"].tolist() == ["finished", "finished"]
    for name in ("seed=1", "seed=2"):
        found = read_result(tmp_path / "out" / name)
        assert found is not None
        run = json.loads((tmp_path / "out" / name / "run.json").read_text())
        alone = run_one(tmp_path / "alone" / name, run, quiet)
        assert (found["loss"], found["evaluation"]) == (alone["loss"], alone["evaluation"]), "to the bit"
        assert "step 60/60" in (tmp_path / "out" / name / "log.txt").read_text()
    with pytest.raises(InputError, match="together must be an integer ≥ 1, got 0"):
        in_turns(0)


def test_a_run_that_fails_in_its_turn_leaves_the_others_alone(file, tmp_path) -> None:
    file.write_text(SWEEP.replace("seed = [1, 2]", 'seed = [1]\n"train.lr" = [1e-2, 1e38]'))
    with pytest.raises(SweepError, match=r"1 of 2 runs did not finish in 2 attempts: seed=1,lr=1e\+38: RuntimeError"):
        run_sweep(load_sweep(file), tmp_path, in_turns(2), retries=1, report=quiet)
    assert read_result(tmp_path / "seed=1,lr=0.01") is not None
    assert "error: RuntimeError: value" in (tmp_path / "seed=1,lr=1e+38" / "log.txt").read_text()


@pytest.mark.parametrize("executor", [in_turns(2), local_processes(2)])
def test_a_sweep_whose_time_is_over_says_how_far_it_came_and_goes_on(file, tmp_path, executor) -> None:
    short = {"train.evaluate_every": 5, "train.steps": 20}
    sweep = load_sweep(file, short)
    message = r"2 of 2 runs did not finish in 3 attempts and 0 minutes: seed=1: stopped, its time is over"
    with pytest.raises(SweepError, match=message):
        run_sweep(sweep, tmp_path, executor, minutes=0, report=quiet)
    for spec in sweep.runs:  # what a run leaves that its time stopped
        run = {"recipe": spec.recipe.to_dict(), "data": [], "device": "cpu", "threads": 1, "until": time.time()}
        run_one(tmp_path / spec.name, run, quiet)
        assert read_result(tmp_path / spec.name) is None
    with pytest.raises(SweepError):
        run_sweep(sweep, tmp_path, executor, minutes=0, report=quiet)
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert "stopped" in rows[1] and ",5," in rows[1] and "accuracy_8" in rows[0]
    table = run_sweep(sweep, tmp_path, executor, report=quiet)
    assert table["steps"].tolist() == [20, 20]
    assert "resumed at step 5" in (tmp_path / "seed=1" / "log.txt").read_text()


def test_together_is_for_one_process(file, tmp_path, capsys) -> None:
    out = ["--out", str(tmp_path / "x"), "--together", "2"]
    assert main(["sweep", str(file), *out, "--workers", "2"]) == 1
    assert "--together is for one process" in capsys.readouterr().err
    assert main(["sweep", str(file), *out, "--set", "train.steps=10", "--set", "train.evaluate_every=10"]) == 0


def test_runs_take_turns_over_the_gpus(monkeypatch, tmp_path) -> None:
    seen = []

    class Done:
        returncode = 0

        def poll(self) -> int:
            return 0

    def started(job: Job, gpu: str | None) -> Done:
        seen.append((job.name, gpu))
        (job.folder / "result.json").touch()
        return Done()

    monkeypatch.setattr(executors, "_start", started)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    jobs = [Job(name, tmp_path / name, {"device": "cuda"}) for name in "abcd"]
    for job in jobs:
        job.folder.mkdir()
    local_processes(4)(jobs, 0, quiet)
    assert seen == [("a", "3"), ("b", "5"), ("c", "3"), ("d", "5")]


def test_bad_numbers(file, tmp_path) -> None:
    with pytest.raises(InputError, match="workers must be an integer ≥ 1, got 0"):
        local_processes(0)
    with pytest.raises(InputError, match="retries must be ≥ 0 and threads ≥ 1"):
        run_sweep(load_sweep(file), tmp_path / "out", Inline(), retries=-1)


def test_without_ray_the_local_way_is_named(monkeypatch, file, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"pip install mambascope\[ray\], or leave --ray-address out"):
        ray_cluster("auto")
    assert main(["sweep", str(file), "--out", str(tmp_path / "x"), "--ray-address", "auto"]) == 1
    assert "needs Ray" in capsys.readouterr().err


def test_a_cluster_that_cannot_be_reached(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for form in (address, f"ray://{address}"):
            with pytest.raises(BackendError, match=rf"Ray cluster at {form} cannot be reached .*--ray-address out"):
                ray_cluster(form, timeout=1.0)
    with pytest.raises(BackendError, match="'nowhere' is not host:port"):
        ray_cluster("nowhere")


def test_a_cluster_that_refuses(monkeypatch, file, tmp_path) -> None:
    fake = type(sys)("ray")
    fake.is_initialized = lambda: False

    def init(**_: object) -> None:
        raise ConnectionError("no running Ray instance\nsecond line")

    fake.init, fake.shutdown = init, lambda: None
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(BackendError, match=r"cannot be used \(no running Ray instance\).*--ray-address out"):
        run_sweep(load_sweep(file), tmp_path / "out", ray_cluster("auto"), report=quiet)


def test_ray_gives_the_same_results(file, tmp_path) -> None:
    ray = pytest.importorskip("ray")
    sweep = load_sweep(file)
    ray.init(address="local", num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        table = run_sweep(sweep, tmp_path / "ray", ray_cluster("local"), report=quiet)
    finally:
        ray.shutdown()
    here = run_sweep(sweep, tmp_path / "here", Inline(), report=quiet)
    columns = [name for name in table.columns if name != "seconds"]
    assert table[columns].equals(here[columns])


def test_the_command_prints_one_table_and_says_what_failed(file, tmp_path, capsys) -> None:
    file.write_text(SWEEP.replace("seed = [1, 2]", '"train.lr" = [1e-2, 1e30]'))
    out = tmp_path / "out"
    arguments = ["sweep", str(file), "--out", str(out), "--workers", "2", "--retries", "0"]
    arguments += [
        word for change in ("steps=10", "evaluate_every=10", "clip=0") for word in ("--set", f"train.{change}")
    ]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert "2 runs, 0 finished before" in printed.out
    assert re.search(
        r"1 of 2 runs did not finish .*lr=1e\+30: exit status 1: error: step \d+: loss (nan|inf)", printed.err
    )
    assert [line.split(",")[1] for line in (out / "table.csv").read_text().splitlines()] == [
        "status",
        "finished",
        "failed",
    ]
    file.write_text(SWEEP.replace("seed = [1, 2]", '"train.lr" = [1e-2]'))
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "1 runs, 1 finished before" in text
    assert "accuracy_8" in text

"""What a person does wrong at the command line: named in one line, nothing on disk changed, nothing ignored."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mambascope.training.command import main
from mambascope.training.files import only_writer

TASK = """
name = "tiny"
description = "A test"
licence = "Apache-2.0"
seed = 1
[model]
d_model = 8
n_layers = 1
d_vocab = 16
d_state = 2
[train]
steps = 4
batch = 2
length = 8
lr = 1e-2
log_every = 2
checkpoint_every = 2
evaluate_every = 4
[task]
name = "induction"
evaluate_sequences = 4
"""

TEXT = (
    TASK[: TASK.index("[task]")].replace("d_vocab = 16", "d_vocab = 260").replace('"tiny"', '"tiny-lm"')
    + """
[text]
vocabulary = 260
[[text.sources]]
name = "one"
file = "one.txt"
share = 1.0
licence = "CC0"
origin = "made up"
"""
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two recipes, a text, and a finished training of each."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "tiny.toml").write_text(TASK)
    (folder / "text.toml").write_text(TEXT)
    (folder / "one.txt").write_text("".join(f"{i} is less than {i + 1}.\n" for i in range(400)))
    assert main(["train", str(folder / "tiny.toml"), "--out", str(folder / "a"), "--device", "cpu"]) == 0
    text = ["--data", str(folder), "--out", str(folder / "b"), "--device", "cpu"]
    assert main(["train", str(folder / "text.toml"), *text]) == 0
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.n_layers=2", "model.n_layers: 1 before, 2 now"),
        ("model.d_model=16", "model.d_model: 8 before, 16 now"),
        ("train.lr=0.5", "train.lr: 0.01 before, 0.5 now"),
    ],
)
def test_another_recipe_is_refused_by_its_difference_whatever_it_is(home, capsys, change, told):
    before = content(home / "a")
    arguments = ["train", str(home / "tiny.toml"), "--out", str(home / "a"), "--resume", "--set", change]
    assert main([*arguments, "--device", "cpu"]) == 1
    assert told in capsys.readouterr().err
    assert content(home / "a") == before


def test_a_refused_training_leaves_the_record_of_the_other_alone(home, capsys):
    before = content(home / "b")
    text = ["train", str(home / "text.toml"), "--data", str(home), "--out", str(home / "b"), "--device", "cpu"]
    for arguments, told in (
        (["--resume", "--set", "train.steps=8"], "train.steps: 4 before, 8 now"),
        (["--set", "train.steps=8"], "already holds a training"),
        (["--resume", "--set", "text.vocabulary=300", "--set", "model.d_vocab=300"], "vocabulary: 260 before, 300 now"),
    ):
        assert main([*text, *arguments]) == 1
        assert told in capsys.readouterr().err
    with only_writer(home / "b"):
        for command in (text, ["prepare", *text[1:6]]):
            assert main(command) == 1
            assert "another training is writing to" in capsys.readouterr().err
    assert content(home / "b") == before


@pytest.mark.parametrize(
    ("recipe", "change", "told"),
    [
        ("tiny", "train.betas=[1.5, 0.9]", "betas must be two numbers of 0 ≤ beta < 1, got [1.5, 0.9]"),
        ("tiny", "seed=-1", "seed must be at least 0, got -1"),
        ("tiny", "model.tie_embeddings=no", "tie_embeddings must be true or false, got 'no'"),
        ("tiny", "model.dt_min=0.5", "dt_min=0.5 exceeds dt_max=0.1"),
        ("tiny", "model.initializer_range=-1", "initializer_range must be a number >= 0, got -1"),
        ("tiny", "model.bos_token_id=none", "bos_token_id must be the id of a token or None, got 'none'"),
        ("text", "text.hold=3", "text.hold is a part of training, 0 ≤ hold ≤ 1, got 3.0"),
        ("text", "text.sources=[]", "the shares of the sources must be >= 0 and add up to 1, got sums [0, 0]"),
    ],
)
def test_values_that_cannot_be_are_named(home, tmp_path, capsys, recipe, change, told):
    arguments = ["train", str(home / f"{recipe}.toml"), "--data", str(home), "--out", str(tmp_path / "x")]
    assert main([*arguments, "--set", change]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (TEXT.replace('"one"', '"../one"'), "'../one' is to be the name of a file, without a folder"),
        (TEXT.replace('"one"', '".."'), "'..' is to be the name of a file"),
        (TEXT.replace("1.0", "-1.0"), "add up to 1, got sums [-1.0, -1.0]"),
        ((TEXT + TEXT[TEXT.index("[[text") :]).replace("1.0", "0.5"), "two sources are called 'one'"),
    ],
)
def test_sources_that_cannot_be_are_named_before_anything_is_read(tmp_path, capsys, text, told):
    (tmp_path / "r.toml").write_text(text)
    assert main(["train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "x")]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("like", "told"),
    [
        ('"r"', "are like each other in a circle: r -> r"),
        ('"s"', "are like each other in a circle: r -> s -> r"),
        ("3", "like must be the name of a recipe in"),
        ('"../r"', "like must be the name of a recipe in"),
        ('"t"', "cannot read recipe"),
    ],
)
def test_recipes_that_are_like_themselves_or_nothing(tmp_path, capsys, like, told):
    (tmp_path / "r.toml").write_text(f"like = {like}\n")
    (tmp_path / "s.toml").write_text('like = "r"\n')
    assert main(["train", str(tmp_path / "r.toml"), "--out", str(tmp_path / "x")]) == 1
    assert told in capsys.readouterr().err


def test_places_devices_and_times_that_cannot_be(home, tmp_path, capsys):
    tiny = str(home / "tiny.toml")
    (tmp_path / "file").write_text("")
    for arguments, told in (
        (["train", tiny, "--out", str(tmp_path / "file")], "File exists"),
        (["train", tiny, "--out", "/proc/nothing"], "/proc/nothing: No such file or directory"),
        (["train", tiny, "--out", str(tmp_path / "x"), "--device", "foo"], "device 'foo' cannot be used here"),
        (["compare", "lm-mini", "--csv", "/proc/nothing/t.csv"], "non-existent directory: '/proc/nothing'"),
        (["match", "lm-mini", "af", "--set", "heads=3"], "config has no field 'heads' to set, did you mean"),
        (["match", "lm-mini", "af", "--step", "0"], "step must be at least 1, got 0"),
        (["train", "nothing", "--out", str(tmp_path / "x")], "the zoo has no recipe 'nothing'. It has: "),
    ):
        assert main(arguments) == 1
        assert told in capsys.readouterr().err
    for minutes in ("-3", "nan", "0"):
        with pytest.raises(SystemExit):
            main(["train", tiny, "--out", str(tmp_path / "x"), "--minutes", minutes])
        assert "argument --minutes" in capsys.readouterr().err


def test_what_no_measurement_reads_is_refused_and_every_one_asked_for_is_made(home, capsys, monkeypatch):
    made: list[str] = []
    for name in ("evaluate_copying", "evaluate_context", "evaluate_generation"):
        monkeypatch.setattr(f"mambascope.training.measure.{name}", lambda *_, n=name, **__: made.append(n))
    for name in ("evaluate_text_tasks", "evaluate_task", "evaluate_text"):
        monkeypatch.setattr(f"mambascope.training.export.{name}", lambda *_, n=name, **__: made.append(n))
    task, text = (["evaluate", "x", "--dry", "--folder", str(home / f / "model")] for f in "ab")
    assert main([*text, "--copying", "--text-tasks", str(home), "--generation", "--context"]) == 0
    assert made == ["evaluate_copying", "evaluate_context", "evaluate_generation", "evaluate_text_tasks"]
    made.clear()
    assert (main(task), main(text), main([*task, "--lengths", "8"])) == (0, 0, 0)
    assert made == ["evaluate_task", "evaluate_text", "evaluate_task"]
    made.clear()
    capsys.readouterr()
    for arguments, told in (
        ([*text, "--long-answers"], "--long-answers is for --text-tasks FOLDER"),
        ([*text, "--lengths", "8"], "--lengths and --sequences are for the task"),
        ([*task, "--copying", "--sequences", "8"], "--lengths and --sequences are for the task"),
    ):
        assert main(arguments) == 1
        assert told in capsys.readouterr().err
    assert not made


def test_a_negative_seed_is_named(home, capsys):
    arguments = [
        "evaluate",
        "tiny",
        "--dry",
        "--folder",
        str(home / "a" / "model"),
        "--lengths",
        "8",
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--seed", "-4"]) == 1
    assert "a seed is an integer ≥ 0, or a tuple of such, got (-4, 8, 0)" in capsys.readouterr().err


def test_models_of_one_name_are_compared_by_their_folders(home, tmp_path, capsys):
    one, two = home / "a" / "model", tmp_path / "two"
    shutil.copytree(one, two)
    card = json.loads((two / "card.json").read_text()) | {"parameters": 7}
    (two / "card.json").write_text(json.dumps(card))
    assert main(["compare", str(one), str(two), str(home / "b" / "model"), "--csv", str(tmp_path / "t.csv")]) == 0
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0] == f"what,{one},{two},tiny-lm"
    assert lines[1].split(",")[2] == "7"
    assert main(["compare", str(one), str(one)]) == 1
    assert "the models to compare must differ" in capsys.readouterr().err


def test_a_damaged_folder_is_named_by_its_file_and_exports_nothing(home, tmp_path, capsys):
    for name, damage, told in (
        ("epochs.json", None, "epochs.json: No such file"),
        ("epochs.json", "{}", "epochs.json is damaged: it lacks epochs, sources"),
        ("checkpoints/step-00000004/progress.json", "{", "progress.json is damaged: Expecting"),
        ("checkpoints/step-00000004/progress.json", "[]", "progress.json is damaged: it lacks everything"),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(home / "b", tmp_path / "run")
        (tmp_path / "run" / name).unlink() if damage is None else (tmp_path / "run" / name).write_text(damage)
        assert main(["export", "--out", str(tmp_path / "run"), "--to", str(tmp_path / "to")]) == 1
        assert told in capsys.readouterr().err
        assert not (tmp_path / "to").exists()
    (tmp_path / "run" / "data" / "prepared.json").write_text("{")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    text = ["train", str(home / "text.toml"), "--data", str(home), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main(text) == 1
    assert "prepared.json is damaged" in capsys.readouterr().err
    for card, told in (
        ("{}", "lacks name, summary"),
        ('{"recipe": []}', "lacks name"),
        ("[]", "must be a JSON object"),
    ):
        (tmp_path / "run" / "model" / "card.json").write_text(card)
        for command in (["compare"], ["evaluate", "x", "--dry", "--folder"]):
            assert main([*command, str(tmp_path / "run" / "model")]) == 1
            assert told in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_control_c_is_one_line_and_the_training_goes_on(home, tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", str(home / "tiny.toml"), "--out", str(out), "--device", "cpu", "--set", "train.steps=100000"]
    command = [sys.executable, "-m", "mambascope.zoo", *train]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "interrupted; the last checkpoint stays: go on with --resume\n")
    assert main([*train, "--resume", "--minutes", "0.00001"]) == 0
    assert "resumed at step" in capsys.readouterr().out

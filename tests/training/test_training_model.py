"""The whole line on a real, tiny Mamba: text -> tokens -> training -> resume -> model folder -> bits per byte."""

import errno
import json
import lzma
import math
import os
import random
import re

import pytest
import torch

from mambascope.analyses.tasks import InductionHeads, evaluate
from mambascope.errors import InputError
from mambascope.loading import load
from mambascope.training.build import train_recipe
from mambascope.training.command import main, recipe_for
from mambascope.training.export import evaluate_text_tasks, export_model
from mambascope.training.recipe import load_recipe
from mambascope.training.sampler import Batch
from mambascope.training.task_batches import TaskBatches
from mambascope.zoo.card import read_card

RECIPE = """
name = "tiny-lm"
description = "A test"
licence = "Apache-2.0"
seed = 4
store = "bf16"
[model]
d_model = 16
n_layers = 2
d_vocab = 300
d_state = 4
bos_token_id = 0
eos_token_id = 0
[train]
steps = 30
batch = 4
length = 32
lr = 1e-2
warmup = 3
weight_decay = 0.1
log_every = 5
checkpoint_every = 10
evaluate_every = 10
[text]
vocabulary = 300
held_out = 0.1
[[text.sources]]
name = "fox"
file = "sub/fox.txt.xz"
share = [0.9, 0.1]
licence = "CC0"
origin = "made up"
[[text.sources]]
name = "sum"
file = "sum.txt"
share = [0.1, 0.9]
licence = "CC0"
origin = "made up, too"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the recipe and its data."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "sub").mkdir()
    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps"]
    fox = "".join(" ".join(rng.choices(words, k=9)) + ".\n" for _ in range(300))
    (folder / "sub" / "fox.txt.xz").write_bytes(lzma.compress((fox + "<|endoftext|>\n" + fox[:999]).encode()))
    pairs = [(rng.randrange(10), rng.randrange(10)) for _ in range(900)]
    (folder / "sum.txt").write_text("".join(f"{a} + {b} = {a + b}\n" for a, b in pairs))
    (folder / "tiny.toml").write_text(RECIPE)
    (folder / "wikitext-2").mkdir()
    (folder / "wikitext-2" / "valid.txt.xz").write_bytes(lzma.compress(fox[:1500].encode()))
    return folder


def quiet(_: str) -> None:
    return None


def test_training_stops_resumes_and_learns(home, tmp_path):
    recipe = load_recipe(home / "tiny.toml")
    whole, straight = train_recipe(recipe, tmp_path / "a", data=[home], report=quiet)
    assert straight.finished
    assert straight.rows[-1]["loss"] < straight.rows[0]["loss"] - 0.5
    watched = {"induction_first", "induction_second", "induction_gain", "prefix_matching", "in_context"}
    assert set(straight.evaluations[-1]) == {"step", "fox", "sum", "state_norm_0", "state_norm_1"} | watched
    assert all(math.isfinite(value) for value in straight.evaluations[-1].values())
    stopped = train_recipe(recipe, tmp_path / "b", data=[home], report=quiet, minutes=0.0)[1]
    assert stopped.step == 5
    again, resumed = train_recipe(recipe, tmp_path / "b", data=[home], report=quiet, resume=True)
    assert [row["loss"] for row in resumed.rows] == [row["loss"] for row in straight.rows]
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_from_command_line_to_a_model_that_loads(home, tmp_path, capsys):
    tiny, out = str(home / "tiny.toml"), str(tmp_path / "run")
    assert main(["prepare", tiny, "--data", str(home), "--out", str(tmp_path / "data")]) == 0
    assert main(["train", tiny, "--data", str(tmp_path / "data"), "--out", out, "--device", "cpu"]) == 0
    folder = tmp_path / "run" / "model"
    model = load(folder)
    assert next(model.parameters()).dtype == torch.float32
    assert model.cfg.name == "tiny-lm"
    assert model.blocks[0].mixer.A_log.dtype == torch.float32
    arguments = ["evaluate", "tiny-lm", "--folder", str(folder), "--data", str(home), "--device", "cpu"]
    assert main(arguments) == 0
    card = read_card(folder)
    assert 1.0 < card["evaluations"]["WikiText-2 validation"]["bits_per_byte"] < 4.5
    assert (
        f"bits per byte {card['evaluations']['WikiText-2 validation']['bits_per_byte']:.4f}" in capsys.readouterr().out
    )
    assert [source["name"] for source in card["sources"]] == ["fox", "sum"]
    trained = sum(s["epochs"] * 0.9 * s["tokens"] for s in card["sources"])  # the rest is held out
    assert trained == pytest.approx(30 * 4 * 32, rel=0.02)
    assert card["training"]["tokens_seen"] == 30 * 4 * 32
    shares = card["training"]["held_out_windows_of_13_tokens_also_trained_on"]
    assert re.fullmatch(r"fox [\d.]+%, sum [\d.]+%, wikitext-2/valid.txt.xz 99.\d\d%", shares), "it was cut from fox"
    assert card["licence"] == "Apache-2.0"
    text = (folder / "card.md").read_text()
    assert text.startswith("# tiny-lm")
    assert "made up, too" in text
    assert "bits per byte" in text


def test_an_exported_model_lies_in_files_of_bounded_size(home, tmp_path, monkeypatch):
    train_recipe(recipe_for(str(home / "tiny.toml"), ["train.steps=5"]), tmp_path / "run", data=[home], report=quiet)
    whole = load(export_model(tmp_path / "run", tmp_path / "whole"))
    assert [f.name for f in (tmp_path / "whole").glob("*.safetensors")] == ["model.safetensors"]
    limit = (tmp_path / "whole" / "model.safetensors").stat().st_size * 2 // 3
    monkeypatch.setattr("mambascope.training.export.SHARD_BYTES", limit)
    parts = load(export_model(tmp_path / "run", tmp_path / "parts"))
    sizes = [f.stat().st_size for f in (tmp_path / "parts").glob("model-*-of-*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) <= limit + 8192, "the header comes on top"
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value), name


def test_text_tasks_go_into_the_card(home, tmp_path, capsys):
    train_recipe(recipe_for(str(home / "tiny.toml"), ["train.steps=5"]), tmp_path / "run", data=[home], report=quiet)
    folder = export_model(tmp_path / "run", tmp_path / "model")
    for name in ("simple", "nounpp", "within_rc"):
        line = {"clean_prefix": "the fox", "clean_answer": " jumps", "patch_answer": " dog"}
        (tmp_path / f"sva_{name}.json").write_text(f"{json.dumps(line)}\n{json.dumps(line | {'clean_answer': ' q'})}\n")
    (tmp_path / "known_1000.json").write_text('[{"prompt": "the fox", "attribute": "qqq"}]')
    chosen = ["sva_simple", "sva_nounpp", "known_facts"]
    evaluate_text_tasks(folder, tmp_path, names=chosen, device="cpu")
    assert "1 of 2 kept; 1 dropped: an answer is more than one token" in capsys.readouterr().out
    rows = read_card(folder)["evaluations"]["Text tasks, answers single tokens"]["rows"]
    found = [(row["task"], row["given"], row["kept"]) for row in rows]
    assert found == [("sva_simple", 2, 1), ("sva_nounpp", 2, 1), ("known_facts", 1, 0)]
    assert rows[2]["accuracy"] == ""
    evaluate_text_tasks(folder, tmp_path, names=chosen, single_tokens=False, device="cpu", write=False, report=quiet)
    arguments = ["evaluate", "tiny-lm", "--folder", str(folder), "--text-tasks", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 1
    assert "'ioi' reads ioi_pairs.csv" in capsys.readouterr().err


def test_a_full_disk_while_preparing_is_one_line(home, tmp_path, capsys, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["prepare", str(home / "tiny.toml"), "--data", str(home), "--out", str(tmp_path / "data")]) == 1
    assert "could not be written: No space left on device; make room" in capsys.readouterr().err
    monkeypatch.setattr("mambascope.training.build.write_bytes", lambda *_: None)
    assert main(["prepare", str(home / "tiny.toml"), "--data", str(home), "--out", str(tmp_path / "data")]) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".lock"], "no half file is left"


def test_prepared_data_of_other_sources_is_refused(home, tmp_path):
    recipe = recipe_for(str(home / "tiny.toml"))
    train_recipe(recipe, tmp_path / "a", data=[home], report=quiet, minutes=0.0)
    other = recipe_for(str(home / "tiny.toml"), ["text.vocabulary=310", "model.d_vocab=310"])
    with pytest.raises(InputError, match="prepared from other sources or another vocabulary"):
        train_recipe(other, tmp_path / "b", data=[tmp_path / "a" / "data"], report=quiet)


def test_induction_recipe_trains_through_the_command_line(tmp_path, capsys):
    changes = [f"train.{key}" for key in ("steps=6", "log_every=3", "checkpoint_every=3", "evaluate_every=6")]
    changes += ["train.length=24", "task.evaluate_lengths=[24, 48]", "task.evaluate_sequences=20"]
    sets = [word for change in changes for word in ("--set", change)]
    out = tmp_path / "run"
    assert main(["train", "induction-2l", "--out", str(out), "--device", "cpu", *sets]) == 0
    curve = json.loads((out / "curve.json").read_text())
    assert curve["rows"][-1]["step"] == 6
    assert curve["evaluations"][-1]["errors_48"] <= 20
    folder = str(out / "model")
    asked = ["--lengths", "16", "40", "--sequences", "30", "10"]
    assert main(["evaluate", "induction-2l", "--folder", folder, *asked, "--device", "cpu"]) == 0
    rows = read_card(out / "model")["evaluations"]["Induction heads"]["rows"]
    assert [(row["length"], row["sequences"]) for row in rows] == [(16, 30), (40, 10)]
    model = load(folder)
    assert rows[0]["errors"] == evaluate(InductionHeads(), model, 16, 30, seed=1).errors
    assert [row["beyond_training"] for row in rows] == ["no", "yes"]
    assert main(["evaluate", "induction-2l", "--folder", folder, "--lengths", "16", "--sequences", "3", "4"]) == 1
    assert "--sequences wants one number or 1" in capsys.readouterr().err


def test_the_answer_is_what_is_scored():
    recipe = recipe_for("induction-2l", ["train.length=12"])
    batches = TaskBatches(recipe.task.make(), recipe.train, recipe.seed)  # type: ignore[union-attr]
    batch: Batch = batches(7)
    assert batch.tokens.shape == (64, 12)
    assert batch.targets.shape == (64, 1)
    first = (batch.tokens == 15).int().argmax(1)
    assert torch.equal(batch.tokens[torch.arange(64), first + 1], batch.targets[:, 0])
    assert torch.equal(batch.tokens, batches(7).tokens)


def test_command_line_errors(tmp_path, capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "lm-mini" in out
    assert "induction-2l" in out
    assert "markov-width" in out
    for arguments, message in (
        (["train", "lm-mimi", "--out", str(tmp_path)], "did you mean 'lm-mini'"),
        (["train", "lm-mini", "--out", str(tmp_path / "x")], "'wikitext-2/train.txt.xz' was not found"),
        (["prepare", "induction-2l", "--out", str(tmp_path)], "there is no text to prepare"),
        (["export", "--out", str(tmp_path), "--to", str(tmp_path / "m")], "holds no checkpoint"),
        (["train", "induction-2l", "--out", str(tmp_path), "--set", "train.step=3"], "unknown key 'step'"),
        (["train", "induction-2l", "--out", str(tmp_path), "--set", "nothing"], "--set wants section.key=value"),
        (["evaluate", "tiny", "--folder", str(tmp_path)], "cannot read the model card"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_a_hybrid_is_trained_watched_and_evaluated_in_windows_of_its_length(home, tmp_path, capsys):
    out = tmp_path / "run"
    rival = ["--set", "name=tiny-hybrid", "--set", "model.pattern=ma", "--set", "model.n_heads=2"]
    more = ["--data", str(home), "--out", str(out), "--device", "cpu"]
    assert main(["train", str(home / "tiny.toml"), *more, *rival]) == 0
    folder = out / "model"
    assert load(folder).cfg.layers == "ma"
    assert main(["evaluate", "tiny-hybrid", "--folder", str(folder), "--data", str(home), "--device", "cpu"]) == 0
    values = read_card(folder)["evaluations"]["WikiText-2 validation"]
    assert values["context"].startswith("windows of 32 tokens, overlapping by half")
    assert 1.0 < values["bits_per_byte"] < 4.5
    assert not any("fresh_start" in key for key in values)

"""The command line: what it prints, what it writes, and one clean line for everything that it refuses."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import mambascope
from mambascope import cli
from mambascope.config import MambaConfig
from mambascope.loading import save_model
from mambascope.loading.tokenizer import Tokenizer
from mambascope.model import HookedMamba


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a token a byte, saved as a model folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    model = HookedMamba(MambaConfig(d_model=16, n_layers=2, d_vocab=256, name="tiny"), Tokenizer(backend))
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, path)
    return path


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> Callable[..., Done]:
    """Run ``main`` in an empty folder; ``{model}`` in an argument is the model folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", __import__("warnings").showwarning)  # main replaces it

    def call(*arguments: str, stdin: bytes | None = None) -> Done:
        monkeypatch.setattr(sys, "argv", ["mambascope", *(a.replace("{model}", str(folder)) for a in arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


def test_scope_prints_a_table_and_writes_a_page(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("scope", "The <b>[red]cat[/red]", "-m", "{model}")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith("tiny: 2 layers, 21 tokens, 5.5")
    assert lines[1].split() == ["at", "token", "loss", "delta", "state", "norm", "next"]
    tokens = [line.split()[1] for line in lines[2:23]]
    assert "".join(tokens) == "The·<b>[red]cat[/red]"  # nothing is taken for markup
    assert lines[2].split()[2] == "–"
    assert lines[-1] == "page: mambascope-the-b-red-cat-red.html"
    assert (tmp_path / "mambascope-the-b-red-cat-red.html").stat().st_size > 4_000_000


def test_out_file_stdin_and_json(run: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("\ufeffnaïve\n".encode())
    done = run("scope", "--file", "text.txt", "-m", "{model}", "--out", "a.html", "--json")
    assert done.code == 0
    assert done.err == "page: a.html\n"
    data = json.loads(done.out)
    assert "".join(t["text"] for t in data["tokens"][:2]) == "na"
    assert len(data["tokens"]) == 6  # a token a byte, no byte-order mark, no last line break
    assert (tmp_path / "a.html").exists()
    piped = run("scope", "-", "-m", "{model}", "--json", "--top", "2", stdin="naïve\r\n".encode())
    again = json.loads(piped.out)
    assert [t["id"] for t in again["tokens"]] == [t["id"] for t in data["tokens"]]
    assert len(again["tokens"][0]["next"]) == 2
    assert [p.name for p in tmp_path.glob("*.html")] == ["a.html"]  # --json alone writes no page


def test_long_texts(run: Callable[..., Done]) -> None:
    whole = json.loads(run("scope", "abc " * 50, "-m", "{model}", "--json").out)
    done = run("scope", "abc " * 50, "-m", "{model}", "--json", "--max-tokens", "30")
    part = json.loads(done.out)
    assert (part["about"]["tokens_before"], part["about"]["tokens"]) == (170, 30)
    assert part["tokens"][0]["position"] == 170
    for a, b in zip(part["tokens"], whole["tokens"][170:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["state_norm"] == pytest.approx(b["state_norm"], rel=1e-4)
    shown = run("scope", "abc " * 50, "-m", "{model}", "--out", "p.html").out
    assert "the last 64 of 200 tokens" in shown
    assert len(shown.splitlines()) == 2 + 64 + 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scope", "", "-m", "{model}"], "the text is empty"),
        (["scope"], "there is no text: give one, --file PATH, or '-' for standard input"),
        (["scope", "a", "--file", "b"], "give a text or --file, not both"),
        (["scope", "--file", "missing.txt"], "'missing.txt' cannot be read: No such file or directory"),
        (["scope", "--file", "."], "'.' cannot be read: Is a directory"),
        (["scope", "a", "-m", "mamba-130"], "did you mean 'mamba-130m'"),
        (["scope", "a", "-m", "{model}", "--backend", "gpu"], "--backend 'gpu' is unknown; known: auto,"),
        (["scope", "a", "-m", "{model}", "--device", "tpu9"], "device 'tpu9' cannot be used here"),
        (["scope", "a", "-m", "{model}", "--max-tokens", "0"], "max_tokens must be a positive integer, got 0"),
        (["scope", "a", "-m", "{model}", "--top", "0"], "top must be an integer from 1"),
        (["scope", "a", "-m", "{model}", "--out", "no/page.html"], "there is no folder 'no'"),
        (["scope", "a", "-m", "{model}", "--out", "."], "is a folder; give the page a file name"),
        (["scope", "lone \ud800", "-m", "{model}"], "lone surrogate"),
    ],
)
def test_refusals_are_one_line(run: Callable[..., Done], tmp_path: Path, arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("mambascope: ")
    assert done.err.count("\n") == 1
    assert words in done.err
    assert list(tmp_path.iterdir()) == []


def test_bytes_that_are_no_text(run: Callable[..., Done]) -> None:
    done = run("scope", "-", "-m", "{model}", stdin=b"ab\xff")
    assert (done.code, done.err) == (2, "mambascope: standard input is not UTF-8: byte 2 is 0xff; convert it first\n")


def test_nul_and_script_reach_the_page_harmless(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("scope", "-", "-m", "{model}", "--out", "p.html", stdin=b"a\0<script>alert(1)</script>")
    assert done.code == 0
    page = (tmp_path / "p.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert "\0" not in page
    assert "\0" not in done.out


def test_models_lists_every_name(run: Callable[..., Done]) -> None:
    done = run("models")
    assert done.code == 0
    names = [line.split()[0] for line in done.out.splitlines()[1:]]
    assert names == [info.name for info in mambascope.list_models()]


def test_warnings_are_one_line(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    run("models")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli._notice(UserWarning("first\nsecond"), UserWarning, "file", 1)
    assert run("models").code == 0
    assert cli._one_line("first\nsecond \ud800") == "first second \\ud800"


def test_file_names_come_from_the_text() -> None:
    assert cli._file_name("The cat, sat! on/the ../mat") == "mambascope-the-cat-sat-on-the.html"
    assert cli._file_name("日本 語") == "mambascope-日本-語.html"
    assert cli._file_name("\0 ../ !") == "mambascope.html"


def test_version_starts_at_once() -> None:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mambascope.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"mambascope {mambascope.__version__}\n"
    assert time.perf_counter() - start < 5  # torch alone would take most of that on a busy machine

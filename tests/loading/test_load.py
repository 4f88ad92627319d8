"""``mambascope.load`` as a user calls it: names, devices, types, tokenizers, and every kind of bad folder."""

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    TINY,
    authors_config,
    random_weights,
    small_bpe,
    to_theirs,
    transformers_config,
    write_checkpoint,
    write_json,
    write_pickle,
    write_safetensors,
)
from fake_hub import FakeHub

import mambascope as ms
from mambascope.config import MambaConfig
from mambascope.errors import BackendError, ConfigError, InputError, LoadError, UnknownNameError
from mambascope.loading import registry, save_model
from mambascope.loading.names import parameter_shapes
from mambascope.loading.tokenizer import Tokenizer

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def load(name: Any, **options: Any) -> ms.HookedMamba:
    """Loading without a warning, on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ms.load(name, **({"device": "cpu"} | options))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", refuse)


# ---- what comes back -------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_network")
def test_a_folder(folder: Path) -> None:
    model = load(folder)
    weights = random_weights(TINY)
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]), name
        assert p.requires_grad, name
        assert p.device.type == "cpu", name
    assert model.unembed.weight is model.embed.weight
    assert not model.training
    assert model.cfg.name == "tiny"
    assert model.cfg.n_tokens == 277 < model.cfg.d_vocab  # what the tokenizer knows
    assert model(IDS).shape == (1, 8, 300)
    assert model("the cat sat").shape == (1, 3, 300)
    assert torch.equal(model(IDS), load(str(folder))(IDS))


def test_loading_draws_no_random_numbers_and_leaves_nothing_hollow(folder: Path) -> None:
    before = torch.get_rng_state()
    model = load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    again = ms.HookedMamba(model.cfg)  # building as usual is not affected
    assert float(again.embed.weight.detach().std()) > 0


def test_loading_does_not_import_a_computer_algebra_system(folder: Path) -> None:
    """torch's meta device does so on first use, which costs two seconds."""
    code = f"import sys, mambascope as ms; ms.load({str(folder)!r}, device='cpu'); print('sympy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_relative_and_home_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in ("tiny", "./tiny", "~/tiny", Path("tiny"), "../" + folder.parent.name + "/tiny"):
        assert load(name).cfg.name == "tiny"
    monkeypatch.chdir(folder)
    assert load(".").cfg.name == "tiny"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, "float16", "bfloat16", "torch.float32"])
def test_dtype(folder: Path, dtype: Any) -> None:
    model = load(folder, dtype=dtype)
    want = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    assert model.dtype == want
    for name, p in model.named_parameters():
        half = want in (torch.bfloat16, torch.float16)
        assert p.dtype == (torch.float32 if half and name.endswith(("A_log", "mixer.D")) else want), name
    assert torch.isfinite(model(IDS)).all()


def test_stored_dtype_and_default(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    write_safetensors(tmp_path, {to_theirs(n): t.bfloat16() for n, t in random_weights(TINY).items()})
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_backend(folder: Path, backend: Any) -> None:
    model = load(folder, backend=backend)
    assert model.backend == backend
    model(IDS)
    assert {path.backend for path in model.explain_path()} == {backend}


def test_authors_format_and_its_padding(tmp_path: Path) -> None:
    cfg = dataclasses.replace(TINY, d_vocab=304, n_tokens=299, d_inner=12)
    weights = random_weights(cfg)
    theirs = {to_theirs(n, embedding="embedding"): t for n, t in weights.items()}
    write_pickle(tmp_path, theirs | {"lm_head.weight": weights["embed.weight"]})
    write_json(tmp_path / "config.json", authors_config(cfg))
    model = load(tmp_path, tokenizer=False)
    assert (model.cfg.d_vocab, model.cfg.n_tokens) == (304, 299)
    assert model.tokenizer is None
    assert torch.equal(model.W_E, weights["embed.weight"])


# ---- tokenizers ------------------------------------------------------------------------------------


def test_bos_habit_of_the_tokenizer_becomes_the_models_default(folder: Path) -> None:
    from tokenizers import processors

    backend = small_bpe(special=("<s>", "</s>"))
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    model = load(folder)
    assert (model.cfg.bos_token_id, model.cfg.eos_token_id, model.cfg.prepend_bos) == (0, 1, True)
    assert model.to_tokens("the cat")[0, 0] == 0
    (folder / "tokenizer_config.json").unlink()
    assert not load(folder).cfg.prepend_bos  # nothing says which token it is


def test_every_way_to_give_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "words"
    other.mkdir()
    Tokenizer(small_bpe(vocab_size=270)).save(other)
    (folder / "tokenizer.json").unlink()
    for way in (other, str(other), other / "tokenizer.json", Tokenizer(small_bpe(vocab_size=270))):
        assert load(folder, tokenizer=way).cfg.n_tokens == 270
    assert load(folder, tokenizer=False).cfg.n_tokens == 300
    with pytest.raises(InputError, match=r"model 'tiny' has no tokenizer"):
        load(folder, tokenizer=False)("text")
    with pytest.raises(LoadError, match=r"has no tokenizer\.json.*tokenizer=False"):
        load(folder)
    with pytest.raises(LoadError, match=r"tokenizer='nowhere' is neither a folder"):
        load(folder, tokenizer="nowhere")
    with pytest.raises(InputError, match=r"tokenizer=5: expected a folder"):
        load(folder, tokenizer=5)


def test_tokenizer_and_model_that_do_not_fit(folder: Path) -> None:
    wide = Tokenizer(small_bpe())
    wide.backend.add_tokens([f"<{i}>" for i in range(60)])
    with pytest.warns(UserWarning, match=r"ids up to 336, but 'tiny' has 300 embeddings"):
        ms.load(folder, tokenizer=Tokenizer(wide.backend))
    write_json(folder / "config.json", transformers_config(TINY, bos_token_id=290))
    with pytest.raises(LoadError, match=r"bos_token_id=290 of 'tiny' is not in its tokenizer of 277 tokens"):
        load(folder)


# ---- names -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_network")
def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match=r"no model is called 'mamba-13m', did you mean 'mamba-130m'"):
        load("mamba-13m")
    for name in ("./nowhere", "a/b/c", "x" * 5000, "~nobody/x/y", "C:\\models"):
        with pytest.raises(UnknownNameError, match=r"no model is called"):
            load(name)
    for name in ("", "a\0b", b"x", 5):
        with pytest.raises(InputError, match=r"a model's name is a text or a path"):
            load(name)
    with pytest.raises(LoadError, match=r"the folder .*nowhere.* cannot be opened"):
        load(Path("nowhere"))


@pytest.mark.usefixtures("no_network")
def test_embedded_models_load_without_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo = folder.parent / "zoo"
    model = load(folder)
    save_model(model, zoo / "lm-test", card={"licence": "CC0"})
    monkeypatch.setattr(registry, "_zoo", lambda: zoo)
    again = load("lm-test")
    assert torch.equal(again(IDS), model(IDS))
    assert again.cfg == model.cfg
    assert [info.name for info in ms.list_models() if info.embedded] == ["lm-test"]
    with pytest.raises(InputError, match=r"revision='v1' is for hub models, but 'lm-test' is on this machine"):
        load("lm-test", revision="v1")
    monkeypatch.chdir(folder.parent)
    os.rename(folder, "lm-test")
    with pytest.warns(UserWarning, match=r"'lm-test' names a known model; .* needs '\./lm-test'"):
        ms.load("lm-test", device="cpu")
    assert load("./lm-test").cfg.name == "lm-test"


def test_folders_do_not_take_a_revision(folder: Path) -> None:
    with pytest.raises(InputError, match=r"revision='main' is for hub models"):
        load(folder, revision="main")


def test_hub_id(hub: FakeHub) -> None:
    weights = write_checkpoint(hub.folder("me/tiny"))
    model = load("me/tiny")
    assert model.cfg.name == "me/tiny"
    assert torch.equal(model.W_E, weights["embed.weight"])
    hub.close()
    assert torch.equal(load("me/tiny", local_files_only=True)(IDS), model(IDS))


def test_official_alias_takes_its_tokenizer_from_the_neox_repository(hub: FakeHub) -> None:
    served = hub.folder("state-spaces/mamba-130m")
    cfg = dataclasses.replace(TINY, d_vocab=304, n_tokens=300, d_inner=12)
    write_pickle(served, {to_theirs(n, embedding="embedding"): t for n, t in random_weights(cfg).items()})
    write_json(served / "config.json", authors_config(cfg))
    small_bpe().save(str(hub.folder("EleutherAI/gpt-neox-20b") / "tokenizer.json"))
    model = load("mamba-130m")
    assert model.cfg.name == "mamba-130m"
    assert (model.cfg.n_tokens, model.cfg.bos_token_id, model.cfg.prepend_bos) == (300, 0, False)
    assert model("the cat").shape[1] == 2
    assert {name for name in hub.files() if "130m" not in name} == {"EleutherAI/gpt-neox-20b/tokenizer.json"}
    assert load("state-spaces/mamba-130m").tokenizer is not None


# ---- bad folders and arguments ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["float8", "int8", torch.int64, 32, "torch.complex64"])
def test_dtypes_that_are_not_supported(folder: Path, bad: Any) -> None:
    with pytest.raises(InputError, match=r"dtype .* is not supported; use one of float32"):
        load(folder, dtype=bad)


@pytest.mark.usefixtures("no_network")
def test_backends_that_cannot_run_are_refused_before_the_network(folder: Path) -> None:
    for name in (folder, "mamba-130m"):
        with pytest.raises(BackendError, match="nope"):
            load(name, backend="nope")
        with pytest.raises(BackendError, match="triton"):
            load(name, backend="triton", dtype="float64")


@pytest.mark.parametrize("bad", ["cuda:99", "gpu", 5.0, "meta"])
def test_devices_that_are_not_there(folder: Path, bad: Any) -> None:
    with pytest.raises(InputError, match=rf"device '?{bad}'? (cannot be used here .*use 'cpu'|holds no weights)"):
        load(folder, device=bad)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(LoadError, match=r"has no config\.json"):
        load(empty)
    with pytest.raises(LoadError, match=r"is a file; give the folder"):
        load(folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "mamba2", "hidden_size": 4})
    with pytest.raises(ConfigError, match=r"config\.json of 'tiny': model_type 'mamba2' is Mamba-2"):
        load(folder)


def test_a_config_that_lies(folder: Path) -> None:
    write_checkpoint(folder)
    text = (folder / "config.json").read_text().replace('"state_size": 3', '"state_size": 4')
    (folder / "config.json").write_text(text)
    with pytest.raises(LoadError, match=r"'backbone\.layers\.0\.mixer\.x_proj\.weight'.*\(8, 10\).*\(10, 10\)"):
        load(folder)


def test_not_finite_weights_are_warned_of(folder: Path) -> None:
    weights = random_weights(TINY)
    weights["blocks.0.mixer.D"][0] = float("inf")
    write_safetensors(folder, {to_theirs(n): t for n, t in weights.items()})
    with pytest.warns(UserWarning, match=r"1 of 10 values of 'blocks\.0\.mixer\.D'"):
        ms.load(folder, device="cpu")


@pytest.mark.parametrize("seed", range(3))
def test_shapes_of_every_option(tmp_path: Path, seed: int) -> None:
    """Loading relies on parameter_shapes: it must agree with the model for any config."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=g))]

    cfg = MambaConfig(
        d_model=pick(1, 5, 16), n_layers=pick(1, 3), d_vocab=pick(7, 40), d_inner=pick(1, 9), d_state=pick(1, 7, 33),
        d_conv=pick(1, 2, 8), dt_rank=pick(1, 4), conv_bias=pick(True, False), proj_bias=pick(True, False),
        tie_embeddings=pick(True, False), mixer_norm_eps=pick(None, 1e-6),
    )  # fmt: skip
    write_checkpoint(tmp_path, cfg, tokenizer=False)
    model = load(tmp_path, tokenizer=False)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == parameter_shapes(cfg)

"""The tokenizer wrapper: what it gives, what it switches off, and what it refuses."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from checkpoints import small_bpe, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from mambascope.errors import InputError, LoadError
from mambascope.loading.tokenizer import Tokenizer

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(small_bpe(), eos_token=END)


def test_encode_and_decode(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.decode(ids) == "the cat sat"
    assert [tokenizer.token(i) for i in ids] == ["the", " cat", " sat"]
    assert tokenizer.encode_batch(["the cat", "", " sat"]) == [ids[:2], [], ids[2:]]
    assert tokenizer.decode_batch([ids[:2], []]) == ["the cat", ""]
    assert tokenizer.single_token(" cat") == ids[1]
    assert len(tokenizer) == tokenizer.vocab_size == tokenizer.backend.get_vocab_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 0)
    assert tokenizer.decode([0, ids[0]]) == END + "the"  # special tokens are spelled out
    assert tokenizer.encode(END + "the") == [0, ids[0]]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_round_trips(text: str) -> None:
    tokenizer = Tokenizer(_SHARED)
    assert tokenizer.decode(tokenizer.encode(text)) == text


_SHARED = small_bpe()


def test_nul_passes_and_surrogates_are_named(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\0b")) == "a\0b"
    with pytest.raises(InputError, match=r"character 2 is the lone surrogate '\\ud800'"):
        tokenizer.encode("ab\ud800c")
    with pytest.raises(InputError, match=r"text 1: character 0 is the lone surrogate"):
        tokenizer.encode_batch(["fine", "\udfff"])


@pytest.mark.parametrize("bad", [None, 5, b"bytes", ["a"]])
def test_no_text(tokenizer: Tokenizer, bad: Any) -> None:
    with pytest.raises(InputError, match=rf"expected a text, got {type(bad).__name__}"):
        tokenizer.encode(bad)


def test_batch_of_one_string_is_a_mistake(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"takes a list of texts"):
        tokenizer.encode_batch("text")


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40])
def test_ids_that_do_not_exist(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(InputError, match=rf"no token with id {bad}; its ids go from 0 to {tokenizer.vocab_size - 1}"):
        tokenizer.decode([0, bad])


@pytest.mark.parametrize("bad", [True, 1.0, "a"])
def test_ids_that_are_no_integers(tokenizer: Tokenizer, bad: Any) -> None:
    with pytest.raises(InputError, match=rf"integers, got {type(bad).__name__}"):
        tokenizer.decode([bad])


def test_single_token_names_the_pieces(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"'the cat' is 2 tokens, \['the', ' cat'\]"):
        tokenizer.single_token("the cat")
    with pytest.raises(InputError, match=r"'' is 0 tokens"):
        tokenizer.single_token("")


def test_truncation_padding_and_dropout_are_switched_off() -> None:
    backend = small_bpe()
    plain = Tokenizer(small_bpe()).encode("the cat sat on the mat")
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.model.dropout = 0.9  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"dropout.*switched off"):
        tokenizer = Tokenizer.from_bytes(backend.to_str().encode(), "here")
    assert tokenizer.encode("the cat sat on the mat") == plain
    assert len(plain) > 2
    assert tokenizer.encode_batch(["the", "the cat"])[0] == plain[:1]


def test_special_tokens_are_never_added_but_the_habit_is_known() -> None:
    backend = small_bpe(special=("<s>", END))
    assert not Tokenizer(backend, bos_token="<s>").adds_bos
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = Tokenizer(backend, bos_token="<s>", eos_token=END)
    assert tokenizer.adds_bos
    assert tokenizer.encode("the") == Tokenizer(small_bpe(special=("<s>", END))).encode("the")
    assert not Tokenizer(backend, eos_token=END).adds_bos  # no BOS is known, so there is nothing to prepend


# ---- folders ---------------------------------------------------------------------------------------


def folder_with(tmp_path: Path, **files: Any) -> Path:
    small_bpe(special=("<s>", END)).save(str(tmp_path / "tokenizer.json"))
    for stem, values in files.items():
        write_json(tmp_path / f"{stem}.json", values)
    return tmp_path


def test_bos_and_eos_from_the_folder(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path,
        special_tokens_map={"bos_token": END, "eos_token": {"content": END, "lstrip": False}},
        tokenizer_config={"bos_token": "<s>", "eos_token": None},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<s>", 0)  # tokenizer_config.json has the last word
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (END, 1)


def test_a_special_token_out_of_vocabulary_is_said_aloud(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"bos_token '<bos>'.*not in its vocabulary"):
        tokenizer = Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config={"bos_token": "<bos>"}))
    assert tokenizer.bos_token is None
    assert tokenizer.bos_token_id is None
    with pytest.raises(LoadError, match=r"eos_token '<eos>' is not in"):
        Tokenizer(small_bpe(), eos_token="<eos>")


def test_save_and_load(tmp_path: Path) -> None:
    first = Tokenizer(small_bpe(special=("<s>", END)), bos_token="<s>", eos_token=END)
    first.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Tokenizer.from_folder(tmp_path)
    assert repr(again) == repr(first)
    assert again.encode("the cat, ünïcode") == first.encode("the cat, ünïcode")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_no_tokenizer_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no tokenizer.json.*tokenizer=False"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"[" * 100_000, b'{"model": 5}', b"\xff\xfe", b"\x00" * 100, b'{"version": "1.0"}'],
)
def test_broken_tokenizer_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(LoadError, match=r"tokenizer.json in .* is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_truncated_tokenizer_file(tmp_path: Path) -> None:
    text = small_bpe().to_str()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(LoadError, match=r"is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_gaps_in_the_ids_count(tmp_path: Path) -> None:
    """The size is one more than the highest id, not the number of entries."""
    values = json.loads(small_bpe().to_str())
    values["added_tokens"].append(
        {"id": 999, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    )  # fmt: skip
    values["model"]["vocab"]["<far>"] = 999
    tokenizer = Tokenizer.from_bytes(json.dumps(values).encode(), "here")
    assert tokenizer.vocab_size == 1000 > tokenizer.backend.get_vocab_size()
    with pytest.raises(InputError, match=r"no token with id 998"):
        tokenizer.decode([998])

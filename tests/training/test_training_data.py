"""Text to tokens: reading, learning a BPE, encoding in pieces, token files."""

import json
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mambascope.errors import ConfigError, InputError, LoadError
from mambascope.training import data, overlap
from mambascope.training.overlap import shared_windows

TEXT = "The cat's 12 hats — naïve café; don't stop.\n\n  Indented line\t \n = Title = \n" * 40


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer([TEXT, "Ein zweiter Text über Bäume. " * 30], 320)


def test_bpe_has_separator_first_all_bytes_and_round_trips(tokenizer):
    assert tokenizer.token_to_id(data.SEPARATOR) == 0
    assert tokenizer.get_vocab_size() == 320
    for text in (TEXT, "\x00\x01 🐍 日本語 \r\n\t", " leading and trailing "):
        assert tokenizer.decode(data.encode(tokenizer, text).tolist()) == text
    assert len(data.encode(tokenizer, TEXT)) < 0.6 * len(TEXT.encode()), "merges were learned"


def test_the_same_text_gives_the_same_tokenizer(tokenizer):
    again = data.train_tokenizer([TEXT, "Ein zweiter Text über Bäume. " * 30], 320)
    assert again.to_str() == tokenizer.to_str()


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab ,.'\n\t 1é\u00a0=", max_size=80), size=st.integers(1, 9))
def test_pieces_encode_like_the_whole(tokenizer, text, size):
    parts = list(data.pieces(text, size))
    assert "".join(parts) == text
    joined = [i for part in parts for i in tokenizer.encode(part).ids]
    assert joined == tokenizer.encode(text).ids


def test_cutting_anywhere_would_not_encode_like_the_whole(tokenizer):
    text = "The cat The cat"
    cut = [i for part in (text[:2], text[2:]) for i in tokenizer.encode(part).ids]
    assert cut != tokenizer.encode(text).ids


def test_documents_are_split_at_separator_lines_only(tmp_path):
    path = tmp_path / "corpus.txt.xz"
    path.write_bytes(lzma.compress(b"one\ntwo <|endoftext|> stays\n<|endoftext|>\nthree\n<|endoftext|>\n"))
    assert data.read_documents(path) == ["one\ntwo <|endoftext|> stays\n", "three\n"]
    assert data.read_documents(path, (1, None)) == ["three\n"]
    with pytest.raises(InputError, match="has 2 documents; the slice 2:5"):
        data.read_documents(path, (2, 5))


def test_token_file_round_trip(tmp_path, tokenizer):
    documents = ["First document.\n", "Second: naïve café.\n"]
    file = data.write_tokens(tmp_path / "x.u16", tokenizer, documents, "abc")
    assert len(file) == len(file.ids) == file.header.tokens
    assert file.header.documents == 2
    assert file.header.source_sha256 == "abc"
    assert file.header.utf8_bytes == sum(len(d.encode()) for d in documents)
    ends = np.flatnonzero(file.ids == 0)
    assert ends[-1] == len(file) - 1
    assert tokenizer.decode(file.ids[: ends[0]].tolist()) == documents[0]
    assert tokenizer.decode(file.ids[ends[0] + 1 : -1].tolist()) == documents[1]
    assert isinstance(data.TokenFile(file.path).ids, np.memmap)


def test_damaged_files_are_named(tmp_path, tokenizer):
    file = data.write_tokens(tmp_path / "x.u16", tokenizer, ["some text\n"])
    (tmp_path / "x.u16").write_bytes(b"\x00\x00")
    with pytest.raises(LoadError, match=r"x\.u16 has 2 bytes, its header says"):
        data.TokenFile(file.path)
    (tmp_path / "x.json").write_text(json.dumps({"tokens": 1}))
    with pytest.raises(LoadError, match=r"x\.json is no header"):
        data.TokenFile(file.path)
    with pytest.raises(LoadError, match=r"cannot open token file .*none\.u16"):
        data.TokenFile(tmp_path / "none.u16")
    whole = lzma.compress(b"text " * 1000)
    (tmp_path / "cut.txt.xz").write_bytes(whole[:-20])
    with pytest.raises(LoadError, match="not a whole xz file"):
        data.read_text(tmp_path / "cut.txt.xz")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LoadError, match=r"not UTF-8 text: .* at byte 3"):
        data.read_text(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(LoadError, match="holds no text"):
        data.read_text(tmp_path / "empty.txt")
    with pytest.raises(LoadError, match=r"'a/b.txt' was not found; tried"):
        data.find_file("a/b.txt", [tmp_path])


def test_vocabularies_that_cannot_be(tokenizer):
    with pytest.raises(ConfigError, match="257 to 65,536"):
        data.train_tokenizer([TEXT], 256)
    with pytest.raises(InputError, match="give a vocabulary of"):
        data.train_tokenizer(["abc"], 400)


def test_shared_windows_by_hand():
    trained = np.arange(100, dtype=np.uint16)
    assert shared_windows(trained[20:40], [trained]) == 1.0
    assert shared_windows(trained[::-1], [trained]) == 0.0
    half = np.concatenate([trained[:20], trained[20:40][::-1]])  # 8 of its 28 windows of 13 lie in the first half
    assert shared_windows(half, [trained[50:], trained[:50]]) == pytest.approx(8 / 28)
    assert shared_windows(trained[:12], [trained]) == 0.0


def test_windows_across_pieces_are_found(monkeypatch):
    monkeypatch.setattr(overlap, "_PIECE", 7)
    trained = np.random.default_rng(0).integers(0, 50, 200).astype(np.uint16)
    assert shared_windows(trained[3:180], [trained]) == 1.0

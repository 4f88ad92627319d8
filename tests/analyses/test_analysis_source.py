"""What an analysis accepts as its source, and what it says of the rest."""

import pytest
import torch
from hand_built import byte_tokenizer, random_model
from torch import Tensor

from mambascope.analyses import predictions, read, state_norms
from mambascope.analyses.labels import short, token_labels, visible
from mambascope.errors import CacheError, InputError


def test_text_ids_cache_and_reading_are_the_same(speaking) -> None:
    text = "two words"
    ids = speaking.to_tokens(text)
    _, cache = speaking.run_with_cache(ids)
    _, plain = speaking.run_with_cache(ids)
    sources = [text, ids, ids[0], ids[0].tolist(), cache, plain.remove_batch_dim(), read(speaking, text)]
    norms = [state_norms(speaking, source) for source in sources]
    for other in norms[1:]:
        assert torch.equal(other.norm, norms[0].norm)
    assert norms[0].labels == tuple(text)


def test_a_row_of_a_batch(random, ids: Tensor) -> None:
    batch = torch.cat([ids, ids.flip(1)])
    _, cache = random.run_with_cache(batch)
    with pytest.raises(InputError, match="holds 2 rows; take one"):
        read(random, cache)
    row = read(random, cache.apply_slice_to_batch_dim(slice(1, 2)))
    assert torch.equal(row.tokens, ids.flip(1)[0])
    alone = state_norms(random, ids.flip(1)).norm
    assert torch.allclose(state_norms(random, row).norm, alone, rtol=1e-5)


def test_a_long_text_is_read_whole_and_shown_in_part(random, ids: Tensor) -> None:
    whole, tail = read(random, ids), read(random, ids, max_tokens=20)
    assert (tail.start, tail.length) == (55, 20)
    assert torch.allclose(state_norms(random, tail).norm, state_norms(random, whole).norm[:, 55:], rtol=1e-4)
    full, part = predictions(random, whole), predictions(random, tail)
    assert torch.allclose(part.loss, full.loss[55:], atol=1e-5)  # the first token shown has a loss as well
    assert part.table()["position"].tolist() == list(range(55, 75))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "the text is empty"),
        ([], "is empty"),
        (["a", "b"], "list of 2 texts"),
        (torch.zeros(2, 3, dtype=torch.long), r"shape \(2, 3\)"),
        (torch.zeros(1, 3), "integer ids"),
        ([True, False], "other things than integers"),
        (3.5, "got float"),
        (torch.tensor([[5, 999]]), "outside the vocabulary"),
        ("lone \ud800 surrogate", "surrogate"),
    ],
)
def test_bad_sources(speaking, source: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(speaking, source)


def test_foreign_caches_and_readings(random, ids: Tensor) -> None:
    other = random_model(seed=1)
    _, cache = other.run_with_cache(ids)
    with pytest.raises(CacheError, match="another model"):
        read(random, cache)
    with pytest.raises(CacheError, match="another model"):
        read(random, read(other, ids))
    resid = torch.zeros(1, 4, 16)
    _, cache = random.run_with_cache(resid, start_at_layer=1)
    with pytest.raises(CacheError, match="holds no tokens"):
        read(random, cache)
    with pytest.raises(InputError, match="max_tokens must be a positive integer, got 0"):
        read(random, ids, max_tokens=0)


def test_padded_rows_are_refused(speaking) -> None:
    _, cache = speaking.run_with_cache(["long text", "short"])
    with pytest.raises(InputError, match="padded"):
        read(speaking, cache.apply_slice_to_batch_dim(slice(1, 2)))
    assert read(speaking, cache.apply_slice_to_batch_dim(slice(0, 1))).length == 9


def test_everything_invisible_becomes_visible() -> None:
    assert visible("a b\n\t\0\x7f\u202e\u200b") == "a·b⏎⇥␀␡\\u202e\\u200b"
    assert visible("naïve 日本", spaces=False) == "naïve 日本"
    assert short("x" * 30, 10) == "x" * 9 + "…"
    tokenizer = byte_tokenizer()
    assert token_labels(random_model(tokenizer=tokenizer), tokenizer.encode("<b>")) == ("<", "b", ">")
    assert token_labels(random_model(), [3, 7]) == ("[3]", "[7]")

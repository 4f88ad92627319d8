"""Bits per byte against a count by hand."""

import math

import numpy as np
import pytest
import torch

from mambascope.errors import InputError
from mambascope.training.data import SEPARATOR, train_tokenizer
from mambascope.training.evaluate import bits_per_byte, held_out_losses

TEXT = "naïve words, and the same words again: naïve words.\n" * 30


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 270)


def by_hand(model, tokenizer, text):
    """One token at a time: -log2 p(token | separator and all before), summed, over the bytes."""
    ids = [tokenizer.token_to_id(SEPARATOR), *tokenizer.encode(text).ids]
    bits = 0.0
    for t in range(1, len(ids)):
        p = torch.softmax(model(torch.tensor([ids[:t]]))[0, -1].double(), -1)[ids[t]]
        bits -= math.log2(p.item())
    return bits / len(text.encode("utf-8"))


def test_bits_per_byte_equal_a_hand_count(tiny, tokenizer):
    model, text = tiny(vocabulary=270), TEXT[:200]
    hand = by_hand(model, tokenizer, text)
    for piece in (1, 7, 64, 4096):
        found = bits_per_byte(model, tokenizer, text, piece=piece)
        assert found.bits_per_byte == pytest.approx(hand, rel=1e-5), "pieces carry the state"
    assert found.utf8_bytes == len(text.encode()) != len(text)
    assert found.words == len(text.split())
    assert found.word_perplexity == pytest.approx(2 ** (hand * found.utf8_bytes / found.words), rel=1e-4)


def test_resetting_the_context_changes_the_number(tiny, tokenizer):
    model = tiny(vocabulary=270)
    carried = bits_per_byte(model, tokenizer, TEXT, piece=16)
    reset = bits_per_byte(model, tokenizer, TEXT, piece=16, reset_every=16)
    assert carried.tokens == reset.tokens
    assert carried.nats != reset.nats
    with pytest.raises(InputError, match="multiple of piece"):
        bits_per_byte(model, tokenizer, TEXT, piece=16, reset_every=40)


def test_a_uniform_model_needs_log2_of_its_vocabulary(tiny, tokenizer):
    model = tiny(vocabulary=270)
    torch.nn.init.zeros_(model.embed.weight)
    found = bits_per_byte(model, tokenizer, TEXT)
    assert found.bits_per_byte == pytest.approx(math.log2(270) * found.tokens / found.utf8_bytes, rel=1e-6)


def test_nothing_to_measure(tiny, tokenizer):
    with pytest.raises(InputError, match="empty"):
        bits_per_byte(tiny(vocabulary=270), tokenizer, "")


def test_held_out_losses(tiny):
    model = tiny()
    torch.nn.init.zeros_(model.embed.weight)
    ids = np.arange(100, dtype=np.uint16) % 16
    assert held_out_losses({"x": ids}, length=9, windows=5, batch=2)(model) == {"x": pytest.approx(math.log(16))}
    with pytest.raises(InputError, match="'x' has 100 tokens, fewer than one window of 100"):
        held_out_losses({"x": ids}, length=100, windows=5, batch=2)


def test_windows_score_every_token_once_with_half_a_window_before_it(tiny, tokenizer):
    model, text, window = tiny(vocabulary=270), TEXT[:130], 10
    ids = [tokenizer.token_to_id(SEPARATOR), *tokenizer.encode(text).ids]
    nats = 0.0
    for t in range(1, len(ids)):
        first = max(0, (t - 1) // 5 * 5 - 5)  # where the window begins in whose second half token t stands
        logits = model(torch.tensor([ids[first:t]]))[0, -1].double()
        nats -= torch.log_softmax(logits, -1)[ids[t]].item()
    found = bits_per_byte(model, tokenizer, text, window=window)
    assert found.tokens == len(ids) - 1
    assert found.nats == pytest.approx(nats, rel=1e-5)
    whole = bits_per_byte(model, tokenizer, text, window=2 * len(ids))
    assert whole.nats == pytest.approx(bits_per_byte(model, tokenizer, text).nats, rel=1e-5)
    for wrong in ({"window": 7}, {"window": 8, "reset_every": 2048}):
        with pytest.raises(InputError, match="window must be an even number"):
            bits_per_byte(model, tokenizer, text, **wrong)

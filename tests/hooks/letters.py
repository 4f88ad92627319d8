"""A tokenizer with one token a letter, for tests that need text."""

import tokenizers

from mambascope.loading.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOP"
BOS, END = "<s>", "<end>"


def letter_tokenizer() -> Tokenizer:
    """Ids 0…42 for LETTERS, 43 for BOS, 44 for END."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)} | {BOS: len(LETTERS), END: len(LETTERS) + 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=END))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("[\\s\\S]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, bos_token=BOS, eos_token=END)

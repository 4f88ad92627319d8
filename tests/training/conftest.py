"""A language model of twenty lines with HookedMamba's calling convention, to test the trainer apart from Mamba."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class TinyRecurrent(nn.Module):
    """Embedding, one GRU, tied head; carries its state like HookedMamba."""

    def __init__(self, vocabulary: int = 16, width: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocabulary, width)
        self.mixer = nn.GRU(width, width, batch_first=True)
        self.unembed = nn.Linear(width, vocabulary, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        return_type: str = "logits",
        logits_to_keep: int | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
    ):
        assert return_type == "logits"
        hidden, state = self.mixer(self.embed(tokens), state)
        logits = self.unembed(hidden if logits_to_keep is None else hidden[:, -logits_to_keep:])
        return (logits, state) if return_state else logits


@pytest.fixture
def tiny() -> Callable[..., TinyRecurrent]:
    return TinyRecurrent

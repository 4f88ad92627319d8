"""Models for the analyses."""

import pytest
import torch
from hand_built import byte_tokenizer, random_model, recall_model

from mambascope.model import HookedMamba


@pytest.fixture(scope="session")
def random() -> HookedMamba:
    return random_model()


@pytest.fixture(scope="session")
def speaking() -> HookedMamba:
    return random_model(tokenizer=byte_tokenizer())


@pytest.fixture(scope="session")
def recall() -> HookedMamba:
    return recall_model()


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(0, 40, (1, 75), generator=torch.Generator().manual_seed(3))

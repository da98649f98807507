"""Fixtures of the unit tests."""

import pytest

from mlx_training.data.tokenizer import Tokenizer, train_bpe

TEXTS = ["what is the trend of the series? up down", "it has mean 0.1 and std 2.3: Answer: yes no"] * 4


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE of 300 ids."""
    return train_bpe(TEXTS, 300, tmp_path_factory.mktemp("tokenizer"))

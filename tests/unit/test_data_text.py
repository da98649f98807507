"""Text windows for decoders."""

from pathlib import Path

import numpy as np
import pytest

from mlx_training.data.batching import Batches
from mlx_training.data.text import TextWindows, encode_documents, read_documents, split_documents
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError


def test_documents_are_closed_by_eos(tiny_tokenizer: Tokenizer) -> None:
    bos, eos = tiny_tokenizer.bos_id, tiny_tokenizer.eos_id
    stream = encode_documents(["up", "down"], tiny_tokenizer)
    assert stream.tolist() == [bos, *tiny_tokenizer.encode("up"), eos, bos, *tiny_tokenizer.encode("down"), eos]


@pytest.mark.parametrize("size", [2, 10, 11, 12, 31])
def test_every_token_after_the_first_is_a_target_once(size: int) -> None:
    windows = TextWindows(np.arange(size, dtype=np.int32), context_length=10)
    batch = windows.collate(list(windows), range(len(windows)))
    assert batch.tokens.shape == (len(windows), 10) and batch.positions is None
    supervised = batch.mask > 0
    assert batch.targets[supervised].tolist() == list(range(1, size))
    assert batch.tokens[supervised].tolist() == list(range(size - 1))
    assert batch.lengths.tolist() == supervised.sum(1).tolist()


def test_windows_are_a_dataset_for_batches() -> None:
    windows = TextWindows(np.arange(100, dtype=np.int32), context_length=10)
    data = Batches(windows, lambda window: window, 4, 0, windows.collate)
    seen = np.concatenate([b.targets[b.mask > 0] for b in map(data.batch, range(data.num_batches))])
    assert sorted(seen.tolist()) == list(range(1, 100))


def test_splits_are_contiguous_and_share_nothing() -> None:
    documents = ["a" * 40, "b" * 45, "c" * 15]
    parts = split_documents(documents, {"validation": 0.1, "test": 0.2})
    assert {name: sum(map(len, part)) for name, part in parts.items()} == {"train": 70, "validation": 10, "test": 20}
    assert "".join(text for part in parts.values() for text in part) == "".join(documents)
    with pytest.raises(DataError, match="validation would hold 1 of 10 characters"):
        split_documents(["0123456789"], {"validation": 0.1})
    with pytest.raises(DataError, match="train would hold 0 of 10 characters"):
        split_documents(["0123456789"], {"validation": 1.5})


def test_reading_documents(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\n\nthree\n\n \n\n")
    (tmp_path / "a.txt").write_text("one")
    assert read_documents(tmp_path) == ["one", "two\n\nthree\n\n \n\n"]
    assert read_documents(tmp_path / "b.txt", separator="\n\n") == ["two", "three"]
    (tmp_path / "c.jsonl").write_text('{"story": "x"}\n{"story": "y"}\n')
    assert read_documents(tmp_path / "c.jsonl", text_column="story") == ["x", "y"]
    with pytest.raises(DataError, match="c.jsonl:1: no text in field 'text'; the fields are story"):
        read_documents(tmp_path / "c.jsonl")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="empty.txt: no text"):
        read_documents(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="no data file"):
        read_documents(tmp_path / "missing.txt")

"""The order of batches: seekable, complete, bucketed by length; the prefetch thread."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from mlx_training.data.batch import Batch
from mlx_training.data.batching import Batches, eval_batches
from mlx_training.errors import DataError

DATASET = [np.arange(n) for n in np.random.default_rng(0).integers(1, 60, 50)]


def collate(items: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
    lengths = np.array([item.size for item in items], np.int32)
    empty = np.zeros((len(items), int(lengths.max())), np.int32)
    return Batch(empty, empty, empty.astype(np.float32), lengths, rows=tuple(rows))


def batches(seed: int = 1, batch_size: int = 4, **options: object) -> Batches:
    return Batches(DATASET, lambda item: item, batch_size, seed, collate, **{"window": 3, **options})  # type: ignore[arg-type]


def test_a_batch_is_a_pure_function_of_seed_and_index() -> None:
    whole = batches()
    rows = [whole.batch(i).rows for i in range(2 * whole.num_batches)]
    for i in (20, 3, 25, 0, 12):
        assert batches(cache=False).batch(i).rows == rows[i]
    assert [batches(seed=2).batch(i).rows for i in range(13)] != rows[:13]


def test_every_row_comes_once_an_epoch_in_another_order() -> None:
    data = batches()
    assert data.num_batches == 13
    epochs = [[row for i in range(13) for row in data.batch(13 * epoch + i).rows] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1]


def test_batches_hold_rows_of_similar_length_in_no_order_of_length() -> None:
    def padding(data: Batches) -> float:
        chosen = [data.batch(i) for i in range(data.num_batches)]
        return 1 - sum(b.lengths.sum() for b in chosen) / sum(b.tokens.size for b in chosen)

    assert padding(batches(window=13)) < 0.08 < 0.25 < padding(batches(window=1))
    longest = [batches(window=13).batch(i).tokens.shape[1] for i in range(13)]
    assert longest != sorted(longest)


def test_rows_are_encoded_once_when_cached_and_afresh_when_not() -> None:
    for cache, expected in ((True, 50), (False, 100)):
        calls: list[int] = []
        data = Batches(DATASET, lambda item, calls=calls: calls.append(1) or item, 5, 0, collate, window=2, cache=cache)
        for i in range(20):
            data.batch(i)
        assert len(calls) == expected


def test_more_batch_than_data() -> None:
    with pytest.raises(DataError, match=r"batch_size 51 is larger than the training data \(50 rows\)"):
        batches(batch_size=51)


def test_prefetch_yields_the_same_batches() -> None:
    assert [b.rows for b in batches().prefetch(9, 16)] == [batches().batch(i).rows for i in range(9, 16)]


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batches"]


def test_prefetch_stops_when_the_consumer_does() -> None:
    stream = batches().prefetch(0)
    next(stream)
    assert prefetch_threads()
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < 2
    assert not prefetch_threads()


def test_prefetch_raises_what_the_thread_raised() -> None:
    def encode(item: np.ndarray) -> np.ndarray:
        if item.size == 59:
            raise DataError("row 59 is bad")
        return item

    stream = Batches([*DATASET, np.arange(59)], encode, 4, 0, collate, window=1).prefetch(0)
    with pytest.raises(DataError, match="row 59 is bad"):
        for _ in range(100):
            next(stream)
    assert not prefetch_threads()


def test_prefetch_hands_over_what_is_no_exception() -> None:
    class Panic(BaseException):
        """As a library in Rust raises it."""

    def encode(item: np.ndarray) -> np.ndarray:
        raise Panic

    with pytest.raises(Panic):
        next(Batches(DATASET, encode, 4, 0, collate).prefetch(0))


def test_evaluation_sees_every_row_once_by_length() -> None:
    chosen = list(eval_batches(DATASET, lambda item: item, 8, collate))
    assert [len(b.rows) for b in chosen] == [8] * 6 + [2]
    assert sorted(row for b in chosen for row in b.rows) == list(range(50))
    lengths = np.concatenate([b.lengths for b in chosen])
    assert (np.diff(lengths) >= 0).all()
    assert all(DATASET[row].size == length for b in chosen for row, length in zip(b.rows, b.lengths, strict=True))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_shares_of_processes_are_the_batch(size: int) -> None:
    """The last batch of an epoch has 2 rows: more processes than that are left without one, and count nothing."""

    def ones(items: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
        batch = collate(items, rows)
        return replace(batch, mask=np.ones_like(batch.mask))

    for index in range(13):
        whole, rows = batches().batch(index).rows, []
        for rank in range(size):
            data = batches()
            data.collate, data.share = ones, (rank, size)
            part = data.batch(index)
            rows += part.rows if part.num_supervised else ()
        assert sorted(rows) == sorted(whole)

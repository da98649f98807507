"""The order of batches: seekable, complete, bucketed by length; the prefetch thread."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from mlx_training.data.batch import Batch
from mlx_training.data.batching import BatchBy, Batches, cut, eval_batches
from mlx_training.errors import DataError

DATASET = [np.arange(n) for n in np.random.default_rng(0).integers(1, 60, 50)]


def collate(items: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
    lengths = np.array([item.size for item in items], np.int32)
    empty = np.zeros((len(items), int(lengths.max())), np.int32)
    return Batch(empty, empty, empty.astype(np.float32), lengths, rows=tuple(rows))


def batches(seed: int = 1, batch_size: int = 4, **options: object) -> Batches:
    return Batches(DATASET, lambda item: item, batch_size, seed, collate, **{"window": 3, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_a_batch_is_a_pure_function_of_seed_and_index(by: BatchBy) -> None:
    whole = batches(batch_by=by)
    rows = [whole.batch(i).rows for i in range(2 * whole.num_batches)]
    for i in (20, 3, 25, 0, 12):
        assert batches(cache=False, batch_by=by).batch(i).rows == rows[i]
    assert [batches(seed=2, batch_by=by).batch(i).rows for i in range(13)] != rows[:13]


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_every_row_comes_once_an_epoch_in_another_order(by: BatchBy) -> None:
    data = batches(batch_by=by)
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


def test_batches_by_tokens_have_about_the_same_tokens_and_other_numbers_of_rows() -> None:
    def places(by: BatchBy) -> list[int]:
        data = batches(window=13, batch_by=by)
        return [data.batch(i).tokens.size for i in range(13)]

    assert max(places("rows")) > 1.7 * np.mean(places("rows"))
    assert max(places("tokens")) < 1.3 * np.mean(places("tokens"))
    assert min(places("tokens")) > 10 * min(places("rows"))
    assert len({len(batches(window=13, batch_by="tokens").batch(i).rows) for i in range(13)}) > 3


@pytest.mark.parametrize("num_rows", [1, 5, 8, 11])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 11])
def test_no_cut_by_tokens_has_a_smaller_largest_batch(num_rows: int, batch_size: int) -> None:
    lengths = sorted(np.random.default_rng(num_rows).integers(0, 40, num_rows).tolist())
    num_batches = -(-num_rows // batch_size)

    def largest(ends: Sequence[int]) -> int:
        return max((stop - start) * lengths[stop - 1] for start, stop in pairwise((0, *ends, num_rows)))

    runs = cut(lengths, batch_size, "tokens")
    assert [row for run in runs for row in range(num_rows)[run]] == list(range(num_rows))
    assert len(runs) == num_batches and all(run.stop > run.start for run in runs)
    every = combinations(range(1, num_rows), num_batches - 1)
    assert largest([run.stop for run in runs[:-1]]) == min(map(largest, every))


@pytest.mark.parametrize(("batch_size", "window"), [(1, 512), (4, 128), (5, 103), (16, 32), (64, 32)])
def test_a_window_has_32_batches_and_512_rows_or_more(batch_size: int, window: int) -> None:
    data = Batches(range(1000), lambda row: DATASET[0], batch_size, 0, collate)
    assert data.window == window
    assert len(data.batch(0).rows) == batch_size


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


@pytest.mark.parametrize("by", ["rows", "tokens"])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_the_shares_of_processes_are_the_batch(size: int, by: BatchBy) -> None:
    """Some batches have 2 rows: more processes than that are left without one, and count nothing."""

    def ones(items: Sequence[np.ndarray], rows: Sequence[int]) -> Batch:
        batch = collate(items, rows)
        return replace(batch, mask=np.ones_like(batch.mask))

    for index in range(13):
        whole, rows = batches(batch_by=by).batch(index).rows, []
        for rank in range(size):
            data = batches(batch_by=by)
            data.collate, data.share = ones, (rank, size)
            part = data.batch(index)
            rows += part.rows if part.num_supervised else ()
        assert sorted(rows) == sorted(whole)

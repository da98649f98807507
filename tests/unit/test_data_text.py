"""Text windows for decoders."""

from collections import Counter

import numpy as np
import pytest

from mlx_training.data.batching import Batches
from mlx_training.data.text import Mixture, TextBatches, TextWindows


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


def numbered(count: int, start: int = 0) -> TextWindows:
    return TextWindows(np.arange(start, start + 10 * count + 1), context_length=10)


def drawn(batches: TextBatches, first: int, stop: int) -> list[int]:
    """First tokens of the windows of some batches."""
    return [int(row) for index in range(first, stop) for row in batches.batch(index).tokens[:, 0]]


def test_mixture_draws_by_weight_and_every_window_as_often_as_any_other() -> None:
    mixture = Mixture([numbered(30), numbered(10, start=1000)], [1.0, 3.0])
    assert len(mixture) == 40 and mixture.draws() == [10, 30]
    assert [int(mixture[i][0]) for i in (0, 29, 30, 39)] == [0, 290, 1000, 1090]
    batches = TextBatches(mixture, 5, seed=3)
    seen = Counter(drawn(batches, 0, 3 * batches.num_batches))
    assert all(seen[10 * i] == 1 for i in range(30)), "three epochs of ten draws are one pass over thirty windows"
    assert all(seen[1000 + 10 * i] == 9 for i in range(10))
    assert sum(count for token, count in Counter(drawn(batches, 0, 8)).items() if token >= 1000) == 30


def test_mixture_is_a_function_of_seed_and_index() -> None:
    mixture = Mixture([numbered(7), numbered(5, start=1000)], [2.0, 1.0])
    first, again = TextBatches(mixture, 3, seed=1), TextBatches(mixture, 3, seed=1)
    forwards = [first.batch(i).tokens.tolist() for i in range(12)]
    assert [again.batch(i).tokens.tolist() for i in reversed(range(12))] == forwards[::-1]
    assert [TextBatches(mixture, 3, seed=2).batch(i).tokens.tolist() for i in range(12)] != forwards


def test_without_weights_an_epoch_is_every_window_once() -> None:
    mixture = Mixture([numbered(7), numbered(5, start=1000)])
    batches = TextBatches(mixture, 4, seed=0)
    assert sorted(drawn(batches, 0, 3)) == sorted(int(mixture[i][0]) for i in range(12))
    plain = Batches(mixture, lambda row: row, 4, 0, mixture.collate)
    assert plain.batch(1).tokens.tolist() == batches.batch(1).tokens.tolist()

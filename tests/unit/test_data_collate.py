"""Collating: label alignment, patch places, shapes, independence of neighbours."""

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.collate import collate, collate_prompts
from mlx_training.data.prompt import Encoded

PATCH = 2


def encoded(prompt: int, answer: int, *num_patches: int) -> Encoded:
    """A row whose patches follow the first prompt token; token t is 10 + t, sample values name their patch."""
    length = prompt + answer
    places = np.zeros(length, np.int32)
    places[1 : 1 + sum(num_patches)] = np.arange(1, 1 + sum(num_patches))
    return Encoded(
        tokens=np.where(places, 0, 10 + np.arange(length)).astype(np.int32),
        prompt_length=prompt,
        series=tuple(np.full(n * PATCH, 1 + i, np.float32) for i, n in enumerate(num_patches)),
        scale=np.arange(2 * len(num_patches), dtype=np.float32).reshape(-1, 2),
        patch_place=places,
        num_patches=num_patches,
        patch_size=PATCH,
    )


def row_of(batch: Batch, b: int) -> tuple[list, ...]:
    """What row `b` says, free of padding: tokens, labels, and the samples and scale behind each place."""
    length = int(batch.lengths[b])
    labels = batch.mask[b] > 0
    assert batch.positions is not None
    seen: list[object] = []
    if batch.patch_index is not None:
        assert batch.series is not None and batch.scale is not None and batch.num_patches is not None
        max_patches = batch.series.shape[1] // PATCH
        for index in batch.patch_index[b, :length]:
            s, p = divmod(int(index) - 1, max_patches)
            if index:
                assert p < batch.num_patches[s]
                samples = batch.series[s, p * PATCH : (p + 1) * PATCH].tolist()
                seen.append((samples, batch.scale[s].tolist(), p, int(batch.series_place[s])))
    return (
        batch.tokens[b, :length].tolist(),
        batch.targets[b][labels].tolist(),
        batch.positions[b][labels].tolist(),
        seen,
    )


def test_a_label_is_the_token_after_its_position() -> None:
    batch = collate([encoded(5, 2, 3), encoded(4, 3)], [7, 9])
    assert batch.positions is not None
    for b in range(2):
        for k in np.flatnonzero(batch.mask[b]):
            assert batch.targets[b, k] == batch.tokens[b, batch.positions[b, k] + 1]
    assert batch.positions[0, :2].tolist() == [4, 5]
    assert batch.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert not batch.targets[batch.mask == 0].any() and not batch.positions[batch.mask == 0].any()
    assert batch.num_supervised == 5
    assert batch.rows == (7, 9)


def test_a_series_knows_its_place_in_its_row() -> None:
    batch = collate([encoded(5, 2, 1, 1), encoded(5, 2, 3), encoded(4, 2, 1, 1)])
    assert batch.series_place.tolist() == [0, 1, 0, 0, 1, 0, 0, 0]  # three dummies complete a multiple of 4


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    items = [encoded(8, 2, 3), encoded(40, 9, 17, 2), encoded(3, 1), encoded(30, 5, 5, 5, 5)]
    together = collate(items)
    for b, item in enumerate(items):
        assert row_of(together, b) == row_of(collate([item]), 0)
    assert [place[2] for place in row_of(together, 1)[3]] == [*range(17), 0, 1]


def test_shapes_are_rounded_up() -> None:
    mixed = collate([encoded(8, 5, 3), encoded(40, 1, 9, 2)])
    assert mixed.tokens.shape == (2, 44) and mixed.targets.shape == (2, 8)
    assert mixed.series is not None and mixed.num_patches is not None and mixed.patch_index is not None
    assert mixed.series.shape == (4, 12 * PATCH)  # 3 series: a dummy makes 4
    assert mixed.num_patches.tolist() == [3, 9, 2, 1] and not mixed.series[3].any()
    assert mixed.patch_index.max() <= 3 * 12  # the dummy is never referred to
    equal = collate([encoded(8, 1, 3), encoded(8, 1, 2), encoded(8, 1, 2)])
    assert equal.series is not None and equal.series.shape == (3, 4 * PATCH)
    assert {array.dtype for array in equal.arrays().values()} == {np.dtype(np.int32), np.dtype(np.float32)}


def test_rows_without_series() -> None:
    batch = collate([encoded(3, 1), encoded(4, 1)])
    assert batch.series is batch.scale is batch.num_patches is batch.patch_index is None


def test_prompts_have_nothing_to_learn() -> None:
    batch = collate_prompts([encoded(5, 0, 3), encoded(17, 0, 3)])
    assert batch.lengths.tolist() == [5, 17]
    assert batch.targets.shape == batch.mask.shape == (2, 1) and batch.num_supervised == 0

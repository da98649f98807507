"""Collate: encoded rows become one Batch, padded at the end, with few distinct shapes.

L, K and P are multiples of 4, the prefix of 8; S is exact when every row has the same number of series, else a
multiple of 4. Every distinct shape is compiled once, so the roundings bound the number of compilations.
"""

from collections.abc import Sequence

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.prompt import Encoded
from mlx_training.data.series import round_up

PREFIX_STEP = 8  # a prefix is cut to a multiple of it


def collate(encoded: Sequence[Encoded], rows: Sequence[int] = (), *, pad_id: int = 0, round_to: int = 4) -> Batch:
    """A Batch whose labels are the answers: position t - 1 predicts tokens[t], answer and EOS only."""
    counts = [len(item) - item.prompt_length for item in encoded]
    num_labels = round_up(max(*counts, 1), 4)
    shape = (len(encoded), num_labels)
    positions, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    for b, (item, count) in enumerate(zip(encoded, counts, strict=True)):
        positions[b, :count] = np.arange(item.prompt_length - 1, len(item) - 1)
        targets[b, :count] = item.tokens[item.prompt_length :]
        mask[b, :count] = 1
    return _batch(encoded, rows, targets, mask, positions, pad_id, round_to)


def common_prefix(tokens: np.ndarray) -> int:
    """How many leading places are alike in all rows of tokens (B, N), in steps of PREFIX_STEP."""
    differs = (tokens != tokens[0]).any(0)
    return int(np.argmax(differs) if differs.any() else differs.size) // PREFIX_STEP * PREFIX_STEP


def collate_prompts(
    encoded: Sequence[Encoded], rows: Sequence[int] = (), *, pad_id: int = 0, round_to: int = 4
) -> Batch:
    """A Batch to generate from: `encoded` are prompts without answers; one unsupervised dummy label a row."""
    assert all(len(item) == item.prompt_length for item in encoded), "encode with with_answer=False"
    shape = (len(encoded), 1)
    zeros = np.zeros(shape, np.int32)
    return _batch(encoded, rows, zeros, np.zeros(shape, np.float32), zeros, pad_id, round_to)


def _batch(
    encoded: Sequence[Encoded],
    rows: Sequence[int],
    targets: np.ndarray,
    mask: np.ndarray,
    positions: np.ndarray,
    pad_id: int,
    round_to: int,
) -> Batch:
    lengths = np.array([len(item) for item in encoded], np.int32)
    shape = (len(encoded), round_up(int(lengths.max()), round_to))
    tokens = np.full(shape, pad_id, np.int32)
    for b, item in enumerate(encoded):
        tokens[b, : len(item)] = item.tokens
    series = [values for item in encoded for values in item.series]
    if not series:
        return Batch(tokens, targets, mask, lengths, positions, rows=tuple(rows))

    num_series = [len(item.series) for item in encoded]
    total = len(series) if len(set(num_series)) == 1 else round_up(len(series), 4)
    num_patches = np.ones(total, np.int32)
    num_patches[: len(series)] = [count for item in encoded for count in item.num_patches]
    max_patches = round_up(int(num_patches.max()), 4)  # P
    samples = np.zeros((total, max_patches * encoded[0].patch_size), np.float32)
    for s, values in enumerate(series):
        samples[s, : values.size] = values
    scale = np.zeros((total, 2), np.float32)
    scale[: len(series)] = np.concatenate([item.scale for item in encoded])
    series_place = np.zeros(total, np.int32)
    series_place[: len(series)] = np.concatenate([np.arange(count) for count in num_series])
    patch_index = np.zeros(shape, np.int32)
    s = 0
    for b, item in enumerate(encoded):
        starts = range(s * max_patches + 1, (s + len(item.series)) * max_patches + 1, max_patches)
        ranges = [np.arange(start, start + count) for start, count in zip(starts, item.num_patches, strict=True)]
        patch_index[b, : len(item)] = np.concatenate([[0], *ranges])[item.patch_place]
        s += len(item.series)
    before_series = [int(np.argmax(item.patch_place > 0)) if item.series else len(item) for item in encoded]
    before_labels = [item.prompt_length - 1 for item in encoded]
    return Batch(
        tokens,
        targets,
        mask,
        lengths,
        positions,
        prefix=min(*before_series, *before_labels) // PREFIX_STEP * PREFIX_STEP,
        series=samples,
        scale=scale,
        num_patches=num_patches,
        series_place=series_place,
        patch_index=patch_index,
        rows=tuple(rows),
    )

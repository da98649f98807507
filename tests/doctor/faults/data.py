"""Wrong data: batches, labels, series, rows."""

import copy
import time
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.collate import collate
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import each_batch, edit, fault, rows_of, train_rows, with_encoder, with_rows


def every_place(batch: Batch, mask: np.ndarray) -> Batch:
    """The batch with a label at every place (targets are the next tokens) and this mask (B, L)."""
    targets = np.pad(batch.tokens[:, 1:], ((0, 0), (0, 1)))
    return edit(batch, targets=targets, mask=mask, positions=None)


def is_answer(batch: Batch) -> np.ndarray:
    """1 at the places whose next token belongs to the answer (B, L)."""
    mask = np.zeros(batch.tokens.shape, np.float32)
    for b, k in zip(*np.nonzero(batch.mask), strict=True):
        mask[b, batch.positions[b, k]] = 1
    return mask


@fault("vocabulary_mismatch")
def tokens_of_another_tokenizer(subject: Subject) -> None:
    """The data was tokenised with a larger vocabulary than the model has."""
    size = subject.spec.llm.vocab_size  # type: ignore[attr-defined]

    def change(batch: Batch) -> Batch:
        tokens = batch.tokens.copy()
        tokens[:, 1] = size + 5
        return edit(batch, tokens=tokens)

    each_batch(subject, change)


@fault("vocabulary_mismatch")
def vocabulary_off_by_one(subject: Subject) -> None:
    """An end token was added to the tokenizer (32102 ids) but not to the model (32101)."""
    size = subject.spec.llm.vocab_size  # type: ignore[attr-defined]
    eos = subject.data.tokenizer.eos_id  # type: ignore[union-attr]
    each_batch(subject, lambda batch: edit(batch, targets=np.where(batch.targets == eos, size, batch.targets)))


@fault("labels_shifted")
def labels_not_shifted(subject: Subject) -> None:
    """The target of a place is its own token: a copy task whose loss looks healthy."""
    each_batch(subject, lambda b: edit(b, targets=np.take_along_axis(b.tokens, b.positions, axis=1)))


@fault("labels_shifted", case="decoder")
def decoder_labels_not_shifted(subject: Subject) -> None:
    """The collator and the loss each leave the shift to the other: a language model learns to copy."""
    each_batch(subject, lambda batch: edit(batch, targets=batch.tokens.copy()))


@fault("labels_shifted")
def labels_shifted_twice(subject: Subject) -> None:
    """Both the collator and the loss shift the labels, so that a place predicts the token after the next."""

    def change(batch: Batch) -> Batch:
        targets, mask = np.roll(batch.targets, -1, axis=1), np.roll(batch.mask, -1, axis=1)
        mask[:, -1] = 0
        return edit(batch, targets=targets, mask=mask * batch.mask)

    each_batch(subject, change)


@fault("labels_shifted", case="decoder")
def decoder_labels_shifted_twice(subject: Subject) -> None:
    """Shifted labels are handed to a loss that shifts them once more."""
    each_batch(subject, lambda b: edit(b, targets=np.roll(b.targets, -1, 1), mask=b.mask * np.roll(b.mask, -1, 1)))


@fault("labels_swapped")
def targets_of_another_row(subject: Subject) -> None:
    """Prompts were sorted by length for batching, and the list of labels was not."""
    each_batch(subject, lambda b: edit(b, targets=np.roll(b.targets, 1, 0), mask=np.roll(b.mask, 1, 0)))


@fault("labels_swapped")
def answers_of_another_row(subject: Subject) -> None:
    """Two files, questions and answers, were shuffled apart: every row carries the answer of the row before."""
    rows, original, data = train_rows(subject), subject.batch, subject.data
    wrong = [replace(row, answer=rows[i - 1].answer) for i, row in enumerate(rows)]

    def batch(index: int) -> Batch:
        chosen = original(index).rows
        return collate([data.encode(wrong[row]) for row in chosen], chosen)  # type: ignore[union-attr]

    subject.batch = batch


@fault("mask_inverted")
def mask_means_ignore(subject: Subject) -> None:
    """The mask says what to ignore where the loss expects what to keep."""
    each_batch(subject, lambda batch: every_place(batch, 1 - is_answer(batch)))


@fault("mask_inverted")
def label_mask_means_ignore(subject: Subject) -> None:
    """The padding mask of the labels is True for padding, as key_padding_mask is."""
    each_batch(subject, lambda batch: edit(batch, mask=1 - batch.mask))


@fault("prompt_supervised")
def loss_on_the_prompt(subject: Subject) -> None:
    """Labels are a copy of the input ids; nobody set those of the prompt to -100."""

    def change(batch: Batch) -> Batch:
        places = np.arange(batch.tokens.shape[1])
        next_is_text = np.pad(batch.patch_index[:, 1:] == 0, ((0, 0), (0, 1)))
        return every_place(batch, (places < batch.lengths[:, None] - 1) * next_is_text * np.float32(1))

    each_batch(subject, change)


@fault("padding_supervised")
def loss_on_the_padding(subject: Subject) -> None:
    """Pads after the answer are supervised: the pad token is the end token, which -100 was not written over."""
    eos = subject.data.tokenizer.eos_id  # type: ignore[union-attr]

    def change(batch: Batch) -> Batch:
        pad = batch.mask == 0
        ends = np.minimum(batch.lengths[:, None] + np.cumsum(pad, axis=1) - 1, batch.tokens.shape[1] - 1)
        positions = np.where(pad, ends, batch.positions)
        return edit(
            batch, positions=positions, targets=np.where(pad, eos, batch.targets), mask=np.ones_like(batch.mask)
        )

    each_batch(subject, change)


@fault("nothing_supervised")
def row_without_labels(subject: Subject) -> None:
    """A chat template that was not recognised masks whole rows."""

    def change(batch: Batch) -> Batch:
        mask = batch.mask.copy()
        mask[0] = 0
        return edit(batch, mask=mask)

    each_batch(subject, change)


@fault("answer_truncated")
def answers_cut_off(subject: Subject) -> None:
    """max_length was chosen for the prompts, and long answers lose their end."""
    data: Any = subject.data
    longest = max(len(data.encode_prompt(row)) for rows in data.splits.values() for row in rows)
    with_encoder(subject, max_length=longest + 1)


@fault("eos_missing")
def answers_without_end(subject: Subject) -> None:
    """The end token is not supervised, so that generation never stops."""
    eos = subject.data.tokenizer.eos_id  # type: ignore[union-attr]
    each_batch(subject, lambda batch: edit(batch, mask=batch.mask * (batch.targets != eos)))


@fault("bos_repeated")
def bos_before_every_text(subject: Subject) -> None:
    """Every fragment of the prompt is tokenised with special tokens."""
    tokenizer = copy.copy(subject.data.tokenizer)  # type: ignore[union-attr]
    encode = tokenizer.encode
    tokenizer.encode = lambda text, **options: [tokenizer.bos_id, *encode(text, **options)]  # type: ignore[method-assign]
    with_encoder(subject, tokenizer)


@fault("patches_after_answer")
def soft_prompt_after_the_answer(subject: Subject) -> None:
    """The series are appended to the text, answer included, so that no label can see them."""

    def change(batch: Batch) -> Batch:
        order = np.argsort(batch.patch_index > 0, axis=1, kind="stable")
        for b, length in enumerate(batch.lengths):  # the padding stays at the end
            order[b] = [*[i for i in order[b] if i < length], *range(length, order.shape[1])]
        return edit(
            batch,
            tokens=np.take_along_axis(batch.tokens, order, 1),
            patch_index=np.take_along_axis(batch.patch_index, order, 1),
            positions=np.take_along_axis(np.argsort(order, axis=1), batch.positions, 1),
        )

    each_batch(subject, change)


@fault("patches_misplaced")
def patches_of_another_row(subject: Subject) -> None:
    """Series are sorted by length before they are encoded, and their order is not restored."""

    def change(batch: Batch) -> Batch:
        num_series, num_patches = batch.series.shape[0], batch.series.shape[1] // 4
        moved = (batch.patch_index - 1 + num_patches) % (num_series * num_patches) + 1
        return edit(batch, patch_index=np.where(batch.patch_index > 0, moved, 0))

    each_batch(subject, change)


def poison(subject: Subject, rest: int, value: float) -> None:
    """Write a value into the first series of every eighth row."""

    def change(batch: Batch) -> Batch:
        series = batch.series.copy()
        for row, first in zip(batch.rows, np.flatnonzero(batch.series_place == 0), strict=False):
            if row % 8 == rest:
                series[first, 2] = value
        return edit(batch, series=series)

    each_batch(subject, change)


@fault("series_nonfinite")
def nan_in_rows(subject: Subject) -> None:
    """Gaps of a sensor reach the model as NaN."""
    poison(subject, 3, np.nan)


@fault("series_nonfinite")
def infinite_value_in_rows(subject: Subject) -> None:
    """A division by zero in preprocessing left an infinite sample in some rows."""
    poison(subject, 5, np.inf)


@fault("series_constant")
def wrong_column_is_read(subject: Subject) -> None:
    """Every series is the sampling rate of its device, because the wrong column was read."""
    rows = train_rows(subject)
    constant = [tuple(np.full_like(v, 50 + i + 0.5 * k) for k, v in enumerate(r.series)) for i, r in enumerate(rows)]
    with_rows(subject, train=[replace(row, series=series) for row, series in zip(rows, constant, strict=True)])


@fault("series_not_normalized")
def raw_values(subject: Subject) -> None:
    """The z-score was lost when the data loader was rewritten; raw values of any size go in."""
    with_encoder(subject, normalize="none")


@fault("rows_duplicated")
def training_rows_repeated(subject: Subject) -> None:
    """Oversampling wrote every row several times into the training file."""
    with_rows(subject, train=train_rows(subject)[:16] * 4)


@fault("leakage")
def test_rows_in_training(subject: Subject) -> None:
    """Two downloads overlap, so that rows of the test split stand in the training split under other ids."""
    leaked = [replace(row, id=f"x{row.id}") for row in rows_of(subject, "test")]
    with_rows(subject, train=[*train_rows(subject), *leaked])


@fault("answers_unbalanced")
def one_answer_for_nearly_all(subject: Subject) -> None:
    """A default label was written wherever the annotation was missing: 97 % of the rows."""
    rows = train_rows(subject)
    with_rows(subject, train=[replace(row, answer=row.options[1 if i < 2 else 0]) for i, row in enumerate(rows)])


@fault("batches_repeat")
def same_batch_for_ever(subject: Subject) -> None:
    """The iterator is made anew in every step, so that only the first batch is ever seen."""
    original = subject.batch
    subject.batch = lambda index: original(0)


@fault("batches_not_reproducible")
def augmentation_from_a_global_generator(subject: Subject) -> None:
    """Noise is drawn from a generator that nobody seeds: the same step differs between two runs."""
    rng = np.random.default_rng(time.time_ns())
    each_batch(
        subject, lambda b: edit(b, series=b.series + 0.01 * rng.standard_normal(b.series.shape) * (b.series != 0))
    )


@fault("batches_not_reproducible")
def order_from_a_global_generator(subject: Subject) -> None:
    """Which rows a step gets depends on how many batches were drawn before, so that a resumed run sees others."""
    original, drawn = subject.batch, iter(range(10**9))
    subject.batch = lambda index: original(next(drawn))

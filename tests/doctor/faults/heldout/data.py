"""Unseen faults in data and labels."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.prompt import Encoded, PromptEncoder
from mlx_training.data.rows import Row
from mlx_training.data.series import SeriesStats, pad_to
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import (
    each_batch,
    edit,
    rows_of,
    train_rows,
    with_encoder,
    with_rows,
)
from tests.doctor.faults.heldout.registry import fault


def encoding(subject: Subject, kind: type[PromptEncoder]) -> None:
    """Rows become tokens by a subclass of PromptEncoder."""
    with_encoder(subject)
    subject.data.encoder.__class__ = kind  # type: ignore[union-attr]


def odd_batches(subject: Subject, change: Callable[[Batch], Batch]) -> None:
    """Every second micro-batch goes through `change`."""
    original = subject.batch
    subject.batch = lambda index: change(original(index)) if index % 2 else original(index)


@fault("labels_shifted")
def long_rows_shifted_once_more(subject: Subject) -> None:
    """Rows above a length take another path through the collator, which shifts their labels a second time."""
    typical = float(np.median(np.concatenate([subject.batch(i).lengths for i in range(12)])))

    def change(batch: Batch) -> Batch:
        targets, mask = batch.targets.copy(), batch.mask.copy()
        for b in np.flatnonzero(batch.lengths > typical):
            count = int(mask[b].sum())
            targets[b, : count - 1] = batch.targets[b, 1:count]
            mask[b, count - 1] = 0
        return edit(batch, targets=targets, mask=mask)

    each_batch(subject, change)


@fault("labels_swapped", case="decoder")
def windows_and_targets_of_two_workers(subject: Subject) -> None:
    """Inputs and targets come from two loaders, one of which turns every second batch round."""
    odd_batches(subject, lambda batch: edit(batch, targets=batch.targets[::-1].copy(), mask=batch.mask[::-1].copy()))


@fault("labels_swapped")
def answers_swapped_in_one_micro_batch(subject: Subject) -> None:
    """The second worker of the loader returns its labels in reverse order."""
    odd_batches(subject, lambda batch: edit(batch, targets=batch.targets[::-1].copy(), mask=batch.mask[::-1].copy()))


@fault("eos_missing")
def rows_of_one_importer_without_end(subject: Subject) -> None:
    """Rows of one of two sources have no end token: their last label is not supervised."""
    eos = subject.data.tokenizer.eos_id  # type: ignore[union-attr]

    def change(batch: Batch) -> Batch:
        affected = np.array([row % 2 == 1 for row in batch.rows])[:, None]
        return edit(batch, mask=batch.mask * ~(affected & (batch.targets == eos)))

    each_batch(subject, change)


@fault("bos_repeated")
def bos_before_the_answer(subject: Subject) -> None:
    """Only the answer is tokenised with special tokens, and its first label is a beginning of text."""

    class Doubled(PromptEncoder):
        def encode(self, row: Row, *, with_answer: bool = True, ablate: bool = False) -> Encoded:
            encoded = super().encode(row, with_answer=with_answer, ablate=ablate)
            if not with_answer:
                return encoded
            at, bos = encoded.prompt_length, self.tokenizer.bos_id
            places = np.insert(encoded.patch_place, at, 0)
            return replace(encoded, tokens=np.insert(encoded.tokens, at, bos or 0), patch_place=places)

    encoding(subject, Doubled)


@fault("prompt_supervised")
def labels_begin_two_tokens_early(subject: Subject) -> None:
    """The length of the prompt is counted without its last words, which become labels."""

    class Early(PromptEncoder):
        def encode(self, row: Row, *, with_answer: bool = True, ablate: bool = False) -> Encoded:
            encoded = super().encode(row, with_answer=with_answer, ablate=ablate)
            return replace(encoded, prompt_length=encoded.prompt_length - 2) if with_answer else encoded

    encoding(subject, Early)


@fault("padding_supervised")
def one_pad_behind_the_end(subject: Subject) -> None:
    """The range of labels is one too long: the first pad after the end token is a label."""

    def change(batch: Batch) -> Batch:
        targets, positions, mask = batch.targets.copy(), batch.positions.copy(), batch.mask.copy()
        for b, count in enumerate(batch.mask.sum(axis=1).astype(int)):
            if count < mask.shape[1] and batch.lengths[b] < batch.tokens.shape[1]:
                targets[b, count], positions[b, count], mask[b, count] = 0, batch.lengths[b] - 1, 1
        return edit(batch, targets=targets, positions=positions, mask=mask)

    each_batch(subject, change)


@fault("nothing_supervised")
def micro_batches_without_labels(subject: Subject) -> None:
    """Every second micro-batch has no label at all, since a filter looked for another answer prefix."""
    odd_batches(subject, lambda batch: edit(batch, mask=batch.mask * 0))


@fault("vocabulary_mismatch")
def added_token_in_some_rows(subject: Subject) -> None:
    """A special token that was added to the tokenizer stands in some prompts only."""
    size = subject.spec.llm.vocab_size  # type: ignore[attr-defined]

    def change(batch: Batch) -> Batch:
        tokens = batch.tokens.copy()
        tokens[[row % 8 == 2 for row in batch.rows], 2] = size
        return edit(batch, tokens=tokens)

    each_batch(subject, change)


@fault("vocabulary_mismatch")
def ignore_index_in_the_labels(subject: Subject) -> None:
    """Labels outside the mask are -100, which the loss of another framework would skip; here they are looked up."""
    each_batch(subject, lambda batch: edit(batch, targets=np.where(batch.mask > 0, batch.targets, -100)))


@fault("answer_truncated")
def answers_of_at_most_two_tokens(subject: Subject) -> None:
    """A limit on the answer's length cuts long answers; the end token is put behind what is left."""

    class Short(PromptEncoder):
        def encode(self, row: Row, *, with_answer: bool = True, ablate: bool = False) -> Encoded:
            encoded = super().encode(row, with_answer=with_answer, ablate=ablate)
            at = encoded.prompt_length + 2
            if not with_answer or len(encoded) <= at + 1:
                return encoded
            tokens = np.append(encoded.tokens[:at], np.int32(self.tokenizer.eos_id))
            return replace(encoded, tokens=tokens, patch_place=encoded.patch_place[: at + 1])

    encoding(subject, Short)


@fault("series_nonfinite")
def logarithm_of_a_zero_deviation(subject: Subject) -> None:
    """The scale features of some rows are NaN, while their samples are fine."""

    def change(batch: Batch) -> Batch:
        scale = batch.scale.copy()
        for row, first in zip(batch.rows, np.flatnonzero(batch.series_place == 0), strict=False):
            if row % 6 == 1:
                scale[first, 1] = np.nan
        return edit(batch, scale=scale)

    each_batch(subject, change)


@fault("series_not_normalized")
def statistics_of_the_whole_data_set(subject: Subject) -> None:
    """One mean and deviation for all rows, whose units differ by factors of a thousand."""
    values = np.concatenate([v for row in train_rows(subject) for v in row.series])
    mean, std = float(values.mean()), float(values.std())

    class Global(PromptEncoder):
        def _samples(self, values: np.ndarray, stats: SeriesStats, num_patches: int, ablate: bool) -> np.ndarray:
            samples = (values * (not ablate) - mean) / std
            return pad_to(samples.astype(np.float32), num_patches * self.patch_size)

    encoding(subject, Global)


@fault("series_not_normalized")
def second_series_raw(subject: Subject) -> None:
    """Only the first series of a row is normalised; the second keeps its unit."""

    class FirstOnly(PromptEncoder):
        def encode(self, row: Row, *, with_answer: bool = True, ablate: bool = False) -> Encoded:
            encoded = super().encode(row, with_answer=with_answer, ablate=ablate)
            raw = [pad_to(v * (not ablate), s.size) for v, s in zip(row.series, encoded.series, strict=True)]
            return replace(encoded, series=(*encoded.series[:1], *raw[1:]))

    encoding(subject, FirstOnly)


@fault("series_constant")
def series_of_one_type_missing(subject: Subject) -> None:
    """The files of one recording device were not found, and zeros stand in for all its series."""
    rows = train_rows(subject)
    kind = rows[0].type
    with_rows(
        subject,
        train=[replace(r, series=tuple(v * 0 for v in r.series)) if r.type == kind else r for r in rows],
    )


@fault("rows_duplicated")
def part_of_the_rows_twice(subject: Subject) -> None:
    """A retried download appended two fifths of the rows again under new ids and groups."""
    rows = train_rows(subject)
    again = [replace(row, id=f"again {i}", group=f"again {i}") for i, row in enumerate(rows[: len(rows) * 2 // 5])]
    with_rows(subject, train=[*rows, *again])


@fault("leakage")
def validation_rows_in_training(subject: Subject) -> None:
    """Another export of the validation rows, rounded to six digits and under other ids, went into training."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.array([float(f"{v:.6g}") for v in values], np.float32)

    leaked = [
        replace(row, id=f"x{row.id}", group=f"x{row.group}", series=tuple(map(rounded, row.series)))
        for row in rows_of(subject, "validation")
    ]
    with_rows(subject, train=[*train_rows(subject), *leaked])


@fault("patches_misplaced")
def second_slot_shows_the_first_series(subject: Subject) -> None:
    """The places of a row's second series are filled with patches of its first."""

    def change(batch: Batch) -> Batch:
        num_patches = batch.series.shape[1] // 4
        series = np.maximum(batch.patch_index - 1, 0) // num_patches
        first = np.maximum.accumulate(np.where(batch.series_place == 0, np.arange(len(batch.series_place)), 0))
        moved = batch.patch_index - (series - first[series]) * num_patches
        return edit(batch, patch_index=np.where(batch.patch_index > 0, moved, 0))

    each_batch(subject, change)


@fault("batches_repeat")
def iterator_advanced_once_a_step(subject: Subject) -> None:
    """Both micro-batches of a step are the same: the index counts steps."""
    original = subject.batch
    subject.batch = lambda index: original(index // 2)


@fault("batches_not_reproducible")
def augmentation_after_the_warm_up(subject: Subject) -> None:
    """Unseeded noise comes in at the sixth step only."""
    original, rng = subject.batch, np.random.default_rng()

    def batch(index: int) -> Batch:
        made = original(index)
        noise = 0.02 * rng.standard_normal(made.series.shape) * (made.series != 0)
        return made if index < 12 else edit(made, series=made.series + noise)

    subject.batch = batch

"""Exam: one examination's shared measurements, made once; and Check, one question asked of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mlx_training.assemble import RowData
from mlx_training.backend import Arrays
from mlx_training.data.batch import Batch
from mlx_training.data.prompt import Encoded
from mlx_training.data.rows import Row
from mlx_training.diagnostics.report import Finding
from mlx_training.diagnostics.subject import Subject

NUM_BATCHES = 4  # looked at by the checks of the data
WARM_STEPS = 3  # what has a zero gradient at first (LoRA's A, layers behind a zero one) has one now
WARM_RATE = 1e-3


@dataclass(frozen=True)
class Check:
    """One question. A check that fails and is `blocking` makes the answers of later ones meaningless."""

    name: str
    run: Callable[["Exam"], Finding | list[Finding]]
    blocking: bool = False
    full: bool = False  # only with --full


@dataclass
class Exam:
    """A subject and what several checks need to know about it."""

    subject: Subject
    full: bool = False
    as_configured: bool = False  # the subject is what its configuration makes, so that another process can make it

    @cached_property
    def batches(self) -> list[Batch]:
        """The first micro-batches of training."""
        return [self.subject.batch(index) for index in range(NUM_BATCHES)]

    @cached_property
    def gradients(self) -> Arrays:
        """Gradients of the first micro-batch at the present parameters, dropout off."""
        return self.gradients_of(self.batches[0])

    @cached_property
    def parameters(self) -> Arrays:
        """The present values of every parameter of the table."""
        return self.subject.backend.export(self.subject.model)

    @cached_property
    def row_data(self) -> RowData | None:
        """The data, if they are rows about series."""
        return self.subject.data if isinstance(self.subject.data, RowData) else None

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        return {}

    def rows(self, split: str) -> list[Row]:
        """Rows of a split: all of a file; of generated ones a thousand, unless --full."""
        assert self.row_data is not None
        if split not in self._rows:
            rows = self.row_data.rows(split)
            generated = self.row_data.config.dataset.format == "questions"
            count = min(len(rows), 1000) if generated and not self.full else len(rows)
            self._rows[split] = [rows[i] for i in range(count)]
        return self._rows[split]

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts the next token; else it tells hidden ones."""
        return self.subject.spec.is_causal

    @property
    def has_series(self) -> bool:
        """Whether the first batches hold series whose patches can be found."""
        return self.patch_size > 0 and any(batch.series is not None for batch in self.batches)

    @property
    def patch_size(self) -> int:
        """Samples a patch, by the spec; 0 if it has none."""
        return getattr(getattr(self.subject.spec, "encoder", None), "patch_size", 0)

    @property
    def vocab_size(self) -> int | None:
        """Size of the model's vocabulary, where the spec says it."""
        spec: Any = self.subject.spec
        return getattr(spec, "vocab_size", None) or getattr(getattr(spec, "llm", None), "vocab_size", None)

    def gradients_of(self, batch: Batch) -> Arrays:
        """d(loss / weight) / d(parameters), dropout off."""
        return self.subject.backend.gradients(self.subject.model, self.subject.objective, batch)

    def sums(self, batch: Batch) -> tuple[float, float]:
        """The objective's loss sum and weight, dropout off."""
        sums = self.subject.backend.score(self.subject.model, self.subject.objective, batch)
        return sums["loss"], sums["weight"]

    def loss(self, batch: Batch) -> float:
        """Mean loss, dropout off."""
        loss, weight = self.sums(batch)
        return loss / weight

    def loss_at(self, parameters: Arrays, batch: Batch) -> float:
        """Mean loss with other parameters; the caller restores the present ones."""
        self.subject.backend.load(self.subject.model, parameters)
        return self.loss(batch)

    def train(self, num_steps: int) -> None:
        """Real optimiser steps on the first batches; the caller restores the parameters."""
        step, rates = self.subject.new_step(), dict.fromkeys(self.subject.spec.groups, WARM_RATE)
        for number in range(1, num_steps + 1):
            step([self.batches[number % len(self.batches)]], step=number, lr=rates)

    def encoded(self, batch: Batch) -> list[tuple[Row, Encoded]]:
        """The rows of one of `batches`, and what they should look like in its epoch."""
        data = self.row_data
        assert data is not None
        rows, drawn = data.rows("train"), data.train_batches()
        epoch = next(i for i, own in enumerate(self.batches) if own is batch) // drawn.num_batches
        return [(rows[index], drawn.item(index, epoch)) for index in batch.rows]


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """Keeps a model in evaluation mode even where a step switches it to training."""
    train = model.train
    model.train = lambda mode=True: train(False)
    try:
        yield
    finally:
        del model.train


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Puts back what an examination leaves changed beside the parameters: training mode, buffers, stored gradients."""
    modes = [(module, module.training) for _, module in model.named_modules()]
    is_torch = hasattr(model, "named_buffers")
    buffers = [(buffer, buffer.clone()) for _, buffer in model.named_buffers()] if is_torch else []
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()] if is_torch else []
    arrays = None if is_torch else model.parameters()
    try:
        yield
    finally:
        for module, mode in modes:
            setattr(module, "training" if is_torch else "_training", mode)
        for buffer, value in buffers:
            buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if arrays is not None:
            model.update(arrays)


def label_places(batch: Batch) -> list[np.ndarray]:
    """For every row the places (K,) whose next token is a label, whether supervised or not."""
    num_rows, num_labels = batch.targets.shape
    if batch.positions is None:
        return [np.arange(num_labels)] * num_rows
    return [batch.positions[b] for b in range(num_rows)]


def row_names(exam: Exam, indices: list[int] | tuple[int, ...]) -> tuple[str, ...]:
    """Names of training rows (at most 8), as errors call them."""
    data = exam.row_data
    if data is None:
        return tuple(f"window {index}" for index in indices[:8])
    rows = data.rows("train")
    return tuple(rows[index].name for index in indices[:8])


def only_label(batch: Batch, row: int, label: int) -> Batch:
    """The batch with a single supervised label."""
    mask = np.zeros_like(batch.mask)
    mask[row, label] = 1
    return replace(batch, mask=mask)


def row_index(batch: Batch, b: int) -> int:
    """The row's number in its data set, where the batch knows it."""
    return batch.rows[b] if batch.rows else b


def series_of(exam: Exam, batch: Batch, b: int) -> list[int]:
    """Which series row b of a batch sees; patch_index counts 1 + s * P + p."""
    places = batch.patch_index[b][batch.patch_index[b] > 0] - 1
    chosen = np.unique(places // (batch.series.shape[1] // exam.patch_size))
    return [int(s) for s in chosen if s < len(batch.series)]


def samples_of(exam: Exam, batch: Batch, b: int) -> list[np.ndarray]:
    """The real samples of every series that row b sees."""
    size = exam.patch_size
    return [batch.series[s, : int(batch.num_patches[s]) * size] for s in series_of(exam, batch, b)]

"""Unseen look-alikes that are no faults."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlx_training.data.rows import Row
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import (
    change_parameters,
    rebuilt,
    rows_of,
    train_rows,
    with_rows,
)
from tests.doctor.faults.heldout.registry import lookalike
from tests.doctor.faults.runs import rewrite


def answered(subject: Subject, answer: Callable[[str], str]) -> None:
    """Other answers in every split."""

    def changed(rows: Iterable[Row]) -> list[Row]:
        return [replace(r, answer=answer(r.answer), options=tuple(map(answer, r.options))) for r in rows]

    with_rows(subject, **{split: changed(rows_of(subject, split)) for split in ("train", "validation", "test")})


@lookalike
def letters_as_answers(subject: Subject) -> None:
    """Answers are single letters."""
    options = train_rows(subject)[0].options
    answered(subject, lambda text: "ABC"[options.index(text)])


@lookalike
def long_explanations(subject: Subject) -> None:
    """Answers are explanations, many times longer than the question."""
    answered(subject, lambda text: f"The teeth rise and fall along the whole of the series. {text}. " * 4)


@lookalike
def outliers_in_some_series(subject: Subject) -> None:
    """One sample of some series is fifty times the rest: a spike that was measured."""

    def spike(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[4] += 50 * values.std()
        return values

    rows = train_rows(subject)
    with_rows(
        subject,
        train=[replace(r, series=tuple(map(spike, r.series))) if i % 4 == 0 else r for i, r in enumerate(rows)],
    )


@lookalike
def small_wave_on_a_large_offset(subject: Subject) -> None:
    """Series of pressure in pascal: a mean of 101,325 and a deviation of a few."""
    rows = train_rows(subject)
    moved = [replace(r, series=tuple((v / v.std() * 3 + 101325).astype(np.float32) for v in r.series)) for r in rows]
    with_rows(subject, train=moved)


@lookalike
def own_betas(subject: Subject) -> None:
    """betas (0.9, 0.95) and a limit of 0.5, as many language models are trained."""
    subject.optim = replace(subject.optim, betas=(0.9, 0.95), grad_clip_norm=0.5)


@lookalike
def no_warm_up_and_constant_rate(subject: Subject) -> None:
    """One rate for all groups from the first step to the last."""
    rates = subject.rates
    subject.rates = lambda step: dict.fromkeys(rates(step), 5e-3)


@lookalike
def rows_without_series(subject: Subject) -> None:
    """Every fourth row is a plain question, replayed so that the language is not forgotten."""
    rows = train_rows(subject)
    plain = [
        replace(r, series=(), series_text=(), pre_prompt=f"Note {i}: the answer is {r.answer}.") if i % 4 == 0 else r
        for i, r in enumerate(rows)
    ]
    with_rows(subject, train=plain)


@lookalike
def trained_norms(subject: Subject) -> None:
    """After long training norms have weights between 0.2 and 2.6 and biases that are not zero."""
    change_parameters(subject, lambda v: v * (0.2 + 2.4 * np.linspace(0, 1, v.size)), "norm1.weight")
    change_parameters(subject, lambda v: v + 0.5 * np.sin(np.arange(v.size)), "norm2.bias")
    subject.fresh = False


@lookalike(case="decoder")
def no_grouped_heads(subject: Subject) -> Subject:
    """As many key heads as heads, and a longer context."""
    return rebuilt(subject, {"model.decoder.num_kv_heads": 2, "model.decoder.context_length": 48})


@lookalike(case="run")
def noisy_and_short(run: Path) -> None:
    """A short run with large noise whose loss falls by a third."""
    path = run / "metrics.jsonl"
    noise = np.random.default_rng(0).standard_normal(60)
    rewrite(run, lambda step: 6 - step / 30 + 0.25 * noise[step - 1], lambda step: 6 - step / 32, steps=60)
    assert all(json.loads(line) for line in path.read_text().splitlines())

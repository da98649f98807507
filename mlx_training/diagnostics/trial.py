"""Trial: real optimiser steps seen from outside, and the AdamW they are compared with, in NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.exam import Exam
from mlx_training.diagnostics.subject import Subject
from mlx_training.objectives import Objective, Sums

RATE = 1e-3  # learning rate of the first group in the trial; each further group has one more of it


@dataclass(frozen=True)
class Observed:
    """One optimiser step: what went in, what should have been used, what came out."""

    gradient: Arrays  # the mean gradient by autograd, before clipping
    parts: list[Arrays]  # of each micro-batch
    before: Arrays
    after: Arrays
    state: Arrays  # optimiser state afterwards
    metrics: dict[str, Any]
    compiled: bool


class Unreadable(Exception):
    """Parameters or state cannot be read after a step; the message is the framework's."""


class Trial:
    """Real steps over a subject, each seen from outside."""

    def __init__(self, exam: Exam, subject: Subject, scale: float) -> None:
        self.exam, self.subject, self.scale = exam, subject, scale
        self.step, self.number = subject.new_step(), 0

    def take(self, batches: Sequence[Batch]) -> Observed:
        """One step over these micro-batches."""
        exam, subject = self.exam, self.subject
        self.number += 1
        before = subject.backend.export(subject.model)
        losses, weights = zip(*(exam.sums(batch) for batch in batches), strict=True)
        parts = [exam.gradients_of(batch) for batch in batches]
        metrics = self.step(batches, step=self.number, lr=trial_rates(subject, self.number))
        metrics = {key: float(metrics[key]) for key in ("loss", "grad_norm")}
        # a step may bring an objective of its own, which is not scaled
        scale = 1.0 if np.isclose(metrics["loss"], sum(losses) / sum(weights), rtol=1e-3) else self.scale
        parts = [times(part, scale) for part in parts]
        shares = [weight / sum(weights) for weight in weights]
        gradient = {
            n: np.sum([share * part[n] for share, part in zip(shares, parts, strict=True)], axis=0) for n in before
        }
        try:
            after, state = subject.backend.export(subject.model), self.step.export()
        except Exception as error:  # a trace left behind raises the framework's own
            raise Unreadable(str(error).splitlines()[0]) from error
        compiled = getattr(self.step, "num_compilations", 0) > 0
        return Observed(gradient, parts, before, after, state, metrics, compiled)


def trial_rates(subject: Subject, number: int) -> dict[str, float]:
    """A different learning rate for every group and step."""
    return {group: RATE * (1 + index) / number for index, group in enumerate(subject.spec.groups)}


def scaled(objective: Objective, factor: float) -> Objective:
    """The objective with its loss multiplied."""

    def louder(model: Any, batch: Batch) -> Sums:
        sums = objective(model, batch)
        return {**sums, "loss": sums["loss"] * factor}

    return louder


def adamw(
    subject: Subject,
    seen: Observed,
    number: int,
    *,
    bias_correction: bool = True,
    decays: bool | None = None,
    sign: float = 1.0,
) -> Arrays | None:
    """The step of AdamW (Loshchilov & Hutter 2019) from the moments after it; `decays` overrules the table."""
    (b1, b2), table, lr = subject.optim.betas, subject.spec.params(), trial_rates(subject, number)
    c1, c2 = (1 - b1**number, 1 - b2**number) if bias_correction else (1.0, 1.0)
    moves = {}
    for n, before in seen.before.items():
        if f"{n}.m" not in seen.state or f"{n}.v" not in seen.state:
            return None
        m, v = (seen.state[f"{n}.{k}"].astype(np.float64) for k in "mv")
        decayed = table[n].decay if decays is None else decays
        pull = subject.optim.weight_decay * before if decayed else 0.0
        moves[n] = -lr[table[n].group] * (sign * m / c1 / (np.sqrt(v / c2) + subject.optim.eps) + pull)
    return moves


def used_gradient(subject: Subject, state: Arrays) -> Arrays | None:
    """The gradient of a first step, from its first moment."""
    scale = 1 / (1 - subject.optim.betas[0])
    names = subject.spec.params()
    if any(f"{n}.m" not in state for n in names):
        return None
    return {n: scale * state[f"{n}.m"].astype(np.float64) for n in names}


def moments(names: Arrays, state: Arrays, kind: str = "m") -> Arrays:
    """First ("m") or second ("v") moments by parameter, float64."""
    return {n: state[f"{n}.{kind}"].astype(np.float64) for n in names}


def only(arrays: Arrays, names: Sequence[str]) -> Arrays:
    """Some of the arrays."""
    return {n: arrays[n] for n in names}


def clipped(subject: Subject, gradient: Arrays) -> Arrays:
    """The gradient after global-norm clipping as configured."""
    limit = subject.optim.grad_clip_norm
    return gradient if limit is None else times(gradient, min(1.0, limit / (norm_of(gradient) + 1e-6)))


def times(arrays: Arrays, factor: float) -> Arrays:
    """Every array multiplied, float64."""
    return {n: factor * array.astype(np.float64) for n, array in arrays.items()}


def norm_of(arrays: Arrays) -> float:
    """Global L2 norm."""
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays.values())))


def difference(a: Arrays, b: Arrays) -> float:
    """||a - b|| / ||b||."""
    return norm_of({n: a[n] - b[n] for n in b}) / max(norm_of(b), 1e-30)


def angle(a: Arrays, b: Arrays) -> float:
    """||a / |a| - b / |b|||: 0 where they point the same way."""
    sizes = norm_of(a), norm_of(b)
    if min(sizes) == 0:
        return 2.0
    return difference(times(a, 1 / sizes[0]), times(b, 1 / sizes[1]))


def ratio(a: np.ndarray, b: np.ndarray) -> float:
    """c of the best fit a = c b."""
    return float((a * b).sum() / np.square(b, dtype=np.float64).sum())

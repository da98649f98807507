"""Updates that go wrong: norm, clipping, accumulation, lost updates, compilation, resuming."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_training.backend import Arrays, Step
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import fault, is_torch
from tests.doctor.faults.steps_compiled import StateNotCaptured, StateNotReturned
from tests.doctor.faults.steps_numpy import NumpyStep


class Around:
    """A step whose calls go through a function; all else is the step's own."""

    def __init__(self, step: Step, call: Callable[..., dict[str, Any]]) -> None:
        self.step, self.call = step, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def __call__(self, batches: Sequence[Batch], **options: Any) -> dict[str, Any]:
        return self.call(self.step, batches, **options)


def around(subject: Subject, call: Callable[..., dict[str, Any]]) -> None:
    """Every call of a step becomes `call(take, batches, **options)`, where `take` is the step."""
    original = subject.make_step
    subject.make_step = lambda s: Around(original(s), call)  # type: ignore[assignment, return-value]


@fault("frozen_weights_changed")
def language_model_drifts(subject: Subject) -> None:
    """Every step renormalises the embeddings of the frozen language model in place."""

    def call(take: Step, batches: Sequence[Batch], **options: Any) -> dict[str, Any]:
        metrics = take(batches, **options)
        table = subject.model.lm.model.embed_tokens
        if is_torch(table):
            table.weight.data.mul_(1.001)
        else:
            table.weight = table.weight * 1.001
        return metrics

    around(subject, call)


@fault("norm_misreported")
def norm_over_top_level_entries(subject: Subject) -> None:
    """The norm is taken over (path, array) pairs, none of which is an array: 0.00 for a week."""
    around(subject, lambda take, batches, **options: (m := take(batches, **options)) | {"grad_norm": m["loss"] * 0})


@fault("norm_misreported")
def norm_after_clipping(subject: Subject) -> None:
    """The norm is measured after clipping, so that it never exceeds the limit, and nobody sees a spike."""

    class Step(NumpyStep):
        def reported(self, norm: float, gradients: Arrays) -> float:
            clipped = self.clipped(gradients, norm)
            return math.sqrt(sum(float((g**2).sum()) for g in clipped.values()))

    subject.make_step = Step


@fault("norm_misreported")
def norm_without_lists(subject: Subject) -> None:
    """The recursion over the gradients knows dictionaries and not lists: the encoder's layers are left out."""

    class Step(NumpyStep):
        def reported(self, norm: float, gradients: Arrays) -> float:
            return math.sqrt(sum(float((g**2).sum()) for name, g in gradients.items() if ".layers." not in name))

    subject.make_step = Step


@fault("clip_ignored")
def clipping_not_passed_on(subject: Subject) -> None:
    """grad_clip_norm stands in the configuration, and the trainer never reads it."""
    subject.make_step = lambda s: replace(s, optim=replace(s.optim, grad_clip_norm=None)).default_step()


@fault("clip_wrong")
def clipped_one_by_one(subject: Subject) -> None:
    """Every parameter is clipped by its own norm, which turns the gradient."""

    class Step(NumpyStep):
        def clipped(self, gradients: Arrays, norm: float) -> Arrays:
            each = {name: float(np.linalg.norm(g)) for name, g in gradients.items()}
            return {name: NumpyStep.clipped(self, {name: g}, each[name])[name] for name, g in gradients.items()}

    subject.make_step = Step


@fault("clip_wrong")
def clipped_by_the_sum_of_norms(subject: Subject) -> None:
    """The norms of all parameters are added up in place of their squares."""

    class Step(NumpyStep):
        def clipped(self, gradients: Arrays, norm: float) -> Arrays:
            return super().clipped(gradients, sum(float(np.linalg.norm(g)) for g in gradients.values()))

    subject.make_step = Step


@fault("gradients_accumulate")
def gradients_never_cleared(subject: Subject) -> None:
    """zero_grad is missing."""

    class Step(NumpyStep):
        total: Arrays = {}

        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            new = super().gradients(batches, weights)
            self.total = {name: self.total.get(name, 0.0) + gradient for name, gradient in new.items()}
            return self.total

    subject.make_step = Step


@fault("update_discarded", where="projector", backends=("torch",))
def module_replaced_after_the_optimizer(subject: Subject) -> None:
    """The projector is swapped after the optimiser was built, which goes on training the old one."""

    def make(s: Subject) -> Step:
        import copy

        step = s.default_step()
        s.model.projector = copy.deepcopy(s.model.projector)
        return step

    subject.make_step = make


@fault("update_discarded")
def parameters_not_written_back(subject: Subject) -> None:
    """A functional update whose result is thrown away."""

    class Step(NumpyStep):
        def write(self, arrays: Arrays) -> None:
            pass

    subject.make_step = Step


@fault("update_discarded", where="projector")
def half_of_the_update_discarded(subject: Subject) -> None:
    """Only the encoder's new parameters are written back; the projector keeps its initial values."""

    class Step(NumpyStep):
        def write(self, arrays: Arrays) -> None:
            old = self.backend.export(self.model)
            super().write({name: old[name] if "projector" in name else array for name, array in arrays.items()})

    subject.make_step = Step


@fault("accumulation_wrong")
def mean_of_means(subject: Subject) -> None:
    """Every micro-batch is divided by its own count and then by the number of micro-batches."""

    class Step(NumpyStep):
        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            return super().gradients(batches, [1.0] * len(weights))

    subject.make_step = Step


@fault("accumulation_wrong")
def accumulation_not_divided(subject: Subject) -> None:
    """Gradients of micro-batches are added up as means: k of them are k times too large."""

    class Step(NumpyStep):
        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            return {name: g * len(batches) for name, g in super().gradients(batches, weights).items()}

    subject.make_step = Step


@fault("micro_batches_dropped")
def last_micro_batch_only(subject: Subject) -> None:
    """Gradients are cleared before every micro-batch in place of every step."""
    around(subject, lambda take, batches, **options: take(batches[-1:], **options))


@fault("compiled_differs", backends=("mlx",))
def state_not_captured(subject: Subject) -> None:
    """Model and optimiser are no inputs of mx.compile: every later step repeats the first."""
    subject.make_step = StateNotCaptured


@fault("parameters_unreadable", backends=("mlx",))
def parameters_left_in_the_trace(subject: Subject) -> None:
    """mx.compile without outputs: it fails when a parameter is read, at the first checkpoint."""
    subject.make_step = StateNotReturned


@fault("ascent")
def update_added(subject: Subject) -> None:
    """The update is added in place of subtracted."""

    class Step(NumpyStep):
        def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
            return -super().direction(name, gradient)

    subject.make_step = Step


@fault("resume_differs", level="full")
def moments_not_restored(subject: Subject) -> None:
    """The checkpoint holds the moments, and loading puts zeros in their place."""

    class Step(NumpyStep):
        def load(self, arrays: Arrays) -> None:
            super().load({name: array * 0 if name[-2:] in (".m", ".v") else array for name, array in arrays.items()})

    subject.make_step = Step


@fault("resume_differs", level="full")
def step_count_not_restored(subject: Subject) -> None:
    """The moments come back and the number of steps does not: bias correction starts over."""

    class Step(NumpyStep):
        def load(self, arrays: Arrays) -> None:
            super().load(arrays | {"step": np.zeros((), np.float32)})

    subject.make_step = Step

"""Unseen faults in the step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.heldout.registry import fault
from tests.doctor.faults.steps_compiled import CompiledStep
from tests.doctor.faults.steps_numpy import NumpyStep
from tests.doctor.faults.update import around


def stepping(subject: Subject, kind: type[NumpyStep]) -> None:
    """Steps of a subclass of NumpyStep."""
    subject.make_step = kind


@fault("norm_misreported")
def norm_of_the_last_micro_batch(subject: Subject) -> None:
    """The norm is taken of the gradient that came last, not of the sum."""

    class Own(NumpyStep):
        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            self.last = super().gradients(batches[-1:], weights[-1:])
            return super().gradients(batches, weights)

        def reported(self, norm: float, gradients: Arrays) -> float:
            return math.sqrt(sum(float((g**2).sum()) for g in self.last.values()))

    stepping(subject, Own)


@fault("norm_misreported")
def norm_without_its_root(subject: Subject) -> None:
    """The sum of squares is reported."""

    class Own(NumpyStep):
        def reported(self, norm: float, gradients: Arrays) -> float:
            return norm**2

    stepping(subject, Own)


@fault("clip_wrong", "clip_ignored")
def clipped_at_ten_times_the_limit(subject: Subject) -> None:
    """The limit is 10 where the configuration says 1."""
    limit = 10 * (subject.optim.grad_clip_norm or 1.0)
    subject.make_step = lambda s: replace(s, optim=replace(s.optim, grad_clip_norm=limit)).default_step()


@fault("clip_wrong")
def clipped_by_group(subject: Subject) -> None:
    """Encoder, projector and head are clipped apart, each by its own norm."""

    class Own(NumpyStep):
        def clipped(self, gradients: Arrays, norm: float) -> Arrays:
            result: Arrays = {}
            for group in dict.fromkeys(param.group for param in self.table.values()):
                part = {name: g for name, g in gradients.items() if self.table[name].group == group}
                result |= super().clipped(part, math.sqrt(sum(float((g**2).sum()) for g in part.values())))
            return result

    stepping(subject, Own)


@fault("learning_rate_wrong")
def rates_of_two_groups_swapped(subject: Subject) -> None:
    """Encoder and projector get each other's learning rate."""
    around(
        subject,
        lambda take, batches, lr, **options: take(
            batches, lr={**lr, "encoder": lr["projector"], "projector": lr["encoder"]}, **options
        ),
    )


@fault("learning_rate_wrong")
def rate_read_once(subject: Subject) -> None:
    """The rate of the first step is captured by the closure and used for ever."""

    def make(s: Subject) -> Any:
        step = original(s)
        first: dict[str, Any] = {}

        def call(batches: Sequence[Batch], *, lr: dict[str, float], **options: Any) -> dict[str, Any]:
            first.setdefault("lr", dict(lr))
            return step(batches, lr=first["lr"], **options)

        class Once:
            def __getattr__(self, name: str) -> Any:
                return getattr(step, name)

            def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
                return call(*args, **kwargs)

        return Once()

    original = subject.make_step
    subject.make_step = make


@fault("learning_rate_zero")
def schedule_counts_epochs(subject: Subject) -> None:
    """The schedule was given the number of epochs as its length: from step 12 on the rate is zero."""
    rates = subject.rates
    subject.rates = lambda step: {group: rate * max(0.0, 1 - step / 12) for group, rate in rates(step).items()}


@fault("update_wrong")
def decay_twice(subject: Subject) -> None:
    """Both the optimiser and a hook of the trainer apply weight decay."""

    class Own(NumpyStep):
        def updated(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
            return super().updated(name, value, gradient, rate) - rate * self.decay(name) * value

    stepping(subject, Own)


@fault("update_wrong")
def decay_without_the_rate(subject: Subject) -> None:
    """Weights are multiplied by 1 - decay / 10 whatever the learning rate is."""

    class Own(NumpyStep):
        def updated(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
            return value * (1 - 0.1 * self.decay(name)) - rate * self.direction(name, gradient)

    stepping(subject, Own)


@fault("decay_ignored", where="projector")
def decay_of_one_group_lost(subject: Subject) -> None:
    """The group of the projector is made without weight_decay."""

    class Own(NumpyStep):
        def decay(self, name: str) -> float:
            return 0.0 if "projector" in name else super().decay(name)

    stepping(subject, Own)


@fault("decay_everywhere", where="pos_embed")
def positions_decay_too(subject: Subject) -> None:
    """The rule `more than one dimension` lets the learned positions decay, which the table exempts."""

    class Own(NumpyStep):
        def decay(self, name: str) -> float:
            return self.optim.weight_decay if len(self.table[name].shape) > 1 else 0.0

    stepping(subject, Own)


@fault("update_wrong")
def momentum_of_another_size(subject: Subject) -> None:
    """beta1 is 0.5, left from a GAN."""

    class Own(NumpyStep):
        def betas(self) -> tuple[float, float]:
            return 0.5, super().betas()[1]

    stepping(subject, Own)


@fault("update_wrong")
def epsilon_inside_the_root(subject: Subject) -> None:
    """sqrt(v + eps) in place of sqrt(v) + eps."""

    class Own(NumpyStep):
        def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
            super().direction(name, gradient)
            first, second = self.corrections()
            return (self.m[name] / first) / np.sqrt(self.v[name] / second + self.optim.eps)

    stepping(subject, Own)


@fault("no_bias_correction", "update_wrong")
def second_moment_not_corrected(subject: Subject) -> None:
    """Only the first moment is divided by its correction."""

    class Own(NumpyStep):
        def corrections(self) -> tuple[float, float]:
            return super().corrections()[0], 1.0

    stepping(subject, Own)


@fault("update_wrong")
def state_in_half_precision(subject: Subject) -> None:
    """Moments are kept in float16, where squares of small gradients are zero."""

    class Own(NumpyStep):
        def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
            super().direction(name, gradient)
            for moments in (self.m, self.v):
                moments[name] = moments[name].astype(np.float16).astype(np.float64)
            first, second = self.corrections()
            return (self.m[name] / first) / (np.sqrt(self.v[name] / second) + self.optim.eps)

    stepping(subject, Own)


@fault("state_lost", "update_wrong")
def second_moment_lost(subject: Subject) -> None:
    """The second moment is not part of the state that is handed on: every step starts it at zero."""

    class Own(NumpyStep):
        def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
            self.v[name] = self.v[name] * 0
            return super().direction(name, gradient)

    stepping(subject, Own)


@fault("ascent", "update_wrong")
def one_group_goes_up(subject: Subject) -> None:
    """An adversarial experiment left the sign of the encoder's update reversed."""

    class Own(NumpyStep):
        def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
            return super().direction(name, gradient) * (-1 if name.startswith("encoder") else 1)

    stepping(subject, Own)


@fault("accumulation_wrong")
def first_micro_batch_twice(subject: Subject) -> None:
    """The gradient of the first micro-batch is the start of the sum, and is added once more."""

    class Own(NumpyStep):
        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            total, scale = super().gradients(batches, weights), weights[0] / sum(weights)
            first = super().gradients(batches[:1], weights[:1])
            return {name: g + scale * first[name] * (len(batches) > 1) for name, g in total.items()}

    stepping(subject, Own)


@fault("micro_batches_dropped")
def first_micro_batch_only(subject: Subject) -> None:
    """Loss and count are of all micro-batches, the gradient of the first alone."""

    class Own(NumpyStep):
        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            return super().gradients(batches[:1], weights[:1])

    stepping(subject, Own)


@fault("gradients_accumulate", where="projector")
def one_group_never_cleared(subject: Subject) -> None:
    """zero_grad is called on the encoder's optimiser, and the projector has its own."""

    class Own(NumpyStep):
        total: Arrays = {}

        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            new = super().gradients(batches, weights)
            old = {name: g for name, g in self.total.items() if "projector" in name}
            self.total = {name: g + old.get(name, 0.0) for name, g in new.items()}
            return self.total

    stepping(subject, Own)


@fault("update_discarded")
def no_update_after_the_second_step(subject: Subject) -> None:
    """The model is copied for evaluation after two steps, and training goes on with the copy."""

    class Own(NumpyStep):
        def write(self, arrays: Arrays) -> None:
            if self.taken <= 2:
                super().write(arrays)

    stepping(subject, Own)


@fault("update_discarded", where="encoder.layers.1.linear2")
def one_matrix_never_written(subject: Subject) -> None:
    """A name is misspelt when new parameters are written back: one matrix stays as it was."""

    class Own(NumpyStep):
        def write(self, arrays: Arrays) -> None:
            name = "encoder.layers.1.linear2.weight"
            super().write({**arrays, name: self.backend.export(self.model)[name]})

    stepping(subject, Own)


@fault("compiled_differs", backends=("mlx",))
def step_count_is_a_constant(subject: Subject) -> None:
    """The number of steps is no input of mx.compile: bias correction stays at the first step."""

    class Own(CompiledStep):
        def run(self, arrays: list[dict[str, Any]], rates: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            import mlx.core as mx

            if not hasattr(self, "constant"):
                count = self.taken
                step = lambda state, arrays, rates: self.take([*state, count], arrays, rates)  # noqa: E731
                self.constant = mx.compile(step, mx.random.state, mx.random.state)
            return self.constant(self.state()[:3], arrays, rates)

    subject.make_step = Own


@fault("resume_differs", level="full")
def moments_loaded_into_the_neighbour(subject: Subject) -> None:
    """Moments are matched by order and shape: those of two norms are exchanged."""

    class Own(NumpyStep):
        def load(self, arrays: Arrays) -> None:
            def other(name: str) -> str:
                for a, b in (("norm1", "norm2"), ("norm2", "norm1")):
                    if a in name:
                        return name.replace(a, b)
                return name

            super().load({name: arrays[other(name)] for name in arrays})

    stepping(subject, Own)


@fault("resume_differs", level="full")
def second_moments_saved_in_half(subject: Subject) -> None:
    """The exported second moments are float16: small ones come back as zero."""

    class Own(NumpyStep):
        def export(self) -> Arrays:
            half = super().export().items()
            return {n: a.astype(np.float16).astype(np.float32) if n.endswith(".v") else a for n, a in half}

    stepping(subject, Own)

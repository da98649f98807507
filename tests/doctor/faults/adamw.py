"""Optimisers that are not the AdamW that was configured: learning rates, decay, moments."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import fault
from tests.doctor.faults.steps_numpy import NumpyStep
from tests.doctor.faults.update import around


@fault("learning_rate_zero", where="encoder")
def encoder_group_at_zero(subject: Subject) -> None:
    """The scheduler knows one group; the other one keeps the rate 0 that it was created with."""
    rates = subject.rates
    subject.rates = lambda step: {**rates(step), "encoder": 0.0}


@fault("learning_rate_zero")
def integer_division_in_the_schedule(subject: Subject) -> None:
    """step // total_steps is 0 until the last step, and so is the rate."""
    rates, total = subject.rates, subject.total_steps
    subject.rates = lambda step: {group: rate * (step // (total + 1)) for group, rate in rates(step).items()}


@fault("learning_rate_wrong")
def schedule_without_effect(subject: Subject) -> None:
    """The schedule is computed and logged, and the optimiser keeps its own constant rate."""
    around(subject, lambda take, batches, lr, **options: take(batches, lr=dict.fromkeys(lr, 1e-3), **options))


@fault("learning_rate_wrong")
def rate_of_one_group_for_all(subject: Subject) -> None:
    """All groups get the rate of the first."""
    around(subject, lambda take, batches, lr, **o: take(batches, lr=dict.fromkeys(lr, next(iter(lr.values()))), **o))


@fault("no_bias_correction")
def adam_without_bias_correction(subject: Subject) -> None:
    """MLX's AdamW has bias_correction=False by default: the first step is 3.16 times too long."""

    class Step(NumpyStep):
        def corrections(self) -> tuple[float, float]:
            return 1.0, 1.0

    subject.make_step = Step


@fault("decay_coupled")
def decay_in_the_gradient(subject: Subject) -> None:
    """Adam with weight_decay in place of AdamW."""

    class Step(NumpyStep):
        def updated(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
            return value - rate * self.direction(name, gradient + self.decay(name) * value)

    subject.make_step = Step


@fault("decay_ignored")
def decay_not_passed_on(subject: Subject) -> None:
    """weight_decay is read under another key and stays at its default of zero."""
    subject.make_step = lambda s: replace(s, optim=replace(s.optim, weight_decay=0.0)).default_step()


@fault("decay_everywhere", where="norm")
def decay_on_norms_and_biases(subject: Subject) -> None:
    """One parameter group for all: norms and biases are pulled to zero as well."""

    class Step(NumpyStep):
        def decay(self, name: str) -> float:
            return self.optim.weight_decay

    subject.make_step = Step


@fault("state_lost")
def optimizer_made_anew_every_step(subject: Subject) -> None:
    """The optimiser is created inside the loop: no moment survives a step."""

    class Step(NumpyStep):
        def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
            self.load({name: array * 0 for name, array in self.export().items()})
            return super().gradients(batches, weights)

    subject.make_step = Step


@fault("update_wrong")
def betas_swapped(subject: Subject) -> None:
    """The two decay rates are passed in the wrong order."""

    class Step(NumpyStep):
        def betas(self) -> tuple[float, float]:
            beta1, beta2 = super().betas()
            return beta2, beta1

    subject.make_step = Step


@fault("learning_rate_too_small")
def rate_in_another_unit(subject: Subject) -> None:
    """The rate is a millionth of what was meant: everything moves, and nothing is learnt."""
    rates = subject.rates
    subject.rates = lambda step: {group: 1e-6 * rate for group, rate in rates(step).items()}

"""Objectives: what is minimised, written once for both backends.

An objective is a function (model, batch) -> sums. It returns sums and counts, never a mean: the step divides once,
after accumulation, so that k micro-batches equal one large batch and short tails do not weigh more.
"""

from collections.abc import Callable
from typing import Any

from mlx_training.data.batch import Batch

Array = Any  # mx.array or torch.Tensor; an objective uses only operators and methods that both have
Sums = dict[str, Array]  # "loss": the sum to minimise, "weight": what it is divided by
Objective = Callable[[Any, Batch], Sums]

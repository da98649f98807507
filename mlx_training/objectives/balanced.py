"""Next-token prediction with experts that share the work."""

from typing import Any

from mlx_training.data.batch import Batch
from mlx_training.objectives import Objective, Sums
from mlx_training.objectives.lm import lm
from mlx_training.spec import DecoderSpec, Spec


def balanced_lm(model: Any, batch: Batch) -> Sums:
    """`lm`, plus what the model says about its experts' balance, times the number of tokens."""
    sums = lm(model, batch)
    return sums | {"loss": sums["loss"] + sums["weight"] * model.aux_loss()}


def training_objective(spec: Spec) -> Objective:
    """What a spec is trained with; it is evaluated with `lm` always."""
    return balanced_lm if isinstance(spec, DecoderSpec) and spec.experts else lm

"""Next-token prediction; supervised fine-tuning is the same with a mask."""

from typing import Any

from mlx_training.data.batch import Batch
from mlx_training.objectives import Sums


def lm(model: Any, batch: Batch) -> Sums:
    """Negative log-likelihood in nats, summed over the supervised tokens, and their number."""
    logprobs_BK = model.logprobs(batch)
    return {"loss": -(logprobs_BK * batch.mask).sum(), "weight": batch.mask.sum()}

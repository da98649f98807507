"""Learning-rate schedules: step -> factor of the peak learning rate."""

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def factor(kind: Schedule, step: int, total_steps: int, num_warmup_steps: int, min_fraction: float = 0.0) -> float:
    """Factor for step `step` of 1..total_steps.

    Warm-up rises linearly and reaches 1 at step `num_warmup_steps`. Then "cosine" and "linear" fall to `min_fraction`
    at the step after the last, so that no step is taken at a rate of zero; "constant" stays at 1.
    """
    if step <= num_warmup_steps:
        return step / num_warmup_steps
    if kind == "constant":
        return 1.0
    progress = (step - num_warmup_steps) / (total_steps + 1 - num_warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    return min_fraction + (1 - min_fraction) * fall

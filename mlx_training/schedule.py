"""Learning-rate schedules: step -> factor of the peak learning rate, a pure function."""

import math
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["cosine", "linear", "constant", "step", "wsd", "inverse_sqrt"]

# What each schedule reads beside the warm-up, and what it is unless given.
SETTINGS: dict[str, dict[str, Any]] = {
    "cosine": {"min_lr_fraction": 0.0},
    "linear": {"min_lr_fraction": 0.0},
    "constant": {},
    "step": {"milestones": (0.5, 0.75), "gamma": 0.1},
    "wsd": {"decay_fraction": 0.2, "decay_shape": "linear", "min_lr_fraction": 0.0},
    "inverse_sqrt": {},
}


@dataclass(frozen=True)
class Schedule:
    """Warm-up rises linearly and reaches 1 at its last step. After it:

    - "constant" stays at 1.
    - "cosine" and "linear" fall to `min_lr_fraction`.
    - "step" is multiplied by `gamma` after each milestone, a share of all steps.
    - "wsd" (warm-up, stable, decay) stays at 1 and falls in the last `decay_fraction` of all steps, in a line or as
      1 - sqrt (Haegele et al. 2024).
    - "inverse_sqrt" is sqrt(W / step) with W steps of warm-up, at least 1 (Vaswani et al. 2017).

    What falls to an end gets there at the step after the last, so that no step is taken at a rate of zero.
    """

    kind: Kind = "cosine"
    warmup: float | int = 0.0  # a share of all steps, or (int) their number
    min_lr_fraction: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 1.0
    decay_fraction: float = 0.0
    decay_shape: Literal["linear", "sqrt"] = "linear"

    def factor(self, step: int, total_steps: int) -> float:
        """Factor for step `step` of 1..total_steps."""
        num_warmup = self.warmup if isinstance(self.warmup, int) else round(self.warmup * total_steps)
        if step <= num_warmup:
            return step / num_warmup
        match self.kind:
            case "cosine" | "linear":
                return self._fallen(step, num_warmup, total_steps)
            case "step":
                return self.gamma ** sum(step > round(share * total_steps) for share in self.milestones)
            case "wsd":
                start = max(num_warmup, total_steps - round(self.decay_fraction * total_steps))
                return self._fallen(max(step, start), start, total_steps)
            case "inverse_sqrt":
                return math.sqrt(max(num_warmup, 1) / step)
            case _:
                return 1.0

    def _fallen(self, step: int, start: int, total_steps: int) -> float:
        progress = (step - start) / (total_steps + 1 - start)
        if self.kind == "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            fall = 1 - (math.sqrt(progress) if self.decay_shape == "sqrt" else progress)
        return self.min_lr_fraction + (1 - self.min_lr_fraction) * fall

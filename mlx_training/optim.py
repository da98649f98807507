"""Optimisers by name: the settings each one reads, what it keeps of a parameter, and which parameters it moves how.

Both backends realise the definitions in their `optimizers.py`; `diagnostics.optimizers` has them in NumPy.

- adam, sgd, adagrad, rmsprop: PyTorch's. Weight decay is added to the gradient (after clipping).
- adamw (Loshchilov & Hutter 2019), lion (Chen et al. 2023): decay is decoupled, as in the two below.
- adafactor (Shazeer & Stern 2018) with the learning rate that is given: no relative step, no scaling by the
  parameter, no first moment; updates clipped at an RMS of 1, decay rate 1 - t^-0.8.
- muon (Jordan 2024) for hidden matrices: Nesterov momentum, five Newton-Schulz steps in float32, times
  0.2 sqrt(max(rows, columns)) (Liu et al. 2025), which makes an update as large as AdamW's; all else is AdamW's.

Beside any of them the weights may be averaged (Polyak & Juditsky 1992): an exponential mean over the steps taken,
average += (weights - average) (1 - d) / (1 - d^t), which is the mean of all of them while they are few.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from mlx_training.spec import Param, Spec

Name = Literal["adamw", "adam", "sgd", "adagrad", "rmsprop", "lion", "adafactor", "muon"]
Shape = tuple[int, ...]

# What each optimiser reads beside the learning rate and clipping, and what it is unless given.
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "sgd": {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0},
    "adagrad": {"eps": 1e-8, "weight_decay": 0.0},
    "rmsprop": {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "weight_decay": 0.0},
    "lion": {"betas": (0.9, 0.99), "weight_decay": 0.01},
    "adafactor": {"eps": 1e-30, "weight_decay": 0.0},
    "muon": {"momentum": 0.95, "nesterov": True, "muon_lr_factor": 1.0}
    | {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
}
COUPLED = ("adam", "sgd", "adagrad", "rmsprop")  # weight decay is part of the gradient
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz polynomial a x + b x^3 + c x^5
MUON_STEPS, MUON_EPS, MUON_SCALE = 5, 1e-7, 0.2
ADAFACTOR_DECAY, ADAFACTOR_CLIP = -0.8, 1.0


@dataclass(frozen=True)
class Optim:
    """An optimiser and its settings; global-norm clipping comes before it, averaging of the weights after it."""

    name: Name = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    alpha: float = 0.99
    muon_lr_factor: float = 1.0
    ema_decay: float | None = None

    def rule(self, param: Param) -> str:
        """The name of the rule that moves a parameter: under muon, AdamW's for what is no hidden matrix."""
        return "adamw" if self.name == "muon" and not param.hidden else self.name

    def rate_factor(self, param: Param) -> float:
        """What the learning rate of a parameter's group is multiplied by."""
        return self.muon_lr_factor if self.rule(param) == "muon" else 1.0

    def decay(self, param: Param) -> float:
        """Weight decay of a parameter."""
        return self.weight_decay if param.decay else 0.0

    def state(self, param: Param) -> dict[str, Shape]:
        """Shapes of what is kept of a parameter between steps, float32: "m" first moment or momentum, "v" mean or
        sum of squares, "row" and "col" their means over columns and rows of the last two axes.
        """
        shape = param.shape
        match self.rule(param):
            case "adamw" | "adam":
                return {"m": shape, "v": shape}
            case "sgd":
                return {"m": shape} if self.momentum else {}
            case "rmsprop":
                return {"m": shape, "v": shape} if self.momentum else {"v": shape}
            case "adagrad":
                return {"v": shape}
            case "adafactor" if len(shape) > 1:
                return {"row": shape[:-1], "col": (*shape[:-2], shape[-1])}
            case "adafactor":
                return {"v": shape}
            case _:
                return {"m": shape}

    def state_shapes(self, spec: Spec) -> dict[str, Shape]:
        """Every array of the exported state: "<parameter>.<key>" and "step".

        Where weights are averaged, the averages are the model's, and the key "raw" holds the weights that train.
        """
        kept = {name: self.state(param) for name, param in spec.params().items()}
        if self.ema_decay is not None:
            kept = {name: state | {"raw": spec.params()[name].shape} for name, state in kept.items()}
        return {f"{name}.{key}": shape for name, state in kept.items() for key, shape in state.items()} | {"step": ()}

    def state_size(self, spec: Spec) -> int:
        """Elements of the state."""
        return sum(map(prod, self.state_shapes(spec).values())) - 1

"""An optimiser step in NumPy over `backend.gradients`: the same on both frameworks, with parts to get wrong."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.subject import Subject


class NumpyStep:
    """AdamW with global-norm clipping, dropout off. As it stands it is right; a fault overrides one method."""

    num_compilations = 0

    def __init__(self, subject: Subject) -> None:
        self.backend, self.model, self.objective = subject.backend, subject.model, subject.objective
        self.optim, self.table = subject.optim, subject.spec.params()
        self.m: Arrays = {name: np.zeros(param.shape) for name, param in self.table.items()}
        self.v: Arrays = {name: np.zeros(param.shape) for name, param in self.table.items()}
        self.taken = 0

    def __call__(
        self, batches: Sequence[Batch], *, step: int, lr: Mapping[str, float], probe: bool = False
    ) -> dict[str, Any]:
        sums = [self.backend.score(self.model, self.objective, batch) for batch in batches]
        loss, weight = sum(s["loss"] for s in sums), sum(s["weight"] for s in sums)
        gradients = self.gradients(batches, [s["weight"] for s in sums])
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        metrics: dict[str, Any] = {"loss": loss / weight, "weight": weight, "skipped": 0.0}
        metrics["grad_norm"] = self.reported(norm, gradients)
        before = self.backend.export(self.model)
        after = dict(before)
        if math.isfinite(loss) and math.isfinite(norm):
            self.taken += 1
            for name, gradient in self.clipped(gradients, norm).items():
                rate = lr[self.table[name].group]
                after[name] = self.updated(name, before[name].astype(np.float64), gradient, rate).astype(np.float32)
            self.write(after)
        else:
            metrics["skipped"] = 1.0
        if probe:
            metrics["probe"] = {name: self.probe(name, gradients[name], before[name], after[name]) for name in before}
        return metrics

    def gradients(self, batches: Sequence[Batch], weights: Sequence[float]) -> Arrays:
        """d(sum of losses / sum of weights): `backend.gradients` are means over one batch."""
        total = {name: np.zeros(param.shape) for name, param in self.table.items()}
        for batch, weight in zip(batches, weights, strict=True):
            for name, gradient in self.backend.gradients(self.model, self.objective, batch).items():
                total[name] += gradient * (weight / sum(weights))
        return total

    def reported(self, norm: float, gradients: Arrays) -> float:
        """The gradient norm that metrics show."""
        return norm

    def clipped(self, gradients: Arrays, norm: float) -> Arrays:
        """All gradients scaled by one factor, so that their norm is within the limit."""
        limit = self.optim.grad_clip_norm
        factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        return {name: gradient * factor for name, gradient in gradients.items()}

    def updated(self, name: str, value: np.ndarray, gradient: np.ndarray, rate: float) -> np.ndarray:
        """Decoupled decay, then Adam."""
        return value * (1 - rate * self.decay(name)) - rate * self.direction(name, gradient)

    def decay(self, name: str) -> float:
        """Weight decay of one parameter."""
        return self.optim.weight_decay if self.table[name].decay else 0.0

    def direction(self, name: str, gradient: np.ndarray) -> np.ndarray:
        """Adam's update for a rate of 1."""
        beta1, beta2 = self.betas()
        self.m[name] = beta1 * self.m[name] + (1 - beta1) * gradient
        self.v[name] = beta2 * self.v[name] + (1 - beta2) * gradient**2
        first, second = self.corrections()
        return (self.m[name] / first) / (np.sqrt(self.v[name] / second) + self.optim.eps)

    def betas(self) -> tuple[float, float]:
        """Decay rates of the moments."""
        return self.optim.betas

    def corrections(self) -> tuple[float, float]:
        """What the moments are divided by, because they start at zero."""
        beta1, beta2 = self.betas()
        return 1 - beta1**self.taken, 1 - beta2**self.taken

    def write(self, arrays: Arrays) -> None:
        """New parameters into the model."""
        self.backend.load(self.model, arrays)

    def probe(self, name: str, gradient: np.ndarray, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
        """What a step with probe=True says about one parameter."""
        norms = {"grad": gradient, "param": after, "update": after - before, "m": self.m[name], "v": self.v[name]}
        figures = {f"{key}_norm": float(np.linalg.norm(values)) for key, values in norms.items()}
        return figures | {"zeros": float((gradient == 0).mean()), "nonfinite": int((~np.isfinite(gradient)).sum())}

    def export(self) -> Arrays:
        """Moments by canonical name, and the number of steps."""
        moments = {f"{name}.{k}": getattr(self, k)[name].astype(np.float32) for name in self.table for k in "mv"}
        return moments | {"step": np.asarray(self.taken, np.float32)}

    def load(self, arrays: Arrays) -> None:
        """Take over what `export` returned."""
        self.taken = int(arrays["step"])
        for name in self.table:
            self.m[name], self.v[name] = (arrays[f"{name}.{k}"].astype(np.float64) for k in "mv")

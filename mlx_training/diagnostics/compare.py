"""Two realisations of one model, layer by layer: outputs in order of execution, loss, gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlx_training.backend import Arrays, Backend
from mlx_training.data.batch import Batch
from mlx_training.objectives import Objective

LOSS, GRADIENT = "loss", "gradient of "


class Difference(NamedTuple):
    """||a - b|| / ||b|| of one thing that both compute; infinite where shapes or non-finite places differ."""

    path: str
    relative: float


@dataclass(frozen=True)
class Comparison:
    """Outputs of the modules that both have, in order of execution; then "loss" and "gradient of <parameter>"."""

    rows: tuple[Difference, ...]

    @property
    def largest(self) -> float:
        """The largest difference."""
        return max(row.relative for row in self.rows)

    def first_divergence(self, tolerance: float) -> str | None:
        """The first row beyond the tolerance: a module, "loss" or "gradient of <parameter>"."""
        return next((row.path for row in self.rows if not row.relative <= tolerance), None)

    def table(self, tolerance: float) -> str:
        """One line a row, those beyond the tolerance marked."""
        width = max(len(row.path) for row in self.rows)
        lines = [f"{path.ljust(width)}  {d:.2e}{'' if d <= tolerance else '  <--'}" for path, d in self.rows]
        return "\n".join(lines)


def compare(a: Backend, model_a: Any, b: Backend, model_b: Any, objective: Objective, batch: Batch) -> Comparison:
    """Run both on one batch, with dropout off; the models must hold the same values.

    Parts of parameters whose true gradient is zero (the specs say which) hold rounding noise and are left out.
    """
    outputs_a, outputs_b = a.activations(model_a, objective, batch), b.activations(model_b, objective, batch)
    common = _in_order([path for path in outputs_b if path in outputs_a])
    rows = [Difference(path, relative(outputs_a[path], outputs_b[path])) for path in common]
    losses = [
        sums["loss"] / sums["weight"]
        for sums in (a.score(model_a, objective, batch), b.score(model_b, objective, batch))
    ]
    rows.append(Difference(LOSS, relative(*map(np.asarray, losses))))
    gradients_a, gradients_b = (_gradients(x, model, objective, batch) for x, model in ((a, model_a), (b, model_b)))
    for name in gradients_b:
        if name in gradients_a:
            rows.append(Difference(GRADIENT + name, relative(gradients_a[name], gradients_b[name])))
    return Comparison(tuple(rows))


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b|| in float64; 0 where both are zero."""
    finite = np.isfinite(b)
    if a.shape != b.shape or not np.array_equal(np.isfinite(a), finite):
        return float("inf")
    a, b = np.where(finite, a, 0).astype(np.float64), np.where(finite, b, 0).astype(np.float64)
    difference, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    return difference / size if size else float("inf") if difference else 0.0


def _in_order(paths: Sequence[str]) -> list[str]:
    """`activations` puts "inputs" at the end; they are computed before the language model's first layer."""
    if "inputs" not in paths:
        return list(paths)
    others = [path for path in paths if path != "inputs"]
    is_layer = (path.startswith(("lm.model.layers.", "model.layers.")) for path in others)
    place = next((i for i, found in enumerate(is_layer) if found), len(others) - 1)
    return [*others[:place], "inputs", *others[place:]]


def _gradients(backend: Backend, model: Any, objective: Objective, batch: Batch) -> Arrays:
    gradients = backend.gradients(model, objective, batch)
    for name, part in model.spec.zero_gradients().items():
        gradients[name] = np.delete(gradients[name], np.arange(len(gradients[name]))[part], axis=0)
    return gradients

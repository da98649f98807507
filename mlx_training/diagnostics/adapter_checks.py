"""Checks of adapters: each one is applied, to its own Linear, by alpha / r. Seen in activations, without a gradient."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.diagnostics.exam import Check, Exam
from mlx_training.diagnostics.report import Finding, failed, passed
from mlx_training.spec import AdapterSpec

SAME = {"float32": 1e-2, "bfloat16": 0.1}  # relative
MAX_OUTPUTS = 16  # of a Linear that are looked at


def adapters(exam: Exam) -> list[Finding]:
    """With an A that marks its layer and a random B, every Linear puts out base + alpha / r * B A x."""
    name, subject = "adapters", exam.subject
    spec: AdapterSpec | None = getattr(subject.spec, "adapter", None)
    if spec is None:
        return []
    marks, marked = _marked(exam, spec)
    with subject.restored():
        subject.backend.load(subject.model, marked)
        outputs = subject.backend.activations(subject.model, subject.objective, exam.batches[0])
    tolerance = SAME[subject.backend.runtime.precision]
    idle, swapped, factors = [], [], {}
    for path, *_ in spec.linears:
        y, base, low = (outputs.get(f"lm.{path}{part}") for part in ("", ".base_layer", ".lora_A"))
        if y is None or base is None or low is None or np.array_equal(y, base):
            idle.append(f"lm.{path}")
            continue
        change = _flat(low) @ marked[f"lm.{path}.lora_B.weight"][:MAX_OUTPUTS].T * spec.scale
        factor, misfit = _fit(_flat(y)[:, :MAX_OUTPUTS], _flat(base)[:, :MAX_OUTPUTS], change)
        if max(_off_mark(_flat(low), marks[path]), misfit) > tolerance:
            swapped.append(f"lm.{path}")
        elif abs(factor - 1) > tolerance:
            factors[f"lm.{path}"] = factor
    found = []
    if idle:
        found.append(failed(name, f"{len(idle)} of {len(spec.linears)} change nothing", "adapter_not_applied", idle))
    if swapped:
        figure = f"{len(swapped)} of {len(spec.linears)} compute something else than their own B A x"
        found.append(failed(name, figure, "adapters_swapped", swapped))
    if factors:
        factor = float(np.median([*factors.values()]))
        figure = f"applied {factor:.3g} times as strongly as alpha / r = {spec.scale:g}"
        found.append(failed(name, figure, "adapter_scale", [*factors]))
    return found or [passed(name, f"{len(spec.linears)} Linears change by {spec.scale:g} B A x of their own")]


CHECKS = (Check("adapters", adapters),)


def _marked(exam: Exam, spec: AdapterSpec) -> tuple[dict[str, np.ndarray], Arrays]:
    """Marks (r,) by path, and parameters whose A has rank one: its outputs stand to each other as the mark's values."""
    rng, arrays = np.random.default_rng(0), dict(exam.parameters)
    marks: dict[str, np.ndarray] = {}
    for path, out_size, in_size in spec.linears:
        marks[path] = rng.standard_normal(spec.rank)
        a = np.outer(marks[path], rng.standard_normal(in_size) / in_size**0.5)
        b = 0.3 * rng.standard_normal((out_size, spec.rank)) / spec.scale
        arrays |= {f"lm.{path}.lora_A.weight": a.astype(np.float32), f"lm.{path}.lora_B.weight": b.astype(np.float32)}
    return marks, arrays


def _flat(array: Any) -> np.ndarray:
    return array.reshape(-1, array.shape[-1]).astype(np.float64)


def _off_mark(low: np.ndarray, mark: np.ndarray) -> float:
    along = np.outer(low @ mark / (mark @ mark), mark)
    return float(np.linalg.norm(low - along)) / max(float(np.linalg.norm(low)), 1e-30)


def _fit(y: np.ndarray, base: np.ndarray, change: np.ndarray) -> tuple[float, float]:
    """y = gain * (base + factor * change) + bias with one factor for all outputs; the factor, and the relative misfit.

    Without DoRA the gain is 1 and the bias 0, which the fit finds.
    """
    pairs = [*zip(base.T, change.T, y.T, strict=True)]
    solutions = [_solve((b, c), t)[0] for b, c, t in pairs]
    factor = float(np.median([solution[1] / solution[0] for solution in solutions]))
    rest = sum(_solve((b + factor * c,), t)[1] for b, c, t in pairs)
    return factor, (rest / float(np.square(y - y.mean(0)).sum())) ** 0.5


def _solve(sources: Sequence[np.ndarray], target: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares with a constant: the solution, and the squared misfit."""
    columns = np.stack([*sources, np.ones_like(target)], axis=1)
    solution = np.linalg.lstsq(columns, target, rcond=None)[0]
    return solution, float(np.square(columns @ solution - target).sum())

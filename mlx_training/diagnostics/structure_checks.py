"""Checks of what the model is: registered, initialised, finite, and with an objective that returns sums."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.diagnostics.exam import Check, Exam
from mlx_training.diagnostics.report import Finding, failed, passed, skipped

FROZEN_PREFIX = "lm."  # where both realisations keep the frozen language model
INIT_FACTOR = 4.0  # RMS of initial values may differ this much from the table's


def registration(exam: Exam) -> list[Finding]:
    """The framework knows every parameter of the table, with its shape, as trainable, and trains nothing else."""
    name, table = "parameters", exam.subject.spec.params()
    known = exam.subject.backend.parameters(exam.subject.model)
    if not table:
        return [failed(name, f"none of {len(known)} trains", "frozen_parameters", list(known))]
    missing = [n for n in table if n not in known]
    misshaped = [n for n in table if n in known and known[n].shape != table[n].shape]
    frozen = [n for n in table if n in known and not known[n].trainable]
    extra = [n for n, parameter in known.items() if parameter.trainable and n not in table]
    thawed = [n for n in extra if n.startswith(FROZEN_PREFIX)]
    found = []
    for names, cause in (
        (missing or _strays(exam.subject.model, known), "unregistered_parameters"),
        (misshaped, "misshaped_parameters"),
        (frozen, "frozen_parameters"),
        (thawed, "frozen_weights_trainable"),
        ([n for n in extra if n not in thawed], "unexpected_parameters"),
    ):
        if names:
            found.append(failed(name, f"{len(names)} parameters; the table has {len(table)}", cause, names))
    trainable = sum(param.size for param in table.values())
    frozen_size = sum(int(np.prod(p.shape)) for p in known.values() if not p.trainable)
    return found or [passed(name, f"{len(table)} train ({trainable:,} values), {frozen_size:,} values frozen")]


def parameters_finite(exam: Exam) -> Finding:
    """No NaN and no infinity among the parameters, trained or frozen."""
    known = exam.subject.backend.parameters(exam.subject.model)
    bad = [n for n, parameter in known.items() if not parameter.finite]
    if bad:
        return failed("parameter values", f"{len(bad)} parameters", "nonfinite_parameters", bad)
    return passed("parameter values", "finite")


def initial_values(exam: Exam) -> list[Finding]:
    """Fresh parameters are as large as the table says."""
    name = "initial values"
    if not exam.subject.fresh:
        return [skipped(name, "the parameters are not initial ones")]
    large, small = [], []
    for n, param in exam.subject.spec.params().items():
        expected = {"normal": param.scale, "uniform": param.scale / 3**0.5, "ones": 1.0, "zeros": 0.0}.get(param.init)
        if expected is None:
            continue
        rms = float(np.sqrt(np.square(exam.parameters[n], dtype=np.float64).mean()))
        if rms > INIT_FACTOR * expected:
            large.append(n)
        elif rms < expected / INIT_FACTOR:
            small.append(n)
    found = []
    if large:
        found.append(failed(name, f"{len(large)} parameters", "init_too_large", large))
    if small:
        found.append(failed(name, f"{len(small)} parameters", "init_zero", small))
    return found or [passed(name, f"{len(exam.parameters)} parameters as large as the table says")]


def objective(exam: Exam) -> Finding:
    """The objective returns sums and counts."""
    subject, seen = exam.subject, []

    def watched(model: Any, batch: Batch) -> Any:
        seen.append(subject.objective(model, batch))
        return seen[-1]

    try:
        sums = subject.backend.score(subject.model, watched, exam.batches[0])
        if {"loss", "weight"} <= sums.keys():
            return passed("objective", ", ".join(f"{name} {value:.6g}" for name, value in sums.items()))
    except Exception:
        if not seen or (isinstance(seen[0], dict) and {"loss", "weight"} <= seen[0].keys()):
            raise
    kind = f"a dict with {sorted(seen[0])}" if isinstance(seen[0], dict) else f"a {type(seen[0]).__name__}"
    return failed("objective", f"it returns {kind}; expected {{'loss': sum, 'weight': count}}", "weight_not_count")


def evaluation(exam: Exam) -> Finding:
    """Twice the same batch, twice the same loss; and once more after another batch."""
    first, second = (exam.loss(exam.batches[0]) for _ in range(2))
    figure = f"loss {first:.6f}, again {second:.6f}"
    if first != second and np.isfinite([first, second]).all():
        if not any(map(np.any, exam.gradients.values())):
            return failed("evaluation", f"{figure}; no gradient anywhere", "no_influence", list(exam.gradients))
        return failed("evaluation", figure, "random_in_evaluation")
    exam.loss(exam.batches[1])
    third = exam.loss(exam.batches[0])
    if first != third and np.isfinite([first, third]).all():
        return failed("evaluation", f"loss {first:.6f}, after another batch {third:.6f}", "batch_remembered")
    return passed("evaluation", figure)


def forward(exam: Exam) -> Finding:
    """A finite loss; else the first module whose output is not."""
    loss = exam.loss(exam.batches[0])
    if np.isfinite(loss):
        return passed("forward", f"loss {loss:.4f}")
    outputs = exam.subject.backend.activations(exam.subject.model, exam.subject.objective, exam.batches[0])
    first = next((path for path, array in outputs.items() if not np.isfinite(array).all()), None)
    if first is None:
        return failed("forward", f"loss {loss} of finite outputs", "loss_nonfinite", ["the objective"])
    return failed("forward", f"loss {loss}; first in {first}", "overflow", [first])


CHECKS = (
    Check("parameters", registration, blocking=True),
    Check("parameter values", parameters_finite, blocking=True),
    Check("initial values", initial_values),
    Check("objective", objective, blocking=True),
    Check("forward", forward, blocking=True),
    Check("evaluation", evaluation, blocking=True),
)


def _strays(model: Any, registered: Collection[str]) -> list[str]:
    """Paths of modules that would train, but lie where the framework does not look: tuples, plain lists, `_names`."""
    known = {id(module) for _, module in model.named_modules()}
    found = set()
    for path, module in model.named_modules():
        if path and _trains(module) and not any(name.startswith(f"{path}.") for name in registered):
            found.add(path)
        own = {**vars(module), **(module if isinstance(module, dict) else {})}
        for name in own.keys() - {"_modules", "_parameters", "_buffers"}:
            for key, other in _modules_in(own[name]):
                if id(other) not in known and _trains(other):
                    found.add(f"{path}.{name}{key}".lstrip("."))
    return sorted(found)


def _trains(module: Any) -> bool:
    """Whether a module has parameters that are not frozen."""
    if hasattr(module, "trainable_parameters"):
        return _has_leaf(module.trainable_parameters())
    return any(parameter.requires_grad for parameter in module.parameters())


def _has_leaf(tree: Any) -> bool:
    if isinstance(tree, dict | list | tuple):
        return any(map(_has_leaf, tree.values() if isinstance(tree, dict) else tree))
    return True


def _modules_in(value: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(value, "named_modules"):
        yield "", value
    elif isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from ((f".{key}{rest}", module) for rest, module in _modules_in(item))

"""Checks of the update around the step: learning rates, weight decay, accumulation."""

from dataclasses import replace

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.diagnostics.exam import Check, Exam, without_dropout
from mlx_training.diagnostics.report import Finding, failed, passed, skipped
from mlx_training.diagnostics.rule_checks import configured, differing
from mlx_training.diagnostics.step_checks import NORM_SAME, SAME, step_rule
from mlx_training.diagnostics.subject import Subject
from mlx_training.diagnostics.trial import (
    Observed,
    Trial,
    angle,
    clipped,
    difference,
    norm_of,
    ratio,
    scaled,
    used_gradient,
)
from mlx_training.optim import COUPLED

MOVE_BY_GRADIENT = ("sgd", "adagrad")  # not by about the learning rate a step
LEAST_WAY = 1e-3  # of its own size that some weight must be able to move in the whole run
DECAY_RATE = 0.1  # of the step without a gradient, large enough for float32 to resolve the decay


def rates(exam: Exam) -> Finding:
    """Every group has a learning rate above zero at some step, and nearly everywhere."""
    subject, total = exam.subject, exam.subject.total_steps
    steps = sorted({1, *(max(1, round(total * share)) for share in (0.1, 0.25, 0.5, 0.75, 0.9))})
    by_group = {group: [subject.rates(step).get(group, 0.0) for step in steps] for group in subject.spec.groups}
    idle = [group for group, values in by_group.items() if sum(value > 0 for value in values) < len(values) / 2]
    figure = ", ".join(f"{group} up to {max(values):.1e}" for group, values in by_group.items())
    if idle:
        names = [n for n, param in subject.spec.params().items() if param.group in idle]
        return failed("learning rates", figure, "learning_rate_zero", [*idle, *names])
    if subject.optim.name in MOVE_BY_GRADIENT:
        return passed("learning rates", figure)
    # the others move a value by about the rate a step
    way = {group: total * sum(values) / len(values) for group, values in by_group.items()}
    size = {n: float(np.sqrt(np.square(exam.parameters[n]).mean())) for n in exam.parameters}
    reachable = [way[param.group] / size[n] for n, param in subject.spec.params().items() if param.decay and size[n]]
    if reachable and max(reachable) < LEAST_WAY:
        figure += f": in {total} steps at most {max(reachable):.0e} of a weight's size"
        return failed("learning rates", figure, "learning_rate_too_small", list(by_group))
    return passed("learning rates", figure)


def decay(exam: Exam) -> Finding:
    """A step without a gradient: what remains is the decay, and only where the table wants it."""
    name, subject = "weight decay", exam.subject
    wanted = subject.optim.weight_decay
    if wanted and subject.optim.name in COUPLED:
        return skipped(name, f"{subject.optim.name} adds it to the gradient: the check of the step has looked at it")
    silent = replace(subject, objective=scaled(subject.objective, 0.0))
    with subject.restored(), without_dropout(subject.model):
        before = exam.parameters
        rate = min(DECAY_RATE, 0.01 / wanted) if wanted else DECAY_RATE
        rates = dict.fromkeys(subject.spec.groups, rate)
        metrics = silent.new_step()([exam.batches[0]], step=1, lr=rates)
        if float(metrics["loss"]) != 0:
            return skipped(name, "the step brings its own objective, which cannot be silenced")
        after = subject.backend.export(subject.model)
    table = subject.spec.params()
    pull = {n: rate * wanted * subject.optim.rate_factor(param) for n, param in table.items()}
    moved = {n: before[n].astype(np.float64) - after[n] for n in before if np.any(before[n])}
    gone = {n: ratio(change, before[n]) for n, change in moved.items()}  # share of the parameter, by least squares
    off = [n for n, share in gone.items() if table[n].decay and abs(share - pull[n]) > 0.1 * pull[n] + 1e-6]
    even = [n for n in off if abs(float(np.median(np.abs(moved[n]))) - rate) < 0.2 * rate]  # Adam's own step: sign(p)
    ignored = [n for n in off if abs(gone[n]) < 0.5 * pull[n]]
    everywhere = [n for n, share in gone.items() if not table[n].decay and share > 0.5 * pull[n] > 0]
    figure = f"{wanted:g} on {sum(param.decay for param in table.values())} of {len(table)} parameters"
    for names, cause in (
        (even, "decay_coupled"),
        (everywhere, "decay_everywhere"),
        (ignored, "decay_ignored"),
        (off, "decay_coupled"),
    ):
        if names:
            return failed(name, f"expected {figure}; not so for {len(names)}", cause, names)
    return passed(name, figure)


def accumulation(exam: Exam) -> Finding:
    """Two micro-batches of unequal weight are one batch."""
    name, subject = "accumulation", exam.subject
    pair = [exam.batches[0], _lighter(exam.batches[1])]
    scale = 0.1 * (subject.optim.grad_clip_norm or 1.0) / max(norm_of(exam.gradients), 1e-30)  # not clipped
    louder = replace(subject, objective=scaled(subject.objective, scale))
    with subject.restored(), without_dropout(subject.model):
        seen = Trial(exam, louder, scale).take(pair)
    if subject.optim.name != "adamw":
        return _accumulation_by_rule(subject, seen)
    used = used_gradient(subject, seen.state)
    if used is None:
        return skipped(name, "the optimiser's state cannot be read")
    a, b = seen.parts
    expected = clipped(subject, seen.gradient)
    error, norm = difference(used, expected), norm_of(seen.gradient)
    figure = f"gradient of two micro-batches against one batch: {error:.1e}"
    if error < SAME and abs(seen.metrics["grad_norm"] - norm) > NORM_SAME * norm:
        figure = f"reported norm {seen.metrics['grad_norm']:.3e}, of the gradient of both {norm:.3e}"
        return failed(name, figure, "norm_misreported")
    if error < SAME:
        return passed(name, figure)
    dropped = min(angle(used, a), angle(used, b)) < SAME
    return failed(name, figure, "micro_batches_dropped" if dropped else "accumulation_wrong")


CHECKS = (
    Check("learning rates", rates),
    Check("step", step_rule, blocking=True),
    Check("weight decay", decay),
    Check("accumulation", accumulation),
)


def _accumulation_by_rule(subject: Subject, seen: Observed) -> Finding:
    guess = configured(subject, seen, {}, 1)
    wrong, num_parameters = differing(subject, guess, seen), len(guess.table)
    figure = f"{num_parameters - len(wrong)} of {num_parameters} parameters moved by the gradient of both micro-batches"
    if not wrong:
        return passed("accumulation", figure)
    alone = [replace(guess, gradient=clipped(subject, part)) for part in seen.parts]
    dropped = any(not differing(subject, part, seen, wrong) for part in alone)
    return failed("accumulation", figure, "micro_batches_dropped" if dropped else "accumulation_wrong", wrong)


def _lighter(batch: Batch) -> Batch:
    """The batch with the labels of its first row only, so that it weighs less."""
    mask = batch.mask.copy()
    mask[1:] = 0
    return batch if not mask.any() else replace(batch, mask=mask)

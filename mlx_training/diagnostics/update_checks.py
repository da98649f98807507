"""Checks of the step: one, two, three real optimiser steps beside a NumPy AdamW, and what explains a difference.

The step's first moment tells which gradient it used: after step 1, m = (1 - beta1) g. What it did is compared with
what it should have done; where they differ, each known mistake is tried, and the one that fits is named.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.exam import Check, Exam, without_dropout
from mlx_training.diagnostics.report import Finding, failed, passed, skipped
from mlx_training.diagnostics.subject import Subject
from mlx_training.objectives import Objective, Sums

SAME = 0.02  # relative difference of two gradients or updates that count as equal
NORM_SAME = 1e-3  # of two norms
RATE = 1e-3  # learning rate of the first group in the trial; each further group has one more of it
LEAST_WAY = 1e-3  # of its own size that some weight must be able to move in the whole run
DECAY_RATE = 0.1  # of the step without a gradient, large enough for float32 to resolve the decay


@dataclass(frozen=True)
class Observed:
    """One optimiser step: what went in, what should have been used, what came out."""

    gradient: Arrays  # the mean gradient by autograd, before clipping
    parts: list[Arrays]  # of each micro-batch
    before: Arrays
    after: Arrays
    state: Arrays  # optimiser state afterwards
    metrics: dict[str, Any]
    compiled: bool


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
    # AdamW moves a value by about the rate a step
    way = {group: total * sum(values) / len(values) for group, values in by_group.items()}
    size = {n: float(np.sqrt(np.square(exam.parameters[n]).mean())) for n in exam.parameters}
    reachable = [way[param.group] / size[n] for n, param in subject.spec.params().items() if param.decay and size[n]]
    if reachable and max(reachable) < LEAST_WAY:
        figure += f": in {total} steps at most {max(reachable):.0e} of a weight's size"
        return failed("learning rates", figure, "learning_rate_too_small", list(by_group))
    return passed("learning rates", figure)


def step_rule(exam: Exam) -> list[Finding]:
    """Two steps: the norm that is reported, the gradient that is used, and what is made of it."""
    subject = exam.subject
    with subject.restored(), without_dropout(subject.model):
        scaled, scale = _clipping(exam)
        trial = Trial(exam, scaled, scale)
        try:
            # the first batch again, because a compiled step may repeat what it did for a shape
            first, *later = (trial.take([exam.batches[index]]) for index in (0, 1, 0))
        except Unreadable as error:
            return [failed("step", f"after a step: {error}", "parameters_unreadable")]
    found = _norm(subject, first) or _gradient(subject, first) or _squares(subject, first)
    found = found or _update(subject, first, 1)
    for number, (before, seen) in enumerate(itertools.pairwise([first, *later]), start=2):
        found = found or _next(subject, before, seen, number)
    if found:
        return [found]
    norm = _norm_of(first.gradient)
    limit = subject.optim.grad_clip_norm
    clip = "no clipping" if limit is None else f"clipped at {limit:g}"
    return [passed("step", f"gradient norm {norm:.3e}, {clip}, AdamW as configured, three times")]


def decay(exam: Exam) -> Finding:
    """A step without a gradient: what remains is the decay, and only where the table wants it."""
    name, subject = "weight decay", exam.subject
    wanted = subject.optim.weight_decay
    silent = replace(subject, objective=_scaled(subject.objective, 0.0))
    with subject.restored(), without_dropout(subject.model):
        before = exam.parameters
        rates = dict.fromkeys(subject.spec.groups, DECAY_RATE)
        metrics = silent.new_step()([exam.batches[0]], step=1, lr=rates)
        if float(metrics["loss"]) != 0:
            return skipped(name, "the step brings its own objective, which cannot be silenced")
        after = subject.backend.export(subject.model)
    # share of the parameter that is gone, by least squares; 0 where it is all zeros
    gone = {
        n: float(((before[n] - after[n]) * before[n]).sum() / np.square(before[n], dtype=np.float64).sum())
        for n in before
        if np.any(before[n])
    }
    moved = {n: float(np.abs(after[n] - before[n]).max()) for n in before}
    pull = DECAY_RATE * wanted
    table = subject.spec.params()
    coupled = [n for n in moved if table[n].decay and moved[n] > 0.5 * DECAY_RATE and wanted]
    ignored = [n for n, share in gone.items() if table[n].decay and abs(share) < 0.5 * pull]
    everywhere = [n for n, share in gone.items() if not table[n].decay and share > 0.5 * pull and pull > 0]
    odd = [n for n, share in gone.items() if table[n].decay and abs(share - pull) > 0.1 * pull + 1e-6]
    figure = f"{wanted:g} on {sum(param.decay for param in table.values())} of {len(table)} parameters"
    for names, cause in (
        (coupled, "decay_coupled"),
        (everywhere, "decay_everywhere"),
        (ignored if wanted else [], "decay_ignored"),
        (odd, "decay_coupled"),
    ):
        if names:
            return failed(name, f"expected {figure}; not so for {len(names)}", cause, names)
    return passed(name, figure)


def accumulation(exam: Exam) -> Finding:
    """Two micro-batches of unequal weight are one batch."""
    name, subject = "accumulation", exam.subject
    pair = [exam.batches[0], _lighter(exam.batches[1])]
    scale = 0.1 * (subject.optim.grad_clip_norm or 1.0) / max(_norm_of(exam.gradients), 1e-30)  # not clipped
    scaled = replace(subject, objective=_scaled(subject.objective, scale))
    with subject.restored(), without_dropout(subject.model):
        seen = Trial(exam, scaled, scale).take(pair)
    used = _used(subject, seen.state)
    if used is None:
        return skipped(name, "the optimiser's state cannot be read")
    a, b = seen.parts
    expected = _clip(subject, seen.gradient)
    error, norm = _difference(used, expected), _norm_of(seen.gradient)
    figure = f"gradient of two micro-batches against one batch: {error:.1e}"
    if error < SAME and abs(seen.metrics["grad_norm"] - norm) > NORM_SAME * norm:
        figure = f"reported norm {seen.metrics['grad_norm']:.3e}, of the gradient of both {norm:.3e}"
        return failed(name, figure, "norm_misreported")
    if error < SAME:
        return passed(name, figure)
    dropped = min(_angle(used, a), _angle(used, b)) < SAME
    return failed(name, figure, "micro_batches_dropped" if dropped else "accumulation_wrong")


class Unreadable(Exception):
    """Parameters or state cannot be read after a step; the message is the framework's."""


class Trial:
    """Real steps over a subject, each seen from outside."""

    def __init__(self, exam: Exam, subject: Subject, scale: float) -> None:
        self.exam, self.subject, self.scale = exam, subject, scale
        self.step, self.number = subject.new_step(), 0

    def take(self, batches: Sequence[Batch]) -> Observed:
        """One step over these micro-batches."""
        exam, subject = self.exam, self.subject
        self.number += 1
        before = subject.backend.export(subject.model)
        losses, weights = zip(*(exam.sums(batch) for batch in batches), strict=True)
        parts = [exam.gradients_of(batch) for batch in batches]
        metrics = self.step(batches, step=self.number, lr=trial_rates(subject, self.number))
        metrics = {key: float(metrics[key]) for key in ("loss", "grad_norm")}
        # a step may bring an objective of its own, which is not scaled
        scale = 1.0 if np.isclose(metrics["loss"], sum(losses) / sum(weights), rtol=1e-3) else self.scale
        parts = [_times(part, scale) for part in parts]
        shares = [weight / sum(weights) for weight in weights]
        gradient = {
            n: np.sum([share * part[n] for share, part in zip(shares, parts, strict=True)], axis=0) for n in before
        }
        try:
            after, state = subject.backend.export(subject.model), self.step.export()
        except Exception as error:  # a trace left behind raises the framework's own
            raise Unreadable(str(error).splitlines()[0]) from error
        compiled = getattr(self.step, "num_compilations", 0) > 0
        return Observed(gradient, parts, before, after, state, metrics, compiled)


def trial_rates(subject: Subject, number: int) -> dict[str, float]:
    """A different learning rate for every group and step."""
    return {group: RATE * (1 + index) / number for index, group in enumerate(subject.spec.groups)}


MISTAKES: dict[str, dict[str, Any]] = {
    "no_bias_correction": {"bias_correction": False},
    "decay_ignored": {"decays": False},
    "decay_everywhere": {"decays": True},
    "ascent": {"sign": -1.0},
}
CHECKS = (
    Check("learning rates", rates),
    Check("step", step_rule, blocking=True),
    Check("weight decay", decay),
    Check("accumulation", accumulation),
)


def _clipping(exam: Exam) -> tuple[Subject, float]:
    """The subject, its loss scaled up where its gradient would not meet the clip."""
    subject, limit = exam.subject, exam.subject.optim.grad_clip_norm
    norm = _norm_of(exam.gradients)
    if limit is None or norm > 1.5 * limit or norm == 0:
        return subject, 1.0
    scale = 3 * limit / norm
    return replace(subject, objective=_scaled(subject.objective, scale)), scale


def _scaled(objective: Objective, factor: float) -> Objective:
    def scaled(model: Any, batch: Batch) -> Sums:
        sums = objective(model, batch)
        return {**sums, "loss": sums["loss"] * factor}

    return scaled


def _norm(subject: Subject, seen: Observed) -> Finding | None:
    true, reported = _norm_of(seen.gradient), seen.metrics["grad_norm"]
    used = _used(subject, seen.state)
    if used is not None and _angle(used, seen.gradient) > SAME:
        return None  # another gradient was used: the next question
    if abs(reported - true) <= NORM_SAME * true:
        return None
    return failed("reported norm", f"reported {reported:.3e}, the gradient's norm is {true:.3e}", "norm_misreported")


def _gradient(subject: Subject, seen: Observed) -> Finding | None:
    """The gradient that entered the moments."""
    name, used, expected = "gradient used", _used(subject, seen.state), _clip(subject, seen.gradient)
    if used is None or _difference(used, expected) < SAME:
        return None
    figure = f"norm {_norm_of(used):.3e} entered the moments, {_norm_of(expected):.3e} should have"
    rest = {n: used[n] - expected[n] for n in used}
    table, pull = subject.spec.params(), subject.optim.weight_decay
    everywhere = {n: pull * seen.before[n] for n in used}
    decayed = {n: value if table[n].decay else 0 * value for n, value in everywhere.items()}
    silent = [n for n in used if not np.any(used[n]) and np.any(expected[n])]
    if silent and len(silent) < len(used):
        return failed(name, f"{figure}; none for {len(silent)} parameters", "update_discarded", silent)
    if not any(map(np.any, used.values())):
        return failed(name, figure, "update_discarded")
    if _difference(_times(used, -1.0), expected) < SAME:
        return failed(name, figure, "ascent")
    if min(_angle(rest, decayed), _angle(rest, everywhere)) < 0.1:
        return failed(name, figure, "decay_coupled")
    if _difference(used, seen.gradient) < SAME:
        return failed(name, figure, "clip_ignored")
    if not _squares_fit(subject, seen.state):
        return failed(name, f"{figure}; the second moments do not fit the first", "update_wrong")
    if all(_angle({"": used[n]}, {"": expected[n]}) < SAME for n in used if _norm_of({"": expected[n]}) > 1e-6):
        return failed(name, figure, "clip_wrong")
    return failed(name, figure, "update_wrong", _worst(used, expected))


def _squares(subject: Subject, seen: Observed) -> Finding | None:
    """The second moments after the first step, element by element: small squares are the first to be lost."""
    used = _used(subject, seen.state)
    if used is None:
        return None
    expected = {n: (1 - subject.optim.betas[1]) * g**2 for n, g in used.items()}
    v = _moments(used, seen.state, "v")
    lost = [n for n in v if (np.abs(v[n] - expected[n]) > 0.1 * expected[n] + 1e-30).any()]
    if not lost:
        return None
    exact = replace(seen, state=seen.state | {f"{n}.v": expected[n] for n in v})
    if _update(subject, exact, 1) is None:
        return failed(
            "optimiser state", f"{len(lost)} second moments are not what the step used", "resume_differs", lost
        )
    return failed("optimiser state", f"{len(lost)} second moments are not squares of gradients", "update_wrong", lost)


def _update(subject: Subject, seen: Observed, number: int) -> Finding | None:
    """The parameters after the step, from the moments after it."""
    name = "update"
    moved = {n: seen.after[n] - seen.before[n] for n in seen.before}
    if not any(map(np.any, moved.values())):
        return failed(name, "no parameter has moved", "update_discarded", list(moved)[:8])
    expected = _adamw(subject, seen, number)
    if expected is None:
        return None
    wrong = [n for n in moved if _difference({n: moved[n]}, {n: expected[n]}) > SAME and np.any(expected[n])]
    if not wrong:
        return None
    figure = f"{len(wrong)} of {len(moved)} parameters moved otherwise than AdamW would"
    still = [n for n in wrong if not np.any(moved[n])]
    if len(still) == len(wrong):
        return failed(name, figure, "update_discarded", still)
    for cause, mistake in MISTAKES.items():
        guess = _adamw(subject, seen, number, **mistake)
        if guess is not None and _difference(_only(moved, wrong), _only(guess, wrong)) < SAME / 4:
            return failed(name, figure, cause, wrong)
    ratios = {n: _ratio(moved[n], expected[n]) for n in wrong}
    if all(_difference({n: moved[n]}, {n: ratio * expected[n]}) < SAME for n, ratio in ratios.items()):
        typical = sorted(ratios.values())[len(ratios) // 2]
        figure += f": {typical:.2f} times as far"
        return failed(name, figure, "ascent" if typical < 0 else "learning_rate_wrong", wrong)
    return failed(name, figure, "update_wrong", wrong)


def _next(subject: Subject, first: Observed, seen: Observed, number: int) -> Finding | None:
    """A later step starts from the state that the one before it left."""
    name, beta = f"step {number}", subject.optim.betas[0]
    try:
        m1, m2 = _moments(seen.before, first.state), _moments(seen.before, seen.state)
    except KeyError:
        return None
    fresh = _clip(subject, seen.gradient)
    expected = {n: beta * m1[n] + (1 - beta) * fresh[n] for n in fresh}
    count = float(seen.state["step"])
    if _difference(m2, expected) < SAME and count == number:
        return _second_moments(subject, first, seen, number) or _update(subject, seen, number)
    odd = [n for n in m2 if _difference({n: m2[n]}, {n: expected[n]}) > SAME and np.any(expected[n])]
    figure = f"moments differ by {_difference(m2, expected):.1e} from what {number} steps make; {count:g} were counted"
    both = _clip(subject, {n: first.gradient[n] + seen.gradient[n] for n in fresh})
    summed = {n: beta * m1[n] + (1 - beta) * both[n] for n in fresh}
    if _difference(m2, summed) < SAME:
        return failed(name, figure, "gradients_accumulate")
    if piled := _piled_up(first, seen, {n: m2[n] - beta * m1[n] for n in odd}):
        return failed(name, figure, "gradients_accumulate", piled)
    reported, true = seen.metrics["grad_norm"], _norm_of({n: first.gradient[n] + seen.gradient[n] for n in fresh})
    if abs(reported - true) < 0.05 * true < abs(reported - _norm_of(seen.gradient)):
        return failed(name, figure, "gradients_accumulate")
    if _difference(m2, {n: (1 - beta) * fresh[n] for n in fresh}) < SAME:
        return failed(name, figure, "state_lost")
    return failed(name, figure, "compiled_differs" if seen.compiled else "update_wrong", odd)


def _piled_up(first: Observed, seen: Observed, used: Arrays) -> list[str]:
    """Parameters that got both steps' gradients, if all others got the direction of their own."""
    piled = []
    for n, gradient in used.items():
        own, both = {"": seen.gradient[n]}, {"": first.gradient[n] + seen.gradient[n]}
        if _angle({"": gradient}, own) < SAME:
            continue
        if _angle({"": gradient}, both) > SAME:
            return []
        piled.append(n)
    return piled


def _second_moments(subject: Subject, first: Observed, seen: Observed, number: int) -> Finding | None:
    """The squares that a later step adds to those before it."""
    beta, fresh = subject.optim.betas[1], _clip(subject, seen.gradient)
    v1, v2 = (_moments(seen.before, state, "v") for state in (first.state, seen.state))
    expected = {n: beta * v1[n] + (1 - beta) * fresh[n] ** 2 for n in fresh}
    if _difference(v2, expected) < SAME:
        return None
    figure = f"second moments differ by {_difference(v2, expected):.1e} from what {number} steps make"
    lost = _difference(v2, {n: (1 - beta) * fresh[n] ** 2 for n in fresh}) < SAME
    return failed(f"step {number}", figure, "state_lost" if lost else "update_wrong")


def _adamw(
    subject: Subject,
    seen: Observed,
    number: int,
    *,
    bias_correction: bool = True,
    decays: bool | None = None,
    sign: float = 1.0,
) -> Arrays | None:
    """The step of AdamW (Loshchilov & Hutter 2019) from the moments after it; `decays` overrules the table."""
    (b1, b2), table, lr = subject.optim.betas, subject.spec.params(), trial_rates(subject, number)
    c1, c2 = (1 - b1**number, 1 - b2**number) if bias_correction else (1.0, 1.0)
    moves = {}
    for n, before in seen.before.items():
        if f"{n}.m" not in seen.state or f"{n}.v" not in seen.state:
            return None
        m, v = (seen.state[f"{n}.{k}"].astype(np.float64) for k in "mv")
        decayed = table[n].decay if decays is None else decays
        pull = subject.optim.weight_decay * before if decayed else 0.0
        moves[n] = -lr[table[n].group] * (sign * m / c1 / (np.sqrt(v / c2) + subject.optim.eps) + pull)
    return moves


def _squares_fit(subject: Subject, state: Arrays) -> bool:
    """Whether v = (1 - beta2) g^2 for the g of m = (1 - beta1) g."""
    b1, b2 = subject.optim.betas
    names = subject.spec.params()
    v = {n: state[f"{n}.v"].astype(np.float64) for n in names}
    return _difference({n: (1 - b2) * (state[f"{n}.m"].astype(np.float64) / (1 - b1)) ** 2 for n in names}, v) < SAME


def _used(subject: Subject, state: Arrays) -> Arrays | None:
    """The gradient of a first step, from its first moment."""
    scale = 1 / (1 - subject.optim.betas[0])
    names = subject.spec.params()
    if any(f"{n}.m" not in state for n in names):
        return None
    return {n: scale * state[f"{n}.m"].astype(np.float64) for n in names}


def _moments(names: Arrays, state: Arrays, kind: str = "m") -> Arrays:
    return {n: state[f"{n}.{kind}"].astype(np.float64) for n in names}


def _only(arrays: Arrays, names: Sequence[str]) -> Arrays:
    return {n: arrays[n] for n in names}


def _clip(subject: Subject, gradient: Arrays) -> Arrays:
    limit = subject.optim.grad_clip_norm
    return gradient if limit is None else _times(gradient, min(1.0, limit / (_norm_of(gradient) + 1e-6)))


def _lighter(batch: Batch) -> Batch:
    """The batch with the labels of its first row only, so that it weighs less."""
    mask = batch.mask.copy()
    mask[1:] = 0
    return batch if not mask.any() else replace(batch, mask=mask)


def _times(arrays: Arrays, factor: float) -> Arrays:
    return {n: factor * array.astype(np.float64) for n, array in arrays.items()}


def _norm_of(arrays: Arrays) -> float:
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays.values())))


def _difference(a: Arrays, b: Arrays) -> float:
    """||a - b|| / ||b||."""
    return _norm_of({n: a[n] - b[n] for n in b}) / max(_norm_of(b), 1e-30)


def _angle(a: Arrays, b: Arrays) -> float:
    """||a / |a| - b / |b|||: 0 where they point the same way."""
    sizes = _norm_of(a), _norm_of(b)
    if min(sizes) == 0:
        return 2.0
    return _difference(_times(a, 1 / sizes[0]), _times(b, 1 / sizes[1]))


def _ratio(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.square(b, dtype=np.float64).sum())


def _worst(a: Arrays, b: Arrays) -> list[str]:
    order: Callable[[str], float] = lambda n: -_difference({n: a[n]}, {n: b[n]})  # noqa: E731
    return sorted(b, key=order)[:8]

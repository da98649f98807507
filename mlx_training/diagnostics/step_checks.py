"""The check of the step: three real optimiser steps beside a NumPy AdamW, and what explains a difference.
Other optimisers: `rule_checks`.

The step's first moment tells which gradient it used: after step 1, m = (1 - beta1) g. What it did is compared with
what it should have done; where they differ, each known mistake is tried, and the one that fits is named.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.diagnostics.exam import Exam, without_dropout
from mlx_training.diagnostics.report import Finding, failed, passed
from mlx_training.diagnostics.rule_checks import follow
from mlx_training.diagnostics.subject import Subject
from mlx_training.diagnostics.trial import (
    Observed,
    Trial,
    Unreadable,
    adamw,
    angle,
    clipped,
    difference,
    moments,
    norm_of,
    only,
    ratio,
    scaled,
    times,
    used_gradient,
)

SAME = 0.02  # relative difference of two gradients or updates that count as equal
NORM_SAME = 1e-3  # of two norms


def step_rule(exam: Exam) -> list[Finding]:
    """Two steps: the norm that is reported, the gradient that is used, and what is made of it."""
    subject = exam.subject
    with subject.restored(), without_dropout(subject.model):
        louder, scale = _clipping(exam)
        trial = Trial(exam, louder, scale)
        try:
            # the first batch again, because a compiled step may repeat what it did for a shape
            first, *later = (trial.take([exam.batches[index]]) for index in (0, 1, 0))
        except Unreadable as error:
            return [failed("step", f"after a step: {error}", "parameters_unreadable")]
    if subject.optim.name != "adamw":
        found = follow(subject, [first, *later])
        return [found] if found else [_right(subject, first)]
    found = _norm(subject, first) or _gradient(subject, first) or _squares(subject, first)
    found = found or _update(subject, first, 1)
    for number, (before, seen) in enumerate(itertools.pairwise([first, *later]), start=2):
        found = found or _next(subject, before, seen, number)
    return [found or _right(subject, first)]


def _right(subject: Subject, first: Observed) -> Finding:
    norm, limit = norm_of(first.gradient), subject.optim.grad_clip_norm
    clip = "no clipping" if limit is None else f"clipped at {limit:g}"
    return passed("step", f"gradient norm {norm:.3e}, {clip}, {subject.optim.name} as configured, three times")


MISTAKES: dict[str, dict[str, Any]] = {
    "no_bias_correction": {"bias_correction": False},
    "decay_ignored": {"decays": False},
    "decay_everywhere": {"decays": True},
    "ascent": {"sign": -1.0},
}


def _clipping(exam: Exam) -> tuple[Subject, float]:
    """The subject, its loss scaled up where its gradient would not meet the clip."""
    subject, limit = exam.subject, exam.subject.optim.grad_clip_norm
    norm = norm_of(exam.gradients)
    if limit is None or norm > 1.5 * limit or norm == 0:
        return subject, 1.0
    scale = 3 * limit / norm
    return replace(subject, objective=scaled(subject.objective, scale)), scale


def _norm(subject: Subject, seen: Observed) -> Finding | None:
    true, reported = norm_of(seen.gradient), seen.metrics["grad_norm"]
    used = used_gradient(subject, seen.state)
    if used is not None and angle(used, seen.gradient) > SAME:
        return None  # another gradient was used: the next question
    if abs(reported - true) <= NORM_SAME * true:
        return None
    return failed("reported norm", f"reported {reported:.3e}, the gradient's norm is {true:.3e}", "norm_misreported")


def _gradient(subject: Subject, seen: Observed) -> Finding | None:
    """The gradient that entered the moments."""
    name, used, expected = "gradient used", used_gradient(subject, seen.state), clipped(subject, seen.gradient)
    if used is None or difference(used, expected) < SAME:
        return None
    figure = f"norm {norm_of(used):.3e} entered the moments, {norm_of(expected):.3e} should have"
    rest = {n: used[n] - expected[n] for n in used}
    table, pull = subject.spec.params(), subject.optim.weight_decay
    everywhere = {n: pull * seen.before[n] for n in used}
    decayed = {n: value if table[n].decay else 0 * value for n, value in everywhere.items()}
    silent = [n for n in used if not np.any(used[n]) and np.any(expected[n])]
    if silent and len(silent) < len(used):
        return failed(name, f"{figure}; none for {len(silent)} parameters", "update_discarded", silent)
    if not any(map(np.any, used.values())):
        return failed(name, figure, "update_discarded")
    if difference(times(used, -1.0), expected) < SAME:
        return failed(name, figure, "ascent")
    if min(angle(rest, decayed), angle(rest, everywhere)) < 0.1:
        return failed(name, figure, "decay_coupled")
    if difference(used, seen.gradient) < SAME:
        return failed(name, figure, "clip_ignored")
    if _lost_squares(subject, used, seen):
        return failed(name, f"{figure}; the second moments do not fit the first", "update_wrong")
    if all(angle({"": used[n]}, {"": expected[n]}) < SAME for n in used if norm_of({"": expected[n]}) > 1e-6):
        return failed(name, figure, "clip_wrong")
    return failed(name, figure, "update_wrong", _worst(used, expected))


def _squares(subject: Subject, seen: Observed) -> Finding | None:
    """The second moments after the first step, element by element: small squares are the first to be lost."""
    used = used_gradient(subject, seen.state)
    if used is None:
        return None
    lost = _lost_squares(subject, used, seen)
    if not lost:
        return None
    exact = replace(seen, state=seen.state | {f"{n}.v": (1 - subject.optim.betas[1]) * used[n] ** 2 for n in used})
    if _update(subject, exact, 1) is None:
        return failed(
            "optimiser state", f"{len(lost)} second moments are not what the step used", "resume_differs", lost
        )
    return failed("optimiser state", f"{len(lost)} second moments are not squares of gradients", "update_wrong", lost)


def _lost_squares(subject: Subject, used: Arrays, seen: Observed) -> list[str]:
    """Parameters with v other than (1 - beta2) g^2 somewhere after a first step."""
    v, share = moments(used, seen.state, "v"), 1 - subject.optim.betas[1]
    return [n for n, g in used.items() if (np.abs(v[n] - share * g**2) > 0.1 * share * g**2 + 1e-30).any()]


def _update(subject: Subject, seen: Observed, number: int) -> Finding | None:
    """The parameters after the step, from the moments after it."""
    name = "update"
    moved = {n: seen.after[n] - seen.before[n] for n in seen.before}
    expected = adamw(subject, seen, number)
    if expected is None:
        stands = not any(map(np.any, moved.values()))
        return failed(name, "no parameter has moved", "update_discarded", list(moved)[:8]) if stands else None
    wrong = [n for n in moved if _apart(moved[n], expected[n], seen.before[n])]
    if not wrong:
        return None
    if not any(map(np.any, moved.values())):
        return failed(name, "no parameter has moved", "update_discarded", list(moved)[:8])
    figure = f"{len(wrong)} of {len(moved)} parameters moved otherwise than AdamW would"
    still = [n for n in wrong if not np.any(moved[n])]
    if len(still) == len(wrong):
        return failed(name, figure, "update_discarded", still)
    for cause, mistake in MISTAKES.items():
        guess = adamw(subject, seen, number, **mistake)
        if guess is not None and difference(only(moved, wrong), only(guess, wrong)) < SAME / 4:
            return failed(name, figure, cause, wrong)
    ratios = {n: ratio(moved[n], expected[n]) for n in wrong}
    if all(difference({n: moved[n]}, {n: factor * expected[n]}) < SAME for n, factor in ratios.items()):
        typical = sorted(ratios.values())[len(ratios) // 2]
        figure += f": {typical:.2f} times as far"
        return failed(name, figure, "ascent" if typical < 0 else "learning_rate_wrong", wrong)
    return failed(name, figure, "update_wrong", wrong)


def _next(subject: Subject, first: Observed, seen: Observed, number: int) -> Finding | None:
    """A later step starts from the state that the one before it left."""
    name, beta = f"step {number}", subject.optim.betas[0]
    try:
        m1, m2 = moments(seen.before, first.state), moments(seen.before, seen.state)
    except KeyError:
        return None
    fresh = clipped(subject, seen.gradient)
    expected = {n: beta * m1[n] + (1 - beta) * fresh[n] for n in fresh}
    count = float(seen.state["step"])
    if difference(m2, expected) < SAME and count == number:
        return _second_moments(subject, first, seen, number) or _update(subject, seen, number)
    odd = [n for n in m2 if difference({n: m2[n]}, {n: expected[n]}) > SAME and np.any(expected[n])]
    figure = f"moments differ by {difference(m2, expected):.1e} from what {number} steps make; {count:g} were counted"
    both = clipped(subject, {n: first.gradient[n] + seen.gradient[n] for n in fresh})
    summed = {n: beta * m1[n] + (1 - beta) * both[n] for n in fresh}
    if difference(m2, summed) < SAME:
        return failed(name, figure, "gradients_accumulate")
    if piled := _piled_up(first, seen, {n: m2[n] - beta * m1[n] for n in odd}):
        return failed(name, figure, "gradients_accumulate", piled)
    reported, true = seen.metrics["grad_norm"], norm_of({n: first.gradient[n] + seen.gradient[n] for n in fresh})
    if abs(reported - true) < 0.05 * true < abs(reported - norm_of(seen.gradient)):
        return failed(name, figure, "gradients_accumulate")
    if difference(m2, {n: (1 - beta) * fresh[n] for n in fresh}) < SAME:
        return failed(name, figure, "state_lost")
    return failed(name, figure, "compiled_differs" if seen.compiled else "update_wrong", odd)


def _piled_up(first: Observed, seen: Observed, used: Arrays) -> list[str]:
    """Parameters that got both steps' gradients, if all others got the direction of their own."""
    piled = []
    for n, gradient in used.items():
        own, both = {"": seen.gradient[n]}, {"": first.gradient[n] + seen.gradient[n]}
        if angle({"": gradient}, own) < SAME:
            continue
        if angle({"": gradient}, both) > SAME:
            return []
        piled.append(n)
    return piled


def _second_moments(subject: Subject, first: Observed, seen: Observed, number: int) -> Finding | None:
    """The squares that a later step adds to those before it."""
    beta, fresh = subject.optim.betas[1], clipped(subject, seen.gradient)
    v1, v2 = (moments(seen.before, state, "v") for state in (first.state, seen.state))
    expected = {n: beta * v1[n] + (1 - beta) * fresh[n] ** 2 for n in fresh}
    if difference(v2, expected) < SAME:
        return None
    figure = f"second moments differ by {difference(v2, expected):.1e} from what {number} steps make"
    lost = difference(v2, {n: (1 - beta) * fresh[n] ** 2 for n in fresh}) < SAME
    return failed(f"step {number}", figure, "state_lost" if lost else "update_wrong")


def _apart(moved: np.ndarray, expected: np.ndarray, before: np.ndarray) -> bool:
    """Whether two updates differ by more than rounding the parameter explains."""
    rounding = 2e-7 * float(np.linalg.norm(before))
    return float(np.linalg.norm(moved - expected)) > SAME * float(np.linalg.norm(expected)) + rounding


def _worst(a: Arrays, b: Arrays) -> list[str]:
    order: Callable[[str], float] = lambda n: -difference({n: a[n]}, {n: b[n]})  # noqa: E731
    return sorted(b, key=order)[:8]

"""Steps of any optimiser beside the same steps in NumPy, and which known mistake explains a difference.

A step is predicted from what was there before it: parameters, exported state, and the gradient by autograd. Where the
prediction fails, each mistake is predicted in its turn, and the one that fits is named.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.diagnostics.optimizers import EpsInside, updated
from mlx_training.diagnostics.report import Finding, failed
from mlx_training.diagnostics.subject import Subject
from mlx_training.diagnostics.trial import Observed, clipped, difference, norm_of, ratio, times, trial_rates
from mlx_training.optim import COUPLED, Optim
from mlx_training.spec import Param

SAME = 0.02  # relative difference of two updates or states that count as equal
SURE = 1e-3  # of a parameter's largest gradient: below it a sign may be rounding's
LONG_AGO = 10**9  # steps after which bias correction is over


@dataclass(frozen=True)
class Guess:
    """What a step may have been made of."""

    optim: Optim
    table: dict[str, Param]
    gradient: Arrays  # clipped
    state: Arrays  # before the step
    number: int  # steps, this one included, that the optimiser counts
    decays: float = 0.0  # decoupled decay beside what `optim` does
    rates: dict[str, float] = field(default_factory=dict)


def follow(subject: Subject, taken: Sequence[Observed]) -> Finding | None:
    """What is wrong with the first of these steps, from the start, that is not as configured."""
    state: Arrays = {}
    for number, seen in enumerate(taken, start=1):
        guess = configured(subject, seen, state, number)
        if wrong := differing(subject, guess, seen):
            return _explained(subject, guess, seen, wrong, taken[number - 2] if number > 1 else None)
        true, reported = norm_of(seen.gradient), seen.metrics["grad_norm"]
        if abs(reported - true) > 1e-3 * true:
            figure = f"reported {reported:.3e}, the gradient's norm is {true:.3e}"
            return failed("reported norm", figure, "norm_misreported")
        count = float(seen.state.get("step", number))
        if count != number:
            return failed(f"step {number}", f"{count:g} steps were counted", "state_lost")
        state = seen.state
    return None


def configured(subject: Subject, seen: Observed, state: Arrays, number: int) -> Guess:
    """The step as it should be."""
    table, rates = subject.spec.params(), trial_rates(subject, number)
    return Guess(subject.optim, table, clipped(subject, seen.gradient), state, number, rates=rates)


def differing(subject: Subject, guess: Guess, seen: Observed, names: Sequence[str] = ()) -> list[str]:
    """Of these parameters (all, if none) the ones that moved, or whose state is, otherwise than guessed."""
    wrong, exempt = [], subject.spec.zero_gradients()
    for n in names or guess.table:
        expected, state = _predicted(guess, n, seen.before[n])
        moved, gradient = seen.after[n].astype(np.float64) - seen.before[n], np.abs(seen.gradient[n])
        sure = (gradient > SURE * gradient.max(initial=0.0)) | (gradient == 0)
        if n in exempt:
            sure[exempt[n]] = False
        rounding = 2e-7 * float(np.linalg.norm(seen.before[n]))
        away, way = (float(np.linalg.norm(x[sure])) for x in (moved - expected, expected))
        found = {key: seen.state[f"{n}.{key}"] for key in state if f"{n}.{key}" in seen.state}
        kept = {key: np.where(sure, x, 0) if x.shape == sure.shape else x for key, x in found.items()}
        should = {key: np.where(sure, x, 0) if x.shape == sure.shape else x for key, x in state.items() if key in kept}
        off = [k for k in kept if difference({k: kept[k]}, {k: should[k]}) > SAME and norm_of({k: should[k]}) > 1e-20]
        if away > SAME * way + rounding or (off and n not in exempt):
            wrong.append(n)
    return wrong


def _predicted(guess: Guess, n: str, before: np.ndarray) -> tuple[np.ndarray, Arrays]:
    """How far a parameter moves, and its state afterwards."""
    param = guess.table[n]
    shapes = guess.optim.state(param)
    state = {key: guess.state.get(f"{n}.{key}", np.zeros(shape)) for key, shape in shapes.items()}
    rate = guess.rates[param.group]
    after, state = updated(guess.optim, param, before, guess.gradient[n], state, guess.number, rate)
    pull = rate * guess.decays * before if param.decay else 0.0
    return after - before - pull, state


def _guesses(subject: Subject, right: Guess, seen: Observed, last: Observed | None) -> Iterator[tuple[str, Guess]]:
    optim, table, limit = right.optim, right.table, subject.optim.grad_clip_norm
    yield "ascent", replace(right, gradient=times(right.gradient, -1.0))
    yield "clip_ignored", replace(right, gradient=seen.gradient)
    if limit is not None:
        each = {n: g * min(1.0, limit / (np.linalg.norm(g) + 1e-6)) for n, g in seen.gradient.items()}
        yield "clip_wrong", replace(right, gradient=each)
    if last:
        both = {n: last.gradient[n] + g for n, g in seen.gradient.items()}
        yield "gradients_accumulate", replace(right, gradient=clipped(subject, both))
        yield "state_lost", replace(right, state={})
        yield "state_lost", replace(right, state={}, number=1)
        yield "state_lost", replace(right, number=1)
    if optim.weight_decay:
        without = replace(optim, weight_decay=0.0)
        yield "decay_ignored", replace(right, optim=without)
        yield "decay_everywhere", replace(right, table={n: p._replace(decay=True) for n, p in table.items()})
        if optim.name in COUPLED:
            yield "decay_decoupled", replace(right, optim=without, decays=optim.weight_decay)
        else:
            pulled = {n: g + optim.decay(table[n]) * seen.before[n] for n, g in right.gradient.items()}
            yield "decay_coupled", replace(right, optim=without, gradient=pulled)
    if optim.name == "muon":
        yield "muon_misplaced", replace(right, table={n: p._replace(hidden=len(p.shape) > 1) for n, p in table.items()})
        yield "muon_misplaced", replace(right, table={n: p._replace(hidden=False) for n, p in table.items()})
        yield "learning_rate_wrong", replace(right, optim=replace(optim, muon_lr_factor=1.0))
    yield "no_bias_correction", replace(right, number=LONG_AGO)
    yield "eps_misplaced", replace(right, optim=EpsInside(**vars(optim)))


def _explained(subject: Subject, right: Guess, seen: Observed, wrong: list[str], last: Observed | None) -> Finding:
    name = f"step {right.number}" if last else "update"
    moved = {n: seen.after[n] - seen.before[n] for n in seen.before}
    figure = f"{len(wrong)} of {len(moved)} parameters moved otherwise than {right.optim.name} would"
    still = [n for n in wrong if not np.any(moved[n])]
    if not any(map(np.any, moved.values())):
        return failed(name, "no parameter has moved", "update_discarded", list(moved)[:8])
    if len(still) == len(wrong):
        return failed(name, figure, "update_discarded", still)
    if last and (stale := [n for n in wrong if _is_stale(n, last.state, seen.state)]) and len(stale) == len(wrong):
        return failed(name, f"{figure}; their momentum is the last step's", "momentum_stale", stale)
    fitting = [pair for pair in _guesses(subject, right, seen, last) if not differing(subject, pair[1], seen, wrong)]
    if fitting:
        moves = [{n: _predicted(guess, n, seen.before[n])[0] for n in wrong} for _, guess in fitting]
        best = min(range(len(fitting)), key=lambda i: difference(moved, moves[i]))
        return failed(name, figure, fitting[best][0], wrong)
    expected = {n: _predicted(right, n, seen.before[n])[0] for n in wrong}
    ratios = {n: ratio(moved[n], expected[n]) for n in wrong if np.any(expected[n])}
    if ratios and all(difference({n: moved[n]}, {n: factor * expected[n]}) < SAME for n, factor in ratios.items()):
        typical = sorted(ratios.values())[len(ratios) // 2]
        if abs(typical - 1) > SAME:
            cause = "ascent" if typical < 0 else "learning_rate_wrong"
            return failed(name, f"{figure}: {typical:.2f} times as far", cause, wrong)
    return failed(name, figure, "compiled_differs" if last and seen.compiled else "update_wrong", wrong)


def _is_stale(n: str, before: Arrays, after: Arrays) -> bool:
    old, new = before.get(f"{n}.m"), after.get(f"{n}.m")
    return old is not None and new is not None and bool(np.any(old)) and np.array_equal(old, new)

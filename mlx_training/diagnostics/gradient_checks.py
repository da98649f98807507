"""Checks of the gradient: it is there, it is the derivative, and it arrives with a usable size."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.data.batch import Batch
from mlx_training.diagnostics.exam import WARM_STEPS, Check, Exam
from mlx_training.diagnostics.report import Finding, failed, passed

NUM_DIRECTIONS = 24  # of the probe without autograd: fewer can miss a weak influence
NUM_RANDOM = 2  # further directions of a derivative
TOLERANCE = 0.1  # relative error of a directional derivative
WITH_EXPERTS = 0.5  # the same where tokens change their expert: a step averages over jumps, which have no gradient
RESOLUTION = 3e-7  # relative rounding error of a float32 loss
VANISHING, EXPLODING = 1e-7, 1e4  # gradient norm of a group against the largest; sensitivity |g| |p| / loss


def finite(exam: Exam) -> Finding:
    """No NaN and no infinity."""
    bad = [name for name, gradient in exam.gradients.items() if not np.isfinite(gradient).all()]
    if bad:
        return failed("gradient values", f"{len(bad)} parameters", "gradient_nonfinite", bad)
    norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in exam.gradients.values()))
    return passed("gradient values", f"finite, norm {norm:.3e}")


def reach(exam: Exam) -> list[Finding]:
    """Every trainable parameter gets a gradient, at once or after a few steps; else why not."""
    name, subject = "gradient reach", exam.subject
    zero = _without_gradient(exam, exam.gradients)
    batch = exam.batches[0]
    if zero:
        with subject.restored():
            exam.train(WARM_STEPS)
            later = [exam.gradients_of(other) for other in exam.batches[:2]]
            zero = [n for n in zero if all(n in _without_gradient(exam, gradients) for gradients in later)]
            influential = _influential(exam, zero, batch) if zero else []
    if not zero:
        return [passed(name, f"all {len(exam.gradients)} parameters")]
    found = []
    if influential:
        figure = f"gradient 0 for {len(influential)} parameters, yet the loss changes with them"
        found.append(failed(name, figure, "disconnected", influential))
    if idle := [n for n in zero if n not in influential]:
        figure = f"gradient 0 for {len(idle)} parameters, and no change of the loss in {NUM_DIRECTIONS} directions"
        found.append(failed(name, figure, "no_influence", idle))
    return found


def derivative(exam: Exam) -> Finding:
    """Along a parameter's own gradient the loss rises by its norm: central differences, no autograd."""
    name, subject, batch = "derivative", exam.subject, exam.batches[0]
    names = [n for n, g in exam.gradients.items() if np.any(g)]
    chosen = names if exam.full else names[:: max(1, len(names) // 12)]
    with subject.restored():
        noise = _noise(exam, batch)
        seen = {n: _derivative_error(exam, n, batch, noise) for n in chosen}
        zeros = {n: _zero_error(exam, n, batch, noise) for n in names if not exam.gradients[n].all()}
    errors = {n: error for n, (error, _) in seen.items() if error is not None}
    errors |= {n: max(error, errors.get(n, 0.0)) for n, error in zeros.items()}
    tolerance = WITH_EXPERTS if getattr(subject.spec, "experts", None) else TOLERANCE
    wrong = [n for n, error in errors.items() if error > tolerance]
    steep = [n for n, (_, is_steep) in seen.items() if is_steep and n not in wrong]
    worst = max(errors.values(), default=0.0)
    figure = f"worst relative error {worst:.1e} of {len(errors)} parameters"
    if len(steep) > len(wrong):
        figure = f"{len(steep)} gradients hold only within a thousandth of the weights: the loss is chaotic"
        return failed(name, figure, "gradient_exploding", steep)
    return failed(name, figure, "gradient_wrong", wrong) if wrong else passed(name, figure)


def size(exam: Exam) -> list[Finding]:
    """Nothing vanishes on the way to the first layers, nothing explodes."""
    name, found = "gradient size", []
    loss = abs(exam.loss(exam.batches[0])) + 1e-12
    norms = {n: float(np.linalg.norm(g.astype(np.float64))) for n, g in exam.gradients.items()}
    sensitivity = {n: norms[n] * max(float(np.linalg.norm(exam.parameters[n])), 1e-3) / loss for n in norms}
    modules: dict[str, float] = {}
    for n, norm in norms.items():
        if _real(exam, n):
            modules[_module(n)] = max(modules.get(_module(n), 0.0), norm)
    largest = max(modules.values())
    if vanished := [m for m, norm in modules.items() if 0 < norm < VANISHING * largest]:
        figure = f"{min(modules[m] for m in vanished):.1e} against {largest:.1e} elsewhere"
        found.append(failed(name, figure, "gradient_vanishing", vanished))
    if exploded := [n for n, value in sensitivity.items() if value > EXPLODING]:
        figure = f"norm {max(norms[n] for n in exploded):.1e}, loss {loss:.3g}"
        found.append(failed(name, figure, "gradient_exploding", exploded))
    return found or [passed(name, f"between {min(modules.values()):.1e} and {largest:.1e} by module")]


CHECKS = (
    Check("gradient values", finite, blocking=True),
    Check("gradient reach", reach, blocking=True),
    Check("gradient size", size),
    Check("derivative", derivative),
)


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _real(exam: Exam, name: str) -> bool:
    """Whether any part of a parameter has a true gradient."""
    part = exam.subject.spec.zero_gradients().get(name)
    return part is None or exam.gradients[name].size > exam.gradients[name][part].size


def _without_gradient(exam: Exam, gradients: Arrays) -> list[str]:
    return [name for name, gradient in gradients.items() if not np.any(gradient) and _real(exam, name)]


def _influential(exam: Exam, names: Sequence[str], batch: Batch) -> list[str]:
    """Parameters along which the loss changes; those of one module are moved together first."""
    base = exam.subject.backend.export(exam.subject.model)
    rng, found = np.random.default_rng(0), []
    for module in dict.fromkeys(n.partition(".")[0] for n in names):
        own = [n for n in names if n.partition(".")[0] == module]
        if _changes(exam, base, own, batch, rng):
            found += own if len(own) == 1 else [n for n in own if _changes(exam, base, [n], batch, rng)] or own
    return found


def _changes(exam: Exam, base: Arrays, names: Sequence[str], batch: Batch, rng: np.random.Generator) -> bool:
    reference = exam.loss_at(base, batch)
    for _ in range(NUM_DIRECTIONS):
        moved = dict(base)
        for n in names:
            rms = max(float(np.sqrt(np.square(base[n]).mean())), 0.1)
            moved[n] = (base[n] + 0.5 * rms * rng.standard_normal(base[n].shape)).astype(np.float32)
        if abs(exam.loss_at(moved, batch) - reference) > 10 * RESOLUTION * abs(reference):
            return True
    return False


def _noise(exam: Exam, batch: Batch) -> float:
    """How far the loss jumps when every parameter changes by its last bit: what float32 cannot resolve."""
    rng, base = np.random.default_rng(0), exam.parameters
    loss, jumps = exam.loss_at(base, batch), []
    for _ in range(4):
        last_bit = {
            n: (array * (1 + 1e-7 * rng.choice((-1, 1), array.shape))).astype(np.float32) for n, array in base.items()
        }
        jumps.append(abs(exam.loss_at(last_bit, batch) - loss))
    return max(RESOLUTION * abs(loss), 2 * max(jumps))


def _derivative_error(exam: Exam, name: str, batch: Batch, noise: float) -> tuple[float | None, bool]:
    """Relative error of the first central difference that fits, and whether only a tiny step did.

    None where float32 cannot resolve the difference, or where no two steps agree: a loss that jumps, as it does where
    a token changes its expert, has no derivative to compare with.
    """
    gradient, base = exam.gradients[name].astype(np.float64), exam.parameters
    norm = float(np.linalg.norm(gradient))
    direction, loss = gradient / norm, abs(exam.loss_at(base, batch))
    reach = _reach(base[name])
    slopes: list[float] = []
    for fraction in (1 / 64, 1 / 8, 1.0, 1 / 512, 1 / 4096, 1 / 32768):
        length = fraction * reach
        if RESOLUTION * loss / (length * norm) > TOLERANCE / 2:
            continue
        moved = (base | {name: (base[name] + s * length * direction).astype(np.float32)} for s in (1, -1))
        up, down = (exam.loss_at(parameters, batch) for parameters in moved)
        slope = (up - down) / (2 * length) / norm
        error = abs(slope - 1)
        if noise / (length * norm) < TOLERANCE / 2:  # a misfit counts where it cannot be noise
            slopes.append(slope)
        if error < TOLERANCE:
            return max(error, _random_error(exam, name, batch, fraction * reach, noise)), fraction < 1 / 64
    return (min(abs(slope - 1) for slope in slopes) if _agree(slopes) else None), False


def _random_error(exam: Exam, name: str, batch: Batch, length: float, noise: float) -> float:
    """Error along random directions, as a share of the gradient's norm: a part that is missing shows here only."""
    gradient = exam.gradients[name].astype(np.float64)
    rng, norm = np.random.default_rng(0), float(np.linalg.norm(gradient))
    steps, errors = [length, length / 8, length / 64], []
    for _ in range(NUM_RANDOM):
        direction = rng.choice((-1.0, 1.0), gradient.shape) / gradient.size**0.5
        slopes = _slopes(exam, name, batch, direction, steps, norm, noise)
        along = float((gradient * direction).sum()) / norm
        errors.append(min(abs(slope - along) for slope in slopes) if len(slopes) > 1 and _agree(slopes) else 0.0)
    return max(errors)


def _zero_error(exam: Exam, name: str, batch: Batch, noise: float) -> float:
    """How the loss rises with the values whose gradient is exactly 0, as a share of the others': a head that is cut
    off has such values, too few to show along directions of all.
    """
    gradient = exam.gradients[name].astype(np.float64)
    zero, reach = gradient == 0, _reach(exam.parameters[name])
    rng, typical = np.random.default_rng(0), float(np.linalg.norm(gradient)) / (~zero).sum() ** 0.5
    direction = zero * rng.choice((-1.0, 1.0), gradient.shape) / zero.sum() ** 0.5
    slopes = _slopes(exam, name, batch, direction, [reach, reach / 8, reach / 64], typical, noise)
    return min(map(abs, slopes)) if len(slopes) > 1 and _agree(slopes) else 0.0


def _slopes(
    exam: Exam, name: str, batch: Batch, direction: np.ndarray, steps: Sequence[float], unit: float, noise: float
) -> list[float]:
    """Central differences along a direction in multiples of `unit`, where float32 resolves them."""
    base, slopes = exam.parameters, []
    for step in steps:
        if noise / (step * unit) > TOLERANCE / 2:
            continue
        moved = (base | {name: (base[name] + sign * step * direction).astype(np.float32)} for sign in (1, -1))
        up, down = (exam.loss_at(parameters, batch) for parameters in moved)
        slopes.append((up - down) / (2 * step) / unit)
    return slopes


def _reach(parameter: np.ndarray) -> float:
    """How far a parameter is moved at most: 5 % of its length."""
    return 0.05 * max(float(np.linalg.norm(parameter)), 0.02 * parameter.size**0.5)


def _agree(slopes: Sequence[float]) -> bool:
    """Whether differences with several steps can be one derivative's: a single one, or two that are alike."""
    pairs = combinations(slopes, 2)
    return len(slopes) == 1 or any(abs(a - b) < TOLERANCE * max(1, abs(a)) for a, b in pairs)

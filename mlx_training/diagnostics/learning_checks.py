"""Checks of learning itself: one batch is learnt, every parameter moves, a resumed run goes on, both backends agree."""

import time
from dataclasses import replace

import numpy as np

from mlx_training.backend import Arrays
from mlx_training.data.rows import Row
from mlx_training.diagnostics import drill
from mlx_training.diagnostics.compare import compare
from mlx_training.diagnostics.exam import Check, Exam, without_dropout
from mlx_training.diagnostics.report import Finding, failed, passed, skipped, warned
from mlx_training.diagnostics.subject import from_config
from mlx_training.environment import installed_backends

STEPS = {False: 20, True: 60}  # on one batch, quick and full
BUDGET = 5.0, 40.0  # seconds the steps may take, quick and full: a large model takes fewer
LEARNT = {False: 0.998, True: 0.99}  # share of the loss that may remain: a random frozen LM lets little through
LOWEST_RATE = 1e-3  # of those steps; a configured rate below it would show nothing in so few
LOWEST_RATES = {"sgd": 0.1, "adagrad": 1e-2}  # of optimisers whose steps are shorter than the rate
MOST = 0.3  # of its own size that a parameter should move in a step
AGREE = 1e-3  # relative difference of two backends' activations


def one_batch(exam: Exam) -> list[Finding]:
    """Training on one batch lowers its loss, moves every parameter, and leaves the frozen weights alone."""
    subject, batch, name = exam.subject, exam.batches[0], "one batch"
    backend, model, table = subject.backend, subject.model, subject.spec.params()
    lowest = LOWEST_RATES.get(subject.optim.name, LOWEST_RATE)
    peak = {
        g: max(subject.rates(max(1, round(0.3 * subject.total_steps))).get(g, 0.0), lowest) for g in subject.spec.groups
    }
    before, frozen, loss = exam.parameters, backend.frozen_hash(model), exam.loss(batch)
    with subject.restored():
        step, started, number = subject.new_step(), time.monotonic(), 0
        while number < STEPS[exam.full] and time.monotonic() - started < BUDGET[exam.full]:
            number += 1
            step([batch], step=number, lr=peak)
        try:
            after = backend.export(model)
        except Exception as error:  # noqa: BLE001  # a compiled step that leaves tracers behind raises the framework's own
            return [failed(name, f"after {number} steps: {error}", "parameters_unreadable")]
        remaining = exam.loss(batch)
        frozen_after = backend.frozen_hash(model)
    found = []
    if frozen_after != frozen:
        found.append(
            failed(
                "frozen weights",
                f"hash {frozen[:8]}, after {number} steps {frozen_after[:8]}",
                "frozen_weights_changed",
            )
        )
    figure = f"loss {loss:.4f}, after {number} steps on it {remaining:.4f}"
    if not np.isfinite(remaining) or remaining > 1.02 * loss + 1e-3:
        found.append(failed(name, figure, "learning_rate_too_large" if _falls_slowly(exam, loss) else "ascent"))
    elif remaining > LEARNT[exam.full] * loss and loss > 0.05 and number >= STEPS[False]:
        found.append(failed(name, figure, "cannot_overfit"))
    still = [n for n in table if not _moved(exam, n, before, after, peak[table[n].group] * number)]
    if still:
        found.append(
            failed("movement", f"{len(still)} of {len(table)} parameters did not move", "update_discarded", still)
        )
    ratios = {n: _ratio(before[n], after[n]) / number for n in table if np.any(before[n])}
    if not found and (far := [n for n, ratio in ratios.items() if ratio > MOST]):
        found.append(
            warned("movement", f"{len(far)} move by more than {MOST:g} a step", "learning_rate_too_large", far)
        )
    span = f"update / weight {min(ratios.values()):.1e} to {max(ratios.values()):.1e} a step"
    return found or [passed(name, f"{figure}; {span}")]


def resume(exam: Exam) -> Finding:
    """Two steps, saved, loaded into a new step, two more: as four in a row. Also in a new process, given a config."""
    subject = exam.subject
    backend, model = subject.backend, subject.model
    with subject.restored():
        step = subject.new_step()
        drill.steps(subject, step, (1, 2))
        saved = drill.save(subject, step)
        drill.steps(subject, step, (3, 4))
        whole = drill.save(subject, step).model
        again = subject.new_step()
        backend.load(model, saved.model)
        again.load(saved.optimizer)
        drill.steps(subject, again, (3, 4))
        resumed = drill.save(subject, again).model
    finding = _continued("resume", whole, resumed, saved.model)
    if finding.status == "fail" or not exam.as_configured or subject.config is None or not subject.fresh:
        return finding
    elsewhere = drill.in_a_fresh_process(subject.config, backend.name, saved)
    return _continued("resume", whole, elsewhere, saved.model, " in a fresh process")


def backends_agree(exam: Exam) -> Finding:
    """The same parameters and batch give the same activations on the other backend."""
    name, subject = "MLX = PyTorch", exam.subject
    others = [other for other in installed_backends() if other != subject.backend.name]
    if subject.config is None or not others:
        return skipped(name, "needs both backends and a configuration")
    twin = from_config(subject.config, others[0])
    twin.backend.load(twin.model, exam.parameters)
    with without_dropout(subject.model), without_dropout(twin.model):
        found = compare(subject.backend, subject.model, twin.backend, twin.model, twin.objective, exam.batches[0])
    first = found.first_divergence(AGREE)
    figure = f"largest relative difference {max(row.relative for row in found.rows):.1e}, {len(found.rows)} outputs"
    if first is None:
        return passed(name, figure)
    return failed(name, f"{figure}; first in {first}", "realisation_differs", [first])


def series_matter(exam: Exam) -> list[Finding]:
    """A trained model answers worse without its series, and worse with another row's."""
    name, data, subject = "series matter", exam.row_data, exam.subject
    if data is None or not subject.trained or not exam.has_series:
        return [skipped(name, "not a trained model, or no series")]
    encoder, collate = data.encoder, data.train_batches().collate
    rows = [row for batch in exam.batches for row, _ in exam.encoded(batch) if row.series]
    strangers = [_stranger(row, rows) for row in rows]

    def loss(chosen: list[Row], *, ablate: bool = False) -> float:
        items = [encoder.encode(row, ablate=ablate) for row in chosen]
        return exam.loss(collate(items, range(len(items))))

    own, blank, other = loss(rows), loss(rows, ablate=True), loss(strangers)
    figure = f"loss {own:.4f}; without series {blank:.4f}, with another row's {other:.4f}; {len(rows)} rows"
    if min(blank, other) < 1.2 * own + 0.02:
        return [failed(name, figure, "series_ignored")]
    return [passed(name, figure)]


def _stranger(row: Row, rows: list[Row]) -> Row:
    """The row with the series of one that has another answer."""
    start = rows.index(row)
    others = (rows[(start + i) % len(rows)] for i in range(1, len(rows)))
    fits = (other for other in others if other.answer != row.answer and len(other.series) == len(row.series))
    other = next(fits, None)
    return row if other is None else replace(row, series=other.series)


TRAINED = (Check("series matter", series_matter),)
CHECKS = (
    Check("one batch", one_batch),
    Check("MLX = PyTorch", backends_agree, full=True),
    Check("resume", resume, full=True),
)


def _falls_slowly(exam: Exam, loss: float) -> bool:
    """Whether the loss falls at a small rate."""
    subject = exam.subject
    with subject.restored():
        step, rates = subject.new_step(), dict.fromkeys(subject.spec.groups, LOWEST_RATE / 10)
        for number in range(1, 6):
            step([exam.batches[0]], step=number, lr=rates)
        return exam.loss(exam.batches[0]) < loss


def _moved(exam: Exam, name: str, before: Arrays, after: Arrays, rates: float) -> bool:
    """Whether a parameter moved by more than its decay explains; parts without a true gradient need not."""
    subject = exam.subject
    decay = subject.optim.decay(subject.spec.params()[name])
    part = subject.spec.zero_gradients().get(name)
    if part is not None and before[name][part].size == before[name].size:
        return True
    expected = before[name] * np.exp(-rates * decay)
    moved = np.abs(after[name] - before[name]).max()
    return bool(moved > 0 and np.abs(after[name] - expected).max() > 0.1 * rates * decay * np.abs(before[name]).max())


def _continued(name: str, whole: Arrays, resumed: Arrays, middle: Arrays, where: str = "") -> Finding:
    moved = max(float(np.abs(whole[n] - middle[n]).max()) for n in whole)
    worst = {n: float(np.abs(whole[n] - resumed[n]).max()) for n in whole}
    figure = f"parameters differ by {max(worst.values()):.1e} after two resumed steps of {moved:.1e}{where}"
    if max(worst.values()) > 1e-2 * moved:
        return failed(name, figure, "resume_differs", sorted(worst, key=lambda n: -worst[n])[:8])
    return passed(name, figure)


def _ratio(before: np.ndarray, after: np.ndarray) -> float:
    way, size = (float(np.linalg.norm(array.astype(np.float64))) for array in (after - before, before))
    return way / max(size, 1e-12)

"""Checks of what the model does: it responds, causally, and each row by itself."""

from dataclasses import replace

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.diagnostics.exam import WARM_STEPS, Check, Exam, label_places, only_label, row_names
from mlx_training.diagnostics.report import Finding, failed, passed, skipped, warned

SAME = 1e-5  # relative difference of two losses that should be equal


def activations(exam: Exam) -> Finding:
    """No module says the same whatever it is given."""
    name = "activations"
    dead, total = _constant_outputs(exam)
    if dead:  # a layer that starts at zero does not stay there
        with exam.subject.restored():
            exam.train(WARM_STEPS)
            dead = [path for path in _constant_outputs(exam)[0] if path in dead]
    if dead:
        return failed(name, f"{len(dead)} of {total} modules put out a constant", "dead_activations", dead)
    return passed(name, f"{total} modules respond to their input")


def causality(exam: Exam) -> list[Finding]:
    """By gradient: a label depends on its own row up to its place, and on nothing else."""
    name, subject = "causality", exam.subject
    if not hasattr(subject.model, "inputs"):
        return [skipped(name, "the model has no inputs(batch) to take a gradient of")]
    batch = exam.batches[0]
    places, total = label_places(batch), 0
    future: set[int] = set()
    other: set[int] = set()
    blind: set[int] = set()
    for b, label in _some_labels(batch):
        gradient = subject.backend.gradients(
            subject.model, subject.objective, only_label(batch, b, label), wrt="inputs"
        )["inputs"]
        size = np.abs(gradient).max(-1)
        if not np.isfinite(size).all():
            return [skipped(name, "the gradient is not finite")]
        place, threshold = int(places[b][label]), 1e-6 * float(size.max())
        total += 1
        if size.max() == 0:
            blind.add(b)
            continue
        if (np.delete(size, b, axis=0) > threshold).any():
            other.add(b)
        if exam.is_causal and (size[b, place + 1 :] > threshold).any():
            future.add(b)
        if place > 0 and not (size[b, :place] > 0).any():
            blind.add(b)
    found = []
    for rows, cause, what in (
        (other, "rows_mixed", "see other rows"),
        (future, "future_visible", "see later tokens"),
        (blind, "past_hidden", "see no earlier token"),
    ):
        if rows:
            indices = [batch.rows[b] for b in sorted(rows)] if batch.rows else sorted(rows)
            found.append(failed(name, f"labels of {len(rows)} rows {what}", cause, row_names(exam, indices)))
    reach = "only up to their place" if exam.is_causal else "on both sides of their place"
    return found or [passed(name, f"{total} labels: only their own row, {reach}")]


def neighbours(exam: Exam) -> Finding:
    """Other rows of the batch, given other content, leave a row's loss alone."""
    name, batch = "rows apart", exam.batches[0]
    num_rows = len(batch.lengths)
    if num_rows < 2:
        return skipped(name, "batches of one row")
    worst = 0.0
    for b in {0, num_rows - 1}:
        mask = np.zeros_like(batch.mask)
        mask[b] = batch.mask[b]
        alone = replace(batch, mask=mask)
        if mask.any():
            worst = max(worst, _relative(exam.loss(_others_changed(exam, alone, b)), exam.loss(alone)))
    figure = f"loss of a row changes by {worst:.1e} when its neighbours do"
    return failed(name, figure, "rows_mixed") if worst > SAME else passed(name, figure)


def padding_inert(exam: Exam) -> Finding:
    """Tokens and samples that are padding may hold anything."""
    name, worst, places = "padding inert", 0.0, 0
    rng = np.random.default_rng(0)
    for batch in exam.batches:
        tokens = batch.tokens.copy()
        pad = np.arange(tokens.shape[1]) >= batch.lengths[:, None]
        tokens[pad] = rng.integers(0, int(batch.tokens.max()) + 1, int(pad.sum()))
        changed, places = replace(batch, tokens=tokens), places + int(pad.sum())
        if batch.series is not None and exam.patch_size:
            samples = batch.series.copy()
            real = np.arange(samples.shape[1]) < (batch.num_patches * exam.patch_size)[:, None]
            samples[~real] = 3 * rng.standard_normal(int((~real).sum()))
            changed, places = replace(changed, series=samples), places + int((~real).sum())
        worst = max(worst, _relative(exam.loss(changed), exam.loss(batch)))
    if places == 0:
        return skipped(name, "no padding in these batches")
    figure = f"loss changes by {worst:.1e} with other values in {places} padding places"
    return failed(name, figure, "padding_attended") if worst > SAME else passed(name, figure)


def sums_and_counts(exam: Exam) -> Finding:
    """The objective is additive: over two halves of the labels, sums and weights add up."""
    name, batch = "sums and counts", exam.batches[0]
    labels = np.argwhere(batch.mask > 0)
    if len(labels) < 2:
        return skipped(name, "fewer than two labels")
    halves = []
    for part in (labels[::2], labels[1::2]):
        mask = np.zeros_like(batch.mask)
        mask[tuple(part.T)] = batch.mask[tuple(part.T)]
        halves.append(exam.sums(replace(batch, mask=mask)))
    b, label = labels[np.argmax(labels[:, 1])].tolist()
    if exam.sums(only_label(batch, b, label))[1] <= 0:
        return failed(name, f"label {label} of a row weighs nothing by itself", "weight_not_count")
    loss, weight = exam.sums(batch)
    loss_error = abs(halves[0][0] + halves[1][0] - loss) / abs(loss)
    weight_error = abs(halves[0][1] + halves[1][1] - weight) / abs(weight)
    figure = f"two halves of {len(labels)} labels add up: loss to {loss_error:.0e}, weight to {weight_error:.0e}"
    if max(loss_error, weight_error) > 1e-3:
        return failed(name, figure, "weight_not_count")
    return passed(name, figure)


def initial_loss(exam: Exam) -> Finding:
    """A fresh model guesses: about ln V nats, or what the frozen LM knows already."""
    name, size = "initial loss", exam.vocab_size
    if not exam.subject.fresh or size is None:
        return skipped(name, "not a fresh model, or no vocabulary size")
    loss, guess = exam.loss(exam.batches[0]), float(np.log(size))
    figure = f"{loss:.3f} nats; guessing among {size} is {guess:.3f}"
    if loss > 3 * guess + 2 or loss < 0:
        return failed(name, figure, "initial_loss")
    return warned(name, figure, "initial_loss") if loss > 1.5 * guess + 2 else passed(name, figure)


CHECKS = (
    Check("activations", activations),
    Check("causality", causality),
    Check("rows apart", neighbours),
    Check("padding inert", padding_inert),
    Check("sums and counts", sums_and_counts),
    Check("initial loss", initial_loss),
)


def _constant_outputs(exam: Exam) -> tuple[list[str], int]:
    """Modules whose output is the same at every place, and how many were looked at."""
    subject = exam.subject
    outputs = subject.backend.activations(subject.model, subject.objective, exam.batches[0])
    flat = {path: array.reshape(-1, array.shape[-1]) for path, array in outputs.items() if array.ndim > 1}
    return [path for path, array in flat.items() if len(array) > 1 and not np.ptp(array, axis=0).any()], len(flat)


def _some_labels(batch: Batch) -> list[tuple[int, int]]:
    """First and last supervised label of the first and the last row."""
    chosen = []
    for b in sorted({0, len(batch.lengths) - 1}):
        labels = np.flatnonzero(batch.mask[b])
        chosen += [(b, int(label)) for label in sorted({*labels[:1].tolist(), *labels[-1:].tolist()})]
    return chosen


def _others_changed(exam: Exam, batch: Batch, b: int) -> Batch:
    """The batch with other tokens and samples in every row but b."""
    tokens = np.where(np.arange(len(batch.tokens))[:, None] == b, batch.tokens, np.roll(batch.tokens, 1, axis=1))
    if batch.series is None or not exam.patch_size:
        return replace(batch, tokens=tokens)
    index = batch.patch_index[b]
    own = np.unique((index[index > 0] - 1) // (batch.series.shape[1] // exam.patch_size))
    others = ~np.isin(np.arange(len(batch.series)), own)
    scale, series = batch.scale.copy(), batch.series.copy()
    series[others] = 0.5 - 2 * series[others]
    scale[others] = 1 - scale[others]
    return replace(batch, tokens=tokens, series=series, scale=scale)


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-6)

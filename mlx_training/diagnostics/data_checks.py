"""Checks of the data as a whole: batches, vocabulary, series, copies, balance, padding."""

import itertools
from collections import Counter

import numpy as np

from mlx_training.assemble import SPLITS, TextData
from mlx_training.data.batch import Batch
from mlx_training.data.rows import normalise
from mlx_training.data.series import series_stats, zscore
from mlx_training.diagnostics.exam import Check, Exam, row_index, row_names, samples_of, series_of
from mlx_training.diagnostics.report import Finding, failed, passed, skipped, warned

CONSTANT_SHARE = 0.05  # of the rows may have nothing but constant series
COPIES_SHARE = 0.01  # of the rows may be copies of others
WINDOW_COPIES_SHARE = 0.02  # of short windows of text may coincide
DOMINANT_SHARE = 0.95  # one answer covers more: a constant is a good model
PADDING_SHARE = 0.4


def batches_reproducible(exam: Exam) -> Finding:
    """The same index gives the same batch; another index another one."""
    name = "batches"
    build, data = exam.subject.batch, exam.subject.data
    last = exam.subject.total_steps * exam.subject.accumulation - 1
    for index in sorted({0, 1, 3, 30, last // 2, last}):
        if not _same(build(index), build(index)):
            return failed(name, f"batch {index}, built twice, differs", "batches_not_reproducible")
    if data is not None and len(data.splits["train"]) > len(exam.batches[0].rows):
        for index, (one, other) in enumerate(itertools.pairwise(exam.batches)):
            if one.rows == other.rows and _same(one, other):
                return failed(name, f"batches {index} and {index + 1} are the same", "batches_repeat")
    return passed(name, "reproducible by index, each another one")


def vocabulary(exam: Exam) -> Finding:
    """Every id of tokens and targets has a row in the embedding."""
    name, size = "vocabulary", exam.vocab_size
    if size is None:
        return skipped(name, "the spec does not say how large it is")
    ids = np.concatenate([np.r_[batch.tokens.ravel(), batch.targets.ravel()] for batch in exam.batches])
    figure = f"ids {ids.min()} to {ids.max()}; the model has {size}"
    if ids.max() >= size or ids.min() < 0:
        return failed(name, figure, "vocabulary_mismatch")
    return passed(name, figure)


def series_values(exam: Exam) -> list[Finding]:
    """Samples are finite, say something, and are normalised where the configuration says so."""
    name = "series"
    if not exam.has_series:
        return [skipped(name, "no series")]
    found = []
    bad = [row for batch in exam.batches for row in _nonfinite_rows(exam, batch)]
    raw = exam.rows("train") if exam.row_data is not None else []
    names = [row.name for row in raw if not all(np.isfinite(values).all() for values in row.series)]
    if bad or names:
        found.append(
            failed(name, f"{max(len(bad), len(names))} rows", "series_nonfinite", names[:8] or row_names(exam, bad))
        )
    if silent := [row.name for row in raw if row.series and all(values.min() == values.max() for values in row.series)]:
        figure = f"{len(silent)} of {len(raw)} rows have constant series only"
        make = failed if len(silent) > CONSTANT_SHARE * len(raw) else warned
        found.append(make(name, figure, "series_constant", silent[:8]))
    config = exam.subject.config
    if not bad and (config is None or config.dataset.normalize == "zscore"):
        worst = max((_unnormalised(exam, batch) for batch in exam.batches if batch.series is not None), default=0.0)
        if worst > 0.2 and config is not None:
            found.append(failed(name, f"mean or std off by up to {worst:.3g} from z-scores", "series_not_normalized"))
        elif worst > 30 and config is None:
            found.append(warned(name, f"values up to {worst:.3g} standard deviations off", "series_not_normalized"))
    return found or [passed(name, f"finite and normalised, in {len(raw) or 'all'} rows")]


def copies(exam: Exam) -> list[Finding]:
    """No training row twice, and none in another split."""
    name, data = "copies", exam.subject.data
    if data is None:
        return [skipped(name, "no splits to compare")]
    keys = {split: _fingerprints(exam, split) for split in SPLITS if split in data.splits}
    train = Counter(keys["train"])
    found, threshold = [], WINDOW_COPIES_SHARE if isinstance(data, TextData) else 0.0
    for split in ("validation", "test"):
        own = keys.get(split, [])
        leaked = [index for index, key in enumerate(own) if key in train]
        if len(leaked) > threshold * max(len(own), 1):
            figure = f"{len(leaked)} of {len(own)} rows of {split} are training rows too"
            where = [] if exam.row_data is None else [exam.row_data.rows(split)[index].name for index in leaked[:8]]
            found.append(failed(name, figure, "leakage", where))
    extra = sum(train.values()) - len(train)
    if extra > max(COPIES_SHARE, threshold) * sum(train.values()):
        figure = f"{extra} of {sum(train.values())} training rows are copies"
        where = []
        if exam.row_data is not None:
            where = [exam.row_data.rows("train")[i].name for i, key in enumerate(keys["train"]) if train[key] > 1]
        found.append(failed(name, figure, "rows_duplicated", where[:8]))
    checked = ", ".join(f"{len(own)} of {split}" for split, own in keys.items())
    return found or [passed(name, f"no row twice ({checked})")]


def answer_balance(exam: Exam) -> Finding:
    """No single answer covers nearly all rows."""
    name = "answer balance"
    if exam.row_data is None or len(exam.rows("train")) < 20:
        return skipped(name, "no rows with answers, or too few")
    answer, count = Counter(normalise(row.answer) for row in exam.rows("train")).most_common(1)[0]
    share = count / len(exam.rows("train"))
    figure = f"{answer!r} is the answer of {share:.0%} of {len(exam.rows('train'))} rows"
    return failed(name, figure, "answers_unbalanced") if share > DOMINANT_SHARE else passed(name, figure)


def padding(exam: Exam) -> Finding:
    """How much of a batch is padding."""
    total = sum(batch.tokens.size for batch in exam.batches)
    share = 1 - sum(int(batch.lengths.sum()) for batch in exam.batches) / total
    figure = f"{share:.0%} of the places"
    many = share > PADDING_SHARE and len(exam.batches[0].lengths) > 1
    return warned("padding", figure, "padding_share") if many else passed("padding", figure)


BATCHES = (
    Check("batches", batches_reproducible),
    Check("vocabulary", vocabulary, blocking=True),
)
CONTENT = (
    Check("series", series_values),
    Check("copies", copies),
    Check("answer balance", answer_balance),
    Check("padding", padding),
)


def _same(a: Batch, b: Batch) -> bool:
    first, second = a.arrays(), b.arrays()
    return first.keys() == second.keys() and all(
        np.array_equal(array, second[name], equal_nan=array.dtype.kind == "f") for name, array in first.items()
    )


def _rounded(values: np.ndarray) -> bytes:
    """A series to two digits of its own deviation: what a round trip through text leaves of it."""
    if not np.isfinite(values).all():
        return values.tobytes()
    stats = series_stats(values)
    return np.round(zscore(values, stats), 2).tobytes() + f"{stats.mean:.3g} {stats.std:.3g}".encode()


def _nonfinite_rows(exam: Exam, batch: Batch) -> list[int]:
    if batch.series is None:
        return []
    rows = range(len(batch.lengths))
    finite = np.isfinite(batch.series).all(1) & np.isfinite(batch.scale).all(1)
    return [row_index(batch, b) for b in rows if not finite[series_of(exam, batch, b)].all()]


def _unnormalised(exam: Exam, batch: Batch) -> float:
    """Largest deviation from mean 0 and std 1 of the series that are long enough to tell and not constant."""
    worst = 0.0
    for b in range(len(batch.lengths)):
        for values in samples_of(exam, batch, b):
            real = np.trim_zeros(values, "b")
            if real.size >= 8 and real.std() > 0:
                worst = max(worst, abs(float(real.mean())), abs(float(real.std(ddof=1)) - 1))
    return worst


def _fingerprints(exam: Exam, split: str) -> list[bytes]:
    """What makes two rows the same: their series and prompt, or their tokens."""
    data = exam.subject.data
    assert data is not None
    if isinstance(data, TextData):
        windows = data.splits[split]
        return [windows[i].tobytes() for i in range(len(windows))]
    return [
        b"|".join([*map(_rounded, row.series), row.pre_prompt.encode(), row.post_prompt.encode()])
        for row in exam.rows(split)
    ]

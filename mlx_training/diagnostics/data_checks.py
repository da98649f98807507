"""Checks of the data: what the model really sees, compared with what the rows say."""

import itertools
from collections import Counter, defaultdict

import numpy as np

from mlx_training.assemble import SPLITS, TextData
from mlx_training.data.batch import Batch
from mlx_training.data.prompt import Encoded
from mlx_training.data.rows import Row
from mlx_training.data.series import series_stats, zscore
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.diagnostics.exam import Check, Exam, label_places, row_names
from mlx_training.diagnostics.report import Finding, failed, passed, skipped, warned
from mlx_training.metrics import normalise

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
            if _same(one, other):
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


def supervision(exam: Exam) -> list[Finding]:
    """Mask and targets, place by place."""
    name, wrong = "supervision", _Wrong()
    supervised = places = 0
    for batch in exam.batches:
        expected, swapped = _expected_places(exam, batch), _swapped(exam, batch)
        for b, labels in enumerate(label_places(batch)):
            row, length = _row_index(batch, b), int(batch.lengths[b])
            on = batch.mask[b] > 0
            given = set(labels[on].tolist())
            supervised, places = supervised + int(on.sum()), places + length
            if b in swapped:
                wrong.add("labels_swapped", row)
            elif expected is not None and _inverted(given, expected[b]):
                wrong.add("mask_inverted", row)
            elif not given:
                wrong.add("nothing_supervised", row)
            elif max(given) + 1 > length - (exam.row_data is not None):
                wrong.add("padding_supervised", row)
            elif expected is not None and min(given) < min(expected[b]):
                wrong.add("prompt_supervised", row)
            inside = on & (labels + 1 < batch.tokens.shape[1]) & (labels + 1 < length)
            if _is_text(batch, b, labels[inside] + 1).all():
                wrong.shift(batch.tokens[b], labels[inside], batch.targets[b][inside], row)
    if wrong.rows:
        return [failed(name, wrong.figure(cause), cause, row_names(exam, rows)) for cause, rows in wrong.rows.items()]
    return [passed(name, f"{supervised} of {places} tokens are supervised, each with the token after it as target")]


def answers(exam: Exam) -> list[Finding]:
    """What is supervised is the row's own answer, with one end-of-text token."""
    data, name = exam.row_data, "answers"
    if data is None:
        return [skipped(name, "no rows with answers")]
    wrong = _Wrong()
    for batch in exam.batches:
        own = [row for row, _ in exam.encoded(batch)]
        for b, row in enumerate(own):
            ids = batch.targets[b][batch.mask[b] > 0].tolist()
            said = data.tokenizer.decode([i for i in ids if i != data.tokenizer.eos_id]).strip()
            text, answer = normalise(said), normalise(row.answer)
            if said != row.answer.strip() and said.endswith(row.answer.strip()):
                wrong.add("prompt_supervised", batch.rows[b])
            elif text != answer and answer.startswith(text):
                wrong.add("answer_truncated", batch.rows[b])
            elif _is_another(text, row, own):
                wrong.add("labels_swapped", batch.rows[b])
            elif data.tokenizer.eos_id not in ids:
                cut = data.encoder.max_length is not None and int(batch.lengths[b]) >= data.encoder.max_length
                wrong.add("answer_truncated" if cut else "eos_missing", batch.rows[b])
    if wrong.rows:
        return [failed(name, wrong.figure(cause), cause, row_names(exam, rows)) for cause, rows in wrong.rows.items()]
    batch = exam.batches[0]
    return [passed(name, preview(data.tokenizer, batch, 0))]


def special_tokens(exam: Exam) -> Finding:
    """One beginning-of-text token a row."""
    data, name = exam.row_data, "special tokens"
    if data is None or data.tokenizer.bos_id is None or data.encoder.layout == "opentslm":
        return skipped(name, "none, or by layout one before every text")
    bos, eos, most, rows = data.tokenizer.bos_id, data.tokenizer.eos_id, 0, []
    for batch in exam.batches:
        for b, length in enumerate(batch.lengths.tolist()):
            text = batch.tokens[b, :length][_is_text(batch, b, np.arange(length))]
            count = int((text == bos).sum()) - int(bos == eos and text[-1] == eos)
            most = max(most, count)
            if count > 1:
                rows.append(_row_index(batch, b))
    if rows:
        return failed(name, f"up to {most} beginning-of-text tokens in a row", "bos_repeated", row_names(exam, rows))
    return passed(name, f"{most} beginning-of-text token a row")


def patches(exam: Exam) -> list[Finding]:
    """Every patch stands before the labels, in its own row, and shows that row's samples."""
    name, wrong = "patches", _Wrong()
    if not exam.has_series:
        return [skipped(name, "no series")]
    for batch in exam.batches:
        if batch.series is None:
            continue
        encoded = exam.encoded(batch) if exam.row_data is not None and batch.rows else None
        seen: Counter[int] = Counter()
        for b, labels in enumerate(label_places(batch)):
            index = batch.patch_index[b]
            places, on = np.flatnonzero(index), labels[batch.mask[b] > 0]
            if places.size == 0:
                continue
            seen.update(index[places].tolist())
            if on.size and places.max() > labels.max():
                wrong.add("patches_after_answer", _row_index(batch, b))
            elif (np.diff(index[places]) <= 0).any() or (encoded and not _shows(exam, batch, b, encoded[b][1])):
                wrong.add("patches_misplaced", _row_index(batch, b))
        if max(seen.values(), default=1) > 1:
            wrong.add("patches_misplaced", -1)
    if wrong.rows:
        return [
            failed(name, wrong.figure(cause), cause, row_names(exam, [row for row in rows if row >= 0]))
            for cause, rows in wrong.rows.items()
        ]
    return [passed(name, "in their own rows, before the labels")]


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


def preview(tokenizer: Tokenizer, batch: Batch, b: int) -> str:
    """A row as the model reads it, the supervised end between brackets: `...Answer:[ rising<eos>]`."""
    length, labels = int(batch.lengths[b]), label_places(batch)[b][batch.mask[b] > 0]
    pieces: list[str] = []
    start = int(labels.min()) + 1 if labels.size else length
    index = batch.patch_index[b] if batch.patch_index is not None else np.zeros(length, int)
    t = 0
    while t < start:
        end = t
        while end < start and (index[end] > 0) == (index[t] > 0):
            end += 1
        count = end - t
        pieces.append(f" <{count} patches>" if index[t] > 0 else tokenizer.decode(batch.tokens[b, t:end].tolist()))
        t = end
    supervised = batch.tokens[b, start:length].tolist()
    tail = "<eos>" if tokenizer.eos_id in supervised else ""
    return f"{''.join(pieces)}[{tokenizer.decode(supervised)}{tail}]"


CHECKS = (
    Check("batches", batches_reproducible),
    Check("vocabulary", vocabulary, blocking=True),
    Check("patches", patches),
    Check("supervision", supervision),
    Check("answers", answers),
    Check("special tokens", special_tokens),
    Check("series", series_values),
    Check("copies", copies),
    Check("answer balance", answer_balance),
    Check("padding", padding),
)


class _Wrong:
    """Rows by what is wrong with them."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = defaultdict(list)
        self.offsets: Counter[int] = Counter()

    def add(self, cause: str, row: int) -> None:
        if row not in self.rows[cause]:
            self.rows[cause].append(row)

    def shift(self, tokens: np.ndarray, places: np.ndarray, targets: np.ndarray, row: int) -> None:
        """Labels that are not the next token; which other token they are."""
        if places.size == 0 or (tokens[places + 1] == targets).all():
            return
        for offset in (0, 2, -1, 3):
            at = np.clip(places + offset, 0, tokens.size - 1)
            if (tokens[at] == targets).mean() >= 0.5:
                self.offsets[offset] += 1
                self.add("labels_shifted", row)
                return
        self.add("labels_swapped", row)

    def figure(self, cause: str) -> str:
        text = f"{len(self.rows[cause])} rows"
        if cause == "labels_shifted":
            offset = self.offsets.most_common(1)[0][0]
            text += f": targets are the tokens at place + {offset}, not + 1"
        return text


def _same(a: Batch, b: Batch) -> bool:
    first, second = a.arrays(), b.arrays()
    return first.keys() == second.keys() and all(
        np.array_equal(array, second[name], equal_nan=array.dtype.kind == "f") for name, array in first.items()
    )


def _row_index(batch: Batch, b: int) -> int:
    return batch.rows[b] if batch.rows else b


def _expected_places(exam: Exam, batch: Batch) -> list[set[int]] | None:
    """Label places of every row by its own encoding; None where the rows are not known."""
    if exam.row_data is None or not batch.rows:
        return None
    return [set(range(item.prompt_length - 1, len(item) - 1)) for _, item in exam.encoded(batch)]


def _inverted(given: set[int], expected: set[int]) -> bool:
    """Whether most answer places are off and something else is on."""
    return bool(given - expected) and len(given & expected) < len(expected) / 2


def _swapped(exam: Exam, batch: Batch) -> set[int]:
    """Places in the batch whose targets are the answer of another row, not their own."""
    if exam.row_data is None or not batch.rows:
        return set()
    own = [item.tokens[item.prompt_length :].tolist() for _, item in exam.encoded(batch)]
    given = [batch.targets[b][batch.mask[b] > 0].tolist() for b in range(len(own))]
    return {b for b, targets in enumerate(given) if targets != own[b] and targets in own}


def _rounded(values: np.ndarray) -> bytes:
    """A series to two digits of its own deviation: what a round trip through text leaves of it."""
    if not np.isfinite(values).all():
        return values.tobytes()
    stats = series_stats(values)
    return np.round(zscore(values, stats), 2).tobytes() + f"{stats.mean:.3g} {stats.std:.3g}".encode()


def _is_another(text: str, row: Row, rows: list[Row]) -> bool:
    """Whether this is the answer of another row of the batch, or none of the options."""
    answer = normalise(row.answer)
    is_option = not row.options or answer in map(normalise, row.options)
    return not is_option or (text != answer and any(text == normalise(other.answer) for other in rows))


def _is_text(batch: Batch, b: int, places: np.ndarray) -> np.ndarray:
    if batch.patch_index is None:
        return np.ones(places.shape, bool)
    return batch.patch_index[b][np.clip(places, 0, batch.patch_index.shape[1] - 1)] == 0


def _samples(exam: Exam, batch: Batch, b: int) -> list[np.ndarray]:
    """The real samples of every series that row b sees; patch_index counts 1 + s * P + p."""
    size = exam.patch_size
    return [batch.series[s, : int(batch.num_patches[s]) * size] for s in _series_of(exam, batch, b)]


def _series_of(exam: Exam, batch: Batch, b: int) -> list[int]:
    places = batch.patch_index[b][batch.patch_index[b] > 0] - 1
    chosen = np.unique(places // (batch.series.shape[1] // exam.patch_size))
    return [int(s) for s in chosen if s < len(batch.series)]


def _nonfinite_rows(exam: Exam, batch: Batch) -> list[int]:
    if batch.series is None:
        return []
    rows = range(len(batch.lengths))
    finite = np.isfinite(batch.series).all(1) & np.isfinite(batch.scale).all(1)
    return [_row_index(batch, b) for b in rows if not finite[_series_of(exam, batch, b)].all()]


def _unnormalised(exam: Exam, batch: Batch) -> float:
    """Largest deviation from mean 0 and std 1 of the series that are long enough to tell and not constant."""
    worst = 0.0
    for b in range(len(batch.lengths)):
        for values in _samples(exam, batch, b):
            real = np.trim_zeros(values, "b")
            if real.size >= 8 and real.std() > 0:
                worst = max(worst, abs(float(real.mean())), abs(float(real.std(ddof=1)) - 1))
    return worst


def _shows(exam: Exam, batch: Batch, b: int, item: Encoded) -> bool:
    """Whether row b sees exactly its own samples; normalisation is another check's business."""
    given = _samples(exam, batch, b)
    if len(given) != len(item.series):
        return False
    pairs = zip(given, item.series, strict=True)
    return all(_correlated(a[: e.size], e) for a, e in pairs)


def _correlated(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()) or a.std() == 0 or b.std() == 0:
        return True
    return float(np.corrcoef(a, b)[0, 1]) > 0.99


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

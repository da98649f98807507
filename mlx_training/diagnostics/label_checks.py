"""Checks of the labels: every supervised token is the row's own answer, and its patches stand before it."""

from collections import Counter, defaultdict

import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.data.prompt import Encoded
from mlx_training.data.rows import Row, normalise
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.diagnostics.exam import Check, Exam, label_places, row_index, row_names, samples_of
from mlx_training.diagnostics.report import Finding, failed, passed, skipped


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
                wrong.add("patches_after_answer", row_index(batch, b))
            elif (np.diff(index[places]) <= 0).any() or (encoded and not _shows(exam, batch, b, encoded[b][1])):
                wrong.add("patches_misplaced", row_index(batch, b))
        if max(seen.values(), default=1) > 1:
            wrong.add("patches_misplaced", -1)
    if wrong.rows:
        return [
            failed(name, wrong.figure(cause), cause, row_names(exam, [row for row in rows if row >= 0]))
            for cause, rows in wrong.rows.items()
        ]
    return [passed(name, "in their own rows, before the labels")]


def supervision(exam: Exam) -> list[Finding]:
    """Mask and targets, place by place."""
    name, wrong = "supervision", _Wrong()
    supervised = places = 0
    for batch in exam.batches:
        expected, swapped = _expected_places(exam, batch), _swapped(exam, batch)
        for b, labels in enumerate(label_places(batch)):
            row, length = row_index(batch, b), int(batch.lengths[b])
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
            if batch.segments is not None:  # a document's last target is its EOS, which has no place
                own = batch.segments[b]
                inside &= np.append(own[1:] == own[:-1], False)[labels]
            if not exam.is_causal:
                wrong.visible(batch.tokens[b], labels[on], batch.targets[b][on], row)
            elif _is_text(batch, b, labels[inside] + 1).all():
                wrong.shift(batch.tokens[b], labels[inside], batch.targets[b][inside], row)
    wrong.judge_visible()
    if wrong.rows:
        return [failed(name, wrong.figure(cause), cause, row_names(exam, rows)) for cause, rows in wrong.rows.items()]
    target = "the token after it" if exam.is_causal else "what it was before it was hidden"
    return [passed(name, f"{supervised} of {places} tokens are supervised, each with {target} as target")]


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
                rows.append(row_index(batch, b))
    if rows:
        return failed(name, f"up to {most} beginning-of-text tokens in a row", "bos_repeated", row_names(exam, rows))
    return passed(name, f"{most} beginning-of-text token a row")


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
    Check("patches", patches),
    Check("supervision", supervision),
    Check("answers", answers),
    Check("special tokens", special_tokens),
)


class _Wrong:
    """Rows by what is wrong with them."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = defaultdict(list)
        self.offsets: Counter[int] = Counter()
        self.shown: list[tuple[int, int, int]] = []  # row, labels that it shows, labels

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

    def visible(self, tokens: np.ndarray, places: np.ndarray, targets: np.ndarray, row: int) -> None:
        """Labels of a masked model that the row shows, as a tenth of them should."""
        self.shown.append((row, int((tokens[places] == targets).sum()), targets.size))

    def judge_visible(self) -> None:
        """Where all rows together show more than half of their labels, nothing was hidden."""
        if 2 * sum(shown for _, shown, _ in self.shown) > sum(labels for *_, labels in self.shown):
            for row, shown, labels in self.shown:
                if 2 * shown > labels:
                    self.add("labels_visible", row)

    def figure(self, cause: str) -> str:
        text = f"{len(self.rows[cause])} rows"
        if cause == "labels_shifted":
            offset = self.offsets.most_common(1)[0][0]
            text += f": targets are the tokens at place + {offset}, not + 1"
        return text


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


def _is_another(text: str, row: Row, rows: list[Row]) -> bool:
    """Whether this is the answer of another row of the batch, or none of the options."""
    answer = normalise(row.answer)
    is_option = not row.options or answer in map(normalise, row.options)
    return not is_option or (text != answer and any(text == normalise(other.answer) for other in rows))


def _is_text(batch: Batch, b: int, places: np.ndarray) -> np.ndarray:
    if batch.patch_index is None:
        return np.ones(places.shape, bool)
    return batch.patch_index[b][np.clip(places, 0, batch.patch_index.shape[1] - 1)] == 0


def _shows(exam: Exam, batch: Batch, b: int, item: Encoded) -> bool:
    """Whether row b sees exactly its own samples; normalisation is another check's business."""
    given = samples_of(exam, batch, b)
    if len(given) != len(item.series):
        return False
    pairs = zip(given, item.series, strict=True)
    return all(_correlated(a[: e.size], e) for a, e in pairs)


def _correlated(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()) or a.std() == 0 or b.std() == 0:
        return True
    return float(np.corrcoef(a, b)[0, 1]) > 0.99

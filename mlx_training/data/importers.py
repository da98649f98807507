"""Importers: data files in several formats become rows. `load_rows` is the door; `FORMATS` lists them.

The keyword arguments of an importer are what `dataset.options` may hold for its format.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Literal

import numpy as np

from mlx_training.data import opentslm_rows
from mlx_training.data.files import (
    describe,
    parse_list,
    read_csv,
    read_json_lines,
    read_json_list,
    read_parquet,
)
from mlx_training.data.instruct import instruct
from mlx_training.data.npz_file import read_npz
from mlx_training.data.rows import Row, checked, numbers_from, read_rows
from mlx_training.data.series import check_series
from mlx_training.data.ts_file import read_ts
from mlx_training.errors import ConfigError, DataError

SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".ts": "ts", ".npz": "npz", ".csv": "csv"}
LABELLED = ("ts", "npz", "csv")  # labelled recordings: their prompts list the classes
QUESTION = "Which class does this recording belong to?"
ONE_SERIES = ("This is the time series",)
POST_PROMPT = "Options: {options}. Answer:"


def load_rows(path: Path | str, format: str = "auto", *, classes: Sequence[str] = (), **options: Any) -> list[Row]:
    """All rows of one data file. `auto` goes by the file's suffix; `options` are the importer's keywords.

    `classes`: answers that rows of other files have. In formats of labelled recordings they are options here too,
    before those that only this file has.
    """
    path = Path(path)
    if format == "auto":
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"{path}: cannot tell the format from the suffix {path.suffix!r} (known: {', '.join(SUFFIXES)}); "
                f"set dataset.format to one of {', '.join(FORMATS)}"
            )
        format = SUFFIXES[path.suffix]
    if format not in FORMATS:
        raise ConfigError(f"dataset.format: unknown format {format!r}{_hint(format, ['auto', *FORMATS])}")
    allowed = list(inspect.signature(FORMATS[format]).parameters)[1:]
    if "classes" in allowed:
        allowed.remove("classes")
        options |= {"classes": classes}
    for name in options:
        if name not in (*allowed, "classes"):
            raise ConfigError(f"dataset.options: format {format!r} has no option {name!r}{_hint(name, allowed)}")
    return checked(FORMATS[format](path, **options), path)


def classes_of(rows: Sequence[Row], path: Path | str, format: str = "auto") -> tuple[str, ...]:
    """The options that all rows of a file share, where its format is one of labelled recordings."""
    kind = SUFFIXES.get(Path(path).suffix) if format == "auto" else format
    return rows[0].options if kind in LABELLED else ()


def jsonl(path: Path) -> list[Row]:
    """Canonical rows, one JSON object per line (see rows.py)."""
    return read_rows(path, read_json_lines)


def parquet(path: Path) -> list[Row]:
    """Canonical rows with the fields of rows.py as columns."""
    return read_rows(path, read_parquet)


def timeseriesexam(path: Path, *, answer_with: Literal["text", "letter"] = "text") -> list[Row]:
    """TimeSeriesExam: a JSON list of multiple-choice questions about `ts`, or about `ts1` and `ts2`.

    The options stand in the prompt, the answer is the option's text or its letter, `type` is the category.
    """
    items = read_json_list(path, "questions")
    with_letter = answer_with == "letter"
    return [_exam_row(item, f"{path}: question {number}", with_letter) for number, item in enumerate(items, start=1)]


def _exam_row(item: Any, where: str, with_letter: bool) -> Row:
    names = ["ts"] if isinstance(item, dict) and "ts" in item else ["ts1", "ts2"]
    for field in ("question", "options", "answer", *names):
        if not isinstance(item, dict) or item.get(field) is None:
            raise DataError(f"{where}: missing field {field!r}")
    options = parse_list(item["options"], where, "options")
    if not isinstance(options, (list, tuple)) or not options:
        raise DataError(f"{where}: field 'options' must be a list of answers; got {describe(options)}")
    options = tuple(str(option) for option in options)
    answer = str(item["answer"])
    if answer not in options:
        raise DataError(f"{where}: the answer {answer!r} is none of the options {list(options)}")
    shown = "; ".join(options)
    if with_letter:
        letters = tuple(ascii_uppercase[: len(options)])
        shown = "; ".join(f"{letter}) {option}" for letter, option in zip(letters, options, strict=True))
        answer, options = letters[options.index(answer)], letters
    return Row(
        pre_prompt=str(item["question"]),
        series=tuple(numbers_from(item[name], where, name) for name in names),
        series_text=ONE_SERIES if len(names) == 1 else ("This is time series 1", "This is time series 2"),
        post_prompt=f"Options: {shown}. Answer:",
        answer=answer,
        options=options,
        id=str(item.get("id", where)),
        type=str(item.get("category", "")),
    )


def ts(
    path: Path,
    *,
    question: str = QUESTION,
    post_prompt: str = POST_PROMPT,
    channel_names: Sequence[str] | None = None,
    label_names: Mapping[Any, str] | None = None,
    classes: Sequence[str] = (),
) -> list[Row]:
    """UCR/UEA `.ts`: labelled recordings of one or more channels, of equal or unequal length.

    `channel_names`: one text per channel, before its series. `label_names`: class label -> answer text.
    `post_prompt`: "{options}" in it becomes the list of answers.
    """
    recordings, labels = read_ts(path)
    labelled = [(where, series, label, "") for where, series, label in recordings]
    return _classification_rows(labelled, labels, path, question, post_prompt, channel_names, label_names, classes)


def npz(
    path: Path,
    *,
    x: str = "X",
    y: str = "y",
    labels: str = "labels",
    group: str = "subject",
    question: str = QUESTION,
    post_prompt: str = POST_PROMPT,
    channel_names: Sequence[str] | None = None,
    label_names: Mapping[Any, str] | None = None,
    classes: Sequence[str] = (),
) -> list[Row]:
    """Windows in a NumPy archive: `x` (n, T) or (n, T, C), `y` (n,), and where present `labels`, `group`.

    The options name the arrays. With a `labels` array, `y` holds indices into it; else `y` is the label.
    The other options are those of `ts`.
    """
    windows, answers, groups, names = _npz_arrays(path, x, y, labels, group)
    recordings = []
    for index in range(len(windows)):
        where = f"{path}: window {index}"
        series = tuple(np.ascontiguousarray(windows[index, :, c], np.float32) for c in range(windows.shape[2]))
        for channel, values in enumerate(series):
            check_series(values, f"{where}, channel {channel}")
        recordings.append((where, series, str(answers[index]), "" if groups is None else str(groups[index])))
    return _classification_rows(recordings, names, path, question, post_prompt, channel_names, label_names, classes)


def _npz_arrays(
    path: Path, x: str, y: str, labels: str, group: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[str]]:
    """Windows (n, T, C), the class of each as a label, its group, and all labels."""
    arrays = read_npz(path)
    for name in (x, y):
        if name not in arrays:
            raise DataError(f"{path}: no array {name!r} (it holds {', '.join(arrays)}); name it in dataset.options")
    windows, classes, groups = arrays[x], arrays[y], arrays.get(group)
    if windows.ndim == 2:
        windows = windows[:, :, None]
    if windows.ndim != 3 or windows.dtype.kind not in "fiu" or not windows.size:
        raise DataError(
            f"{path}: {x} must be numbers of shape (n, T) or (n, T, C); got {windows.dtype} {windows.shape}"
        )
    for name, array in ((y, classes), (group, groups)):
        if array is not None and array.shape != (len(windows),):
            raise DataError(f"{path}: {name} has shape {array.shape}; expected ({len(windows)},), one entry per window")
    if labels in arrays:
        names = arrays[labels]
        if names.ndim != 1:
            raise DataError(f"{path}: {labels} has shape {names.shape}; expected a list of names, (n,)")
        if classes.dtype.kind not in "iu" or classes.min() < 0 or classes.max() >= len(names):
            raise DataError(f"{path}: {y} must hold indices into {labels} (0..{len(names) - 1})")
        return windows, names[classes], groups, [str(name) for name in names]
    return windows, classes, groups, [str(label) for label in np.unique(classes)]


def csv_rows(
    path: Path,
    *,
    answer_column: str = "label",
    series_columns: Sequence[str] = ("series",),
    value_columns: Sequence[str] | None = None,
    id_column: str | None = None,
    group_column: str | None = None,
    type_column: str | None = None,
    question_column: str | None = None,
    question: str = QUESTION,
    post_prompt: str = POST_PROMPT,
    channel_names: Sequence[str] | None = None,
    label_names: Mapping[Any, str] | None = None,
    classes: Sequence[str] = (),
) -> list[Row]:
    """A CSV file with a header and one example per line.

    Each of `series_columns` holds a series as a list, e.g. "[0.1, 0.2]" (one column per channel). Or
    `value_columns: [first, last]` names the ends of a range of columns with one number each: one series.
    Answers are `answer_column`; with "{options}" in `post_prompt` they are classes and all are listed.
    """
    recordings = []
    extras: list[dict[str, Any]] = []
    for where, cells in read_csv(path):
        names = [answer_column, *(value_columns or series_columns)]
        chosen = {"id": id_column, "group": group_column, "type": type_column, "pre_prompt": question_column}
        for name in [*names, *filter(None, chosen.values())]:
            if name not in cells:
                raise DataError(f"{where}: no column {name!r}; the columns are {', '.join(cells)}")
        extras.append({field: cells[name] for field, name in chosen.items() if name})
        if value_columns is None:
            series = tuple(numbers_from(parse_list(cells[c], where, c), where, c) for c in series_columns)
        else:
            header = list(cells)
            first, last = header.index(value_columns[0]), header.index(value_columns[-1])
            series = (_value_cells([cells[name] for name in header[first : last + 1]], where),)
        recordings.append((where, series, cells[answer_column], extras[-1].get("group", "")))
    labels = [label for _, _, label, _ in recordings]
    rows = _classification_rows(recordings, labels, path, question, post_prompt, channel_names, label_names, classes)
    return [replace(row, **extra) for row, extra in zip(rows, extras, strict=True)]


def _value_cells(cells: list[str], where: str) -> np.ndarray:
    while cells and not cells[-1].strip():  # shorter series leave their last cells empty
        cells = cells[:-1]
    try:
        values = np.array([float(cell) if cell.strip() else np.nan for cell in cells], np.float32)
    except ValueError as error:
        raise DataError(f"{where}: a value column is not a number ({error})") from error
    check_series(values, where)
    return values


def _classification_rows(
    recordings: Sequence[tuple[str, tuple[np.ndarray, ...], str, str]],
    labels: Sequence[str],
    path: Path,
    question: str,
    post_prompt: str,
    channel_names: Sequence[str] | None,
    label_names: Mapping[Any, str] | None,
    classes: Sequence[str],
) -> list[Row]:
    """Rows that ask for the label of (where, series, label, group); options are `classes` and `labels`, once each."""
    labels = sorted(set(labels))
    names = {str(label): name for label, name in (label_names or {}).items()}
    unknown = [label for label in names if label not in labels and names[label] not in classes]
    if unknown and not names.keys() >= set(labels):  # else other files hold what this one lacks
        raise DataError(f"{path}: label_names has {unknown[0]!r}, but the labels are {', '.join(labels)}")
    answers = {label: names.get(label, label) for label in labels}
    lists_options = "{options}" in post_prompt
    options = tuple(dict.fromkeys((*classes, *answers.values()))) if lists_options else ()
    post_prompt = post_prompt.replace("{options}", ", ".join(options))
    rows = []
    for where, series, label, group in recordings:
        if channel_names is not None and len(channel_names) != len(series):
            raise DataError(f"{where}: {len(series)} channels, but channel_names has {len(channel_names)}")
        texts = tuple(channel_names) if channel_names is not None else _channel_texts(len(series))
        name = Path(where).name
        rows.append(Row(question, series, texts, post_prompt, answers[label], options, name, group))
    return rows


def _channel_texts(num_channels: int) -> tuple[str, ...]:
    if num_channels == 1:
        return ONE_SERIES
    return tuple(f"This is channel {c} of {num_channels}" for c in range(1, num_channels + 1))


def _hint(given: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(allowed) or 'none'}"


FORMATS: dict[str, Callable[..., list[Row]]] = {
    "jsonl": jsonl,
    "parquet": parquet,
    "tsqa": opentslm_rows.tsqa,
    "timeseriesexam": timeseriesexam,
    "m4": opentslm_rows.m4,
    "har_cot": opentslm_rows.har_cot,
    "sleep_cot": opentslm_rows.sleep_cot,
    "ecg_qa_cot": opentslm_rows.ecg_qa_cot,
    "ts": ts,
    "npz": npz,
    "csv": csv_rows,
    "instruct": instruct,
}

"""Row: one question about zero or more series, and its JSON lines / parquet spelling.

A row in a file is an object with the fields of `Row`; `series` is a list of lists of numbers (raw
values, one list per series) and `series_text` a list with one text per series. JSON lines and parquet
use the same names and types.
"""

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.data.files import describe, read_json_lines, read_parquet
from mlx_training.data.series import check_series
from mlx_training.errors import DataError


@dataclass(frozen=True, eq=False)
class Row:
    """One example: the prompt is pre_prompt, (series_text, series)..., post_prompt; then the answer."""

    pre_prompt: str
    series: tuple[np.ndarray, ...]  # each float32 (T_i,), raw values
    series_text: tuple[str, ...]  # one per series
    post_prompt: str
    answer: str = ""  # may stay empty only for generation
    options: tuple[str, ...] = ()
    id: str = ""
    group: str = ""  # subject, recording, file...: what a split must not cut through
    type: str = ""  # question type: accuracy and chance are reported per type

    @property
    def name(self) -> str:
        """How an error message calls this row."""
        return f"row {self.id!r}" if self.id else f"row without id (it begins {self.pre_prompt[:40]!r})"


def normalise(answer: str) -> str:
    """What an exact match compares: case, runs of whitespace and a closing full stop do not count.

    Of a chain of thought, only what follows its last "Answer:" counts.
    """
    return " ".join(answer.rpartition("Answer:")[2].split()).removesuffix(".").casefold()


Reader = Callable[[Path], Iterable[tuple[str, dict[str, Any]]]]  # a file's ("file:line", object) pairs

REQUIRED = ("pre_prompt", "series", "series_text", "post_prompt")
FIELDS = (*REQUIRED, "answer", "options", "id", "group", "type")


def row_from_dict(data: Mapping[str, Any], where: str) -> Row:
    """The Row of one parsed object; strict. `where` is "file:line", which every DataError names."""
    if not isinstance(data, Mapping):
        raise DataError(f"{where}: expected an object with the fields {', '.join(FIELDS)}; got {describe(data)}")
    for key in data:
        if key not in FIELDS:
            close = difflib.get_close_matches(str(key), FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(FIELDS)}"
            raise DataError(f"{where}: unknown field {key!r}; {hint}")
    missing = [key for key in REQUIRED if data.get(key) is None]
    if missing:
        raise DataError(f"{where}: missing field {missing[0]!r}; a row needs {', '.join(REQUIRED)}")
    series_text = _texts(data, "series_text", where)
    series = series_from(data["series"], where, "series")
    if len(series) != len(series_text):
        raise DataError(
            f"{where}: {len(series)} series but {len(series_text)} series_text; give one text per series, maybe empty"
        )
    answer, options = _text(data, "answer", where), _texts(data, "options", where)
    if len(set(map(normalise, options))) < len(options):
        raise DataError(f"{where}: scores cannot tell the options {list(options)} apart; give each once")
    if answer.strip() and options and normalise(answer) not in map(normalise, options):
        raise DataError(
            f"{where}: the answer {answer[-80:]!r} is none of the options {list(options)}; correct one of them"
        )
    return Row(
        pre_prompt=_text(data, "pre_prompt", where),
        series=series,
        series_text=series_text,
        post_prompt=_text(data, "post_prompt", where),
        answer=answer,
        options=options,
        id=_label(data, "id", where) or Path(where).name,
        group=_label(data, "group", where),
        type=_label(data, "type", where),
    )


def series_from(value: Any, where: str, field: str) -> tuple[np.ndarray, ...]:
    """A list of lists of numbers as checked float32 arrays, one per series."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise DataError(f"{where}: field {field!r} must be a list of lists of numbers; got {describe(value)}")
    return tuple(numbers_from(values, where, f"{field}[{index}]") for index, values in enumerate(value))


def numbers_from(value: Any, where: str, field: str) -> np.ndarray:
    """A list of numbers as a checked float32 array (T,)."""
    if isinstance(value, (list, tuple, np.ndarray)):
        try:
            array = np.asarray(value, dtype=None if len(value) else np.float32)
            if array.dtype == object:  # a JSON null is a missing sample
                array = np.asarray([np.nan if v is None else v for v in value])
        except ValueError:  # nested lists of unequal length
            array = np.zeros((1, 1), dtype=object)
        if array.ndim == 1 and array.dtype.kind in "fiu":
            with np.errstate(over="ignore"):  # too large for float32 becomes inf, which the check reports
                array = array.astype(np.float32)
            check_series(array, f"{where}: field {field!r}")
            return array
    raise DataError(f"{where}: field {field!r} must be a list of numbers; got {describe(value)}")


def read_rows(path: Path | str, read: Reader | None = None) -> list[Row]:
    """All rows of a JSON lines or parquet file, by its suffix unless `read` is given.

    A row without an id is called by its file and line.
    """
    path = Path(path)
    read = read or (read_parquet if path.suffix == ".parquet" else read_json_lines)
    return checked([row_from_dict(data, where) for where, data in read(path)], path)


def checked(rows: list[Row], path: Path) -> list[Row]:
    """`rows`, or a DataError when there are none, or a text holds half a character (a lone surrogate)."""
    if not rows:
        raise DataError(f"{path}: no rows; a data file needs at least one")
    for row in rows:
        texts = (
            row.pre_prompt,
            *row.series_text,
            row.post_prompt,
            row.answer,
            *row.options,
            row.id,
            row.group,
            row.type,
        )
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}: {row.name}: a text holds half a character ({error.object[error.start]!r}); write it out"
            ) from error
    return rows


def row_to_dict(row: Row) -> dict[str, Any]:
    """The object that `row_from_dict` reads back; empty optional fields are left out."""
    data: dict[str, Any] = {
        "pre_prompt": row.pre_prompt,
        "series": [[float(str(v)) for v in values] for values in row.series],  # float32's own short decimals
        "series_text": list(row.series_text),
        "post_prompt": row.post_prompt,
        "answer": row.answer,
    }
    optional = {"options": list(row.options), "id": row.id, "group": row.group, "type": row.type}
    return data | {key: value for key, value in optional.items() if value}


def write_rows(path: Path | str, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, or as parquet when the name ends in `.parquet`."""
    path = Path(path)
    objects = [row_to_dict(row) for row in rows]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        empty: dict[str, Any] = {"options": [], "id": "", "group": "", "type": ""}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([empty | data for data in objects]), path)
    else:
        lines = [json.dumps(data, ensure_ascii=False) + "\n" for data in objects]
        path.write_text("".join(lines), encoding="utf-8")


def _text(data: Mapping[str, Any], field: str, where: str) -> str:
    value = data.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be text; got {describe(value)}")
    return value


def _texts(data: Mapping[str, Any], field: str, where: str) -> tuple[str, ...]:
    value = data.get(field)
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise DataError(f"{where}: field {field!r} must be a list of texts; got {describe(value)}")
    return tuple(value)


def _label(data: Mapping[str, Any], field: str, where: str) -> str:
    """An id, group or type: text or a whole number."""
    value = data.get(field)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(f"{where}: field {field!r} must be text or a whole number; got {describe(value)}")
    return str(value)

"""Reading data files: UTF-8 text, JSON lines, parquet and CSV, with errors that name the file and line."""

import ast
import csv
import io
import json
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_training.errors import DataError
from mlx_training.json_text import parse_json, what_is_wrong


def require_file(path: Path) -> Path:
    """`path`, or a DataError when it is no file."""
    if not path.is_file():
        raise DataError(f"no data file {str(path)!r} (working directory: {str(Path.cwd())!r}); check dataset.path")
    return path


def read_text(path: Path) -> str:
    """The text of a UTF-8 file."""
    content = require_file(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({what_is_wrong(error)}); one object per line") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected an object; got {describe(value)}")
        yield where, value


def read_json_list(path: Path, what: str) -> list[Any]:
    """The items of a file that is one JSON list; `what` they are, for the message."""
    text = read_text(path)
    try:
        items = parse_json(text)
    except ValueError as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{line}: not JSON ({what_is_wrong(error)})") from error
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a JSON list of {what}; got {type(items).__name__}")
    return items


def read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:row n", object) of every row."""
    require_file(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow (pip install pyarrow); or convert to JSONL") from error
    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the latter two: texts, dates
        raise DataError(f"{path}: not a readable parquet file ({str(error)[:300]})") from error
    for number, value in enumerate(values, start=1):
        yield f"{path}:row {number}", value


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", texts by column name) of every line after the header. Repeated header lines are skipped."""
    csv.field_size_limit(2**31 - 1)  # a long series in one cell
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    for cells in reader:
        where = f"{path}:{reader.line_num}"
        if None in cells or None in cells.values():
            raise DataError(f"{where}: the number of cells differs from the header's {len(reader.fieldnames or ())}")
        if list(cells) != list(cells.values()):
            yield where, cells


def read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSONL, parquet or CSV file, by suffix; CSV cells are text."""
    readers = {".jsonl": read_json_lines, ".parquet": read_parquet, ".csv": read_csv}
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a file that ends in {', '.join(readers)}")
    return readers[path.suffix](path)


def parse_list(value: Any, where: str, field: str) -> Any:
    """A list that may be spelled as text, in JSON or Python ("[1, 2]"); anything but text is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise DataError(f"{where}: field {field!r} is not a list: {value[:60]!r}") from error


def describe(value: Any) -> str:
    """Type and beginning of a wrong value, for messages."""
    try:
        shown = value if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # a whole number of thousands of digits
        shown = "too long to show"
    return f"{type(value).__name__} {shown[:60]!r}"

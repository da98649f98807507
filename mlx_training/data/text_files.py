"""Documents of text files, read as a stream: no file is in memory as a whole, except a document within it."""

import csv
import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_training.data.files import describe, require_file
from mlx_training.data.hub import download, is_hub_name
from mlx_training.errors import DataError

SUFFIXES = (".txt", ".md", ".jsonl", ".csv", ".parquet")  # of the files of a folder; all but parquet also with .gz
PIECE = 1 << 14  # characters that are in memory at a time
CUTS = (re.compile(r"(?<=\S)(?= \S)"), re.compile(r"(?<=\S\n)(?=\S)"))  # no token spans these places


@dataclass(frozen=True)
class Document:
    """A text, or a whole file that is too long to be held and read in pieces each time it is asked for."""

    content: str | Path

    def pieces(self) -> Iterator[str]:
        """The text in parts of about PIECE characters, cut where no token spans the place."""
        if isinstance(self.content, str) and len(self.content) <= 2 * PIECE:
            yield self.content
        else:
            yield from _cut(self._chunks())

    def measure(self) -> tuple[bytes, int]:
        """(16 bytes that two documents share only when their texts are the same, length in characters)."""
        found, length = hashlib.blake2b(digest_size=16), 0
        for chunk in self._chunks():
            found.update(chunk.encode())
            length += len(chunk)
        return found.digest(), length

    def _chunks(self) -> Iterator[str]:
        return iter([self.content]) if isinstance(self.content, str) else _chunks(self.content)


def text_files(path: Path | str) -> list[Path]:
    """The files of `dataset.path`: one file, those of a folder at any depth, of a pattern with *, of a hub dataset."""
    name = str(path)
    if "*" in name and not is_hub_name(name):
        files = sorted(file for found in glob.glob(name, recursive=True) if (file := Path(found)).is_file())
        if not files:
            raise DataError(f"{name}: no file has such a name (working directory: {str(Path.cwd())!r})")
        return files
    folder = download(name) if is_hub_name(name) else Path(path)
    if not folder.is_dir():
        return [require_file(folder)]
    below = [file for file in folder.rglob("*") if _suffix(file) in SUFFIXES and file.is_file()]
    files = sorted(file for file in below if not any(p.startswith(".") for p in file.relative_to(folder).parts))
    if not files:
        raise DataError(f"{name}: no text in this folder; looked at any depth for {', '.join(SUFFIXES)} (also .gz)")
    return files


def read_documents(
    path: Path | str, *, separator: str | None = None, text_column: str | None = None
) -> Iterator[Document]:
    """Documents of text files, one after another; blank ones are left out.

    `.jsonl`, `.csv` and `.parquet` hold one a row, in the field `text_column` (null: text). Any other file is one
    document, or several when `separator` is given (e.g. "<|endoftext|>" or a line break).

    Raises DataError where there is no text, where a file is binary or not UTF-8, and for a row without text.
    """
    is_empty = True
    for file in text_files(path):
        for document in _read_file(file, separator, text_column or "text"):
            if not isinstance(document.content, str) or document.content.strip():
                is_empty = False
                yield document
    if is_empty:
        raise DataError(f"{path}: no text: it is empty, or blank; give a file or folder with text")


def _read_file(file: Path, separator: str | None, text_column: str) -> Iterator[Document]:
    rows = {".jsonl": _json_lines, ".csv": _csv_lines, ".parquet": _parquet_rows}.get(_suffix(file))
    if rows is not None:
        for where, row in rows(file, text_column):
            if not isinstance(row.get(text_column), str):
                found = (
                    describe(row[text_column]) + " there" if text_column in row else f"the fields are {', '.join(row)}"
                )
                raise DataError(f"{where}: no text in field {text_column!r}; {found} (text_column names the field)")
            try:
                row[text_column].encode()
            except UnicodeEncodeError as error:  # JSON can spell what no text may hold
                raise DataError(f"{where}: field {text_column!r} is no text ({error.reason})") from error
            yield Document(row[text_column])
    elif separator is not None:
        yield from map(Document, _separated(_chunks(file), separator))
    elif file.stat().st_size > 64 * PIECE:
        yield Document(file)
    else:
        yield Document("".join(_chunks(file)))


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _chunks(file: Path) -> Iterator[str]:
    """The text of a file in parts, as they come."""
    with _text_or_error(file), _open(file) as stream:
        while chunk := stream.read(PIECE):
            if "\0" in chunk:
                raise DataError(f"{file}: a binary file (it has NUL bytes); expected UTF-8 text")
            yield chunk


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    with _text_or_error(file), _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{file}:{number}", line


@contextmanager
def _text_or_error(file: Path) -> Iterator[None]:
    """Say which file is not UTF-8 text, and where."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{_first_bad_line(file)}: not UTF-8: convert the file, or is it binary?") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file}: not a readable .gz file ({error})") from error


def _first_bad_line(file: Path) -> str:
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{file}:{number}"
    return str(file)


def _json_lines(file: Path, _column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(file):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); one object per line") from error
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected an object; got {describe(value)}")
        yield where, value


def _csv_lines(file: Path, _column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # a document in one cell
    with _text_or_error(file), _open(file) as stream:
        reader = csv.DictReader(stream)
        for cells in reader:
            where = f"{file}:{reader.line_num}"
            if None in cells or None in cells.values():
                raise DataError(
                    f"{where}: the number of cells differs from the header's {len(reader.fieldnames or ())}"
                )
            yield where, cells


def _parquet_rows(file: Path, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{file}: reading parquet needs pyarrow (pip install pyarrow); or convert to JSONL") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            for batch in table.iter_batches(batch_size=256, columns=[column] if column in names else names[:1]):
                rows = batch.to_pylist() if column in names else [dict.fromkeys(names)]
                for row in rows:
                    number += 1
                    yield f"{file}:row {number}", row
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: not a readable parquet file ({error})") from error


def _separated(chunks: Iterator[str], separator: str) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        *parts, rest = (rest + chunk).split(separator)
        yield from parts
    yield rest


def _cut(chunks: Iterator[str]) -> Iterator[str]:
    """The text of `chunks` in pieces that end where a word ends."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) >= 2 * PIECE:
            place = _place_to_cut(rest[:PIECE])
            yield rest[:place]
            rest = rest[place:]
    yield rest


def _place_to_cut(text: str) -> int:
    """Where the last word of a text ends, or its last line, else its end."""
    for pattern in CUTS:
        tail = max(len(text) - 4096, 0)
        places = [match.start() for match in pattern.finditer(text, tail)]
        if places:
            return places[-1]
    return len(text)

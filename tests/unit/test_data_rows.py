"""Canonical rows: round trips and errors that name file, line and field."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_training.data.rows import Row, read_rows, write_rows
from mlx_training.errors import DataError

GOOD = {"pre_prompt": "p", "series": [[1, 2.5]], "series_text": ["s"], "post_prompt": "q", "answer": "a"}


def write(path: Path, *objects: object) -> Path:
    path.write_text("\n".join(json.dumps(data) for data in objects))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    series = (np.array([0.1, -2e-8, 3e30], np.float32), np.array([7], np.float32))
    rows = [
        Row("pré", series, ("x", ""), "post", "up", ("up", "down"), "7", "subject 1", "trend"),
        Row("p", (), (), "q", "free text", id="8"),
    ]
    path = tmp_path / f"rows.{suffix}"
    write_rows(path, rows)
    for row, back in zip(rows, read_rows(path), strict=True):
        assert len(row.series) == len(back.series)
        for a, b in zip(row.series, back.series, strict=True):
            assert b.dtype == np.float32
            np.testing.assert_array_equal(a, b)
        assert {**vars(row), "series": 0} == {**vars(back), "series": 0}


def test_a_row_without_id_is_called_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "id": 3, "group": 4}) + "\n")
    first, second = read_rows(path)
    assert (first.id, second.id, second.group) == ("x.jsonl:2", "3", "4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anwser": "a"}, "unknown field 'anwser'; did you mean 'answer'"),
        ({"answer": "upp", "options": ["up", "down"]}, "the answer 'upp' is none of the options"),
        ({"answer": "up", "options": ["up", "Up. "]}, "scores cannot tell the options .* apart"),
        ({"series": None}, "missing field 'series'"),
        ({"series": [1, 2]}, r"field 'series\[0\]' must be a list of numbers; got int"),
        ({"series": [[1, "2"]]}, r"field 'series\[0\]' must be a list of numbers"),
        ({"series": [[[1], [2, 3]]]}, r"field 'series\[0\]' must be a list of numbers"),
        ({"series": [[]]}, r"field 'series\[0\]': the series is empty"),
        ({"series": [[1, float("nan")]]}, r"field 'series\[0\]': nan at position 1 of 2"),
        ({"series": [[None, 1]]}, "nan at position 0 of 2"),
        ({"series": [[1, 2, 1e39]]}, "inf at position 2 of 3"),
        ({"series_text": []}, "1 series but 0 series_text"),
        ({"series_text": "s"}, "field 'series_text' must be a list of texts"),
        ({"post_prompt": 3}, "field 'post_prompt' must be text; got int '3'"),
        ({"options": [1, 2]}, "field 'options' must be a list of texts"),
        ({"group": 1.5}, "field 'group' must be text or a whole number"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, change: dict, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, {**GOOD, **change})
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{message}"):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows"),
        (b"\n\n", "no rows"),
        (b'{"pre_prompt": "\xff"}', "x.jsonl:1: not UTF-8"),
        (b"{}\n{", "x.jsonl:1: missing field"),
        (b"[]", "x.jsonl:1: expected an object; got list"),
        (b"{", "x.jsonl:1: not JSON"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(path)


def test_missing_file_and_broken_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file '.*nope.jsonl'"):
        read_rows(tmp_path / "nope.jsonl")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable parquet file"):
        read_rows(tmp_path / "x.parquet")

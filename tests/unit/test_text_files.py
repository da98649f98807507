"""Documents of files, folders and the hub."""

import gzip
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from mlx_training.data import text_files as reading
from mlx_training.data.text_files import Document, read_documents, text_files
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import DataError


def texts(path: Path | str, **options: str) -> list[str]:
    return ["".join(document.pieces()) for document in read_documents(path, **options)]


def test_folders_are_read_at_any_depth_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one.md").write_text("one")
    (tmp_path / "c.txt").write_text("two\r\n\n \n")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "d.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    (tmp_path / "e.csv").write_text('n,text\n1,"fi\nve"\n')
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["six", "seven"]}), tmp_path / "f.parquet")
    with gzip.open(tmp_path / "g.jsonl.gz", "wt") as file:
        file.write('{"text": "eight"}\n')
    (tmp_path / "ignored.py").write_text("no")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "no.txt").write_text("no")
    assert texts(tmp_path) == ["one", "two\r\n\n \n", "three", "four", "fi\nve", "six", "seven", "eight"]
    assert [file.name for file in text_files(f"{tmp_path}/**/*.md")] == ["one.md"]
    with pytest.raises(DataError, match="no file has such a name"):
        text_files(f"{tmp_path}/*.rst")


def test_separators_and_columns(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\n\nthree\n\n \n\n")
    assert texts(tmp_path / "b.txt", separator="\n\n") == ["two", "three"]
    (tmp_path / "c.jsonl").write_text('{"story": "x"}\n{"story": "y"}\n')
    assert texts(tmp_path / "c.jsonl", text_column="story") == ["x", "y"]


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    def check(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            texts(tmp_path / name)

    check("c.jsonl", b'{"story": "x"}\n', "c.jsonl:1: no text in field 'text'; the fields are story")
    check("n.jsonl", b'{"text": "x"}\n{"text": 3}\n', "n.jsonl:2: no text in field 'text'; int '3'")
    check("half.jsonl", b'{"text": "\\ud83e"}\n', "half.jsonl:1: field 'text' is no text .surrogates not allowed")
    check("list.jsonl", b"[1]\n", "list.jsonl:1: expected an object")
    check("t.csv", b"text,n\nx,1\ny\n", "t.csv:3: the number of cells")
    check("empty.txt", b"", "empty.txt: no text: it is empty, or blank")
    check("blank.txt", b" \n", "blank.txt: no text")
    check("b.txt", b"PK\x03\x04\0\0", "b.txt: a binary file")
    check("l.txt", b"good\ncaf\xe9\n", "l.txt:2: not UTF-8")
    check("z.txt.gz", b"no gzip", "z.txt.gz: not a readable .gz")
    check("p.parquet", b"no parquet", "p.parquet: not a readable parquet")
    with pytest.raises(DataError, match="no data file"):
        texts(tmp_path / "missing.txt")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no text in this folder; looked at any depth for .txt"):
        texts(tmp_path / "other")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "q.parquet")
    with pytest.raises(DataError, match="q.parquet:row 1: no text in field 'text'; the fields are n"):
        texts(tmp_path / "q.parquet")


def test_long_documents_come_in_pieces_that_encode_as_the_whole(
    tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"the  trend {i} is\n\n\tup, or   down?\nA{i % 7}  b " for i in range(99))
    (tmp_path / "long.txt").write_text(text)
    whole = tiny_tokenizer.encode(text)
    digest = Document(text).measure()
    monkeypatch.setattr(reading, "PIECE", 50)
    (document,) = read_documents(tmp_path / "long.txt")
    assert document.content == tmp_path / "long.txt", "not held in memory"
    pieces = list(document.pieces())
    assert len(pieces) > 20 and "".join(pieces) == text
    assert [i for piece in pieces for i in tiny_tokenizer.encode(piece)] == whole
    assert document.measure() == digest


def test_a_word_without_end_is_cut_somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 10)
    assert "".join(Document("x" * 95).pieces()) == "x" * 95


def test_hub_datasets_are_downloaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def snapshot_download(name: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, repo_type, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["up"]}), tmp_path / "data" / "train-0.parquet")
    assert texts("hub:someone/stories") == ["up"]
    assert texts("hub:someone/stories@v2/data") == ["up"]
    assert asked[0][:3] == ("someone/stories", "dataset", None) and "*.parquet" in asked[0][3]  # type: ignore[operator]
    assert asked[1] == ("someone/stories", "dataset", "v2", ["data", "data/*"])
    with pytest.raises(DataError, match="no name of a hub dataset; expected hub:owner/name"):
        texts("hub:stories")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(DataError, match="did not deliver it .OSError: no network.. Check the name and the network"):
        texts("hub:someone/stories")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match="pip install huggingface_hub"):
        texts("hub:someone/stories")

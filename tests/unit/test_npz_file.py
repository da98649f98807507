"""Archives of NumPy arrays that others made: nothing is unpickled, and no file takes more memory than it holds."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training.data.importers import load_rows
from mlx_training.data.npz_file import read_npz
from mlx_training.errors import DataError


class Payload:
    """Unpickling this makes a directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def member(shape: str, descr: str = "'<f4'", body: bytes = b"") -> bytes:
    """An .npy file with any header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def archive(path: Path, content: bytes, **info: Any) -> Path:
    """An archive of one array, with any entry in its directory."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("X.npy", content)
    data = bytearray(out.getvalue())
    for start, value in info.items():
        place = data.rfind(b"PK\x01\x02") + {"flags": 8, "method": 10, "size": 24}[start]
        data[place : place + len(value)] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("content", "info"),
    [
        (member("(10**12,)"), {}),
        (member("(1000000000000,)"), {}),
        (member("(1000000000000,)", body=bytes(1000)), {}),
        (member("(4,)", "'<U99999999'", bytes(1000)), {}),
        (member("(1000000000000,)", "'<U0'"), {}),
        (member("((" * 500), {}),
        (member("(1,)", "'|O'", bytes(8)), {}),
        (member("(2,)", body=bytes(8)), {"flags": b"\x01\x00"}),  # locked
        (member("(2,)", body=bytes(8)), {"method": b"\x63\x00"}),
        (member("(2,)", body=bytes(8)), {"size": b"\xff\xff\xff\x7f"}),
        (b"\x93NUMPY\x09\x00", {}),
        (b"", {}),
    ],
)
def test_archives_that_promise_what_they_do_not_hold(tmp_path: Path, content: bytes, info: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match="not a readable npz archive of plain arrays"):
        read_npz(archive(tmp_path / "x.npz", content, **info))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", X=np.array([Payload()], dtype=object))
    with pytest.raises(DataError):
        read_npz(Path("x.npz"))
    assert not Path("unpickled").exists()


def test_a_bare_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(DataError, match="not a readable npz"):
        read_npz(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.zeros((4, 0, 3))}, "X must be numbers of shape"),
        ({"X": np.zeros((0, 5))}, "X must be numbers of shape"),
        ({"labels": np.array("one")}, "expected a list of names"),
        ({"labels": np.array(["a", "\ud800"])}, "labels holds texts that are no Unicode"),
        ({"labels": np.array([0x61, 0x110000], np.uint32).view("U1")}, "labels holds texts that are no Unicode"),
        ({"labels": np.array([0x61, 0x110000], ">u4").view(">U1")}, "labels holds texts that are no Unicode"),
        ({"y": np.zeros(4, [("a", "i4")])}, "y is a structured array"),
    ],
)
def test_arrays_that_are_no_windows(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    arrays = {"X": np.ones((4, 5)), "y": np.array([0, 1, 0, 1]), "labels": np.array(["a", "b"])}
    np.savez(tmp_path / "x.npz", **(arrays | change))
    with pytest.raises(DataError, match=message):
        load_rows(tmp_path / "x.npz")

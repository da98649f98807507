"""What hypothesis does to NumPy archives: other arrays, and files that are no archive of them."""

import contextlib
import io
import zipfile
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tools.trials.fuzz_mutations import Draw, pick, spoil_bytes


class Payload:
    """Unpickling this would make a file: nothing may ever do it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("pwned", "w")


def spoil_arrays(draw: Draw, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One array of another type, shape or content, or under another name."""
    name = pick(draw, sorted(arrays))
    array = arrays[name]
    change = pick(
        draw,
        (
            lambda: np.array([Payload()] * max(1, len(array)), dtype=object) if array.ndim else np.array(Payload()),
            lambda: array.astype(pick(draw, ("U8", "S4", "c8", "bool", "f2", "u1", "i8"))),
            lambda: array[:0],
            lambda: array[0] if array.ndim else array,
            lambda: array[..., None],
            lambda: array.reshape(-1),
            lambda: np.where(np.arange(array.size).reshape(array.shape) == 3, np.nan, 1.0),
            lambda: np.full(array.shape, pick(draw, (np.inf, -1, 1e300, 2**62, 99))),
            lambda: np.zeros(array.shape, "datetime64[s]"),
            lambda: np.zeros(array.shape, [("a", "i4"), ("b", "f4")]),
            lambda: np.zeros((len(array) if array.ndim else 1, 0, 3)),
            lambda: np.array(["\0", "\ud800", ""] * len(array))[: len(array)] if array.ndim else array,
        ),
    )
    renamed = pick(draw, (name, name, name, "x", "../../up", "X", "y", "labels"))
    with contextlib.suppress(ValueError, TypeError, IndexError):  # as an array that was changed before does not take it
        array = np.asarray(change())
    return {key: value for key, value in arrays.items() if key != name} | {renamed: array}


def spoil_npz(draw: Draw, data: bytes) -> bytes:
    """Another archive or none: a bomb, a shape that is not there, another compression, a bare array, a lock."""
    kind = draw(st.integers(0, 4))
    if kind == 0:
        bare = io.BytesIO()
        np.save(bare, np.arange(6.0))
        return bare.getvalue()
    if kind == 1:  # the first file's flags in the archive's directory: encrypted, or of an unknown compression
        at = data.rfind(b"PK\x01\x02") + pick(draw, (8, 10))
        return data[:at] + pick(draw, (b"\x01\x00", b"\x63\x00", b"\x0e\x00")) + data[at + 2 :]
    if kind == 2:
        return spoil_bytes(draw, data)
    return _bomb(draw) if kind == 3 else _repacked(draw, data)


def _bomb(draw: Draw) -> bytes:
    """Arrays whose headers promise far more than the file holds."""
    shape = pick(
        draw, ("(10**12,)", "(1000000000000,)", "(1000000000000, 4)", f"({'9' * 30},)", "(-1,)", "(3.5,)", "()")
    )
    descr = pick(
        draw, ("'<f4'", "'|O'", "'<U99999999'", "[('a', '<f4')]", "'<q9'", "((" * 500, "'" + "x" * 20_000 + "'")
    )
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("X", "y"):
            body = bytes(4 * pick(draw, (0, 10, 1_000_000)))
            length = len(header).to_bytes(2, "little") if len(header) < 65536 else b"\xff\xff"
            archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + length + header + body)
    return out.getvalue()


def _repacked(draw: Draw, data: bytes) -> bytes:
    """The same arrays, compressed otherwise, some of their bytes changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", pick(draw, (0, 8, 12, 14))) as new:
        for name in old.namelist():
            member = old.read(name)
            new.writestr(name, spoil_bytes(draw, member) if draw(st.booleans()) else member)
    return out.getvalue()

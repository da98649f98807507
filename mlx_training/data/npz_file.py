"""NumPy archives that others made: nothing is unpickled, and a file cannot take more memory than it accounts for."""

import lzma
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from mlx_training.data.files import require_file
from mlx_training.errors import DataError

MAX_COMPRESSION = 2000  # deflate reaches 1032
UNREADABLE = (  # what zipfile and NumPy raise for a damaged or locked archive
    *(ValueError, TypeError, KeyError, AttributeError, OverflowError, SyntaxError, RuntimeError, NotImplementedError),
    *(OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError),
)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of an `.npz` file by its name; DataError where it is no archive of plain arrays."""
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_size(archive, member)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _plain(arrays[name], name) for name in arrays.files}
    except UNREADABLE as error:
        raise DataError(f"{path}: not a readable npz archive of plain arrays ({str(error)[:200]})") from error


def _check_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """ValueError when an array's header, or the archive's entry, promises bytes that are not there."""
    if member.file_size > MAX_COMPRESSION * member.compress_size:
        raise ValueError(f"{member.filename} announces {member.file_size} bytes in {member.compress_size}")
    with archive.open(member) as file:
        announced = _announced_bytes(file)
    if announced > member.file_size:
        raise ValueError(f"{member.filename} announces {announced} bytes and holds {member.file_size}")


def _plain(array: np.ndarray, name: str) -> np.ndarray:
    """The array, unless it is structured or its texts are no Unicode: NumPy does not look, and libraries die of it."""
    if array.dtype.kind == "V":
        raise ValueError(f"{name} is a structured array")
    if array.dtype.kind == "U":
        codes = array.astype(array.dtype.newbyteorder("=")).reshape(-1).view(np.uint32)
        if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
            raise ValueError(f"{name} holds texts that are no Unicode")
    return array


def _announced_bytes(file: IO[bytes]) -> int:
    """The size of an array as its .npy header says it."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise ValueError(f"an array of .npy version {version[0]}.{version[1]}; save it with NumPy's defaults")
    shape, _, dtype = readers[version](file)
    if not dtype.itemsize:
        raise ValueError(f"an array of {dtype}, which has no size")
    return dtype.itemsize * math.prod(shape)

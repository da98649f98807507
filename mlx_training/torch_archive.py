"""Read and write PyTorch's `.pt` archives without PyTorch, and without running what they contain.

A `.pt` file is a zip with `<name>/data.pkl`, a pickle of the object, and `<name>/data/<key>`, the bytes of each
tensor's storage. A pickle may call any function it can name. This reader resolves a fixed list of names: plain
containers, tensors, and stand-ins that hold the fields of PEFT's configuration objects but have no behaviour.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.errors import CheckpointError

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": np.uint16,  # widened to float32 on reading: NumPy has no bfloat16
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

MAX_GROWTH = 4  # tensors may share a storage, and bfloat16 is widened


class Inert:
    """An object of a class that is not imported: its constructor arguments and fields, and nothing else."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.fields = state

    def __hash__(self) -> int:
        return id(self)


def read_archive(path: str | Path) -> Any:
    """The object in a `.pt` file, tensors as NumPy arrays (bfloat16 as float32).

    Raises CheckpointError for a file that is damaged, is not such an archive, or names anything that is not on
    the list; nothing in it is ever executed.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"{path}: not a PyTorch archive: expected one data.pkl, found {len(pickles)}.")
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise CheckpointError(f"{path}: not a PyTorch archive: its members are compressed.")
            return _Unpickler(path, archive, pickles[0].removesuffix("data.pkl")).load()
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: not a complete PyTorch archive ({error}). Expected the zip that torch.save writes since "
            "PyTorch 1.6; download it again, or save an older file again with a current PyTorch."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a pickle can fail in any way
        raise CheckpointError(f"{path}: damaged PyTorch archive: {type(error).__name__}: {error}.") from error


class _Unpickler(pickle.Unpickler):
    """Members are read into memory by name and never extracted, so that a name cannot lead anywhere."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(io.BytesIO(archive.read(prefix + "data.pkl")))
        self.path, self.archive, self.prefix = path, archive, prefix
        self.storages: dict[str, np.ndarray] = {}
        self.bytes_left = MAX_GROWTH * path.stat().st_size

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return name
        if module.split(".")[0] == "peft":
            return type(name, (Inert,), {})
        allowed = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,  # a bound method: a pickle cannot alter it
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,  # its name in pickle protocol 2
        }
        if (module, name) not in allowed:
            raise CheckpointError(
                f"{self.path}: refused: it asks to run {module}.{name}. Expected tensors, numbers, text and plain "
                "containers only; nothing was executed. If you trust its source, save encoder_state and "
                "projector_state alone with torch.save, on a machine that may run it."
            )
        return allowed[module, name]

    def persistent_load(self, identity: Any) -> np.ndarray:
        kind, storage, key, _, size = identity
        if kind != "storage" or storage not in STORAGES:
            raise ValueError(f"unknown storage {identity}")
        if key in self.storages:
            return self.storages[key]
        values: np.ndarray = np.frombuffer(self.archive.read(f"{self.prefix}data/{key}"), STORAGES[storage])
        if len(values) != size:
            raise ValueError(f"storage {key} holds {len(values)} numbers, expected {size}")
        if storage == "BFloat16Storage":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        self.storages[key] = values
        return values

    def _rebuild_tensor(
        self, values: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
    ) -> np.ndarray:
        self.bytes_left -= int(np.prod(shape, dtype=object)) * values.itemsize
        if self.bytes_left < 0:
            raise ValueError(f"its tensors are more than {MAX_GROWTH} times as large as the file")
        return _strided(values, offset, shape, strides)


def _strided(values: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """A tensor from its storage; refuses to look outside of it, or to grow beyond it."""
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    count = int(np.prod(shape, dtype=object))
    if min(offset, *shape, *strides, 0) < 0 or count > len(values) or (count and last >= len(values)):
        raise ValueError(f"a tensor of shape {shape} and strides {strides} does not fit its {len(values)} numbers")
    view = np.lib.stride_tricks.as_strided(
        values[offset:], shape, [stride * values.itemsize for stride in strides], writeable=False
    )
    return view.copy()


def write_archive(path: str | Path, value: dict[str, Any]) -> None:
    """Write nested dicts of float32 arrays, numbers, text and None as a file that `torch.load` reads.

    It loads with `weights_only=True`: there is nothing in it but tensors and plain values.
    """
    storages: list[np.ndarray] = []
    content = b"\x80\x02" + b"".join(_opcodes(value, storages)) + b"."
    name = Path(path).stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{name}/data.pkl", content)
        archive.writestr(f"{name}/byteorder", "little")
        for key, array in enumerate(storages):
            archive.writestr(f"{name}/data/{key}", array.astype("<f4").tobytes())
        archive.writestr(f"{name}/version", "3\n")


def _opcodes(value: Any, storages: list[np.ndarray]) -> Iterator[bytes]:
    """Pickle protocol 2, by hand: Python's pickler would have to import torch to name its functions."""
    if value is None:
        yield b"N"
    elif isinstance(value, bool):
        yield b"\x88" if value else b"\x89"
    elif isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        yield b"\x8a" + bytes([len(data)]) + data
    elif isinstance(value, float):
        yield b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        yield b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    elif isinstance(value, (list, tuple)):
        yield b"](" if isinstance(value, list) else b"("
        for item in value:
            yield from _opcodes(item, storages)
        yield b"e" if isinstance(value, list) else b"t"
    elif isinstance(value, dict):
        yield b"}("
        for key, item in value.items():
            yield from _opcodes(key, storages)
            yield from _opcodes(item, storages)
        yield b"u"
    elif isinstance(value, np.ndarray) and value.dtype == np.float32:
        strides = tuple(int(np.prod(value.shape[i + 1 :], dtype=np.int64)) for i in range(value.ndim))
        yield b"ctorch._utils\n_rebuild_tensor_v2\n(("
        yield from _opcodes("storage", storages)
        yield b"ctorch\nFloatStorage\n"
        yield from _opcodes(str(len(storages)), storages)
        yield from _opcodes("cpu", storages)
        yield from _opcodes(value.size, storages)
        yield b"tQ"
        yield from _opcodes(0, storages)
        yield from _opcodes(value.shape, storages)
        yield from _opcodes(strides, storages)
        yield from _opcodes(False, storages)
        yield b"ccollections\nOrderedDict\n)RtR"
        storages.append(value)
    else:
        raise TypeError(f"cannot be written to a .pt file: {type(value).__name__}")

"""MLX's affine quantisation in NumPy: writes checkpoints that mlx-lm and both backends read.

Needs neither framework, so that a model trained with PyTorch alone can be quantised. `quantize` gives the same bits as
`mx.quantize` on the CPU.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.llm_source import BITS, GROUP_SIZES, read_llm_config, safetensors_header, weight_files

_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U32": np.dtype("<u4"),
}


def quantize(w: np.ndarray, group_size: int = 64, bits: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs (..., K) float weights, group by group along K, so that w = scale * q + bias with q in 0 .. 2^bits - 1.

    The end of the range with the larger magnitude is represented exactly, and so is zero.

    Returns:
        packed uint32 (..., K * bits / 32), one LSB-first bit stream; scales and biases float32 (..., K / group_size).
    """
    if bits not in BITS or group_size not in GROUP_SIZES or w.shape[-1] % group_size:
        raise ConfigError(
            f"cannot quantise shape {w.shape} with bits {bits} and group size {group_size}; "
            f"bits are one of {BITS}, group sizes one of {GROUP_SIZES}, and the last axis a multiple of it"
        )
    groups = w.astype(np.float32).reshape(*w.shape[:-1], -1, group_size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    top = np.float32(2**bits - 1)
    low_is_edge = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / top, np.float32(1e-7))
    scale = np.where(low_is_edge, scale, -scale)
    edge = np.where(low_is_edge, low, high)
    edge_q = np.rint(edge / scale)
    scale = np.divide(edge, edge_q, out=scale, where=edge_q != 0)
    bias = np.where(edge_q != 0, edge, np.float32(0))
    q = np.clip(np.rint((groups - bias) / scale), 0, top).astype(np.uint8)
    return pack(q.reshape(w.shape), bits), scale[..., 0], bias[..., 0]


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (..., K) with values below 2^bits -> uint32 (..., K * bits / 32), least significant bit first."""
    stream = np.unpackbits(q[..., None], axis=-1, bitorder="little")[..., :bits]
    octets = np.packbits(stream.reshape(*q.shape[:-1], -1), axis=-1, bitorder="little")
    return octets.view("<u4")


def dequantize(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, group_size: int) -> np.ndarray:
    """w = scale * q + bias, float32 (..., K), from packed uint32 (..., K * bits / 32) and (..., K / group_size)."""
    bits = packed.shape[-1] * 32 // (scales.shape[-1] * group_size)
    stream = np.unpackbits(np.ascontiguousarray(packed).view(np.uint8), axis=-1, bitorder="little")
    q = np.packbits(stream.reshape(*packed.shape[:-1], -1, bits), axis=-1, bitorder="little")[..., 0]
    groups = q.reshape(*scales.shape, group_size).astype(np.float32)
    return (groups * scales[..., None] + biases[..., None]).reshape(q.shape)


def quantize_directory(source: Path, target: Path, bits: int = 4, group_size: int = 64) -> None:
    """Writes `source` (a Hugging Face checkpoint, float weights) quantised to `target`, as `mlx_lm.convert -q` would.

    Every matrix whose rows are a multiple of `group_size` is quantised, the embedding included; scales and biases keep
    the weight's type. `config.json` is written normalised, with the RoPE keys that mlx-lm reads; tokenizer files are
    copied.
    """
    source, target = Path(source), Path(target)
    config = read_llm_config(source)
    if config.get("quantization"):
        raise ConfigError(f"{source} is quantised already; give the original checkpoint")
    if target.resolve() == source.resolve():
        raise ConfigError(f"source and target are both {source}; give another target directory")
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for file in weight_files(source):
        for name, (dtype, array) in read_tensors(file).items():
            if array.ndim == 2 and array.shape[-1] % group_size == 0:
                packed, scales, biases = quantize(to_float32(dtype, array), group_size, bits)
                tensors[name] = ("U32", packed)
                stem = name.removesuffix(".weight")
                tensors[f"{stem}.scales"] = (dtype, _from_float32(dtype, scales))
                tensors[f"{stem}.biases"] = (dtype, _from_float32(dtype, biases))
            else:
                tensors[name] = (dtype, array)

    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".model", ".txt", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    _write_safetensors(target / "model.safetensors", tensors)
    quantization = {"group_size": group_size, "bits": bits, "mode": "affine"}
    config |= {"quantization": quantization, "quantization_config": quantization}  # the second is what the hub shows
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """{name: (safetensors type, array)}; bfloat16, which NumPy lacks, as its uint16 bits."""
    header, offset = safetensors_header(path)
    data = np.memmap(path, np.uint8, "r", offset=offset)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name} has type {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        start, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], data[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"]))
    return tensors


def _write_safetensors(path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    header: dict = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).data)


def to_float32(dtype: str, array: np.ndarray) -> np.ndarray:
    """The values of what `read_tensors` returns."""
    if dtype == "BF16":
        return np.left_shift(array, 16, dtype=np.uint32).view(np.float32)
    return array.astype(np.float32)


def _from_float32(dtype: str, array: np.ndarray) -> np.ndarray:
    if dtype == "BF16":  # round to nearest, ties to even
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return array.astype(_DTYPES[dtype])

"""Adapters added into the weights of their base, in NumPy: a model that needs no adapter any more."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mlx_training.adapters import Adapter
from mlx_training.checkpoint_files import MODEL
from mlx_training.llm_source import is_weight, read_llm_config, weight_files
from mlx_training.pretrained import group_size
from mlx_training.quantize import dequantize, quantize_directory, read_tensors, to_float32

COPIED = (".json", ".model", ".txt", ".jinja")
FORMAT = {"format": "pt"}


class Weights:
    """The weights of a model's directory; each is expanded to float32 when it is asked for."""

    def __init__(self, directory: Path, config: dict[str, Any] | None = None) -> None:
        self.config = config or read_llm_config(directory)
        self.files: dict[str, list[str]] = {}  # names by file, packed layers as one weight
        self.stored: dict[str, tuple[str, np.ndarray]] = {}
        for file in weight_files(directory):
            tensors = {name: t for name, t in read_tensors(file).items() if is_weight(name, self.config)}
            self.stored |= tensors
            self.files[file.name] = [name for name in tensors if not name.endswith((".scales", ".biases"))]

    def __getitem__(self, name: str) -> np.ndarray:
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in self.stored or path == name:
            return to_float32(*self.stored[name])
        scales, biases = (to_float32(*self.stored[f"{path}.{part}"]) for part in ("scales", "biases"))
        return dequantize(self.stored[name][1], scales, biases, group_size(self.config, path))


def merge_directory(base: Path, adapter: Adapter, target: Path) -> None:
    """Write `base` with the adapters in it to the directory `target`: dense, float32, one weight file at a time."""
    weights = Weights(base)
    index: dict[str, str] = {}
    for file_name, names in weights.files.items():
        save_file({name: merge_weight(weights[name], adapter, name) for name in names}, target / file_name, FORMAT)
        index |= dict.fromkeys(names, file_name)
    if len(weights.files) > 1:
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}, indent=1) + "\n")
    for file in base.iterdir():
        if file.suffix in COPIED and file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    config = {key: value for key, value in weights.config.items() if not key.startswith("quantization")}
    (target / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=1) + "\n")


def merge_decoder(checkpoint: Path, adapter: Adapter) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint's decoder with the adapters in them."""
    return {name: merge_weight(array, adapter, name) for name, array in load_file(checkpoint / MODEL).items()}


def merge_weight(weight: np.ndarray, adapter: Adapter, name: str) -> np.ndarray:
    """The matrix (out, in) that does what base and adapter do; `weight` itself where the adapter has no part."""
    path = f"lm.{name.removesuffix('.weight')}"
    if name.endswith(".bias") or (a := adapter.arrays.get(f"{path}.lora_A.weight")) is None:
        return weight
    merged = weight + np.float32(adapter.alpha / adapter.rank) * (adapter.arrays[f"{path}.lora_B.weight"] @ a)
    magnitude = adapter.arrays.get(f"{path}.lora_magnitude_vector")
    return merged if magnitude is None else merged * (magnitude / np.linalg.norm(merged, axis=1))[:, None]


def merge_and_quantize(base: Path, adapter: Adapter, target: Path, bits: int, size: int) -> str:
    """The same, packed as `mlx_lm.convert -q` would; in words, what packing changed beside what the adapters did."""
    scratch = target / "float"
    scratch.mkdir()
    merge_directory(base, adapter, scratch)
    quantize_directory(scratch, target, bits, size)
    before, merged, packed = Weights(base), Weights(scratch), Weights(target)
    change = rounding = whole = 0.0
    for path in adapter.paths:
        exact = merged[f"{path}.weight"]
        change += float(np.square(exact - before[f"{path}.weight"]).sum())
        rounding += float(np.square(exact - packed[f"{path}.weight"]).sum())
        whole += float(np.square(exact).sum())
    shutil.rmtree(scratch)
    shares = [f"{(part / whole) ** 0.5:.2%}" for part in (change, rounding)]
    return (
        f"quantised to {bits} bits in groups of {size}: of the adapted matrices' norm the adapters changed {shares[0]} "
        f"and packing {shares[1]}"
    )

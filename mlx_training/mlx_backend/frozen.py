"""Frozen language models from a directory or a run: their weights, dense or packed, and the fingerprint of them."""

import hashlib
import math
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_training import environment
from mlx_training.llm_source import (
    is_norm,
    is_weight,
    match_weights,
    packed_note,
    read_llm_config,
    stays_packed,
    weight_files,
)
from mlx_training.mlx_backend.decoder import Decoder
from mlx_training.mlx_backend.pretrained import PretrainedLM
from mlx_training.mlx_backend.quant import dense_weight, dequantize, keep_quantized
from mlx_training.spec import FrozenLM


def load_frozen(llm: FrozenLM, *, precision: str = "float32", device: Any = None) -> PretrainedLM | Decoder:
    """The frozen LM of a spec: a directory's (`load_pretrained`), or the decoder of a checkpoint.

    A decoder's weights are in the compute type, as every product would cast them; its norms stay float32.
    """
    if llm.decoder is None:
        return load_pretrained(llm.directory, precision=precision, weights=llm.weights, device=device)
    dtype = getattr(mx, precision)
    with mx.stream(device or mx.default_device()):
        lm = Decoder(llm.decoder, dtype)
        (file,) = weight_files(llm.directory)
        arrays = [(n, p if is_norm(n) else p.astype(dtype)) for n, p in mx.load(str(file)).items()]
        mx.eval(arrays)
    lm.load_weights(arrays)
    return lm.freeze().eval()


def load_pretrained(
    directory: Path,
    *,
    precision: str = "float32",
    weights: str = "dequantized",
    device: Any = None,
) -> PretrainedLM:
    """A frozen LM from a directory in Hugging Face or MLX format.

    Args:
        precision: compute type, "float32" or "bfloat16".
        weights: "dequantized" expands packed weights once, in float32, then casts; "resident" keeps them packed;
            "auto" expands them where that takes half of the free memory at most.
        device: an MLX device; the default device if None.

    Raises:
        CheckpointError: missing files; missing, unused or misshaped tensors.
        ConfigError: an architecture or quantisation that is not supported.
    """
    config, dtype = read_llm_config(directory), getattr(mx, precision)
    with mx.stream(device or mx.default_device()):
        lm = PretrainedLM(config)
        stored = {
            name: array
            for file in weight_files(directory)
            for name, array in mx.load(str(file)).items()
            if is_weight(name, config)
        }
        expected = {name: p.shape for name, p in tree_flatten(lm.parameters())}
        packed = match_weights(expected, {name: array.shape for name, array in stored.items()}, directory)
        dense = sum(math.prod(shape) for shape in expected.values()) * dtype.size
        free = free_memory(device or mx.default_device())
        is_resident = bool(packed) and stays_packed(weights, dense, free)
        if is_resident and weights == "auto":
            print(packed_note(dense, free), file=sys.stderr)
        if is_resident:
            keep_quantized(lm, packed)
        else:
            for path, (group_size, bits) in packed.items():
                scales, biases = stored.pop(f"{path}.scales"), stored.pop(f"{path}.biases")
                stored[f"{path}.weight"] = dequantize(stored[f"{path}.weight"], scales, biases, group_size, bits)
        arrays = []
        for name in list(stored):
            array = stored.pop(name)
            array = array if array.dtype == mx.uint32 else array.astype(dtype)
            mx.eval(array)  # one tensor at a time, so that packed and dense copies of all never stand side by side
            arrays.append((name, array))
    lm.load_weights(arrays)
    lm.freeze()
    return lm.eval()


def free_memory(device: mx.Device) -> int:
    """Bytes that weights on this device may still take."""
    if device.type == mx.DeviceType.gpu:
        known = mx.device_info(device)  # Metal has the former key, CUDA the latter
        if most := known.get("max_recommended_working_set_size") or known.get("total_memory"):
            return int(most) - mx.get_active_memory()
    return environment.free_memory()


def frozen_hash(lm: nn.Module) -> str:
    """SHA-256 over all weights in name order; dense weights of one type give the same on both backends.

    Adapters have no part in it.
    """
    digest = hashlib.sha256()
    known = tree_flatten(lm.parameters())
    frozen = {name.replace(".base_layer.", "."): p for name, p in known if ".lora_" not in name}
    for name, array in sorted(frozen.items()):
        digest.update(f"{name}{tuple(array.shape)}".encode())
        digest.update(memoryview(array.view(mx.uint8)))
    return digest.hexdigest()


def head_weight(lm: PretrainedLM | Decoder) -> np.ndarray:
    """The head as a dense matrix, float32 (V, H)."""
    return np.array(dense_weight(lm.head_layer))

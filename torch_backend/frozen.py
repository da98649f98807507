"""Frozen language models from a directory or a run: their weights, dense or packed, and the fingerprint of them."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

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
from mlx_training.spec import FrozenLM
from torch_backend.decoder import Decoder
from torch_backend.pretrained import PretrainedLM
from torch_backend.quant import dense_weight, dequantize, keep_quantized


def load_frozen(llm: FrozenLM, *, precision: str = "float32", device: Any = None) -> PretrainedLM | Decoder:
    """The frozen LM of a spec: a directory's (`load_pretrained`), or the decoder of a checkpoint.

    A decoder's weights are in the compute type, as every product would cast them; its norms stay float32.
    """
    if llm.decoder is None:
        return load_pretrained(llm.directory, precision=precision, weights=llm.weights, device=device)
    dtype, device = getattr(torch, precision), torch.device(device or "cpu")
    lm = Decoder(llm.decoder, dtype)
    (file,) = weight_files(llm.directory)
    arrays = load_file(file, device=str(device))
    lm.load_state_dict({n: p if is_norm(n) else p.to(dtype) for n, p in arrays.items()}, assign=True)
    lm.requires_grad_(False)
    return lm.to(device).eval()


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
        device: a PyTorch device; the CPU if None.

    Raises:
        CheckpointError: missing files; missing, unused or misshaped tensors.
        ConfigError: an architecture or quantisation that is not supported.
    """
    config, dtype, device = read_llm_config(directory), getattr(torch, precision), torch.device(device or "cpu")
    lm = PretrainedLM(config)
    files = [safe_open(file, framework="pt", device=str(device)) for file in weight_files(directory)]
    stored = {name: file for file in files for name in list(file.keys()) if is_weight(name, config)}
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in stored.items()}
    packed = match_weights({name: tuple(p.shape) for name, p in lm.named_parameters()}, shapes, directory)
    dense, free = sum(p.numel() for p in lm.parameters()) * dtype.itemsize, free_memory(device)
    is_resident = bool(packed) and stays_packed(weights, dense, free)
    if is_resident and weights == "auto":
        print(packed_note(dense, free), file=sys.stderr)
    arrays = {}
    for name, file in stored.items():
        path, _, part = name.rpartition(".")
        if path not in packed or part == "bias":
            arrays[name] = file.get_tensor(name).to(dtype)
        elif part == "weight":
            group_size, bits = packed[path]
            bits_of_w = file.get_tensor(name).view(torch.int32)
            scales, biases = (stored[other].get_tensor(other) for other in (f"{path}.scales", f"{path}.biases"))
            if is_resident:
                arrays |= {f"{path}.packed": bits_of_w, f"{path}.scales": scales, f"{path}.biases": biases}
            else:
                arrays[name] = dequantize(bits_of_w, scales, biases, group_size, bits).to(dtype)
    if is_resident:
        keep_quantized(lm, packed)
    lm.load_state_dict(arrays, assign=True)
    return lm.requires_grad_(False).to(device).eval()


def free_memory(device: torch.device) -> int:
    """Bytes that weights on this device may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return environment.free_memory()


def frozen_hash(lm: nn.Module) -> str:
    """SHA-256 over all weights in name order; dense weights of one type give the same on both backends.

    Adapters have no part in it.
    """
    digest = hashlib.sha256()
    frozen = {name.replace(".base_layer.", "."): p for name, p in lm.state_dict().items() if ".lora_" not in name}
    for name, array in sorted((name.replace(".packed", ".weight"), array) for name, array in frozen.items()):
        digest.update(f"{name}{tuple(array.shape)}".encode())
        digest.update(array.contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def head_weight(lm: PretrainedLM | Decoder) -> np.ndarray:
    """The head as a dense matrix, float32 (V, H)."""
    return dense_weight(lm.head_layer).cpu().numpy()

"""MLX's affine-quantised weights, read by MLX itself."""

import mlx.core as mx
import mlx.nn as nn


def dequantize(packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    """w = scale * q + bias, float32 (..., K), from packed uint32 (..., K * bits / 32) and (..., K / group_size)."""
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(packed, scales, biases, group_size, bits)


def dense_weight(layer: nn.Module) -> mx.array:
    """The matrix of a Linear or Embedding, packed or not, float32 (out, in)."""
    if layer.weight.dtype == mx.uint32:
        return dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    return layer.weight.astype(mx.float32)


def keep_quantized(body: nn.Module, layers: dict[str, tuple[int, int]]) -> None:
    """Replaces the named Linear and Embedding modules by packed ones; {path: (group_size, bits)}."""

    def packing(path: str, _: nn.Module) -> bool | dict:
        if path not in layers:
            return False
        group_size, bits = layers[path]
        return {"group_size": group_size, "bits": bits}

    nn.quantize(body, class_predicate=packing)

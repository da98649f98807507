"""MLX's affine-quantised weights, read by PyTorch bit for bit.

Shape suffixes: R rows, K input features, G groups along K.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dequantize(packed: Tensor, scales: Tensor, biases: Tensor, group_size: int, bits: int) -> Tensor:
    """w = scale * q + bias, float32 (..., K), from packed uint32 (..., K * bits / 32) and (..., K / group_size)."""
    q = _unpack(packed, bits).unflatten(-1, (-1, group_size)).float()
    return q.mul_(scales.float()[..., None]).add_(biases.float()[..., None]).flatten(-2)


def dense_weight(layer: nn.Module) -> Tensor:
    """The matrix of a Linear or Embedding, packed or not, float32 (out, in)."""
    if isinstance(layer, _Packed):
        return dequantize(layer.packed, layer.scales, layer.biases, layer.group_size, layer.bits)
    return layer.weight.float()


def keep_quantized(body: nn.Module, layers: dict[str, tuple[int, int]]) -> None:
    """Replaces the named Linear and Embedding modules by packed ones; {path: (group_size, bits)}."""
    for path, (group_size, bits) in layers.items():
        dense = body.get_submodule(path)
        packed = _PackedEmbedding if isinstance(dense, nn.Embedding) else _PackedLinear
        body.set_submodule(path, packed(dense, group_size, bits))


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """One little-endian stream of `bits`-wide numbers, least significant bit first -> (..., K)."""
    octets = packed.view(torch.uint8)
    mask = 2**bits - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((octets[..., None] >> shifts) & mask).flatten(-2)
    octets = octets.unflatten(-1, (-1, bits)).long()  # 8 numbers in `bits` bytes
    words = (octets << torch.arange(0, 8 * bits, 8, device=packed.device)).sum(-1, keepdim=True)
    return ((words >> torch.arange(0, 8 * bits, bits, device=packed.device)) & mask).flatten(-2)


class _Packed(nn.Module):
    """Packed weights as buffers (int32: PyTorch has no shifts for uint32), filled by `load_state_dict`."""

    def __init__(self, dense: nn.Linear | nn.Embedding, group_size: int, bits: int) -> None:
        super().__init__()
        self.group_size, self.bits = group_size, bits
        rows, in_size = dense.weight.shape
        self.register_buffer("packed", torch.empty(rows, in_size * bits // 32, dtype=torch.int32, device="meta"))
        self.register_buffer("scales", torch.empty(rows, in_size // group_size, device="meta"))
        self.register_buffer("biases", torch.empty(rows, in_size // group_size, device="meta"))
        self.bias = getattr(dense, "bias", None)

    def as_linear(self, x: Tensor) -> Tensor:
        return _PackedProduct.apply(x, self.bias, self.packed, self.scales, self.biases, self.group_size, self.bits)


class _PackedLinear(_Packed):
    def forward(self, x: Tensor) -> Tensor:
        return self.as_linear(x)


class _PackedEmbedding(_Packed):
    def forward(self, tokens: Tensor) -> Tensor:
        rows = (self.packed[tokens], self.scales[tokens], self.biases[tokens])
        return dequantize(*rows, self.group_size, self.bits)


class _PackedProduct(torch.autograd.Function):
    """x @ w.T + bias; w is expanded again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
        ctx.save_for_backward(*weight[:3])
        ctx.layout = weight[3:]
        return F.linear(x, dequantize(*weight).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight = dequantize(*ctx.saved_tensors, *ctx.layout)
        return grads[0] @ weight.to(grads[0].dtype), *[None] * 6

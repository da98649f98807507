"""LoRA and DoRA on the Linears of a frozen language model: names, layouts and numbers of PEFT."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_training.mlx_backend.dropout import Dropout
from mlx_training.mlx_backend.layers import Linear
from mlx_training.mlx_backend.quant import dense_weight
from mlx_training.spec import AdapterSpec


class AdaptedLinear(nn.Module):
    """A frozen Linear, dense or packed, and its low-rank change. Adapters are float32 under any activations."""

    def __init__(self, base: nn.Module, spec: AdapterSpec, out_size: int, in_size: int) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = spec.scale
        self.lora_A = Linear(in_size, spec.rank, bias=False)
        self.lora_B = Linear(spec.rank, out_size, bias=False)
        self.dropout = Dropout(spec.dropout)
        if spec.dora:
            self.lora_magnitude_vector = mx.linalg.norm(dense_weight(base), axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.base_layer(x)
        change = self.scale * self.lora_B(self.lora_A(self.dropout(x)))
        if "lora_magnitude_vector" not in self:
            return y + change
        gain = (self.lora_magnitude_vector / self._norms()).astype(x.dtype)
        bias = self.base_layer.get("bias")
        return gain * (y + change) if bias is None else gain * (y - bias + change) + bias

    def _norms(self) -> mx.array:
        """||W + scale B A|| of every output, float32; a constant in backward (Liu et al. 2024, section 4.3)."""
        weight = dense_weight(self.base_layer) + self.scale * (self.lora_B.weight @ self.lora_A.weight)
        return mx.stop_gradient(mx.linalg.norm(weight, axis=1))


def adapt(lm: nn.Module, spec: AdapterSpec) -> None:
    """Puts adapters on the Linears that the spec names; nothing else of a frozen model becomes trainable."""
    modules = dict(lm.named_modules())
    adapted = [(path, AdaptedLinear(modules[path], spec, *sizes)) for path, *sizes in spec.linears]
    lm.update_modules(tree_unflatten(adapted))

"""LoRA and DoRA on the Linears of a frozen language model: names, layouts and numbers of PEFT."""

import torch
from torch import Tensor, nn

from mlx_training.spec import AdapterSpec
from torch_backend.layers import Linear
from torch_backend.quant import dense_weight


class AdaptedLinear(nn.Module):
    """A frozen Linear, dense or packed, and its low-rank change. Adapters are float32 under any activations."""

    def __init__(self, base: nn.Module, spec: AdapterSpec, out_size: int, in_size: int) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = spec.scale
        self.lora_A = Linear(in_size, spec.rank, bias=False)
        self.lora_B = Linear(spec.rank, out_size, bias=False)
        self.dropout = nn.Dropout(spec.dropout)
        if spec.dora:
            self.lora_magnitude_vector = nn.Parameter(dense_weight(base).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        change = self.scale * self.lora_B(self.lora_A(self.dropout(x)))
        if not hasattr(self, "lora_magnitude_vector"):
            return y + change
        gain = (self.lora_magnitude_vector / self._norms()).to(x.dtype)
        bias = getattr(self.base_layer, "bias", None)
        return gain * (y + change) if bias is None else gain * (y - bias + change) + bias

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """||W + scale B A|| of every output, float32; a constant in backward (Liu et al. 2024, section 4.3)."""
        weight = dense_weight(self.base_layer) + self.scale * (self.lora_B.weight @ self.lora_A.weight)
        return weight.norm(dim=1)


def adapt(lm: nn.Module, spec: AdapterSpec) -> None:
    """Puts adapters on the Linears that the spec names; nothing else of a frozen model becomes trainable."""
    for path, out_size, in_size in spec.linears:
        lm.set_submodule(path, AdaptedLinear(lm.get_submodule(path), spec, out_size, in_size))

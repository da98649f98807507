"""Mixture of experts: tokens choose a few of many feed-forward layers.

Shape suffixes: B rows, L tokens, H hidden, X tokens of all rows, E experts, A active experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_training.spec import DecoderSpec
from torch_backend.layers import ACTIVATIONS, Linear


class Stack(nn.Module):
    """One weight matrix (out, in) an expert."""

    def __init__(self, num_experts: int, out_size: int, in_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, out_size, in_size))


class Experts(nn.Module):
    """Top-k routing with a softmax over the chosen (Mixtral). `balance`: the balancing loss of the last pass."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        assert spec.experts is not None
        num_experts, H, width = spec.experts.num_experts, spec.hidden_size, spec.intermediate_size
        self.num_active = spec.experts.num_active
        self.router = Linear(H, num_experts, bias=False)
        if spec.activation == "swiglu":
            self.gate_proj = Stack(num_experts, width, H)
        else:
            self.activation = ACTIVATIONS[spec.activation]
        self.up_proj = Stack(num_experts, width, H)
        self.down_proj = Stack(num_experts, H, width)
        self._balance: Tensor | float = 0.0

    @property
    def balance(self) -> Tensor | float:
        """The balancing loss of the last pass."""
        return self._balance

    def forward(self, x_BLH: Tensor, real_BL: Tensor | None) -> Tensor:
        """Each token's weighted sum of its experts (B, L, H); padding does not count for the balance."""
        logits_BLE = self.router(x_BLH).float()
        top_BLA, chosen_BLA = logits_BLE.topk(self.num_active, dim=-1)
        weights_BLA = top_BLA.softmax(-1).to(x_BLH.dtype)
        self._balance = balance(logits_BLE, chosen_BLA, real_BL)
        x_XH, weights_XA, chosen_XA = (t.flatten(0, 1) for t in (x_BLH, weights_BLA, chosen_BLA))
        out_XH = torch.zeros_like(x_XH)
        for expert in range(logits_BLE.shape[-1]):
            tokens, places = (chosen_XA == expert).nonzero(as_tuple=True)
            out = self._expert(expert, x_XH[tokens]) * weights_XA[tokens, places, None]
            out_XH = out_XH.index_add(0, tokens, out)
        return out_XH.view_as(x_BLH)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        up = F.linear(x, self.up_proj.weight[expert].to(x.dtype))
        if hasattr(self, "gate_proj"):
            inner = F.silu(F.linear(x, self.gate_proj.weight[expert].to(x.dtype))) * up
        else:
            inner = self.activation(up)
        return F.linear(inner, self.down_proj.weight[expert].to(x.dtype))


def balance(logits_BLE: Tensor, chosen_BLA: Tensor, real_BL: Tensor | None) -> Tensor:
    """E * sum over experts of (share of choices) * (mean probability): 1 when balanced (Fedus et al. 2021)."""
    num_experts = logits_BLE.shape[-1]
    picked_BLE = F.one_hot(chosen_BLA, num_experts).float().mean(-2)
    real = torch.ones_like(logits_BLE[..., :1]) if real_BL is None else real_BL[..., None].float()
    share_E, mean_E = ((x * real).sum((0, 1)) / real.sum() for x in (picked_BLE, logits_BLE.softmax(-1)))
    return num_experts * (share_E * mean_E).sum()

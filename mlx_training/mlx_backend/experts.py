"""Mixture of experts: tokens choose a few of many feed-forward layers.

Shape suffixes: B rows, L tokens, H hidden, X tokens of all rows, E experts, A active experts a token,
S choices: every token as often as it has active experts.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_training.mlx_backend.layers import ACTIVATIONS, Linear
from mlx_training.spec import DecoderSpec


class Stack(nn.Module):
    """One weight matrix (out, in) an expert."""

    def __init__(self, num_experts: int, out_size: int, in_size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, out_size, in_size))


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
        self._balance: mx.array | float = 0.0  # underscore: not a parameter

    @property
    def balance(self) -> mx.array | float:
        """The balancing loss of the last pass."""
        return self._balance

    def __call__(self, x_BLH: mx.array, real_BL: mx.array | None) -> mx.array:
        """Each token's weighted sum of its experts (B, L, H); padding does not count for the balance."""
        logits_BLE = self.router(x_BLH).astype(mx.float32)
        chosen_BLA = mx.stop_gradient(mx.argsort(-logits_BLE, axis=-1)[..., : self.num_active])
        top_BLA = mx.take_along_axis(logits_BLE, chosen_BLA, axis=-1)
        weights_BLA = mx.softmax(top_BLA, axis=-1).astype(x_BLH.dtype)
        self._balance = balance(logits_BLE, chosen_BLA, real_BL)
        out_BLAH = self._experts(chosen_BLA, x_BLH)
        return (out_BLAH * weights_BLA[..., None]).sum(-2)

    def _experts(self, chosen_BLA: mx.array, x_BLH: mx.array) -> mx.array:
        """What each chosen expert makes of each token (B, L, A, H).

        Sorted by expert, for the sake of the weights' gradient: unsorted, MLX makes a matrix for every token of it.
        """
        order_S = mx.argsort(chosen_BLA.flatten())
        sorted_S = chosen_BLA.flatten()[order_S]

        def product(x: mx.array, stack: Stack) -> mx.array:
            weight = stack.weight.astype(x.dtype).swapaxes(-1, -2)
            return mx.gather_mm(x, weight, rhs_indices=sorted_S, sorted_indices=True)

        x_S1H = x_BLH.flatten(0, 1)[order_S // self.num_active][:, None]
        up = product(x_S1H, self.up_proj)
        inner = nn.silu(product(x_S1H, self.gate_proj)) * up if "gate_proj" in self else self.activation(up)
        out_SH = product(inner, self.down_proj)[:, 0][mx.argsort(order_S)]
        return out_SH.reshape(*chosen_BLA.shape, -1)


def balance(logits_BLE: mx.array, chosen_BLA: mx.array, real_BL: mx.array | None) -> mx.array:
    """E * sum over experts of (share of choices) * (mean probability): 1 when balanced (Fedus et al. 2021)."""
    num_experts = logits_BLE.shape[-1]
    picked_BLE = (chosen_BLA[..., None] == mx.arange(num_experts)).astype(mx.float32).mean(-2)
    real = mx.ones_like(logits_BLE[..., :1]) if real_BL is None else real_BL[..., None].astype(mx.float32)
    share_E, mean_E = ((x * real).sum((0, 1)) / real.sum() for x in (picked_BLE, mx.softmax(logits_BLE, axis=-1)))
    return num_experts * (share_E * mean_E).sum()

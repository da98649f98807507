"""What the layers of a frozen language model are made of: Llama, Mistral, Qwen 2, Qwen 3 and Gemma 3 differ in little.

They are named as in a checkpoint and compute what transformers' do, to which tests compare them: importing that
takes longer than all else before the first step. In MLX they are mlx-lm's. `blocks.py` has the forward over them.

Shape suffixes: B rows, T tokens, D head_dim.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_backend.blocks import Block
from torch_backend.layers import RMSNorm

Config = Mapping[str, Any]  # a `config.json` as `normalize_llm_config` leaves it


class Linear(nn.Linear):
    """A layer whose weights come from a file."""

    def reset_parameters(self) -> None:
        """None are drawn: for parameters without memory that imports PyTorch's compiler, in seconds."""


class Embedding(nn.Embedding):
    """A table that comes from a file."""

    def reset_parameters(self) -> None:
        """As in Linear."""


class GemmaRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), all in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps) * (1 + self.weight.float())).to(x.dtype)


class AttentionParts(nn.Module):
    """Projections, norms of queries and keys (Qwen 3, Gemma 3), sizes."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        H, D, kind = config["hidden_size"], config["head_dim"], config["model_type"]
        query_size, key_size = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
        bias = kind == "llama" and config["attention_bias"]  # other families do not read the key
        biased = bias or kind == "qwen2"
        self.head_dim: int = D
        self.scale: float = (config["query_pre_attn_scalar"] if is_gemma(config) else D) ** -0.5
        self.is_sliding: bool = is_gemma(config) and config["layer_types"][layer] == "sliding_attention"
        self.q_proj = Linear(H, query_size, bias=biased)
        self.k_proj = Linear(H, key_size, bias=biased)
        self.v_proj = Linear(H, key_size, bias=biased)
        self.o_proj = Linear(query_size, H, bias=bias)
        has_norms = kind in ("qwen3", "gemma3_text")
        self.q_norm, self.k_norm = (norm(config, D) if has_norms else None for _ in "qk")


class MLP(nn.Module):
    """Gated feed-forward layer: SwiGLU, or Gemma's GeGLU (Shazeer 2020)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        H, size = config["hidden_size"], config["intermediate_size"]
        bias = config["model_type"] == "llama" and config["mlp_bias"]
        self.gate_proj = Linear(H, size, bias=bias)
        self.up_proj = Linear(H, size, bias=bias)
        self.down_proj = Linear(size, H, bias=bias)
        self.act_fn: nn.Module = nn.GELU(approximate="tanh") if is_gemma(config) else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LayerParts(nn.Module):
    """One layer's parts; Gemma has a norm after attention and feed-forward layer too."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        H = config["hidden_size"]
        self.self_attn, self.mlp = AttentionParts(config, layer), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = norm(config, H), norm(config, H)
        if is_gemma(config):
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(config, H), norm(config, H)


class Body(nn.Module):
    """All of a language model but its head, under the names of its checkpoints. Input embeddings are not scaled."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList([Block(LayerParts(config, i), i) for i in range(config["num_hidden_layers"])])
        self.norm = norm(config, config["hidden_size"])
        self.frequencies: Tensor
        self.local_frequencies: Tensor  # of sliding layers
        D, theta = config["head_dim"], config["rope_theta"]
        self.register_buffer("frequencies", frequencies(D, theta, config.get("rope_scaling")), persistent=False)
        local = frequencies(D, config.get("rope_local_base_freq", theta), None)
        self.register_buffer("local_frequencies", local, persistent=False)

    def rotation(self, positions_BT: Tensor, dtype: torch.dtype, is_sliding: bool) -> tuple[Tensor, Tensor]:
        """Cosines and sines for both halves of a head (B, T, D); angles are float32."""
        angles = positions_BT[..., None].float() * (self.local_frequencies if is_sliding else self.frequencies)
        angles_BTD = torch.cat([angles, angles], dim=-1)
        return angles_BTD.cos().to(dtype), angles_BTD.sin().to(dtype)


def is_gemma(config: Config) -> bool:
    """Whether the model is one of Gemma's."""
    return str(config["model_type"]).startswith("gemma")


def norm(config: Config, size: int) -> RMSNorm:
    """The family's normalisation of `size` features."""
    return (GemmaRMSNorm if is_gemma(config) else RMSNorm)(size, config["rms_norm_eps"])


def frequencies(head_dim: int, theta: float, scaling: Config | None) -> Tensor:
    """Angles a position (D / 2,) on the CPU, rounded as in transformers; `scaling` is linear or Llama 3.1's."""
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    kind = (scaling or {}).get("rope_type", "default")
    if scaling is None or kind == "default":
        return plain
    if kind == "linear":
        return plain / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # of waves that are neither long nor short, a part
    return (1 - keep) * plain / scaling["factor"] + keep * plain

"""The blocks of a frozen language model: Llama, Mistral, Qwen 2, Qwen 3 and Gemma 3, which differ in little.

Layers are named as in a checkpoint and compute what transformers' do, to which tests compare them: importing that takes
longer than all else before the first step. The last block can be computed at some places only, and masks and rotations
are made once for all layers.

Shape suffixes: B rows, T new tokens, S cached and new tokens, K places a row, H hidden, N heads, D head_dim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_backend import layers
from torch_backend.layers import KVCache, attention

Config = Mapping[str, Any]  # a `config.json` as `normalize_llm_config` leaves it


@dataclass(frozen=True)
class Seen:
    """Where new tokens stand, and what they may look at."""

    cache: KVCache
    num_new: int
    cos_BTD: Tensor
    sin_BTD: Tensor
    mask: Tensor | str | None  # None: everything; "causal"; or what is added to the scores (B or 1, 1, T, S)

    def at(self, places_BK: Tensor) -> "Seen":
        """The same of queries at some places."""
        num_rows, num_places = places_BK.shape
        cos, sin = (at_places(x.expand(num_rows, -1, -1), places_BK) for x in (self.cos_BTD, self.sin_BTD))
        if self.mask is None:
            return Seen(self.cache, num_places, cos, sin, None)
        if isinstance(self.mask, str):
            keys = torch.arange(self.num_new, device=places_BK.device)
            return Seen(self.cache, num_places, cos, sin, (keys <= places_BK[..., None])[:, None])
        mask_BTS = self.mask.expand(num_rows, -1, -1, -1)[:, 0]
        return Seen(self.cache, num_places, cos, sin, at_places(mask_BTS, places_BK)[:, None])


class Linear(nn.Linear):
    """A layer whose weights come from a file."""

    def reset_parameters(self) -> None:
        """None are drawn: for parameters without memory that imports torch._dynamo, in seconds."""


class Embedding(nn.Embedding):
    """A table that comes from a file."""

    def reset_parameters(self) -> None:
        """As in Linear."""


class GemmaRMSNorm(layers.RMSNorm):
    """x / rms(x) * (1 + weight), all in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps) * (1 + self.weight.float())).to(x.dtype)


def norm(config: Config, size: int) -> layers.RMSNorm:
    """The family's normalisation of `size` features."""
    return (GemmaRMSNorm if is_gemma(config) else layers.RMSNorm)(size, config["rms_norm_eps"])


def is_gemma(config: Config) -> bool:
    """Whether norms stand after the layers too, and two kinds of attention alternate."""
    return str(config["model_type"]).startswith("gemma")


class Attention(nn.Module):
    """Attention with rotary positions and grouped heads."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        H, D, bias = config["hidden_size"], config["head_dim"], config.get("attention_bias", False)
        query_size, key_size = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
        biased = bias or config["model_type"] == "qwen2"
        self.layer, self.head_dim = layer, D
        self.scale: float = config.get("query_pre_attn_scalar", D) ** -0.5
        self.q_proj = Linear(H, query_size, bias=biased)
        self.k_proj = Linear(H, key_size, bias=biased)
        self.v_proj = Linear(H, key_size, bias=biased)
        self.o_proj = Linear(query_size, H, bias=bias)
        has_norms = config["model_type"] in ("qwen3", "gemma3_text")
        self.q_norm = norm(config, D) if has_norms else None
        self.k_norm = norm(config, D) if has_norms else None

    def forward(self, x_BTH: Tensor, seen: Seen, places_BK: Tensor | None = None) -> Tensor:
        """Of all places (B, T, H), or of some (B, K, H); their keys and values join the cache."""
        k_BNSD, v_BNSD = self.remember(x_BTH, seen)
        if places_BK is not None:
            x_BTH, seen = at_places(x_BTH, places_BK), seen.at(places_BK)
        q_BNTD = self._rotated(self._heads(self.q_proj, x_BTH), self.q_norm, seen)
        out_BNTD = attention(q_BNTD, k_BNSD, v_BNSD, seen.mask, self.scale)
        return self.o_proj(out_BNTD.transpose(1, 2).flatten(2))

    def remember(self, x_BTH: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """Keys and values so far (B, N, S, D); the new ones join the cache."""
        k_BNTD = self._rotated(self._heads(self.k_proj, x_BTH), self.k_norm, seen)
        return seen.cache.append(self.layer, k_BNTD, self._heads(self.v_proj, x_BTH))

    def _heads(self, project: nn.Module, x_BTH: Tensor) -> Tensor:
        return project(x_BTH).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _rotated(self, x_BNTD: Tensor, norm: nn.Module | None, seen: Seen) -> Tensor:
        if norm is not None:
            x_BNTD = norm(x_BNTD)
        a, b = x_BNTD.chunk(2, dim=-1)
        return x_BNTD * seen.cos_BTD[:, None] + torch.cat([-b, a], dim=-1) * seen.sin_BTD[:, None]


class MLP(nn.Module):
    """Gated feed-forward layer: SwiGLU, or Gemma's GeGLU (Shazeer 2020)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        H, size, bias = config["hidden_size"], config["intermediate_size"], config.get("mlp_bias", False)
        self.gate_proj = Linear(H, size, bias=bias)
        self.up_proj = Linear(H, size, bias=bias)
        self.down_proj = Linear(size, H, bias=bias)
        self.act_fn: nn.Module = nn.GELU(approximate="tanh") if is_gemma(config) else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward layer, each with a norm before it; Gemma has one after it too."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        H = config["hidden_size"]
        self.has_post_norms = is_gemma(config)
        self.is_sliding: bool = self.has_post_norms and config["layer_types"][layer] == "sliding_attention"
        self.self_attn, self.mlp = Attention(config, layer), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = norm(config, H), norm(config, H)
        if self.has_post_norms:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(config, H), norm(config, H)

    def forward(self, x_BTH: Tensor, seen: Seen, places_BK: Tensor | None = None) -> Tensor:
        """Of all places (B, T, H), or of some (B, K, H): keys and values are computed everywhere, the rest there."""
        change = self.self_attn(self.input_layernorm(x_BTH), seen, places_BK)
        if places_BK is not None:
            x_BTH = at_places(x_BTH, places_BK)
        if not self.has_post_norms:
            x_BTH = x_BTH + change
            return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
        x_BTH = x_BTH + self.post_attention_layernorm(change)
        return x_BTH + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTH)))

    def remember(self, x_BTH: Tensor, seen: Seen) -> None:
        """Keys and values join the cache, and nothing else is computed."""
        self.self_attn.remember(self.input_layernorm(x_BTH), seen)


class Body(nn.Module):
    """All of a language model but its head, under the names of its checkpoints. Input embeddings are not scaled."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList([Block(config, i) for i in range(config["num_hidden_layers"])])
        self.norm = norm(config, config["hidden_size"])
        self.frequencies: Tensor
        self.local_frequencies: Tensor  # of sliding layers
        D, theta = config["head_dim"], config["rope_theta"]
        self.register_buffer("frequencies", frequencies(D, theta, config.get("rope_scaling")), persistent=False)
        local = frequencies(D, config.get("rope_local_base_freq", theta), None)
        self.register_buffer("local_frequencies", local, persistent=False)

    def rotation(self, positions_BT: Tensor, dtype: torch.dtype, is_sliding: bool) -> tuple[Tensor, Tensor]:
        """Cosines and sines of both halves of a head (B, T, D); angles are float32."""
        angles = positions_BT[..., None].float() * (self.local_frequencies if is_sliding else self.frequencies)
        angles_BTD = torch.cat([angles, angles], dim=-1)
        return angles_BTD.cos().to(dtype), angles_BTD.sin().to(dtype)


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


def at_places(x_BTx: Tensor, places_BK: Tensor) -> Tensor:
    """The places of every row (B, K, x)."""
    return x_BTx.gather(1, places_BK[..., None].expand(-1, -1, x_BTx.shape[-1]))

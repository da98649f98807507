"""The blocks of a frozen language model: the forward over the parts of its layers (`layer_parts.py`).

The last block can be computed at some places only, and masks and rotations are made once for all layers.

Shape suffixes: B rows, T new tokens, S cached and new tokens, K places a row, H hidden, N heads, D head_dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_backend.layers import KVCache, attention


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


class Attention(nn.Module):
    """Attention with rotary positions and grouped heads."""

    def __init__(self, parts: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim: int = parts.head_dim
        self.scale: float = parts.scale
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = parts.q_proj, parts.k_proj, parts.v_proj, parts.o_proj
        self.q_norm: nn.Module | None = parts.q_norm
        self.k_norm: nn.Module | None = parts.k_norm

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


class Block(nn.Module):
    """Attention and feed-forward layer, each with a norm before it; Gemma has one after it too."""

    def __init__(self, parts: Any, layer: int) -> None:
        super().__init__()
        self.is_sliding: bool = getattr(parts.self_attn, "is_sliding", False)
        self.self_attn, self.mlp = Attention(parts.self_attn, layer), parts.mlp
        self.input_layernorm, self.post_attention_layernorm = parts.input_layernorm, parts.post_attention_layernorm
        self.has_post_norms = hasattr(parts, "pre_feedforward_layernorm")
        if self.has_post_norms:
            self.pre_feedforward_layernorm = parts.pre_feedforward_layernorm
            self.post_feedforward_layernorm = parts.post_feedforward_layernorm

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


def at_places(x_BTx: Tensor, places_BK: Tensor) -> Tensor:
    """The places of every row (B, K, x)."""
    return x_BTx.gather(1, places_BK[..., None].expand(-1, -1, x_BTx.shape[-1]))

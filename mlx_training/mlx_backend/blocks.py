"""The blocks of a frozen language model: the parts of mlx-lm's layers under a forward of our own.

The last block can be computed at some places only, and masks are made once for all layers.

Shape suffixes: B rows, T new tokens, S cached and new tokens, K places a row, H hidden, N heads, D head_dim.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_training.mlx_backend.layers import KVCache, attention


@dataclass(frozen=True)
class Seen:
    """Where new tokens stand, and what they may look at."""

    cache: KVCache
    offset: int | mx.array  # position of the first; an array has one a row, negative in the padding
    num_new: int
    mask: mx.array | str  # "causal", or boolean (B or 1, 1, T, S)

    def at(self, places_BK: mx.array) -> "Seen":
        """The same of queries at some places, which follow each other but for padding."""
        num_rows, num_places = places_BK.shape
        offset = places_BK[:, 0] + self.offset
        if isinstance(self.mask, str):
            num_before = self.cache.length  # "causal" is said of rows without padding only
            mask_B1KS = (mx.arange(num_before + self.num_new) <= num_before + places_BK[..., None])[:, None]
        else:
            mask_BTS = mx.broadcast_to(self.mask[:, 0], (num_rows, *self.mask.shape[2:]))
            mask_B1KS = at_places(mask_BTS, places_BK)[:, None]
        return Seen(self.cache, offset, num_places, mask_B1KS)


class Attention(nn.Module):
    """Attention with rotary positions and grouped heads."""

    def __init__(self, parts: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads: int = parts.n_heads
        self.num_kv_heads: int = parts.n_kv_heads
        self.scale: float = parts.scale
        self.rope = parts.rope
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = parts.q_proj, parts.k_proj, parts.v_proj, parts.o_proj
        if "q_norm" in parts:
            self.q_norm, self.k_norm = parts.q_norm, parts.k_norm

    def __call__(self, x_BTH: mx.array, seen: Seen, places_BK: mx.array | None = None) -> mx.array:
        """Of all places (B, T, H), or of some (B, K, H); their keys and values join the cache."""
        k_BNSD, v_BNSD = self.remember(x_BTH, seen)
        if places_BK is not None:
            x_BTH, seen = at_places(x_BTH, places_BK), seen.at(places_BK)
        q_BNTD = self._rotated(self._heads(self.q_proj, x_BTH, self.num_heads), "q_norm", seen)
        out_BNTD = attention(q_BNTD, k_BNSD, v_BNSD, seen.mask, self.scale)
        return self.o_proj(out_BNTD.swapaxes(1, 2).flatten(2))

    def remember(self, x_BTH: mx.array, seen: Seen) -> tuple[mx.array, mx.array]:
        """Keys and values so far (B, N, S, D); the new ones join the cache."""
        k_BNTD = self._rotated(self._heads(self.k_proj, x_BTH, self.num_kv_heads), "k_norm", seen)
        return seen.cache.append(self.layer, k_BNTD, self._heads(self.v_proj, x_BTH, self.num_kv_heads))

    def _heads(self, project: nn.Module, x_BTH: mx.array, num_heads: int) -> mx.array:
        return project(x_BTH).reshape(*x_BTH.shape[:2], num_heads, -1).swapaxes(1, 2)

    def _rotated(self, x_BNTD: mx.array, norm: str, seen: Seen) -> mx.array:
        return self.rope(self[norm](x_BNTD) if norm in self else x_BNTD, offset=seen.offset)


class Block(nn.Module):
    """Attention and feed-forward layer, each with a norm before it; Gemma has one after it too."""

    def __init__(self, parts: Any, layer: int) -> None:
        super().__init__()
        self.is_sliding: bool = getattr(parts.self_attn, "is_sliding", False)
        self.self_attn, self.mlp = Attention(parts.self_attn, layer), parts.mlp
        self.input_layernorm, self.post_attention_layernorm = parts.input_layernorm, parts.post_attention_layernorm
        self.has_post_norms = "pre_feedforward_layernorm" in parts
        if self.has_post_norms:
            self.pre_feedforward_layernorm = parts.pre_feedforward_layernorm
            self.post_feedforward_layernorm = parts.post_feedforward_layernorm

    def __call__(self, x_BTH: mx.array, seen: Seen, places_BK: mx.array | None = None) -> mx.array:
        """Of all places (B, T, H), or of some (B, K, H): keys and values are computed everywhere, the rest there."""
        if places_BK is not None:  # a layer that is computed again has gradients of all its arguments
            places_BK = mx.stop_gradient(places_BK)
        change = self.self_attn(self.input_layernorm(x_BTH), seen, places_BK)
        if places_BK is not None:
            x_BTH = at_places(x_BTH, places_BK)
        if not self.has_post_norms:
            x_BTH = x_BTH + change
            return x_BTH + self.mlp(self.post_attention_layernorm(x_BTH))
        x_BTH = x_BTH + self.post_attention_layernorm(change)
        return x_BTH + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTH)))

    def remember(self, x_BTH: mx.array, seen: Seen) -> None:
        """Keys and values join the cache, and nothing else is computed."""
        self.self_attn.remember(self.input_layernorm(x_BTH), seen)


def at_places(x_BTx: mx.array, places_BK: mx.array) -> mx.array:
    """The places of every row (B, K, x)."""
    return mx.take_along_axis(x_BTx, places_BK[..., None], axis=1)

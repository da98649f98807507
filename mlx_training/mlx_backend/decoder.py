"""Decoder: the MLX realisation of DecoderSpec, module names as in Hugging Face's LlamaForCausalLM.

Shape suffixes: B rows, L tokens, T new tokens, S keys, H hidden, N heads, K key/value heads, D head_dim.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_training.data.batch import Batch
from mlx_training.mlx_backend.layers import (
    ACTIVATIONS,
    NORMS,
    KVCache,
    LanguageModel,
    Linear,
    RMSNorm,
    alibi,
    attention,
    rotate,
)
from mlx_training.spec import DecoderSpec


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads; rotary positions where `angles` are given."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden_size, query, bias=spec.attention_bias)
        self.k_proj = Linear(spec.hidden_size, key, bias=spec.attention_bias)
        self.v_proj = Linear(spec.hidden_size, key, bias=spec.attention_bias)
        self.o_proj = Linear(query, spec.hidden_size, bias=spec.attention_bias)
        if spec.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(spec.head_dim, spec.norm_eps) for _ in range(2))

    def __call__(
        self, x_BLH: mx.array, angles: mx.array | None, mask: mx.array | str | None, cache: KVCache | None, layer: int
    ) -> mx.array:
        B, L, _ = x_BLH.shape
        q_BNLD = self.q_proj(x_BLH).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        k_BKLD = self.k_proj(x_BLH).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        v_BKLD = self.v_proj(x_BLH).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        if "q_norm" in self:
            q_BNLD, k_BKLD = self.q_norm(q_BNLD), self.k_norm(k_BKLD)
        if angles is not None:
            q_BNLD, k_BKLD = rotate(q_BNLD, angles), rotate(k_BKLD, angles)
        if cache is not None:
            k_BKLD, v_BKLD = cache.append(layer, k_BKLD, v_BKLD)
        out = attention(q_BNLD, k_BKLD, v_BKLD, mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), or up, activation, down."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        H, F_ = spec.hidden_size, spec.intermediate_size
        if spec.activation == "swiglu":
            self.gate_proj = Linear(H, F_, bias=spec.mlp_bias)
        else:
            self.activation = ACTIVATIONS[spec.activation]
        self.up_proj = Linear(H, F_, bias=spec.mlp_bias)
        self.down_proj = Linear(F_, H, bias=spec.mlp_bias)

    def __call__(self, x_BLH: mx.array) -> mx.array:
        up = self.up_proj(x_BLH)
        inner = nn.silu(self.gate_proj(x_BLH)) * up if "gate_proj" in self else self.activation(up)
        return self.down_proj(inner)


class DecoderLayer(nn.Module):
    """Pre-norm: x + f(norm(x)) for attention, then for the MLP. Post-norm: norm(x + f(x))."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        norm = NORMS[spec.norm]
        self.is_pre_norm = spec.norm_position == "pre"
        self.input_layernorm = norm(spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = norm(spec.hidden_size, spec.norm_eps)
        self.mlp = MLP(spec)
        self.dropout = nn.Dropout(spec.dropout)

    def __call__(
        self, x_BLH: mx.array, angles: mx.array | None, mask: mx.array | str | None, cache: KVCache | None, layer: int
    ) -> mx.array:
        if self.is_pre_norm:
            x_BLH = x_BLH + self.dropout(self.self_attn(self.input_layernorm(x_BLH), angles, mask, cache, layer))
            return x_BLH + self.dropout(self.mlp(self.post_attention_layernorm(x_BLH)))
        x_BLH = self.input_layernorm(x_BLH + self.dropout(self.self_attn(x_BLH, angles, mask, cache, layer)))
        return self.post_attention_layernorm(x_BLH + self.dropout(self.mlp(x_BLH)))


class Body(nn.Module):
    """Embeddings, layers and final norm ("model" in Hugging Face's names)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.positions == "learned":
            self.embed_positions = nn.Embedding(spec.context_length, spec.hidden_size)
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = [DecoderLayer(spec) for _ in range(spec.num_layers)]
        self.norm = NORMS[spec.norm](spec.hidden_size, spec.norm_eps) if spec.norm_position == "pre" else nn.Identity()


class Decoder(LanguageModel):
    """A GPT- or Llama-shaped language model, trainable from scratch."""

    def __init__(self, spec: DecoderSpec, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.model = Body(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self._frequencies = mx.array(spec.rope_frequencies())  # underscore: not a parameter
        self._slopes = mx.array(spec.alibi_slopes())

    @property
    def lm(self) -> "Decoder":
        """The language model that a session drives: this one."""
        return self

    def inputs(self, batch: Batch) -> mx.array:
        return self.embed(batch.tokens)

    def embed(self, tokens_BL: mx.array) -> mx.array:
        """Token embeddings (B, L, H) in the compute type."""
        return self.model.embed_tokens(tokens_BL).astype(self.dtype)

    def hidden(self, x_BLH: mx.array) -> mx.array:
        positions = mx.arange(x_BLH.shape[1])[None]
        return self._run(x_BLH, positions, "causal", None)

    def head(self, h: mx.array) -> mx.array:
        weight = self.model.embed_tokens.weight if self.spec.tie_word_embeddings else self.lm_head.weight
        logits = (h @ weight.astype(h.dtype).T).astype(mx.float32)
        cap = self.spec.logit_softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def make_cache(self, left_padding: Sequence[int]) -> KVCache:
        """An empty cache for rows with this much padding on the left."""
        return KVCache(self.spec.num_layers, left_padding)

    def extend(self, x_BTH: mx.array, cache: KVCache) -> mx.array:
        """Hidden states (B, T, H) of new tokens after those in the cache, which grows."""
        num_new = x_BTH.shape[1]
        h = self._run(x_BTH, cache.positions(num_new), cache.mask(num_new), cache)
        cache.length += num_new
        return h

    def select(self, cache: KVCache, rows: Sequence[int]) -> KVCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

    def _run(self, x_BLH: mx.array, positions_BL: mx.array, mask: mx.array | str, cache: KVCache | None) -> mx.array:
        angles, num_new = None, x_BLH.shape[1]
        match self.spec.positions:
            case "rope":
                angles = positions_BL[..., None].astype(mx.float32) * self._frequencies
            case "learned":
                x_BLH = x_BLH + self.model.embed_positions(positions_BL).astype(x_BLH.dtype)
            case "alibi":
                mask = alibi(mask, self._slopes, num_new, num_new + (cache.length if cache else 0)).astype(x_BLH.dtype)
        x_BLH = self.model.dropout(x_BLH)
        for i, layer in enumerate(self.model.layers):
            x_BLH = layer(x_BLH, angles, mask, cache, i)
        return self.model.norm(x_BLH)

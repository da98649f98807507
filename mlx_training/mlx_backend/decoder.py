"""Decoder: the MLX realisation of DecoderSpec, module names as in Hugging Face's LlamaForCausalLM.

Shape suffixes: B rows, L tokens, T new tokens, S keys, H hidden, N heads, K key/value heads, D head_dim, J sinks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_training.data.batch import Batch
from mlx_training.mlx_backend.dropout import Dropout
from mlx_training.mlx_backend.experts import Experts
from mlx_training.mlx_backend.layers import (
    ACTIVATIONS,
    NORMS,
    KVCache,
    LanguageModel,
    Linear,
    RMSNorm,
    alibi,
    rotate,
)
from mlx_training.mlx_backend.mixers import attend, mix
from mlx_training.mlx_backend.sparsek import sparsek, sparsek_cached
from mlx_training.spec import DecoderSpec
from mlx_training.spec.mixers import visible


@dataclass
class Places:
    """Where the tokens of one forward pass stand, and what they may look at."""

    angles_BLD: mx.array | None = None  # of rotary positions, for every width of head
    mask: mx.array | None = None  # in the place of the mixers: boolean, or ALiBi to be added
    segments_BL: mx.array | None = None
    real_BL: mx.array | None = None  # False in the padding
    cache: KVCache | None = None
    masks: dict[str, mx.array] | None = None  # of each mixer, where there is a cache


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, whose mixer says how far it looks.

    Sinks are learned keys and values that every query sees at the same distance: no position turns them.
    """

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.spec, self.layer, self.mixer, self.head_dim = spec, layer, spec.mixer(layer), spec.head_dim
        self.rotary = spec.rope_slice(layer)
        query, key = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden_size, query, bias=spec.attention_bias)
        self.k_proj = Linear(spec.hidden_size, key, bias=spec.attention_bias)
        self.v_proj = Linear(spec.hidden_size, key, bias=spec.attention_bias)
        self.o_proj = Linear(query, spec.hidden_size, bias=spec.attention_bias)
        if self.mixer == "sparsek":
            self.score_proj = Linear(spec.hidden_size, spec.num_kv_heads, bias=False)
        if spec.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(spec.head_dim, spec.norm_eps) for _ in range(2))
        if spec.num_sinks:
            self.sink_k = mx.zeros((spec.num_kv_heads, spec.num_sinks, spec.head_dim))
            self.sink_v = mx.zeros((spec.num_kv_heads, spec.num_sinks, spec.head_dim))

    def __call__(self, x_BLH: mx.array, places: Places) -> mx.array:
        B, L, _ = x_BLH.shape
        q_BNLD = self.q_proj(x_BLH).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        k_BKLD = self.k_proj(x_BLH).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        v_BKLD = self.v_proj(x_BLH).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        if self.spec.qk_norm:
            q_BNLD, k_BKLD = self.q_norm(q_BNLD), self.k_norm(k_BKLD)
        plain_BNLD = q_BNLD
        if places.angles_BLD is not None:
            angles_BLD = places.angles_BLD[..., self.rotary]
            q_BNLD, k_BKLD = rotate(q_BNLD, angles_BLD), rotate(k_BKLD, angles_BLD)
        scores_BKL = self.score_proj(x_BLH).swapaxes(1, 2) if self.mixer == "sparsek" else None
        if places.cache is not None:
            if scores_BKL is not None:  # kept as one more column of the keys
                k_BKLD = mx.concatenate([k_BKLD, scores_BKL[..., None]], axis=-1)
            k_BKLD, v_BKLD = places.cache.append(self.layer, k_BKLD, v_BKLD)
            if scores_BKL is not None:
                k_BKLD, scores_BKL = k_BKLD[..., :-1], k_BKLD[..., -1]
        sinks = (self.sink_k, self.sink_v) if self.spec.num_sinks else None
        if sinks and places.angles_BLD is not None:  # the unrotated query beside the rotated one, for the sinks alone
            q_BNLD = mx.concatenate([q_BNLD, plain_BNLD], axis=-1)
            k_BKLD = mx.concatenate([k_BKLD, mx.zeros_like(k_BKLD)], axis=-1)
            sinks = (mx.concatenate([mx.zeros_like(sinks[0]), sinks[0]], axis=-1), sinks[1])
        scale = self.head_dim**-0.5
        if scores_BKL is not None and places.masks is not None:
            mask = places.masks[self.mixer]
            out = sparsek_cached(q_BNLD, k_BKLD, v_BKLD, scores_BKL, self.spec, mask, scale, sinks)
        elif scores_BKL is not None:
            out = sparsek(q_BNLD, k_BKLD, v_BKLD, scores_BKL, self.spec, places.segments_BL, scale, sinks)
        elif places.mask is not None:
            out = attend(q_BNLD, k_BKLD, v_BKLD, places.mask, scale, sinks)
        elif places.masks is not None:
            out = attend(q_BNLD, k_BKLD, v_BKLD, places.masks[self.mixer], scale, sinks)
        else:
            out = mix(self.mixer, self.spec, q_BNLD, k_BKLD, v_BKLD, places.segments_BL, scale, sinks)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), or up, activation, down."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        H, width = spec.hidden_size, spec.intermediate_size
        if spec.activation == "swiglu":
            self.gate_proj = Linear(H, width, bias=spec.mlp_bias)
        else:
            self.activation = ACTIVATIONS[spec.activation]
        self.up_proj = Linear(H, width, bias=spec.mlp_bias)
        self.down_proj = Linear(width, H, bias=spec.mlp_bias)

    def __call__(self, x_BLH: mx.array) -> mx.array:
        up = self.up_proj(x_BLH)
        inner = nn.silu(self.gate_proj(x_BLH)) * up if "gate_proj" in self else self.activation(up)
        return self.down_proj(inner)


class DecoderLayer(nn.Module):
    """Pre-norm: x + f(norm(x)) for attention, then for the MLP. Post-norm: norm(x + f(x)).

    In a U-Net what enters is brought to the layer's width, and the output of the layer across the U is added.
    """

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        norm, before = NORMS[spec.norm], spec.of_layer(max(layer - 1, 0)).hidden_size
        spec = spec.of_layer(layer)
        if before != spec.hidden_size:
            self.resize = Linear(before, spec.hidden_size, bias=False)
        self.is_pre_norm = spec.norm_position == "pre"
        self.input_layernorm = norm(spec.hidden_size, spec.norm_eps)
        self.self_attn = Attention(spec, layer)
        self.post_attention_layernorm = norm(spec.hidden_size, spec.norm_eps)
        self.mlp = Experts(spec) if spec.experts else MLP(spec)
        self.dropout = Dropout(spec.dropout)

    def __call__(self, x_BLH: mx.array, places: Places, skip_BLH: mx.array | None = None) -> mx.array:
        x_BLH = self.resize(x_BLH) if "resize" in self else x_BLH
        x_BLH = x_BLH if skip_BLH is None else x_BLH + skip_BLH
        if self.is_pre_norm:
            x_BLH = x_BLH + self.dropout(self.self_attn(self.input_layernorm(x_BLH), places))
            return x_BLH + self.dropout(self._mlp(self.post_attention_layernorm(x_BLH), places))
        x_BLH = self.input_layernorm(x_BLH + self.dropout(self.self_attn(x_BLH, places)))
        return self.post_attention_layernorm(x_BLH + self.dropout(self._mlp(x_BLH, places)))

    def _mlp(self, x_BLH: mx.array, places: Places) -> mx.array:
        return self.mlp(x_BLH, places.real_BL) if isinstance(self.mlp, Experts) else self.mlp(x_BLH)


class Body(nn.Module):
    """Embeddings, layers and final norm ("model" in Hugging Face's names)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.positions == "learned":
            self.embed_positions = nn.Embedding(spec.context_length, spec.hidden_size)
        self.dropout = Dropout(spec.dropout)
        self.layers = [DecoderLayer(spec, i) for i in range(spec.num_layers)]
        self.norm = NORMS[spec.norm](spec.hidden_size, spec.norm_eps) if spec.norm_position == "pre" else nn.Identity()


class Decoder(LanguageModel):
    """A GPT- or Llama-shaped language model, trainable from scratch."""

    def __init__(self, spec: DecoderSpec, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.model = Body(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self._frequencies = mx.array(spec.rope_frequencies())  # underscore: not a parameter
        self._slopes = mx.array(spec.alibi_slopes())
        self._summaries = mx.array(spec.fixed.summaries(spec.num_heads))

    @property
    def lm(self) -> "Decoder":
        """The language model that a session drives: this one."""
        return self

    def inputs(self, batch: Batch) -> mx.array:
        return self.embed(batch.tokens)

    def embed(self, tokens_BL: mx.array) -> mx.array:
        """Token embeddings (B, L, H) in the compute type."""
        return self.model.embed_tokens(tokens_BL).astype(self.dtype)

    def hidden(self, x_BLH: mx.array, batch: Batch | None = None) -> mx.array:
        place_L = mx.arange(x_BLH.shape[1])
        positions_BL, places = place_L[None], Places()
        if batch is not None and batch.segments is not None:
            places.segments_BL = batch.segments
            positions_BL = place_L[None] - _starts(batch.segments)
        elif batch is not None and not self.spec.is_causal:  # padding is a document that nobody sees
            places.segments_BL = place_L[None] >= batch.lengths[:, None]
        if batch is not None and self.spec.experts:
            places.real_BL = place_L[None] < batch.lengths[:, None]
        if self.spec.positions == "alibi":
            seen = "causal" if places.segments_BL is None else _same_document(places.segments_BL)
            places.mask = alibi(seen, self._slopes, place_L.size, place_L.size)
        return self._run(x_BLH, positions_BL, places)

    @property
    def head_layer(self) -> nn.Module:
        return self.model.embed_tokens if self.spec.tie_word_embeddings else self.lm_head

    def head(self, h: mx.array) -> mx.array:
        logits = super().head(h) if self.spec.tie_word_embeddings else self.lm_head(h).astype(mx.float32)
        cap = self.spec.logit_softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def aux_loss(self) -> mx.array | float:
        """The experts' balancing loss of the last forward pass, mean over layers, times its weight."""
        assert self.spec.experts is not None
        balances = [layer.mlp.balance for layer in self.model.layers]
        return self.spec.experts.balance * sum(balances) / len(balances)

    def make_cache(self, left_padding: Sequence[int]) -> KVCache:
        """An empty cache for rows with this much padding on the left."""
        return KVCache(self.spec.num_layers, left_padding)

    def extend(self, x_BTH: mx.array, cache: KVCache) -> mx.array:
        """Hidden states (B, T, H) of new tokens after those in the cache, which grows."""
        num_new = x_BTH.shape[1]
        positions_BT, mask = cache.positions(num_new), cache.mask(num_new)
        places = Places(cache=cache)
        if self.spec.positions == "alibi":
            places.mask = alibi(mask, self._slopes, num_new, mask.shape[-1])
        else:
            q, k = positions_BT[:, None, :, None], cache.positions(num_new, of_keys=True)[:, None, None]
            spec = self.spec
            patterns = {"window": spec.window, "stride": spec.stride, "fixed": spec.fixed, "summaries": self._summaries}
            places.masks = {mixer: mask & visible(mixer, q, k, **patterns) for mixer in set(spec.mixers)}
        h_BTH = self._run(x_BTH, positions_BT, places)
        cache.length += num_new
        return h_BTH

    def select(self, cache: KVCache, rows: Sequence[int]) -> KVCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

    def _run(self, x_BLH: mx.array, positions_BL: mx.array, places: Places) -> mx.array:
        if self.spec.positions == "rope":
            places.angles_BLD = positions_BL[..., None].astype(mx.float32) * self._frequencies
        elif self.spec.positions == "learned":
            known_BL = mx.minimum(positions_BL, self.spec.context_length - 1)  # padding may go beyond
            x_BLH = x_BLH + self.model.embed_positions(known_BL).astype(x_BLH.dtype)
        x_BLH = self.model.dropout(x_BLH)
        outputs: list[mx.array] = []
        for i, layer in enumerate(self.model.layers):
            across = self.spec.skip_from(i)
            x_BLH = self.run_layer(layer, x_BLH, places, *([] if across is None else [outputs[across]]))
            if self.spec.widths:
                outputs.append(x_BLH)
        return self.model.norm(x_BLH)


def _starts(segments_BL: mx.array) -> mx.array:
    """Where the document of every place begins (B, L)."""
    starts = mx.pad(segments_BL[:, 1:] != segments_BL[:, :-1], [(0, 0), (1, 0)])
    places = mx.arange(segments_BL.shape[1])[None]
    return mx.cummax(mx.where(starts, places, 0), axis=1)


def _same_document(segments_BL: mx.array) -> mx.array:
    """Who may look where, boolean (B, 1, L, L): the past of the same document."""
    same = segments_BL[:, None, :, None] == segments_BL[:, None, None]
    place_L = mx.arange(segments_BL.shape[1])
    return same & (place_L <= place_L[:, None])

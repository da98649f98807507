"""Decoder: the PyTorch realisation of DecoderSpec, module names as in Hugging Face's LlamaForCausalLM.

Shape suffixes: B rows, L tokens, T new tokens, S keys, H hidden, N heads, K key/value heads, D head_dim, J sinks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_training.data.batch import Batch
from mlx_training.spec import DecoderSpec
from mlx_training.spec.mixers import visible
from torch_backend.experts import Experts
from torch_backend.layers import ACTIVATIONS, NORMS, KVCache, LanguageModel, Linear, RMSNorm, alibi, rotate
from torch_backend.mixers import attend, mix
from torch_backend.sparsek import sparsek, sparsek_cached


@dataclass
class Places:
    """Where the tokens of one forward pass stand, and what they may look at."""

    angles_BLD: Tensor | None = None  # of rotary positions, for every width of head
    mask: Tensor | None = None  # in the place of the mixers: boolean, or ALiBi to be added
    segments_BL: Tensor | None = None
    real_BL: Tensor | None = None  # False in the padding
    cache: KVCache | None = None
    masks: dict[str, Tensor] | None = None  # of each mixer, where there is a cache


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
            self.sink_k = nn.Parameter(torch.zeros(spec.num_kv_heads, spec.num_sinks, spec.head_dim))
            self.sink_v = nn.Parameter(torch.zeros(spec.num_kv_heads, spec.num_sinks, spec.head_dim))

    def forward(self, x_BLH: Tensor, places: Places) -> Tensor:
        B, L, _ = x_BLH.shape
        q_BNLD = self.q_proj(x_BLH).view(B, L, -1, self.head_dim).transpose(1, 2)
        k_BKLD = self.k_proj(x_BLH).view(B, L, -1, self.head_dim).transpose(1, 2)
        v_BKLD = self.v_proj(x_BLH).view(B, L, -1, self.head_dim).transpose(1, 2)
        if self.spec.qk_norm:
            q_BNLD, k_BKLD = self.q_norm(q_BNLD), self.k_norm(k_BKLD)
        plain_BNLD = q_BNLD
        if places.angles_BLD is not None:
            angles_BLD = places.angles_BLD[..., self.rotary]
            q_BNLD, k_BKLD = rotate(q_BNLD, angles_BLD), rotate(k_BKLD, angles_BLD)
        scores_BKL = self.score_proj(x_BLH).transpose(1, 2) if self.mixer == "sparsek" else None
        if places.cache is not None:
            if scores_BKL is not None:  # kept as one more column of the keys
                k_BKLD = torch.cat([k_BKLD, scores_BKL[..., None]], dim=-1)
            k_BKLD, v_BKLD = places.cache.append(self.layer, k_BKLD, v_BKLD)
            if scores_BKL is not None:
                k_BKLD, scores_BKL = k_BKLD[..., :-1], k_BKLD[..., -1]
        sinks = (self.sink_k, self.sink_v) if self.spec.num_sinks else None
        if sinks and places.angles_BLD is not None:  # the unrotated query beside the rotated one, for the sinks alone
            q_BNLD = torch.cat([q_BNLD, plain_BNLD], dim=-1)
            k_BKLD = torch.cat([k_BKLD, torch.zeros_like(k_BKLD)], dim=-1)
            sinks = (torch.cat([torch.zeros_like(sinks[0]), sinks[0]], dim=-1), sinks[1])
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
        return self.o_proj(out.transpose(1, 2).reshape(B, L, -1))


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

    def forward(self, x_BLH: Tensor) -> Tensor:
        up = self.up_proj(x_BLH)
        inner = F.silu(self.gate_proj(x_BLH)) * up if hasattr(self, "gate_proj") else self.activation(up)
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
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_BLH: Tensor, places: Places, skip_BLH: Tensor | None = None) -> Tensor:
        x_BLH = self.resize(x_BLH) if hasattr(self, "resize") else x_BLH
        x_BLH = x_BLH if skip_BLH is None else x_BLH + skip_BLH
        if self.is_pre_norm:
            x_BLH = x_BLH + self.dropout(self.self_attn(self.input_layernorm(x_BLH), places))
            return x_BLH + self.dropout(self._mlp(self.post_attention_layernorm(x_BLH), places))
        x_BLH = self.input_layernorm(x_BLH + self.dropout(self.self_attn(x_BLH, places)))
        return self.post_attention_layernorm(x_BLH + self.dropout(self._mlp(x_BLH, places)))

    def _mlp(self, x_BLH: Tensor, places: Places) -> Tensor:
        return self.mlp(x_BLH, places.real_BL) if isinstance(self.mlp, Experts) else self.mlp(x_BLH)


class Body(nn.Module):
    """Embeddings, layers and final norm ("model" in Hugging Face's names)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        if spec.positions == "learned":
            self.embed_positions = nn.Embedding(spec.context_length, spec.hidden_size)
        self.dropout = nn.Dropout(spec.dropout)
        self.layers = nn.ModuleList([DecoderLayer(spec, i) for i in range(spec.num_layers)])
        self.norm = NORMS[spec.norm](spec.hidden_size, spec.norm_eps) if spec.norm_position == "pre" else nn.Identity()


class Decoder(LanguageModel):
    """A GPT- or Llama-shaped language model, trainable from scratch."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.model = Body(spec)
        if not spec.tie_word_embeddings:
            self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.register_buffer("frequencies", torch.from_numpy(spec.rope_frequencies()), persistent=False)
        self.register_buffer("slopes", torch.from_numpy(spec.alibi_slopes()), persistent=False)
        self.register_buffer("summaries", torch.from_numpy(spec.fixed.summaries(spec.num_heads)), persistent=False)

    @property
    def lm(self) -> "Decoder":
        """The language model that a session drives: this one."""
        return self

    def inputs(self, batch: Batch) -> Tensor:
        return self.embed(batch.tokens)

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Token embeddings (B, L, H) in the compute type."""
        return self.model.embed_tokens(tokens_BL).to(self.dtype)

    def hidden(self, x_BLH: Tensor, batch: Batch | None = None) -> Tensor:
        place_L = torch.arange(x_BLH.shape[1], device=x_BLH.device)
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
            places.mask = alibi(seen, self.slopes, len(place_L), len(place_L))
        return self._run(x_BLH, positions_BL, places)

    @property
    def head_layer(self) -> nn.Module:
        return self.model.embed_tokens if self.spec.tie_word_embeddings else self.lm_head

    def head(self, h: Tensor) -> Tensor:
        logits = super().head(h) if self.spec.tie_word_embeddings else self.lm_head(h).float()
        cap = self.spec.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def aux_loss(self) -> Tensor | float:
        """The experts' balancing loss of the last forward pass, mean over layers, times its weight."""
        assert self.spec.experts is not None
        balances = [layer.mlp.balance for layer in self.model.layers]
        return self.spec.experts.balance * sum(balances) / len(balances)

    def make_cache(self, left_padding: Sequence[int]) -> KVCache:
        """An empty cache for rows with this much padding on the left."""
        return KVCache(self.spec.num_layers, left_padding)

    def extend(self, x_BTH: Tensor, cache: KVCache) -> Tensor:
        """Hidden states (B, T, H) of new tokens after those in the cache, which grows."""
        num_new, device = x_BTH.shape[1], x_BTH.device
        positions_BT, mask = cache.positions(num_new).to(device), cache.mask(num_new).to(device)
        places = Places(cache=cache)
        if self.spec.positions == "alibi":
            places.mask = alibi(mask, self.slopes, num_new, mask.shape[-1])
        else:
            q, k = positions_BT[:, None, :, None], cache.positions(num_new, of_keys=True).to(device)[:, None, None]
            spec = self.spec
            patterns = {"window": spec.window, "stride": spec.stride, "fixed": spec.fixed, "summaries": self.summaries}
            places.masks = {mixer: mask & visible(mixer, q, k, **patterns) for mixer in set(spec.mixers)}
        h_BTH = self._run(x_BTH, positions_BT, places)
        cache.length += num_new
        return h_BTH

    def select(self, cache: KVCache, rows: Sequence[int]) -> KVCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

    def _run(self, x_BLH: Tensor, positions_BL: Tensor, places: Places) -> Tensor:
        if self.spec.positions == "rope":
            places.angles_BLD = positions_BL[..., None].float() * self.frequencies
        elif self.spec.positions == "learned":
            known_BL = positions_BL.clamp(max=self.spec.context_length - 1)  # padding may go beyond
            x_BLH = x_BLH + self.model.embed_positions(known_BL).to(x_BLH.dtype)
        x_BLH = self.model.dropout(x_BLH)
        outputs: list[Tensor] = []
        for i, layer in enumerate(self.model.layers):
            across = self.spec.skip_from(i)
            x_BLH = self.run_layer(layer, x_BLH, places, *([] if across is None else [outputs[across]]))
            if self.spec.widths:
                outputs.append(x_BLH)
        return self.model.norm(x_BLH)


def _starts(segments_BL: Tensor) -> Tensor:
    """Where the document of every place begins (B, L)."""
    starts = F.pad(segments_BL[:, 1:] != segments_BL[:, :-1], (1, 0))
    places = torch.arange(segments_BL.shape[1], device=segments_BL.device)[None]
    return torch.where(starts, places, 0).cummax(1).values


def _same_document(segments_BL: Tensor) -> Tensor:
    """Who may look where, boolean (B, 1, L, L): the past of the same document."""
    same = segments_BL[:, None, :, None] == segments_BL[:, None, None]
    place_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    return same & (place_L <= place_L[:, None])

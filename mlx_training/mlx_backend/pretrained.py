"""Frozen pretrained language models: mlx-lm's model classes, driven by input embeddings.

Shape suffixes: B rows, L tokens, T new tokens, S cached tokens, H hidden, K key/value heads, D head_dim, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_training.backend import Runtime
from mlx_training.data.batch import Batch
from mlx_training.data.collate import common_prefix
from mlx_training.mlx_backend.blocks import Seen, at_places
from mlx_training.mlx_backend.decoder import Decoder
from mlx_training.mlx_backend.layer_parts import build_causal_lm
from mlx_training.mlx_backend.layers import KVCache, LanguageModel
from mlx_training.spec import PretrainedSpec

NUM_KEPT = 4  # beginnings that rows share
Run = Callable[..., mx.array]  # (layer, its arguments) -> its output


def run_at_once(layer: nn.Module, *args: Any) -> mx.array:
    """The layer's output."""
    return layer(*args)


class PretrainedLM(nn.Module):
    """A frozen causal LM. Its parameters carry the checkpoint's own names (`model.…`, `lm_head.…`)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.hidden_size: int = config["hidden_size"]
        self.vocab_size: int = config["vocab_size"]
        self.num_layers: int = config["num_hidden_layers"]
        self.softcap: float | None = config.get("final_logit_softcapping")
        self.embed_scale = 1.0
        self.sliding_window: int | None = config["sliding_window"]
        causal_lm = build_causal_lm(config)
        self.model = causal_lm.model
        if not config["tie_word_embeddings"]:
            self.lm_head = causal_lm.lm_head
        if config["model_type"].startswith("gemma"):
            self.embed_scale = self.hidden_size**0.5  # mlx-lm's own body rounds it to bfloat16

    def embed(self, tokens_BL: mx.array) -> mx.array:
        """Input embeddings (B, L, H), exactly what `hidden` expects (Gemma's scale is applied)."""
        x_BLH = self.model.embed_tokens(tokens_BL)
        return x_BLH if self.embed_scale == 1.0 else x_BLH * mx.array(self.embed_scale, x_BLH.dtype)

    def hidden(
        self, x_BLH: mx.array, places_BK: mx.array | None = None, past: mx.array | None = None, run: Run = run_at_once
    ) -> mx.array:
        """Final hidden states (B, L, H), or those of some places (B, K, H).

        Rows are padded at the end only, so a causal model needs no mask. `past` stands before x; see `cache_after`.
        `run` calls a layer, perhaps a second time in the backward pass.
        """
        cache = self.cache_after(past, x_BLH.shape[0])
        cache.keeps = False
        return self.extend(x_BLH, cache, places_BK, run)

    @property
    def head_layer(self) -> nn.Module:
        """The layer whose matrix makes the logits."""
        return self.lm_head if "lm_head" in self else self.model.embed_tokens

    def head(self, h: mx.array) -> mx.array:
        """Logits (..., V), float32."""
        project = self.lm_head if "lm_head" in self else self.model.embed_tokens.as_linear
        logits = project(h).astype(mx.float32)
        return logits if self.softcap is None else mx.tanh(logits / self.softcap) * self.softcap

    def make_cache(self, left_padding: Sequence[int]) -> KVCache:
        """An empty cache for rows with this much padding on the left."""
        return KVCache(self.num_layers, left_padding)

    def cache_after(self, past: mx.array | None, num_rows: int) -> KVCache:
        """A cache of rows without padding; it begins with `past` (2, layers, B or 1, K, S, D), if there is one."""
        return self.make_cache([0] * num_rows) if past is None else KVCache.after(past, num_rows)

    def extend(
        self, x_BTH: mx.array, cache: KVCache, places_BK: mx.array | None = None, run: Run = run_at_once
    ) -> mx.array:
        """Hidden states of new tokens (B, T, H), or of some of them (B, K, H), after those in the cache; it grows."""
        x_BTH, seen = self._before_last(x_BTH, cache, run)
        x_BTH = run(self.model.layers[-1], x_BTH, seen, places_BK)
        cache.grow(seen.num_new)
        return self.model.norm(x_BTH)

    def remember(self, x_BTH: mx.array, cache: KVCache) -> None:
        """Keys and values of new tokens join the cache; no hidden states of the last layer are computed."""
        x_BTH, seen = self._before_last(x_BTH, cache)
        self.model.layers[-1].remember(x_BTH, seen)
        cache.grow(seen.num_new)

    def select(self, cache: KVCache, rows: Sequence[int]) -> KVCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

    def _before_last(self, x_BTH: mx.array, cache: KVCache, run: Run = run_at_once) -> tuple[mx.array, Seen]:
        """What the last layer reads (B, T, H), and what it may look at."""
        layers = self.model.layers
        seen = {kind: self._seen(x_BTH.shape[1], cache, kind) for kind in {layer.is_sliding for layer in layers}}
        for layer in layers[:-1]:
            x_BTH = run(layer, x_BTH, seen[layer.is_sliding])
        return x_BTH, seen[layers[-1].is_sliding]

    def _seen(self, num_new: int, cache: KVCache, is_sliding: bool) -> Seen:
        offset = cache.length - cache.left_padding if cache.is_padded else cache.length
        window = self.sliding_window if is_sliding else None
        total = cache.length + num_new
        if not cache.is_padded and total <= (window or total):
            return Seen(cache, offset, num_new, "causal")  # MLX aligns it with the last key
        seen_B1TS = cache.mask(num_new)
        if window is not None:
            queries, keys = mx.arange(cache.length, cache.length + num_new), mx.arange(seen_B1TS.shape[-1])
            seen_B1TS = seen_B1TS & (queries[:, None] - keys < window)
        return Seen(cache, offset, num_new, seen_B1TS)


class PretrainedModel(LanguageModel):
    """A frozen LM on text, with what is trained on it."""

    def __init__(self, spec: PretrainedSpec, lm: PretrainedLM | Decoder, runtime: Runtime) -> None:
        super().__init__()
        self.lm = lm
        whole = spec.adapter or spec.llm.decoder  # adapters train everywhere; a decoder has no such levers
        self.frozen_prefix = "off" if whole else runtime.frozen_prefix
        self.trim_last_layer = runtime.trim_last_layer
        if isinstance(lm, Decoder):
            lm.gradient_checkpointing = runtime.gradient_checkpointing
        self.drops_out = spec.adapter is not None and spec.adapter.dropout > 0
        self._kept: dict[bytes, mx.array] = {}  # tokens that all rows of a batch began with -> their `past`

    def inputs(self, batch: Batch) -> mx.array:
        return self.lm.embed(batch.tokens)

    def hidden(self, x_BLH: mx.array, batch: Batch | None = None) -> mx.array:
        if isinstance(self.lm, Decoder):
            return self.lm.hidden(x_BLH, batch)
        assert batch is None or batch.segments is None, "a frozen pretrained LM cannot keep documents apart"
        return self.lm.hidden(x_BLH, run=self._run)

    def past(self, batch: Batch) -> mx.array | None:
        if not batch.prefix or self.frozen_prefix == "off":
            return None
        tokens = batch.tokens[:, : batch.prefix]
        common = self._kept_past(tokens) if self.frozen_prefix == "reuse" else None
        return common if common is not None and common.shape[-2] == batch.prefix else self._read(tokens, common)

    def shared_past(self, batch: Batch) -> mx.array | None:
        if len(batch.tokens) == 1 or self.frozen_prefix != "reuse":
            return None
        return self._kept_past(batch.tokens[:, : batch.prefix])

    def _kept_past(self, tokens: np.ndarray) -> mx.array | None:
        """`past` of what rows (B, N) begin with alike, for one row; a function of those tokens to the bit, so that a
        resumed run finds the same.
        """
        first = tokens[:1, : common_prefix(tokens)]
        if not first.size:
            return None
        key = first.tobytes()
        if key not in self._kept:
            self._kept = {k: self._kept[k] for k in list(self._kept)[1 - NUM_KEPT :]} | {key: self._read(first, None)}
        return self._kept[key]

    def _read(self, tokens: np.ndarray, past: mx.array | None) -> mx.array:
        """Keys and values of tokens (B, N), whose first ones may be known."""
        cache = self.lm.cache_after(past, len(tokens))
        new = mx.array(tokens[:, cache.length :])
        self.lm.remember(self.lm.embed(new), cache)
        known = [x[:, :, : cache.length] for x in (*cache.keys, *cache.values) if x is not None]  # without the room
        return mx.unflatten(mx.stack(known), 0, (2, -1))

    def label_hidden(self, batch: Batch) -> mx.array:
        """Final hidden states at the label places (B, K, H); what stands before the series and at no label is
        computed where it must be.
        """
        if isinstance(self.lm, Decoder):
            return super().label_hidden(batch)
        x_BLH, places_BK = self.inputs(batch), batch.positions
        if batch.past is not None:
            num_read = batch.past.shape[-2]
            x_BLH, places_BK = x_BLH[:, num_read:], mx.maximum(places_BK - num_read, 0)
        if places_BK is not None and self.trim_last_layer:
            return self.lm.hidden(x_BLH, places_BK, batch.past, self._run)
        h = self.lm.hidden(x_BLH, past=batch.past, run=self._run)
        return h if places_BK is None else at_places(h, places_BK)

    def read(self, batch: Batch) -> tuple[mx.array, Any]:
        """As in training, so that no padding need be masked; then keys and values are moved to the right."""
        if isinstance(self.lm, Decoder):
            return super().read(batch)
        x_BLH, lengths_B = self.inputs(batch), batch.lengths
        cache = self.lm.cache_after(batch.past, lengths_B.size)
        num_read = cache.length
        h_B1H = self.lm.extend(x_BLH[:, num_read:], cache, lengths_B[:, None] - 1 - num_read)
        return h_B1H[:, 0], cache.moved_right(lengths_B.tolist())

    @property
    def _run(self) -> Run:
        return self.run_layer if self.gradient_checkpointing or self.drops_out else run_at_once

    @property
    def head_layer(self) -> nn.Module:
        return self.lm.head_layer

    def head(self, h: mx.array) -> mx.array:
        return self.lm.head(h)

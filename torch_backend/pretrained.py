"""Frozen pretrained language models, driven by input embeddings.

Shape suffixes: B rows, L tokens, T new tokens, S cached tokens, H hidden, K key/value heads, D head_dim, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_training.backend import Runtime
from mlx_training.data.batch import Batch
from mlx_training.data.collate import common_prefix
from mlx_training.spec import PretrainedSpec
from torch_backend.adapter import AdaptedLinear
from torch_backend.blocks import Seen, at_places
from torch_backend.decoder import Decoder
from torch_backend.layer_parts import Body, Linear, is_gemma
from torch_backend.layers import KVCache, LanguageModel

NUM_KEPT = 4  # beginnings that rows share
Run = Callable[..., Tensor]  # (layer, its arguments) -> its output


def run_at_once(layer: nn.Module, *args: Any) -> Tensor:
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
        with torch.device("meta"):  # parameters take no memory and no initial values
            self.model = Body(config)
            if not config["tie_word_embeddings"]:
                self.lm_head = Linear(self.hidden_size, self.vocab_size, bias=False)
        if is_gemma(config):
            self.embed_scale = self.hidden_size**0.5

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Input embeddings (B, L, H), exactly what `hidden` expects (Gemma's scale is applied)."""
        x_BLH = self.model.embed_tokens(tokens_BL).to(self.model.norm.weight.dtype)  # packed rows come in float32
        return x_BLH if self.embed_scale == 1.0 else x_BLH * torch.tensor(self.embed_scale, dtype=x_BLH.dtype)

    def hidden(
        self, x_BLH: Tensor, places_BK: Tensor | None = None, past: Tensor | None = None, run: Run = run_at_once
    ) -> Tensor:
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
        return self.lm_head if hasattr(self, "lm_head") else self.model.embed_tokens

    def head(self, h: Tensor) -> Tensor:
        """Logits (..., V), float32."""
        table = self.model.embed_tokens
        tied = table.as_linear if hasattr(table, "as_linear") else lambda h: F.linear(h, table.weight)
        logits = (self.lm_head if hasattr(self, "lm_head") else tied)(h).float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def make_cache(self, left_padding: Sequence[int]) -> KVCache:
        """An empty cache for rows with this much padding on the left."""
        return KVCache(self.num_layers, left_padding)

    def cache_after(self, past: Tensor | None, num_rows: int) -> KVCache:
        """A cache of rows without padding; it begins with `past` (2, layers, B or 1, K, S, D), if there is one."""
        return self.make_cache([0] * num_rows) if past is None else KVCache.after(past, num_rows)

    def extend(self, x_BTH: Tensor, cache: KVCache, places_BK: Tensor | None = None, run: Run = run_at_once) -> Tensor:
        """Hidden states of new tokens (B, T, H), or of some of them (B, K, H), after those in the cache; it grows."""
        x_BTH, seen = self._before_last(x_BTH, cache, run)
        x_BTH = run(self.model.layers[-1], x_BTH, seen, places_BK)
        cache.grow(seen.num_new)
        return self.model.norm(x_BTH)

    def remember(self, x_BTH: Tensor, cache: KVCache) -> None:
        """Keys and values of new tokens join the cache; no hidden states of the last layer are computed."""
        x_BTH, seen = self._before_last(x_BTH, cache)
        self.model.layers[-1].remember(x_BTH, seen)
        cache.grow(seen.num_new)

    def select(self, cache: KVCache, rows: Sequence[int]) -> KVCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

    def train(self, mode: bool = True) -> "PretrainedLM":
        """Always in evaluation mode, as a frozen model drops nothing out, but for its adapters."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, AdaptedLinear):
                module.train(mode)
        return self

    def _before_last(self, x_BTH: Tensor, cache: KVCache, run: Run = run_at_once) -> tuple[Tensor, Seen]:
        """What the last layer reads (B, T, H), and what it may look at."""
        layers = self.model.layers
        seen = {kind: self._seen(x_BTH, cache, kind) for kind in {layer.is_sliding for layer in layers}}
        for layer in layers[:-1]:
            x_BTH = run(layer, x_BTH, seen[layer.is_sliding])
        return x_BTH, seen[layers[-1].is_sliding]

    def _seen(self, x_BTH: Tensor, cache: KVCache, is_sliding: bool) -> Seen:
        num_new = x_BTH.shape[1]
        positions_BT = cache.positions(num_new).to(x_BTH.device)
        cos_BTD, sin_BTD = self.model.rotation(positions_BT, x_BTH.dtype, is_sliding)
        window = self.sliding_window if is_sliding else None
        if cache.length == 0 and not cache.is_padded and num_new <= (window or num_new):
            return Seen(cache, num_new, cos_BTD, sin_BTD, "causal")
        if num_new == 1 and not cache.is_padded and window is None:
            return Seen(cache, num_new, cos_BTD, sin_BTD, None)
        seen_B1TS = cache.mask(num_new)
        if window is not None:
            queries, keys = torch.arange(cache.length, cache.length + num_new), torch.arange(seen_B1TS.shape[-1])
            seen_B1TS = seen_B1TS & (queries[:, None] - keys < window)
        added = torch.zeros(seen_B1TS.shape, dtype=x_BTH.dtype).masked_fill_(~seen_B1TS, -torch.inf)
        return Seen(cache, num_new, cos_BTD, sin_BTD, added.to(x_BTH.device))


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
        self._kept: dict[bytes, Tensor] = {}  # tokens that all rows of a batch began with -> their `past`

    def inputs(self, batch: Batch) -> Tensor:
        return self.lm.embed(batch.tokens)

    def hidden(self, x_BLH: Tensor, batch: Batch | None = None) -> Tensor:
        if isinstance(self.lm, Decoder):
            return self.lm.hidden(x_BLH, batch)
        assert batch is None or batch.segments is None, "a frozen pretrained LM cannot keep documents apart"
        return self.lm.hidden(x_BLH, run=self._run)

    @torch.no_grad()
    def past(self, batch: Batch) -> Tensor | None:
        if not batch.prefix or self.frozen_prefix == "off":
            return None
        tokens = batch.tokens[:, : batch.prefix]
        common = self._kept_past(tokens) if self.frozen_prefix == "reuse" else None
        return common if common is not None and common.shape[-2] == batch.prefix else self._read(tokens, common)

    @torch.no_grad()
    def shared_past(self, batch: Batch) -> Tensor | None:
        if len(batch.tokens) == 1 or self.frozen_prefix != "reuse":
            return None
        return self._kept_past(batch.tokens[:, : batch.prefix])

    def _kept_past(self, tokens: np.ndarray) -> Tensor | None:
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

    def _read(self, tokens: np.ndarray, past: Tensor | None) -> Tensor:
        """Keys and values of tokens (B, N), whose first ones may be known."""
        cache = self.lm.cache_after(past, len(tokens))
        new = torch.from_numpy(tokens[:, cache.length :]).long().to(self.lm.model.norm.weight.device)
        self.lm.remember(self.lm.embed(new), cache)
        known = [x[:, :, : cache.length] for x in (*cache.keys, *cache.values) if x is not None]  # without the room
        return torch.stack(known).unflatten(0, (2, -1))

    def label_hidden(self, batch: Batch) -> Tensor:
        """Final hidden states at the label places (B, K, H); what stands before the series and at no label is
        computed where it must be.
        """
        if isinstance(self.lm, Decoder):
            return super().label_hidden(batch)
        x_BLH, places_BK = self.inputs(batch), batch.positions
        if batch.past is not None:
            num_read = batch.past.shape[-2]
            x_BLH, places_BK = x_BLH[:, num_read:], (places_BK - num_read).clamp(min=0)
        if places_BK is not None and self.trim_last_layer:
            return self.lm.hidden(x_BLH, places_BK, batch.past, self._run)
        h = self.lm.hidden(x_BLH, past=batch.past, run=self._run)
        return h if places_BK is None else at_places(h, places_BK)

    def read(self, batch: Batch) -> tuple[Tensor, Any]:
        """As in training, so that no padding need be masked; then keys and values are moved to the right."""
        if isinstance(self.lm, Decoder):
            return super().read(batch)
        x_BLH, lengths_B = self.inputs(batch), batch.lengths
        cache = self.lm.cache_after(batch.past, len(lengths_B))
        num_read = cache.length
        h_B1H = self.lm.extend(x_BLH[:, num_read:], cache, lengths_B[:, None] - 1 - num_read)
        return h_B1H[:, 0], cache.moved_right(lengths_B.tolist())

    @property
    def _run(self) -> Run:
        return self.run_layer if self.gradient_checkpointing or self.drops_out else run_at_once

    @property
    def head_layer(self) -> nn.Module:
        return self.lm.head_layer

    def head(self, h: Tensor) -> Tensor:
        return self.lm.head(h)

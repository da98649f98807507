"""Layers that the families share.

Shape suffixes: B rows, L tokens, T new tokens, S cached tokens, H hidden, N heads, K key/value heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_training.backend import ALL_AT_ONCE
from mlx_training.data.batch import Batch
from mlx_training.mlx_backend.chunked_head import chunked_logprobs, chunked_scores, log_softmax_at
from mlx_training.mlx_backend.dropout import drawing_from, new_key


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones(size)
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x.astype(mx.float32), None, self.eps).astype(x.dtype) * self.weight.astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias, statistics in float32 (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = mx.ones(size), mx.zeros(size)
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x.astype(mx.float32), self.weight, self.bias, self.eps).astype(x.dtype)


ROOM = 16  # places for tokens to come that a cache makes at a time
NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_tanh": nn.gelu_approx,
    "gelu_quick": lambda x: x * mx.sigmoid(1.702 * x),
    "relu2": lambda x: mx.maximum(x, 0).square(),
}


class Linear(nn.Linear):
    """A Linear whose float32 weights follow the activations' type: float32 master weights under bfloat16."""

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.weight.astype(x.dtype).T
        return y + self.bias.astype(x.dtype) if "bias" in self else y


def rotate(x_BNLD: mx.array, angles_BLD: mx.array) -> mx.array:
    """Rotary position embedding, half-split layout (Su et al. 2021); angles are float32 (B or 1, L, D / 2)."""
    cos, sin = mx.cos(angles_BLD)[:, None], mx.sin(angles_BLD)[:, None]
    a, b = mx.split(x_BNLD.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNLD.dtype)


def attention(
    q_BNTD: mx.array, k_BKSD: mx.array, v_BKSD: mx.array, mask: mx.array | str | None, scale: float | None = None
) -> mx.array:
    """Scaled dot-product attention with grouped heads.

    `mask` is None, "causal", boolean (True = may look), or what is added to the scores; `scale` is 1 / sqrt(D) if None.
    """
    scale = scale or q_BNTD.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(q_BNTD, k_BKSD, v_BKSD, scale=scale, mask=mask)


def alibi(mask: mx.array | str, slopes_N: mx.array, num_queries: int, num_keys: int) -> mx.array:
    """What ALiBi adds to the scores, float32 (B or 1, N, T, S): -slope * distance; -inf where `mask` forbids to look.

    `mask` is "causal" or boolean; the last query stands at the last key (Press et al. 2022).
    """
    places = mx.arange(num_keys)
    distance_TS = places[num_keys - num_queries :, None] - places[None]
    seen = distance_TS >= 0 if isinstance(mask, str) else mask
    bias_NTS = -slopes_N[:, None, None] * distance_TS
    return mx.where(seen, bias_NTS, -mx.inf)


class KVCache:
    """Keys and values of every layer for rows that are padded on the left; after `length` places there may be room."""

    def __init__(self, num_layers: int, left_padding: Sequence[int]) -> None:
        self.keys: list[mx.array | None] = [None] * num_layers
        self.values: list[mx.array | None] = [None] * num_layers
        self.left_padding = mx.array(left_padding)
        self.is_padded = any(left_padding)
        self.length = 0
        self.keeps = True  # new keys and values; else a layer may be computed twice

    @classmethod
    def after(cls, past: mx.array, num_rows: int) -> "KVCache":
        """A cache that begins with keys and values (2, layers, B or 1, K, S, D)."""
        cache = cls(past.shape[1], [0] * num_rows)
        cache.length = past.shape[-2]
        keys, values = mx.broadcast_to(past, (*past.shape[:2], num_rows, *past.shape[3:]))
        cache.keys, cache.values = list(keys), list(values)
        return cache

    def append(self, layer: int, k_BKTD: mx.array, v_BKTD: mx.array) -> tuple[mx.array, mx.array]:
        """Append new keys and values of one layer; everything so far (B, K, S, D)."""
        k, v = (self._grown(*pair) for pair in ((self.keys[layer], k_BKTD), (self.values[layer], v_BKTD)))
        if self.keeps:
            self.keys[layer], self.values[layer] = k, v
        end = self.length + k_BKTD.shape[2]
        return k[:, :, :end], v[:, :, :end]

    def grow(self, num_new: int) -> None:
        """All layers have had their new keys and values."""
        if self.keeps:
            self.length += num_new

    def _grown(self, old_BKSD: mx.array | None, new_BKTD: mx.array) -> mx.array:
        """The old places and the new; single tokens are written into room that is left for those after them."""
        if old_BKSD is None:
            return new_BKTD
        end = self.length + new_BKTD.shape[2]
        if new_BKTD.shape[2] > 1:
            return mx.concatenate([old_BKSD[:, :, : self.length], new_BKTD], axis=2)
        if old_BKSD.shape[2] < end:
            old_BKSD = mx.pad(old_BKSD, [(0, 0), (0, 0), (0, ROOM), (0, 0)])
        old_BKSD[:, :, self.length : end] = new_BKTD
        return old_BKSD

    def positions(self, num_new: int, *, of_keys: bool = False) -> mx.array:
        """Each row's own positions of the next `num_new` tokens (B, T), or of all keys then; 0 in the padding.

        (1, T) where no row is padded.
        """
        places = mx.arange(0 if of_keys else self.length, self.length + num_new)
        if not self.is_padded:
            return places[None]
        return mx.maximum(places[None] - self.left_padding[:, None], 0)

    def mask(self, num_new: int) -> mx.array:
        """Who may look where, boolean (B, 1, T, S): no future, no padding (padding itself looks at padding).

        (1, 1, T, S) where no row is padded.
        """
        total = self.length + num_new
        queries, keys = mx.arange(self.length, total), mx.arange(total)
        causal_TS = keys[None] <= queries[:, None]
        if not self.is_padded:
            return causal_TS[None, None]
        pad_key = keys[None] < self.left_padding[:, None]
        pad_query = queries[None] < self.left_padding[:, None]
        return (causal_TS[None] & (~pad_key[:, None] | pad_query[:, :, None]))[:, None]

    def moved_right(self, lengths: Sequence[int]) -> "KVCache":
        """The same of rows of these lengths that are padded at the end: padded on the left, their last places meet.

        This one is empty after it, a layer at a time, so that only one layer is held twice.
        """
        longest = max(lengths)
        moved = KVCache(len(self.keys), [longest - length for length in lengths])
        moved.length = longest
        places_BS = mx.clip(mx.arange(longest + ROOM) - moved.left_padding[:, None], 0, self.length - 1)

        for layer in range(len(self.keys)):
            for old, new in ((self.keys, moved.keys), (self.values, moved.values)):
                x_BKSD, old[layer] = old[layer], None
                new[layer] = None if x_BKSD is None else mx.take_along_axis(x_BKSD, places_BS[:, None, :, None], axis=2)
        return moved

    def select(self, rows: Sequence[int]) -> "KVCache":
        """A copy that holds these rows; this one stays valid."""
        index = mx.array([*rows])
        copy = KVCache(len(self.keys), self.left_padding[index].tolist())
        copy.length = self.length
        copy.keys = [None if k is None else k[index] for k in self.keys]
        copy.values = [None if v is None else v[index] for v in self.values]
        return copy


class LanguageModel(nn.Module):
    """What objectives and sessions ask of a model; a family says how inputs, hidden states and logits are made."""

    gradient_checkpointing = False
    head_chunks = ALL_AT_ONCE

    def inputs(self, batch: Batch) -> mx.array:
        """Input embeddings (B, L, H)."""
        raise AssertionError("a family defines this")

    def hidden(self, x_BLH: mx.array, batch: Batch | None = None) -> mx.array:
        """Final hidden states (B, L, H); rows are padded at the end only, so a causal model needs no mask.

        Of the batch a family may read documents and lengths.
        """
        raise AssertionError("a family defines this")

    @property
    def head_layer(self) -> nn.Module:
        """The layer, often the embedding, whose matrix (V, H) makes the logits: everything in `head` that may train."""
        raise AssertionError("a family defines this")

    def head(self, h: mx.array) -> mx.array:
        """Logits (..., V), float32; of every place alone."""
        return (h @ self.head_layer.weight.astype(h.dtype).T).astype(mx.float32)

    def past(self, batch: Batch) -> mx.array | None:
        """Keys and values (2, layers, B or 1, heads, N, D) of leading places that training cannot change; None: none.

        The batch still holds NumPy arrays.
        """
        return None

    def shared_past(self, batch: Batch) -> mx.array | None:
        """Those of leading places that all rows share, of which there are several: what `read` need not read again."""
        return None

    def label_hidden(self, batch: Batch) -> mx.array:
        """Final hidden states at the label places (B, K, H): only those meet the head, never all (B, L, H)."""
        h = self.hidden(self.inputs(batch), batch)
        return h if batch.positions is None else mx.take_along_axis(h, batch.positions[..., None], axis=1)

    def logprobs(self, batch: Batch) -> mx.array:
        """log p(target), float32 (B, K)."""
        h_BKH, targets_BK = self.label_hidden(batch), batch.targets
        if (size := self.head_chunks.of(targets_BK.size)) == targets_BK.size:
            return log_softmax_at(self.head(h_BKH), targets_BK)
        h_NH, targets_N = h_BKH.flatten(0, 1), targets_BK.flatten()
        logprobs_N = chunked_logprobs(self.head, self.head_layer, h_NH, targets_N, size, ahead=self.training)
        return logprobs_N.reshape(targets_BK.shape)

    def scored(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """log p(target) and whether the target is the most probable token, both (B, K)."""
        h_BKH, targets_BK = self.label_hidden(batch), batch.targets
        size = self.head_chunks.of(targets_BK.size)
        found = chunked_scores(self.head, h_BKH.flatten(0, 1), targets_BK.flatten(), size)
        logprobs_BK, hits_BK = (x_N.reshape(targets_BK.shape) for x_N in found)
        return logprobs_BK, hits_BK

    def read(self, batch: Batch) -> tuple[mx.array, Any]:
        """The last hidden state of every prompt (B, H), and a cache that goes on from there.

        Rows come padded at the end. They are moved to the right, so that every row's next token has the same place.
        """
        x_BLH, lengths_B1 = self.inputs(batch), batch.lengths[:, None]
        padding_B1 = lengths_B1.max() - lengths_B1
        places_BL = mx.maximum(mx.arange(lengths_B1.max().item()) - padding_B1, 0)
        cache = self.lm.make_cache(padding_B1[:, 0].tolist())
        return self.lm.extend(mx.take_along_axis(x_BLH, places_BL[..., None], axis=1), cache)[:, -1], cache

    def aux_loss(self) -> mx.array | float:
        """What the last forward pass adds to the loss of a token, as balancing experts does."""
        return 0.0

    def run_layer(self, layer: nn.Module, *args: Any) -> mx.array:
        """A layer's output. With gradient checkpointing only its inputs are kept for the backward pass, which computes
        everything else again, with the same dropout.
        """
        if not self.training:
            return layer(*args)
        parameters, key = layer.trainable_parameters(), new_key()

        def run(parameters: dict[str, Any], key: mx.array, *args: Any) -> mx.array:
            layer.update(parameters)
            with drawing_from(mx.stop_gradient(key)):
                return layer(*args)

        output = (mx.checkpoint(run) if self.gradient_checkpointing else run)(parameters, key, *args)
        layer.update(parameters)
        return output

    def logits(self, batch: Batch) -> mx.array:
        """Logits of every place, float32 (B, L, V)."""
        return self.head(self.hidden(self.inputs(batch), batch))

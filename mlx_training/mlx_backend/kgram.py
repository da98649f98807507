"""Kgram: the MLX realisation of KgramSpec.

Shape suffixes: B rows, L tokens, T new tokens, S new tokens and the k - 1 before them, E what a token enters with,
H hidden.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_training.data.batch import Batch
from mlx_training.mlx_backend.layers import LanguageModel, Linear
from mlx_training.spec import KgramSpec


class OneHotWindow(nn.Module):
    """SiLU of a Linear over k one-hot codes; a token has brought its column for every lag, so they need only adding."""

    def __init__(self, spec: KgramSpec) -> None:
        super().__init__()
        self.k = spec.k
        self.bias = mx.zeros(spec.hidden_size)

    def __call__(self, x_BSE: mx.array) -> mx.array:
        length = x_BSE.shape[1] - self.k + 1
        lags = mx.split(x_BSE, self.k, axis=-1)
        return nn.silu(sum((lag[:, j : j + length] for j, lag in enumerate(lags)), self.bias.astype(x_BSE.dtype)))


class EmbeddingWindow(nn.Module):
    """The embeddings of k tokens side by side (B, T, k * E)."""

    def __init__(self, spec: KgramSpec) -> None:
        super().__init__()
        self.k = spec.k

    def __call__(self, x_BSE: mx.array) -> mx.array:
        length = x_BSE.shape[1] - self.k + 1
        return mx.concatenate([x_BSE[:, j : j + length] for j in range(self.k)], axis=-1)


class ConvolutionWindow(nn.Module):
    """A depthwise convolution of the embeddings of k tokens (B, T, E)."""

    def __init__(self, spec: KgramSpec) -> None:
        super().__init__()
        self.k = spec.k
        self.weight = mx.zeros((spec.embed_size, 1, spec.k))
        self.bias = mx.zeros(spec.embed_size)

    def __call__(self, x_BSE: mx.array) -> mx.array:
        length = x_BSE.shape[1] - self.k + 1
        weight_E1k, bias_E = self.weight.astype(x_BSE.dtype), self.bias.astype(x_BSE.dtype)
        return sum((x_BSE[:, j : j + length] * weight_E1k[:, 0, j] for j in range(self.k)), bias_E)


WINDOWS: dict[str, type[nn.Module]] = {
    "onehot": OneHotWindow,
    "embedding": EmbeddingWindow,
    "convolution": ConvolutionWindow,
}


class KgramCache:
    """What the last k - 1 tokens of every row entered with; zeros before its start."""

    def __init__(self, left_padding: Sequence[int]) -> None:
        self.padding_B: mx.array | None = mx.array(left_padding) if any(left_padding) else None
        self.past: mx.array | None = None

    def select(self, rows: Sequence[int]) -> "KgramCache":
        """A copy that holds these rows; this one stays valid."""
        assert self.past is not None, "nothing was read yet"
        copy = KgramCache([])
        copy.past = self.past[mx.array([*rows])]
        return copy


class Kgram(LanguageModel):
    """A language model that sees the last k tokens, the current one included, at all places at once."""

    def __init__(self, spec: KgramSpec, dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.token_size)
        self.window = WINDOWS[spec.form](spec)
        self.layers = [Linear(in_size, out_size) for out_size, in_size in spec.layer_sizes]
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    @property
    def lm(self) -> "Kgram":
        """The language model that a session drives: this one."""
        return self

    def inputs(self, batch: Batch) -> mx.array:
        return self.embed(batch.tokens)

    def embed(self, tokens_BL: mx.array) -> mx.array:
        """What the tokens enter with (B, L, E), in the compute type."""
        return self.embed_tokens(tokens_BL).astype(self.dtype)

    def hidden(self, x_BLE: mx.array, batch: Batch | None = None) -> mx.array:
        return self._run(mx.concatenate([self._nothing(x_BLE), x_BLE], axis=1))

    @property
    def head_layer(self) -> nn.Module:
        return self.lm_head

    def make_cache(self, left_padding: Sequence[int]) -> KgramCache:
        """An empty cache for rows with this much padding on the left."""
        return KgramCache(left_padding)

    def extend(self, x_BTE: mx.array, cache: KgramCache) -> mx.array:
        """Hidden states (B, T, H) of new tokens after those in the cache, which keeps the last k - 1 of them all."""
        if cache.padding_B is not None:
            is_token = mx.arange(x_BTE.shape[1]) >= cache.padding_B[:, None]
            x_BTE = x_BTE * is_token[..., None].astype(x_BTE.dtype)
            cache.padding_B = None
        past = self._nothing(x_BTE) if cache.past is None else cache.past
        x_BSE = mx.concatenate([past, x_BTE], axis=1)
        cache.past = x_BSE[:, 1 - self.spec.k :]
        return self._run(x_BSE)

    def select(self, cache: KgramCache, rows: Sequence[int]) -> KgramCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

    def _nothing(self, x_BLE: mx.array) -> mx.array:
        """What stands before a row's first token."""
        return mx.zeros((len(x_BLE), self.spec.k - 1, x_BLE.shape[-1]), x_BLE.dtype)

    def _run(self, x_BSE: mx.array) -> mx.array:
        h_BTH = self.window(x_BSE)
        for layer in self.layers:
            h_BTH = nn.silu(layer(h_BTH))
        return h_BTH

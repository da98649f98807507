"""Kgram: the PyTorch realisation of KgramSpec.

Shape suffixes: B rows, L tokens, T new tokens, S new tokens and the k - 1 before them, E what a token enters with,
H hidden.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_training.data.batch import Batch
from mlx_training.spec import KgramSpec
from torch_backend.layers import LanguageModel, Linear


class OneHotWindow(nn.Module):
    """SiLU of a Linear over k one-hot codes; a token has brought its column for every lag, so they need only adding."""

    def __init__(self, spec: KgramSpec) -> None:
        super().__init__()
        self.k = spec.k
        self.bias = nn.Parameter(torch.zeros(spec.hidden_size))

    def forward(self, x_BSE: Tensor) -> Tensor:
        length = x_BSE.shape[1] - self.k + 1
        lags = x_BSE.chunk(self.k, dim=-1)
        return F.silu(sum((lag[:, j : j + length] for j, lag in enumerate(lags)), self.bias.to(x_BSE.dtype)))


class EmbeddingWindow(nn.Module):
    """The embeddings of k tokens side by side (B, T, k * E)."""

    def __init__(self, spec: KgramSpec) -> None:
        super().__init__()
        self.k = spec.k

    def forward(self, x_BSE: Tensor) -> Tensor:
        length = x_BSE.shape[1] - self.k + 1
        return torch.cat([x_BSE[:, j : j + length] for j in range(self.k)], dim=-1)


class ConvolutionWindow(nn.Module):
    """A depthwise convolution of the embeddings of k tokens (B, T, E)."""

    def __init__(self, spec: KgramSpec) -> None:
        super().__init__()
        self.k = spec.k
        self.weight = nn.Parameter(torch.zeros(spec.embed_size, 1, spec.k))
        self.bias = nn.Parameter(torch.zeros(spec.embed_size))

    def forward(self, x_BSE: Tensor) -> Tensor:
        length = x_BSE.shape[1] - self.k + 1
        weight_E1k, bias_E = self.weight.to(x_BSE.dtype), self.bias.to(x_BSE.dtype)
        return sum((x_BSE[:, j : j + length] * weight_E1k[:, 0, j] for j in range(self.k)), bias_E)


WINDOWS: dict[str, type[nn.Module]] = {
    "onehot": OneHotWindow,
    "embedding": EmbeddingWindow,
    "convolution": ConvolutionWindow,
}


class KgramCache:
    """What the last k - 1 tokens of every row entered with; zeros before its start."""

    def __init__(self, left_padding: Sequence[int]) -> None:
        self.padding_B: Tensor | None = torch.tensor(left_padding) if any(left_padding) else None
        self.past: Tensor | None = None

    def select(self, rows: Sequence[int]) -> "KgramCache":
        """A copy that holds these rows; this one stays valid."""
        assert self.past is not None, "nothing was read yet"
        copy = KgramCache([])
        copy.past = self.past[torch.tensor(rows, device=self.past.device)]
        return copy


class Kgram(LanguageModel):
    """A language model that sees the last k tokens, the current one included, at all places at once."""

    def __init__(self, spec: KgramSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.token_size)
        self.window = WINDOWS[spec.form](spec)
        self.layers = nn.ModuleList([Linear(in_size, out_size) for out_size, in_size in spec.layer_sizes])
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    @property
    def lm(self) -> "Kgram":
        """The language model that a session drives: this one."""
        return self

    def inputs(self, batch: Batch) -> Tensor:
        return self.embed(batch.tokens)

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """What the tokens enter with (B, L, E), in the compute type."""
        return self.embed_tokens(tokens_BL).to(self.dtype)

    def hidden(self, x_BLE: Tensor, batch: Batch | None = None) -> Tensor:
        return self._run(torch.cat([self._nothing(x_BLE), x_BLE], dim=1))

    @property
    def head_layer(self) -> nn.Module:
        return self.lm_head

    def make_cache(self, left_padding: Sequence[int]) -> KgramCache:
        """An empty cache for rows with this much padding on the left."""
        return KgramCache(left_padding)

    def extend(self, x_BTE: Tensor, cache: KgramCache) -> Tensor:
        """Hidden states (B, T, H) of new tokens after those in the cache, which keeps the last k - 1 of them all."""
        if cache.padding_B is not None:
            is_token = torch.arange(x_BTE.shape[1]) >= cache.padding_B[:, None]
            x_BTE = x_BTE * is_token[..., None].to(x_BTE)
            cache.padding_B = None
        past = self._nothing(x_BTE) if cache.past is None else cache.past
        x_BSE = torch.cat([past, x_BTE], dim=1)
        cache.past = x_BSE[:, 1 - self.spec.k :]
        return self._run(x_BSE)

    def select(self, cache: KgramCache, rows: Sequence[int]) -> KgramCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

    def _nothing(self, x_BLE: Tensor) -> Tensor:
        """What stands before a row's first token."""
        return x_BLE.new_zeros(len(x_BLE), self.spec.k - 1, x_BLE.shape[-1])

    def _run(self, x_BSE: Tensor) -> Tensor:
        h_BTH = self.window(x_BSE)
        for layer in self.layers:
            h_BTH = F.silu(layer(h_BTH))
        return h_BTH

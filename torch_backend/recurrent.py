"""Recurrent: the PyTorch realisation of RecurrentSpec.

The recurrence is float32 in every precision; under bfloat16 the head's product is not.
Shape suffixes: B rows, L tokens, T new tokens, E embedding, H hidden, N layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from mlx_training.data.batch import Batch
from mlx_training.spec import RecurrentSpec
from torch_backend.layers import LanguageModel

States = tuple[Tensor, ...]  # (N, B, H) each: h and c of an LSTM, h of a GRU


class _Layers(nn.RNNBase):
    """Recurrent layers, with dropout between them."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float) -> None:
        super().__init__(input_size, hidden_size, num_layers, batch_first=True)  # type: ignore[call-arg]
        self.between = nn.Dropout(dropout)

    def forward(self, x_BLE: Tensor, states: States | None, padding_B: Tensor | None) -> tuple[Tensor, States]:
        """What the last layer returns (B, L, H), and the states after the last token, which were zero or `states`.

        The first `padding_B` places of a row are not read; there must be something to read after them.
        """
        if padding_B is not None:
            return self._skipping(x_BLE, padding_B)
        if not (self.training and self.between.p and self.num_layers > 1):
            return self._all_layers(x_BLE, states)
        # cuDNN's own dropout draws from a generator that is seeded once a process: no run would resume exactly
        assert states is None
        zeros, ends = x_BLE.new_zeros(1, len(x_BLE), self.hidden_size), []
        for i, weights in enumerate(self.all_weights):
            x_BLE, *end = self._one_layer(self.between(x_BLE) if i else x_BLE, zeros, weights)
            ends.append(end)
        return x_BLE, tuple(torch.cat(states) for states in zip(*ends, strict=True))

    def _skipping(self, x_BLE: Tensor, padding_B: Tensor) -> tuple[Tensor, States]:
        places, num_new = torch.arange(x_BLE.shape[1], device=x_BLE.device), x_BLE.shape[1]
        left = (places + padding_B[:, None]).clamp(max=num_new - 1)[..., None]
        packed = pack_padded_sequence(
            x_BLE.take_along_dim(left, 1), (num_new - padding_B).cpu(), batch_first=True, enforce_sorted=False
        )
        packed, states = self._all_layers(packed, None)
        h_BLH, _ = pad_packed_sequence(packed, batch_first=True, total_length=num_new)
        return h_BLH.take_along_dim((places - padding_B[:, None]).clamp(min=0)[..., None], 1), states


class LSTM(_Layers, nn.LSTM):
    """Long short-term memory (Hochreiter & Schmidhuber 1997), PyTorch's gates and two biases."""

    def _all_layers(self, x: Any, states: States | None) -> tuple[Any, States]:
        return nn.LSTM.forward(self, x, states)

    def _one_layer(self, x_BLE: Tensor, zeros: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.lstm(x_BLE, (zeros, zeros), weights, True, 1, 0.0, True, False, True)


class GRU(_Layers, nn.GRU):
    """Gated recurrent units (Cho et al. 2014) as PyTorch has them: n = tanh(W x + b + r * (U h + c))."""

    def _all_layers(self, x: Any, states: States | None) -> tuple[Any, States]:
        y, h_NBH = nn.GRU.forward(self, x, states[0] if states else None)
        return y, (h_NBH,)

    def _one_layer(self, x_BLE: Tensor, zeros: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.gru(x_BLE, zeros, weights, True, 1, 0.0, True, False, True)


CELLS: dict[str, type[LSTM | GRU]] = {"lstm": LSTM, "gru": GRU}


class RecurrentCache:
    """The states of rows that are padded on the left; they take the same memory after any number of tokens."""

    def __init__(self, left_padding: Sequence[int]) -> None:
        self.padding_B: Tensor | None = torch.tensor(left_padding) if any(left_padding) else None
        self.states: States | None = None

    def select(self, rows: Sequence[int]) -> "RecurrentCache":
        """A copy that holds these rows; this one stays valid."""
        assert self.states is not None, "nothing was read yet"
        copy = RecurrentCache([])
        copy.states = tuple(s[:, torch.tensor(rows, device=s.device)] for s in self.states)
        return copy


class Recurrent(LanguageModel):
    """An LSTM or GRU language model, trainable from scratch."""

    def __init__(self, spec: RecurrentSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.embed_size)
        self.rnn = CELLS[spec.cell](spec.embed_size, spec.hidden_size, spec.num_layers, spec.dropout)
        self.dropout = nn.Dropout(spec.dropout)
        if not spec.tie_word_embeddings:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    @property
    def lm(self) -> "Recurrent":
        """The language model that a session drives: this one."""
        return self

    def inputs(self, batch: Batch) -> Tensor:
        return self.embed(batch.tokens)

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Token embeddings (B, L, E)."""
        return self.embed_tokens(tokens_BL)

    def hidden(self, x_BLE: Tensor, batch: Batch | None = None) -> Tensor:
        h_BLH, _ = self.rnn(self.dropout(x_BLE), None, None)
        return self.dropout(h_BLH).to(self.dtype)

    @property
    def head_layer(self) -> nn.Module:
        return self.embed_tokens if self.spec.tie_word_embeddings else self.lm_head

    def make_cache(self, left_padding: Sequence[int]) -> RecurrentCache:
        """An empty cache for rows with this much padding on the left."""
        return RecurrentCache(left_padding)

    def extend(self, x_BTE: Tensor, cache: RecurrentCache) -> Tensor:
        """Hidden states (B, T, H) of new tokens after those in the cache, which takes over their states."""
        padding_B = None if cache.padding_B is None else cache.padding_B.to(x_BTE.device)
        h_BTH, cache.states = self.rnn(x_BTE, cache.states, padding_B)
        cache.padding_B = None
        return h_BTH.to(self.dtype)

    def select(self, cache: RecurrentCache, rows: Sequence[int]) -> RecurrentCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

"""Recurrent: the MLX realisation of RecurrentSpec.

The recurrence is float32 in every precision; under bfloat16 the head's product is not.
Shape suffixes: B rows, L tokens, T new tokens, E embedding, H hidden, G gates together, N layers.
"""

from collections.abc import Callable, Sequence
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from mlx_training.data.batch import Batch
from mlx_training.mlx_backend.layers import LanguageModel
from mlx_training.spec import RecurrentSpec

States = tuple[mx.array, ...]  # (N, B, H) each: h and c of an LSTM, h of a GRU
Cell = Callable[[mx.array, mx.array, States], States]  # what inputs and states say to the gates, states -> next states


def _scan(
    cell: Cell, gates_BLG: mx.array, weight_GH: mx.array, bias_G: mx.array, states: States, padding_B: mx.array | None
) -> States:
    """The states after every place (B, L, H) of one layer, from what the inputs say to the gates."""
    after = []
    for t, gates_B1G in enumerate(mx.split(gates_BLG, gates_BLG.shape[1], axis=1)):
        new = cell(gates_B1G[:, 0], mx.addmm(bias_G, states[0], weight_GH.T), states)
        if padding_B is not None:
            new = tuple(mx.where((t >= padding_B)[:, None], s, old) for s, old in zip(new, states, strict=True))
        states = new
        after.append(states)
    return tuple(mx.stack(parts, axis=1) for parts in zip(*after, strict=True))


@cache
def _differentiable(cell: Cell) -> Callable[..., States]:
    """`_scan` without padding, whose gradient of the weights is one product over all places instead of one a place.

    By MLX's own rules those L products, each as large as the weights, would be alive together.
    """
    run = mx.custom_function(lambda gates, weight, bias, *states: _scan(cell, gates, weight, bias, states, None))

    @run.vjp
    def backward(primals: list[mx.array], cotangents: States, after: States) -> list[mx.array]:
        gates_BLG, weight_GH, bias_G, *start = primals
        before = [mx.concatenate([s[:, None], states[:, :-1]], axis=1) for s, states in zip(start, after, strict=True)]
        said_BLG = before[0] @ weight_GH.T + bias_G
        length = gates_BLG.shape[1]
        places = [mx.split(x, length, axis=1) for x in (gates_BLG, said_BLG, *before)]
        given = [mx.split(x, length, axis=1) for x in cotangents]
        carried = [mx.zeros_like(s)[:, None] for s in start]
        to_gates, to_said = [], []
        for t in reversed(range(length)):
            arriving = [g[t] + c for g, c in zip(given, carried, strict=True)]
            _, (d_gates, d_said, *carried) = mx.vjp(lambda x, u, *s: cell(x, u, s), [p[t] for p in places], arriving)
            carried[0] = carried[0] + d_said @ weight_GH
            to_gates.append(d_gates)
            to_said.append(d_said)
        d_gates_BLG, d_said_BLG = (mx.concatenate(parts[::-1], axis=1) for parts in (to_gates, to_said))
        d_weight_GH = d_said_BLG.flatten(0, 1).T @ before[0].flatten(0, 1)
        return [d_gates_BLG, d_weight_GH, d_said_BLG.sum((0, 1)), *(c[:, 0] for c in carried)]

    return run


class _Layers(nn.Module):
    """Recurrent layers, with dropout between them. MLX's own have one bias where PyTorch trains two."""

    num_gates: int
    num_states: int
    cell: Cell

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.between = nn.Dropout(dropout)
        rows = self.num_gates * hidden_size
        for i in range(num_layers):
            self[f"weight_ih_l{i}"] = mx.zeros((rows, hidden_size if i else input_size))
            self[f"weight_hh_l{i}"] = mx.zeros((rows, hidden_size))
            self[f"bias_ih_l{i}"], self[f"bias_hh_l{i}"] = mx.zeros(rows), mx.zeros(rows)

    def __call__(self, x_BLE: mx.array, states: States | None, padding_B: mx.array | None) -> tuple[mx.array, States]:
        """What the last layer returns (B, L, H), and the states after the last token, which were zero or `states`.

        The first `padding_B` places of a row are not read.
        """
        states = states or (mx.zeros((self.num_layers, len(x_BLE), self.hidden_size)),) * self.num_states
        ends = []
        for i in range(self.num_layers):
            x_BLE = self.between(x_BLE) if i else x_BLE
            gates_BLG = x_BLE @ self[f"weight_ih_l{i}"].T + self[f"bias_ih_l{i}"]  # of all places at once
            weight_GH, bias_G, start = self[f"weight_hh_l{i}"], self[f"bias_hh_l{i}"], tuple(s[i] for s in states)
            if padding_B is None:
                after = _differentiable(type(self).cell)(gates_BLG, weight_GH, bias_G, *start)
            else:
                after = _scan(type(self).cell, gates_BLG, weight_GH, bias_G, start, padding_B)
            x_BLE = after[0]
            ends.append([s[:, -1] for s in after])
        return x_BLE, tuple(mx.stack(parts) for parts in zip(*ends, strict=True))


def _lstm(from_input: mx.array, from_state: mx.array, states: States) -> States:
    i, f, g, o = mx.split(from_input + from_state, 4, axis=-1)
    c = mx.sigmoid(f) * states[1] + mx.sigmoid(i) * mx.tanh(g)
    return mx.sigmoid(o) * mx.tanh(c), c


def _gru(from_input: mx.array, from_state: mx.array, states: States) -> States:
    (r, z, n), (r_h, z_h, n_h) = mx.split(from_input, 3, axis=-1), mx.split(from_state, 3, axis=-1)
    z = mx.sigmoid(z + z_h)
    n = mx.tanh(n + mx.sigmoid(r + r_h) * n_h)
    return ((1 - z) * n + z * states[0],)


class LSTM(_Layers):
    """Long short-term memory (Hochreiter & Schmidhuber 1997), PyTorch's gates and two biases."""

    num_gates, num_states, cell = 4, 2, staticmethod(_lstm)


class GRU(_Layers):
    """Gated recurrent units (Cho et al. 2014) as PyTorch has them: n = tanh(W x + b + r * (U h + c))."""

    num_gates, num_states, cell = 3, 1, staticmethod(_gru)


CELLS: dict[str, type[LSTM | GRU]] = {"lstm": LSTM, "gru": GRU}


class RecurrentCache:
    """The states of rows that are padded on the left; they take the same memory after any number of tokens."""

    def __init__(self, left_padding: Sequence[int]) -> None:
        self.padding_B: mx.array | None = mx.array(left_padding) if any(left_padding) else None
        self.states: States | None = None

    def select(self, rows: Sequence[int]) -> "RecurrentCache":
        """A copy that holds these rows; this one stays valid."""
        assert self.states is not None, "nothing was read yet"
        copy = RecurrentCache([])
        copy.states = tuple(s[:, mx.array([*rows])] for s in self.states)
        return copy


class Recurrent(LanguageModel):
    """An LSTM or GRU language model, trainable from scratch."""

    def __init__(self, spec: RecurrentSpec, dtype: mx.Dtype = mx.float32) -> None:
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

    def inputs(self, batch: Batch) -> mx.array:
        return self.embed(batch.tokens)

    def embed(self, tokens_BL: mx.array) -> mx.array:
        """Token embeddings (B, L, E)."""
        return self.embed_tokens(tokens_BL)

    def hidden(self, x_BLE: mx.array, batch: Batch | None = None) -> mx.array:
        h_BLH, _ = self.rnn(self.dropout(x_BLE), None, None)
        return self.dropout(h_BLH).astype(self.dtype)

    @property
    def head_layer(self) -> nn.Module:
        return self.embed_tokens if self.spec.tie_word_embeddings else self.lm_head

    def make_cache(self, left_padding: Sequence[int]) -> RecurrentCache:
        """An empty cache for rows with this much padding on the left."""
        return RecurrentCache(left_padding)

    def extend(self, x_BTE: mx.array, cache: RecurrentCache) -> mx.array:
        """Hidden states (B, T, H) of new tokens after those in the cache, which takes over their states."""
        h_BTH, cache.states = self.rnn(x_BTE, cache.states, cache.padding_B)
        cache.padding_B = None
        return h_BTH.astype(self.dtype)

    def select(self, cache: RecurrentCache, rows: Sequence[int]) -> RecurrentCache:
        """A copy of these rows of a cache."""
        return cache.select(rows)

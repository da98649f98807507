"""The last layer of a frozen language model where it is needed: at the places of labels.

Shape suffixes: B rows, T tokens, S tokens and what stands before them, K places a row, H hidden, N key/value heads,
D head_dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


@contextmanager
def last_layer_at(layers: list[Any], places_BK: mx.array | None) -> Iterator[None]:
    """The last of mlx-lm's layers returns these places alone (B, K, H); None: all places.

    Queries, the attention's output and the feed-forward layer are computed there; keys and values everywhere. The
    places of a row follow each other, but for padding.
    """
    if places_BK is None:
        yield
        return
    layer = layers[-1]
    layers[-1] = _AtPlaces(layer, places_BK)
    try:
        yield
    finally:
        layers[-1] = layer


class _AtPlaces:
    """A layer at some places."""

    def __init__(self, layer: Any, places_BK: mx.array) -> None:
        self.layer, self.places = layer, places_BK

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __call__(self, x_BTH: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        attention, (B, T, _) = self.layer.self_attn, x_BTH.shape
        n_BTH = self.layer.input_layernorm(x_BTH)
        k_BTND, v_BTND = (
            f(n_BTH).reshape(B, T, attention.n_kv_heads, -1) for f in (attention.k_proj, attention.v_proj)
        )
        if "k_norm" in attention:
            k_BTND = attention.k_norm(k_BTND)
        k_BNSD, v_BNSD = k_BTND.transpose(0, 2, 1, 3), v_BTND.transpose(0, 2, 1, 3)
        offset = 0 if cache is None else cache.offset
        k_BNSD = attention.rope(k_BNSD, offset=offset)
        if cache is not None:
            k_BNSD, v_BNSD = cache.update_and_fetch(k_BNSD, v_BNSD)
        if isinstance(mask, mx.array):
            rows_BTS = mx.broadcast_to(mask.reshape(-1, *mask.shape[-2:]), (B, *mask.shape[-2:]))
            mask_B1KS = self._at_places(rows_BTS)[:, None]
        else:
            mask_B1KS = (mx.arange(T) <= self.places[..., None])[:, None]
        return self.layer(self._at_places(x_BTH), mask_B1KS, _Given(k_BNSD, v_BNSD, self.places[:, 0] + offset))

    def _at_places(self, x_BTx: mx.array) -> mx.array:
        return mx.take_along_axis(x_BTx, self.places[..., None], axis=1)


class _Given:
    """A cache that knows all keys and values already; the first new query stands at `offset`."""

    def __init__(self, k_BNSD: mx.array, v_BNSD: mx.array, offset: mx.array) -> None:
        self.known, self.offset = (k_BNSD, v_BNSD), offset

    def update_and_fetch(self, *_: mx.array) -> tuple[mx.array, mx.array]:
        return self.known

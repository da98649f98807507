"""The last layer of a frozen language model where it is needed: at the places of labels.

Shape suffixes: B rows, T tokens, S tokens and what stands before them, K places a row, H hidden, N key/value heads,
D head_dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mlx_training.backend import replaced


@contextmanager
def last_layer_at(layers: nn.ModuleList, places_BK: Tensor | None) -> Iterator[None]:
    """The last of transformers' layers returns these places alone (B, K, H); None: all places.

    Queries, the attention's output and the feed-forward layer are computed there; keys and values everywhere.
    """
    if places_BK is None:
        yield
        return
    with replaced(layers[-1], "forward", _AtPlaces(layers[-1], places_BK)):
        yield


class _AtPlaces:
    """A layer's `forward` at some places."""

    def __init__(self, layer: Any, places_BK: Tensor) -> None:
        self.layer, self.forward, self.places = layer, layer.forward, places_BK

    def __call__(
        self,
        x_BTH: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        attention, (B, T, _) = self.layer.self_attn, x_BTH.shape
        n_BTH = self.layer.input_layernorm(x_BTH)
        k_BTND, v_BTND = (f(n_BTH).view(B, T, -1, attention.head_dim) for f in (attention.k_proj, attention.v_proj))
        if hasattr(attention, "k_norm"):
            k_BTND = attention.k_norm(k_BTND)
        cos, sin = position_embeddings
        a, b = k_BTND.chunk(2, dim=-1)
        k_BTND = k_BTND * cos[:, :, None] + torch.cat([-b, a], dim=-1) * sin[:, :, None]
        k_BNSD, v_BNSD = k_BTND.transpose(1, 2), v_BTND.transpose(1, 2)
        if past_key_values is not None:
            k_BNSD, v_BNSD = past_key_values.update(k_BNSD, v_BNSD, attention.layer_idx)
        if attention_mask is None:
            seen = torch.arange(T, device=x_BTH.device)
            mask_B1KS = (seen <= self.places[..., None])[:, None]
        else:
            mask_B1KS = self._at_places(attention_mask.expand(B, -1, -1, -1)[:, 0])[:, None]
        return self.forward(
            self._at_places(x_BTH),
            position_embeddings=(self._at_places(cos.expand(B, -1, -1)), self._at_places(sin.expand(B, -1, -1))),
            attention_mask=mask_B1KS,
            past_key_values=_Given(k_BNSD, v_BNSD),
            **kwargs | {"position_ids": None},
        )

    def _at_places(self, x_BTx: Tensor) -> Tensor:
        return x_BTx.gather(1, self.places[..., None].expand(-1, -1, x_BTx.shape[-1]))


class _Given:
    """A cache that knows all keys and values already."""

    def __init__(self, k_BNSD: Tensor, v_BNSD: Tensor) -> None:
        self.known = k_BNSD, v_BNSD

    def update(self, *_: Any) -> tuple[Tensor, Tensor]:
        return self.known

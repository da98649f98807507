"""Layers that the families share.

Shape suffixes: B rows, L tokens, T new tokens, S cached tokens, H hidden, N heads, K key/value heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlx_training.backend import ALL_AT_ONCE
from mlx_training.data.batch import Batch
from torch_backend.chunked_head import chunked_logprobs, chunked_scores, log_softmax_at


class RMSNorm(nn.Module):
    """x / rms(x) * weight, statistics in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight.to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias, statistics in float32 (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (x.shape[-1],), self.weight, self.bias, self.eps).to(x.dtype)


ROOM = 16  # places for tokens to come that a cache makes at a time
NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
}


class Linear(nn.Linear):
    """A Linear whose float32 weights follow the activations' type: float32 master weights under bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def rotate(x_BNLD: Tensor, angles_BLD: Tensor) -> Tensor:
    """Rotary position embedding, half-split layout (Su et al. 2021); angles are float32 (B or 1, L, D / 2)."""
    cos, sin = angles_BLD.cos()[:, None], angles_BLD.sin()[:, None]
    a, b = x_BNLD.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BNLD.dtype)


def attention(
    q_BNTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor | str | None, scale: float | None = None
) -> Tensor:
    """Scaled dot-product attention with grouped heads.

    `mask` is None, "causal", boolean (True = may look), or what is added to the scores; `scale` is 1 / sqrt(D) if None.
    """
    causal, grouped = isinstance(mask, str), q_BNTD.shape[1] != k_BKSD.shape[1]
    if grouped and q_BNTD.is_cuda and isinstance(mask, Tensor):  # there grouped heads under a mask have no fused kernel
        k_BKSD, v_BKSD = (x.repeat_interleave(q_BNTD.shape[1] // x.shape[1], dim=1) for x in (k_BKSD, v_BKSD))
        grouped = False
    return F.scaled_dot_product_attention(
        q_BNTD,
        k_BKSD,
        v_BKSD,
        attn_mask=None if causal else mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    )


def alibi(mask: Tensor | str, slopes_N: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """What ALiBi adds to the scores, float32 (B or 1, N, T, S): -slope * distance; -inf where `mask` forbids to look.

    `mask` is "causal" or boolean; the last query stands at the last key (Press et al. 2022).
    """
    places = torch.arange(num_keys, device=slopes_N.device)
    distance_TS = places[num_keys - num_queries :, None] - places[None]
    seen = distance_TS >= 0 if isinstance(mask, str) else mask
    bias_NTS = -slopes_N[:, None, None] * distance_TS
    return torch.where(seen, bias_NTS, -torch.inf)


class KVCache:
    """Keys and values of every layer for rows that are padded on the left; after `length` places there may be room."""

    def __init__(self, num_layers: int, left_padding: Sequence[int]) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers
        self.left_padding = torch.tensor(left_padding)
        self.is_padded = any(left_padding)
        self.length = 0
        self.keeps = True  # new keys and values; else a layer may be computed twice

    @classmethod
    def after(cls, past: Tensor, num_rows: int) -> "KVCache":
        """A cache that begins with keys and values (2, layers, B or 1, K, S, D)."""
        cache = cls(past.shape[1], [0] * num_rows)
        cache.length = past.shape[-2]
        keys, values = past.expand(-1, -1, num_rows, -1, -1, -1)
        cache.keys, cache.values = list(keys), list(values)
        return cache

    def append(self, layer: int, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
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

    def _grown(self, old_BKSD: Tensor | None, new_BKTD: Tensor) -> Tensor:
        """The old places and the new; single tokens are written into room that is left for those after them."""
        if old_BKSD is None:
            return new_BKTD
        end = self.length + new_BKTD.shape[2]
        if new_BKTD.shape[2] > 1:
            return torch.cat([old_BKSD[:, :, : self.length], new_BKTD], dim=2)
        if old_BKSD.shape[2] < end:
            old_BKSD = F.pad(old_BKSD, (0, 0, 0, ROOM))
        old_BKSD[:, :, self.length : end] = new_BKTD
        return old_BKSD

    def positions(self, num_new: int, *, of_keys: bool = False) -> Tensor:
        """Each row's own positions of the next `num_new` tokens (B, T), or of all keys then; 0 in the padding.

        (1, T) where no row is padded.
        """
        places = torch.arange(0 if of_keys else self.length, self.length + num_new)
        if not self.is_padded:
            return places[None]
        return (places[None] - self.left_padding[:, None]).clamp(min=0)

    def mask(self, num_new: int) -> Tensor:
        """Who may look where, boolean (B, 1, T, S): no future, no padding (padding itself looks at padding).

        (1, 1, T, S) where no row is padded.
        """
        total = self.length + num_new
        queries, keys = torch.arange(self.length, total), torch.arange(total)
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
        rows_B1 = torch.arange(len(lengths))[:, None]
        places_BS = (torch.arange(longest + ROOM) - moved.left_padding[:, None]).clamp(0, self.length - 1)

        for layer in range(len(self.keys)):
            for old, new in ((self.keys, moved.keys), (self.values, moved.values)):
                x_BKSD, old[layer] = old[layer], None
                new[layer] = None if x_BKSD is None else x_BKSD.transpose(1, 2)[rows_B1, places_BS].transpose(1, 2)
        return moved

    def select(self, rows: Sequence[int]) -> "KVCache":
        """A copy that holds these rows; this one stays valid."""
        index = torch.tensor(rows)
        copy = KVCache(len(self.keys), self.left_padding[index].tolist())
        copy.length = self.length
        copy.keys = [None if k is None else k[index.to(k.device)] for k in self.keys]
        copy.values = [None if v is None else v[index.to(v.device)] for v in self.values]
        return copy


class LanguageModel(nn.Module):
    """What objectives and sessions ask of a model; a family says how inputs, hidden states and logits are made."""

    gradient_checkpointing = False
    head_chunks = ALL_AT_ONCE

    def inputs(self, batch: Batch) -> Tensor:
        """Input embeddings (B, L, H)."""
        raise AssertionError("a family defines this")

    def hidden(self, x_BLH: Tensor, batch: Batch | None = None) -> Tensor:
        """Final hidden states (B, L, H); rows are padded at the end only, so a causal model needs no mask.

        Of the batch a family may read documents and lengths.
        """
        raise AssertionError("a family defines this")

    @property
    def head_layer(self) -> nn.Module:
        """The layer, often the embedding, whose matrix (V, H) makes the logits: everything in `head` that may train."""
        raise AssertionError("a family defines this")

    def head(self, h: Tensor) -> Tensor:
        """Logits (..., V), float32; of every place alone."""
        return F.linear(h, self.head_layer.weight.to(h.dtype)).float()

    def past(self, batch: Batch) -> Tensor | None:
        """Keys and values (2, layers, B or 1, heads, N, D) of leading places that training cannot change; None: none.

        The batch still holds NumPy arrays.
        """
        return None

    def shared_past(self, batch: Batch) -> Tensor | None:
        """Those of leading places that all rows share, of which there are several: what `read` need not read again."""
        return None

    def label_hidden(self, batch: Batch) -> Tensor:
        """Final hidden states at the label places (B, K, H): only those meet the head, never all (B, L, H)."""
        h = self.hidden(self.inputs(batch), batch)
        return h if batch.positions is None else h.gather(1, batch.positions[..., None].expand(-1, -1, h.shape[-1]))

    def logprobs(self, batch: Batch) -> Tensor:
        """log p(target), float32 (B, K)."""
        h_BKH, targets_BK = self.label_hidden(batch), batch.targets
        if (size := self.head_chunks.of(targets_BK.numel())) == targets_BK.numel():
            return log_softmax_at(self.head(h_BKH), targets_BK)
        h_NH, targets_N = h_BKH.flatten(0, 1), targets_BK.flatten()
        logprobs_N = chunked_logprobs(self.head, self.head_layer, h_NH, targets_N, size, ahead=self.training)
        return logprobs_N.view(targets_BK.shape)

    def scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """log p(target) and whether the target is the most probable token, both (B, K)."""
        h_BKH, targets_BK = self.label_hidden(batch), batch.targets
        size = self.head_chunks.of(targets_BK.numel())
        found = chunked_scores(self.head, h_BKH.flatten(0, 1), targets_BK.flatten(), size)
        logprobs_BK, hits_BK = (x_N.view(targets_BK.shape) for x_N in found)
        return logprobs_BK, hits_BK

    def read(self, batch: Batch) -> tuple[Tensor, Any]:
        """The last hidden state of every prompt (B, H), and a cache that goes on from there.

        Rows come padded at the end. They are moved to the right, so that every row's next token has the same place.
        """
        x_BLH, lengths_B1 = self.inputs(batch), batch.lengths[:, None]
        padding_B1 = lengths_B1.max() - lengths_B1
        rows_B1 = torch.arange(len(x_BLH))[:, None]
        places_BL = (torch.arange(int(lengths_B1.max())) - padding_B1.cpu()).clamp(min=0)
        cache = self.lm.make_cache(padding_B1[:, 0].tolist())
        return self.lm.extend(x_BLH[rows_B1, places_BL], cache)[:, -1], cache

    def aux_loss(self) -> Tensor | float:
        """What the last forward pass adds to the loss of a token, as balancing experts does."""
        return 0.0

    def run_layer(self, layer: nn.Module, *args: Any) -> Tensor:
        """A layer's output. With gradient checkpointing only its inputs are kept for the backward pass, which computes
        everything else again, with the same dropout.
        """
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of every place, float32 (B, L, V)."""
        return self.head(self.hidden(self.inputs(batch), batch))

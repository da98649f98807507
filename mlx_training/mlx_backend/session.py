"""Incremental decoding: prompts of different lengths side by side, one key/value cache."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_training.data.batch import Batch
from mlx_training.mlx_backend.layers import LanguageModel


class Session:
    """Prompts in, next-token logits out, one token per row at a time."""

    def __init__(self, model: LanguageModel, *, to_device: Callable[[Batch], Batch]) -> None:
        self.model, self.lm, self.to_device = model, model.lm, to_device
        self.cache: Any = None

    def prefill(self, batch: Batch) -> np.ndarray:
        """Read the prompts, series included; next-token logits float32 (B, V)."""
        h_BH, self.cache = self.model.read(self.to_device(batch))
        return np.array(self.model.head(h_BH))

    def extend(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token (B,) to every row; next-token logits float32 (B, V)."""
        h_BH = self.lm.extend(self.lm.embed(mx.array(tokens)[:, None]), self.cache)[:, 0]
        return np.array(self.model.head(h_BH))

    def fork(self, rows: Sequence[int]) -> "Session":
        """A session over copies of these rows; this one stays valid."""
        session = Session(self.model, to_device=self.to_device)
        session.cache = self.lm.select(self.cache, rows)
        return session

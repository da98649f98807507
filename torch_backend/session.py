"""Incremental decoding: prompts of different lengths side by side, one key/value cache."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mlx_training.data.batch import Batch
from torch_backend.layers import LanguageModel
from torch_backend.sharding import within


class Session:
    """Prompts in, next-token logits out, one token per row at a time."""

    def __init__(self, model: LanguageModel, *, to_device: Callable[[Batch], Batch]) -> None:
        self.model, self.lm, self.to_device = model, model.lm, to_device
        self.cache: Any = None

    @torch.no_grad()
    def prefill(self, batch: Batch) -> np.ndarray:
        """Read the prompts, series included; next-token logits float32 (B, V)."""
        return within(self.model, self._prefill, batch)

    def _prefill(self, batch: Batch) -> np.ndarray:
        h_BH, self.cache = self.model.read(self.to_device(batch))
        self.device = h_BH.device
        return self.model.head(h_BH).cpu().numpy()

    @torch.no_grad()
    def extend(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token (B,) to every row; next-token logits float32 (B, V)."""
        return within(self.model, self._extend, tokens)

    def _extend(self, tokens: np.ndarray) -> np.ndarray:
        x_B1H = self.lm.embed(torch.from_numpy(tokens).long()[:, None].to(self.device))
        h_BH = self.lm.extend(x_B1H, self.cache)[:, 0]
        return self.model.head(h_BH).cpu().numpy()

    def fork(self, rows: Sequence[int]) -> "Session":
        """A session over copies of these rows; this one stays valid."""
        session = Session(self.model, to_device=self.to_device)
        session.cache, session.device = self.lm.select(self.cache, rows), self.device
        return session

"""Either backend's PretrainedLM, asked in NumPy."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlx_training.backend import PACKAGES, Runtime


def load(backend: str, directory: Path, **options: Any) -> Any:
    return module(backend, "frozen").load_pretrained(directory, **options)


def model_around(backend: str, lm: Any, **runtime: Any) -> Any:
    """A text-only model around a PretrainedLM, nothing in it trained."""
    spec: Any = SimpleNamespace(adapter=None, llm=SimpleNamespace(decoder=None))
    return module(backend, "pretrained").PretrainedModel(spec, lm, Runtime(**runtime))


def module(backend: str, name: str) -> Any:
    return importlib.import_module(f"{PACKAGES[backend]}.{name}")


def to_array(backend: str, array: np.ndarray) -> Any:
    if backend == "mlx":
        import mlx.core as mx

        return mx.array(array)
    import torch

    return torch.from_numpy(array)


def logits(backend: str, lm: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of every place (B, L, V)."""
    return np.asarray(lm.head(lm.hidden(lm.embed(to_array(backend, tokens)))))


def embedding_gradient(backend: str, lm: Any, tokens: np.ndarray) -> np.ndarray:
    """d sum(logits * w) / d (input embeddings), with a fixed random w."""
    w = np.random.default_rng(1).normal(size=(*tokens.shape, lm.vocab_size)).astype(np.float32)
    x, w = lm.embed(to_array(backend, tokens)), to_array(backend, w)
    if backend == "mlx":
        import mlx.core as mx

        return np.array(mx.grad(lambda x: (lm.head(lm.hidden(x)) * w).sum())(x).astype(mx.float32))
    x = x.detach().requires_grad_()
    (lm.head(lm.hidden(x)) * w).sum().backward()
    return x.grad.float().numpy()

"""The parts of a frozen language model's layers: mlx-lm's own, with rotations that round as transformers' do."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_training.mlx_backend.blocks import Block


def build_causal_lm(config: dict[str, Any]) -> Any:
    """mlx-lm's model with our blocks; its random weights are lazy and never computed."""
    module = _mlx_lm_module({"mistral": "llama"}.get(config["model_type"], config["model_type"]))
    causal_lm = module.Model(module.ModelArgs.from_dict(config))
    causal_lm.model.layers = [Block(layer, i) for i, layer in enumerate(causal_lm.model.layers)]
    for layer in causal_lm.model.layers:
        if isinstance(layer.self_attn.rope, nn.RoPE):
            layer.self_attn.rope = RoPE(layer.self_attn.rope)
    return causal_lm


def _mlx_lm_module(name: str) -> ModuleType:
    """A module of `mlx_lm.models` without the package's own imports.

    They load transformers, and torch if there is one, for seconds, and lower the process's limit of open files.
    """
    is_imported, spec = "mlx_lm" in sys.modules, importlib.util.find_spec("mlx_lm")
    if not is_imported and spec is not None:
        sys.modules["mlx_lm"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"mlx_lm.models.{name}")
    finally:
        if not is_imported:
            sys.modules.pop("mlx_lm", None)  # whoever imports it gets all of it


class RoPE(nn.Module):
    """mlx.nn.RoPE with frequencies rounded once, as transformers has them.

    MLX's own are off by some units in the last place: 7e-5 in Gemma's logits after 2,048 tokens instead of 4e-6.
    """

    def __init__(self, rope: nn.RoPE) -> None:
        super().__init__()
        exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
        periods = np.float64(rope.base) ** exponents.astype(np.float64) / rope.scale
        self._periods = mx.array(periods.astype(np.float32))  # underscore: not a parameter
        self.dims = rope.dims

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return mx.fast.rope(x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods)

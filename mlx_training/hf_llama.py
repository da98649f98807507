"""Llama, Mistral and Qwen3 in Hugging Face's format, both ways: the decoder has their names already."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.checkpoint import check_shapes
from mlx_training.errors import ConfigError
from mlx_training.llm_config import normalize_llm_config
from mlx_training.merge import Weights
from mlx_training.spec import DecoderSpec, RopeScaling

MODEL_TYPES = ("llama", "mistral", "qwen3")
POSITIONS = {"llama": 2048, "mistral": 131072, "qwen3": 32768}  # transformers' value for an absent key


def read_llama(directory: Path, config: Mapping[str, Any]) -> tuple[DecoderSpec, dict[str, np.ndarray]]:
    """The spec and float32 parameters of a directory with this `config.json`; packed weights are expanded.

    Raises ConfigError for a setting that the family decoder cannot express, CheckpointError for other arrays.
    """
    normal, window = _normalized(config, str(directory / "config.json"))
    spec = _spec(normal, window, str(directory / "config.json"))
    weights = Weights(directory, normal)
    arrays = {name: weights[name] for names in weights.files.values() for name in names}
    check_shapes(
        {name: param.shape for name, param in spec.params().items()},
        {name: array.shape for name, array in arrays.items()},
        directory,
    )
    return spec, {name: arrays[name] for name in spec.params()}


def llama_kinds(spec: DecoderSpec) -> dict[str, list[str]]:
    """Llama, and before it what has a part of this model that Llama lacks -> the parts that each has not."""
    kinds = {}
    biases = [f"{key}: True" for key in ("attention_bias", "mlp_bias") if getattr(spec, key)]
    if _is_local(spec):
        kinds["Mistral"] = replace(spec, mixers=("causal",)).not_llama() + biases
    if spec.qk_norm:
        kinds["Qwen3"] = replace(_plain(spec), qk_norm=False).not_llama() + biases
    return kinds | {"Llama": _plain(spec).not_llama()}


def llama_config(spec: DecoderSpec, *, bos_token_id: int | None, eos_token_id: int) -> dict[str, Any]:
    """`config.json` of the exported model."""
    config = spec.hf_config(bos_token_id=bos_token_id, eos_token_id=eos_token_id)
    if _is_local(spec):
        return config | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": spec.window,
        }
    if spec.qk_norm:
        return config | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return config


def _is_local(spec: DecoderSpec) -> bool:
    return {*spec.mixers} == {"local"}


def _plain(spec: DecoderSpec) -> DecoderSpec:
    """The same with one name of a mixer for all layers, where they are alike."""
    return replace(spec, mixers=("causal",)) if {*spec.mixers} == {"causal"} else spec


def _normalized(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], int | None]:
    """The configuration as both libraries read it, and Mistral's window, which mlx-lm does not have."""
    if config["model_type"] != "mistral":
        return normalize_llm_config(dict(config), source), None
    window = config.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise ConfigError(f"{source}: sliding_window = {window!r}; expected a positive whole number or null")
    return normalize_llm_config({**config, "sliding_window": None}, source), window


def _spec(config: Mapping[str, Any], window: int | None, source: str) -> DecoderSpec:
    """The spec of a normalised `config.json`."""
    kind = config["model_type"]
    scaling = config["rope_scaling"]
    if scaling and scaling["rope_type"] != "llama3":
        raise ConfigError(
            f"{source}: RoPE type {scaling['rope_type']!r}; the family decoder has default and llama3 only"
        )
    rope = scaling and RopeScaling(
        scaling["factor"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["original_max_position_embeddings"],
    )
    spec = DecoderSpec(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        context_length=config.get("max_position_embeddings", POSITIONS[kind]),
        norm_eps=config["rms_norm_eps"],
        rope_theta=config["rope_theta"],
        rope_scaling=rope,
        attention_bias=kind == "llama" and config["attention_bias"],
        mlp_bias=kind == "llama" and config["mlp_bias"],
        qk_norm=kind == "qwen3",
        tie_word_embeddings=config["tie_word_embeddings"],
    )
    return replace(spec, mixers=("local",), window=window) if window else spec

"""Mamba and Mamba-2 checkpoints in Hugging Face's format, read as a spec and its arrays. No framework is imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.checkpoint import check_shapes
from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.json_text import parse_json
from mlx_training.llm_source import weight_files
from mlx_training.quantize import read_tensors, to_float32
from mlx_training.spec import SSMSpec

HEAD = "lm_head.weight"
FIXED: dict[str, tuple[Any, ...]] = {  # what a spec cannot say otherwise; the first value is the library's default
    "use_bias": (False,),
    "use_conv_bias": (True,),
    "hidden_act": ("silu", "swish"),
}
NO_LIMIT = (0.0, float("inf"))


def read_mamba(directory: Path) -> tuple[SSMSpec, dict[str, np.ndarray]]:
    """The spec and float32 parameters of a directory with `config.json` and safetensors files.

    Raises ConfigError for an architecture or setting that the family ssm cannot express, CheckpointError for files
    that are missing or damaged, or that do not hold the parameters of their configuration.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a model directory in Hugging Face's format")
    try:
        spec = mamba_spec(parse_json(path.read_bytes()), source=str(path))
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no configuration of a Mamba ({error!r}); download it again") from None
    arrays = {
        name.replace("backbone.embedding.", "backbone.embeddings."): to_float32(kind, array)  # the original spelling
        for file in weight_files(Path(directory))
        for name, (kind, array) in read_tensors(file).items()
    }
    if spec.tie_word_embeddings:
        arrays.pop(HEAD, None)  # a copy of the embeddings
    given = {name: array.shape for name, array in arrays.items()}
    check_shapes({name: param.shape for name, param in spec.params().items()}, given, directory)
    return spec, {name: arrays[name] for name in spec.params()}


def mamba_spec(config: Mapping[str, Any], *, source: str) -> SSMSpec:
    """The spec of a `config.json` of model type mamba or mamba2."""
    kind = config.get("model_type")
    if kind not in ("mamba", "mamba2"):
        raise ConfigError(f"{source}: model_type {kind!r}; the family ssm reads mamba and mamba2")
    for key, allowed in FIXED.items():
        if (value := config.get(key, allowed[0])) not in allowed:
            raise ConfigError(f"{source}: {key} {value!r}; the family ssm has {allowed[0]!r} only")
    limit = tuple(map(_number, config.get("time_step_limit", NO_LIMIT)))
    if kind == "mamba2" and limit != NO_LIMIT:
        raise ConfigError(f"{source}: time_step_limit {limit}; the family ssm does not limit time steps: [0, inf] only")
    hidden, rank = config["hidden_size"], config.get("time_step_rank", "auto")
    shared = {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "num_layers": config["num_hidden_layers"],
        "mixers": (kind,),
        "expand": config.get("expand", 2),
        "state_size": config["state_size"],
        "conv_kernel": config.get("conv_kernel", 4),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": config.get("tie_word_embeddings", kind == "mamba"),
        "context_length": config.get("max_position_embeddings", 2048),  # what it trained on is not written down
    }
    if kind == "mamba":
        return SSMSpec(**shared, dt_rank=-(-hidden // 16) if rank == "auto" else rank)
    heads = {"head_dim": config["head_dim"], "num_groups": config["n_groups"]}
    return SSMSpec(**shared, **heads, chunk_size=config.get("chunk_size", 256))


def _number(value: Any) -> float:
    """A number of `config.json`, where transformers spells infinity {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)

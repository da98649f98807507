"""Models of Hugging Face's that a spec can express: a directory as spec and arrays, and the way back."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.hf_gpt2 import gpt2_config, not_gpt2, read_gpt2, to_gpt2
from mlx_training.hf_llama import MODEL_TYPES, llama_config, llama_kinds, read_llama
from mlx_training.hf_mamba import read_mamba
from mlx_training.json_text import parse_json
from mlx_training.llm_source import safetensors_header, weight_files
from mlx_training.spec import DecoderSpec, Spec, SSMSpec

Arrays = dict[str, np.ndarray]
Trainable = DecoderSpec | SSMSpec
Read = Callable[[Path, Mapping[str, Any]], tuple[Trainable, Arrays]]

READERS: dict[str, Read] = {
    "gpt2": read_gpt2,
    **dict.fromkeys(MODEL_TYPES, read_llama),
    **dict.fromkeys(("mamba", "mamba2"), lambda directory, _: read_mamba(directory)),
}
# What another value of does not make another model, or shows in a parameter's shape.
HARMLESS = {"context_length", "dropout", "init", "init_std", "position_init_std", "chunk_size", "dt_rank", "vocab_size"}


def read_huggingface(directory: Path) -> tuple[Trainable, Arrays]:
    """The spec and float32 parameters of a directory with `config.json` and safetensors files.

    Raises ConfigError for an architecture or setting that no spec can express, CheckpointError for files that are
    missing or damaged, or that do not hold the parameters of their configuration.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a model directory in Hugging Face's format")
    try:
        config = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download the model again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in READERS:
        raise ConfigError(f"{path}: model_type {kind!r} cannot be read as a trainable model; {', '.join(READERS)} can")
    _check_layers(Path(directory), config)
    return READERS[kind](Path(directory), config)


def to_huggingface(spec: Trainable, arrays: Arrays, **special: Any) -> tuple[dict[str, Any], Arrays]:
    """`config.json` and the arrays of a trained model; `special`: bos_token_id and eos_token_id.

    Raises ConfigError, naming the nearest of Hugging Face's models and what it lacks, where none fits.
    """
    if isinstance(spec, SSMSpec):
        _check("Mamba", spec.not_mamba())
        return spec.hf_config(**special), arrays
    kinds = llama_kinds(spec) | {"GPT-2": not_gpt2(spec)}
    nearest = min(kinds, key=lambda kind: len(kinds[kind]))
    _check(nearest, kinds[nearest])
    if nearest == "GPT-2":
        return gpt2_config(spec, **special), to_gpt2(arrays, spec)
    return llama_config(spec, **special), arrays


def check_same_model(foreign: Trainable, spec: Spec, where: str | Path) -> None:
    """ConfigError unless parameters of `foreign` mean the same in `spec`: what their shapes do not tell."""
    if type(foreign) is not type(spec):
        raise ConfigError(
            f"{where} holds a {_family(foreign)}, this run trains a {_family(spec)}; set model.family, "
            "or give it as model.llm_id, where it stays frozen"
        )
    differ = []
    for name in (field.name for field in fields(foreign) if field.name not in HARMLESS):
        there, here = (_said(getattr(each, name)) for each in (foreign, spec))
        if there != here:
            differ.append(f"{name}: {there} there, {here} in this run")
    if differ:
        raise ConfigError(
            f"{where} holds another model than this run trains: {'; '.join(differ)}. Set model.{_family(spec)} to what "
            "is there; `mlx-training checkpoint import` writes that section"
        )


def _check_layers(directory: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError for more layers than arrays: a damaged number could ask for a table that never ends."""
    layers = config.get("n_layer", config.get("num_hidden_layers"))
    count = sum(len(safetensors_header(file)[0]) for file in weight_files(directory))
    if isinstance(layers, int) and layers > count:
        raise CheckpointError(
            f"{directory} holds {count} arrays, config.json speaks of {layers} layers; download it again"
        )


def _check(kind: str, misfits: list[str]) -> None:
    if misfits:
        raise ConfigError(f"Hugging Face's {kind} has no {', '.join(misfits)}; this model cannot be exported as one")


def _family(spec: Spec) -> str:
    return type(spec).__name__.removesuffix("Spec").lower()


def _said(value: Any) -> Any:
    """Patterns that repeat one word are that word."""
    return (value[0],) if isinstance(value, tuple) and len({*value}) == 1 else value

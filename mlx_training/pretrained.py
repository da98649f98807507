"""Specs on a frozen language model: its files say which Linears an adapter can go on. No framework is imported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_training.config_model import LoRAConfig, PretrainedConfig, TimeSeriesConfig
from mlx_training.errors import ConfigError
from mlx_training.llm_source import (
    describe_llm,
    is_weight,
    read_llm_config,
    resolve_llm,
    safetensors_header,
    weight_files,
)
from mlx_training.spec import AdapterSpec, EncoderSpec, FrozenLM, PretrainedSpec, ProjectorSpec, TimeSeriesSpec


def timeseries_spec(model: TimeSeriesConfig) -> TimeSeriesSpec:
    """The spec of a `model` section of family timeseries."""
    llm = _frozen_lm(model)
    return TimeSeriesSpec(
        llm=llm,
        encoder=EncoderSpec(**model.encoder.model_dump()),
        projector=ProjectorSpec(**model.projector.model_dump()),
        train_lm_head=model.train_lm_head,
        adapter=_adapter(model.lora, llm.directory),
    )


def pretrained_spec(model: TimeSeriesConfig | PretrainedConfig) -> PretrainedSpec:
    """The spec of a `model` section with a frozen LM."""
    if isinstance(model, TimeSeriesConfig):
        return timeseries_spec(model)
    llm = _frozen_lm(model)
    return PretrainedSpec(llm, adapter=_adapter(model.lora, llm.directory))


def find_linears(directory: Path, targets: Sequence[str]) -> tuple[tuple[str, int, int], ...]:
    """(path, outputs, inputs) of the matrices that `targets` name, in the model's order.

    A target is a path or its end ("q_proj", "layers.0.self_attn.q_proj"), as in PEFT.

    Raises:
        ConfigError: a target that names no Linear of this model.
    """
    config = read_llm_config(directory)
    shapes: dict[str, Sequence[int]] = {}
    for file in weight_files(directory):
        shapes |= {name: e["shape"] for name, e in safetensors_header(file)[0].items() if is_weight(name, config)}
    linears = {}
    for name, shape in shapes.items():
        path, _, part = name.rpartition(".")
        if part == "weight" and len(shape) == 2 and not path.endswith("embed_tokens"):
            num_groups = shapes.get(f"{path}.scales", (0, 0))[1]
            linears[path] = shape[0], num_groups * group_size(config, path) if num_groups else shape[1]
    ends = {path.rpartition(".")[2] for path in linears}
    for target in targets:
        if not any(_ends_in(path, target) for path in linears):
            raise ConfigError(f"{target!r} names no Linear of {directory}; there are: {', '.join(sorted(ends))}")
    chosen = [path for path in linears if any(_ends_in(path, target) for target in targets)]
    return tuple((path, *linears[path]) for path in sorted(chosen, key=_natural))


def _frozen_lm(model: TimeSeriesConfig | PretrainedConfig) -> FrozenLM:
    directory = resolve_llm(model.llm_id, model.llm_revision)
    info = describe_llm(directory)
    weights = "dequantized" if model.llm_weights == "auto" else model.llm_weights
    return FrozenLM(directory, info.hidden_size, info.vocab_size, info.sha256, weights)


def _adapter(lora: LoRAConfig | None, directory: Path) -> AdapterSpec | None:
    if lora is None:
        return None
    try:
        linears = find_linears(directory, lora.targets)
    except ConfigError as error:
        raise ConfigError(f"model.lora.targets: {error}") from None
    return AdapterSpec(linears, lora.rank, lora.alpha, lora.dropout, lora.dora)


def group_size(config: Mapping[str, Any], path: str) -> int:
    """Inputs that share a scale in a packed layer."""
    quantization = config["quantization"]
    block = quantization.get(path)
    return int((block if isinstance(block, dict) else quantization)["group_size"])


def _ends_in(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]

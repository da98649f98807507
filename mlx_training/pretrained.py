"""Specs on a frozen language model: its files say which Linears an adapter can go on. No framework is imported."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_training.config_model import LoRAConfig, PretrainedConfig, TimeSeriesConfig
from mlx_training.data.tokenizer import Tokenizer, check_vocabulary
from mlx_training.errors import ConfigError
from mlx_training.llm_source import (
    describe_llm,
    fingerprint,
    is_weight,
    read_llm_config,
    resolve_llm,
    safetensors_header,
    weight_files,
)
from mlx_training.spec import (
    AdapterSpec,
    DecoderSpec,
    EncoderSpec,
    FrozenLM,
    PretrainedSpec,
    ProjectorSpec,
    Spec,
    TimeSeriesSpec,
)
from mlx_training.trained_run import is_run, read_decoder


def timeseries_spec(model: TimeSeriesConfig) -> TimeSeriesSpec:
    """The spec of a `model` section of family timeseries."""
    llm = frozen_lm(model)
    return TimeSeriesSpec(
        llm=llm,
        encoder=EncoderSpec(**model.encoder.model_dump()),
        projector=ProjectorSpec(**model.projector.model_dump()),
        train_lm_head=model.train_lm_head,
        adapter=_adapter(model.lora, llm),
    )


def pretrained_spec(model: TimeSeriesConfig | PretrainedConfig) -> PretrainedSpec:
    """The spec of a `model` section with a frozen LM."""
    if isinstance(model, TimeSeriesConfig):
        return timeseries_spec(model)
    llm = frozen_lm(model)
    return PretrainedSpec(llm, adapter=_adapter(model.lora, llm))


def find_linears(
    directory: Path, targets: Sequence[str], decoder: DecoderSpec | None = None
) -> tuple[tuple[str, int, int], ...]:
    """(path, outputs, inputs) of the matrices that `targets` name, in the model's order.

    A target is a path or its end ("q_proj", "layers.0.self_attn.q_proj"), as in PEFT. Of a `decoder` the directory
    gives the name only.

    Raises:
        ConfigError: a target that names no Linear of this model.
    """
    linears = _linears_of_files(directory) if decoder is None else _linears_of(decoder)
    ends = {path.rpartition(".")[2] for path in linears}
    for target in targets:
        if not any(_ends_in(path, target) for path in linears):
            raise ConfigError(
                f"{target!r} names no Linear of {directory}{_stacked(decoder, target)}; there are: "
                f"{', '.join(sorted(ends))}"
            )
    chosen = [path for path in linears if any(_ends_in(path, target) for target in targets)]
    return tuple((path, *linears[path]) for path in sorted(chosen, key=_natural))


def frozen_lm(model: TimeSeriesConfig | PretrainedConfig) -> FrozenLM:
    """The frozen LM that a `model` section names: a directory, or the decoder of a run of this project."""
    directory = resolve_llm(model.llm_id, model.llm_revision)
    if is_run(directory):
        found = read_decoder(directory)
        sizes = found.spec.hidden_size, found.spec.vocab_size
        return FrozenLM(found.checkpoint, *sizes, fingerprint(weight_files(found.checkpoint))[0], decoder=found.spec)
    info = describe_llm(directory)
    return FrozenLM(directory, info.hidden_size, info.vocab_size, info.sha256, model.llm_weights)


def frozen_config(spec: Spec) -> dict[str, Any] | None:
    """`config.json` of a frozen LM; None where there is none: a decoder's spec says the same."""
    return read_llm_config(spec.llm.directory) if isinstance(spec, PretrainedSpec) and not spec.llm.decoder else None


def frozen_tokenizer(llm: FrozenLM) -> Tokenizer:
    """The frozen LM's own tokenizer. Raises DataError when it has more ids than the LM."""
    directory = read_decoder(llm.directory).tokenizer if llm.decoder else llm.directory
    tokenizer = Tokenizer.load(directory)
    check_vocabulary(tokenizer.vocab_size, llm.vocab_size, str(llm.directory))
    return tokenizer


def longest_text(spec: PretrainedSpec) -> int | None:
    """Tokens that the frozen LM was made for, if that is known."""
    if spec.llm.decoder:
        return spec.llm.decoder.context_length
    return read_llm_config(spec.llm.directory).get("max_position_embeddings")


def _linears_of_files(directory: Path) -> dict[str, tuple[int, int]]:
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
    return linears


def _linears_of(decoder: DecoderSpec) -> dict[str, tuple[int, int]]:
    matrices = {name: param.shape for name, param in decoder.params().items() if len(param.shape) == 2}
    found = {name.removesuffix(".weight"): (out, size) for name, (out, size) in matrices.items()}
    return {path: sizes for path, sizes in found.items() if not path.endswith(("embed_tokens", "embed_positions"))}


def _stacked(decoder: DecoderSpec | None, target: str) -> str:
    """That a target names the stacked weights of experts, if so."""
    stacks = (name for name, param in decoder.params().items() if len(param.shape) == 3) if decoder else ()
    named = any(_ends_in(name.removesuffix(".weight"), target) for name in stacks)
    return " but the stacked weights of its experts, which have no adapters" if named else ""


def _adapter(lora: LoRAConfig | None, llm: FrozenLM) -> AdapterSpec | None:
    if lora is None:
        return None
    try:
        linears = find_linears(llm.directory, lora.targets, llm.decoder)
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

"""A trained run in other formats: a Hugging Face directory, the same quantised for MLX, adapters, OpenTSLM's file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from mlx_training.adapters import Adapter, kept_adapter, split_adapter, write_mlx_lm, write_peft
from mlx_training.checkpoint import CheckpointStore, check_shapes
from mlx_training.config_model import DecoderConfig, LanguageConfig, PretrainedConfig, SSMConfig, TimeSeriesConfig
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.hf_llama import llama_kinds
from mlx_training.huggingface import Trainable, to_huggingface
from mlx_training.import_run import fill_run
from mlx_training.llm_config import FAMILIES
from mlx_training.llm_source import GROUP_SIZES, describe_llm, resolve_llm
from mlx_training.merge import merge_and_quantize, merge_decoder, merge_directory
from mlx_training.opentslm import write_opentslm
from mlx_training.pretrained import frozen_lm, pretrained_spec
from mlx_training.quantize import quantize_directory
from mlx_training.run_directory import whole_directory
from mlx_training.spec import DecoderSpec, FrozenLM, Spec, SSMSpec
from mlx_training.trained_run import is_run, language_spec, read_decoder, read_run_config, tokenizer_of

FORMATS = {  # and what each can hold: runs of a family, or the adapters of a run
    "hf": ("decoder", "ssm", "adapters"),
    "mlx": ("decoder", "adapters"),
    "peft": ("adapters",),
    "mlx-lm": ("adapters",),
    "run": ("adapters",),
    "opentslm": ("timeseries",),
}
OPENTSLM_FILE = "model_checkpoint.pt"


def export_run(run: Path, target: Path, form: str, bits: int | None = None, group_size: int | None = None) -> str:
    """Write the best checkpoint of a run (else its latest) as the directory `target`; what was written, in words.

    `target` must be absent or empty, and appears complete or not at all. `bits` (4) and `group_size` (64) are MLX's.
    Raises ConfigError for a family that the format cannot hold, CheckpointError when a file cannot be read or written.
    """
    if form != "mlx" and (bits or group_size):
        raise ConfigError(
            f"--bits and --group-size belong to --format mlx; --format {form} writes float32: leave them out"
        )
    if form != "opentslm" or (run / "config.yaml").is_file():  # weights imported from OpenTSLM come without one
        model = read_run_config(run).model
        held = {model.family, *(["adapters"] if getattr(model, "lora", None) else [])}
        if not held & {*FORMATS[form]}:
            others = [name for name, holds in FORMATS.items() if held & {*holds}]
            advice = f"Give --format {' or '.join(others)}" if others else f"No format holds family {model.family}"
            if others == ["opentslm"]:
                advice += ", which can hold what was trained with model.preset: opentslm-sp, and no other encoder"
            raise ConfigError(
                f"{run} is a run of family {' with '.join(sorted(held, reverse=True))}; --format {form} holds family "
                f"{' or '.join(FORMATS[form])} only. {advice}"
            )
    write: dict[str, Callable[[Path], str]] = {
        "hf": lambda folder: _export_dense(run, folder),
        "mlx": lambda folder: _export_mlx(run, folder, bits, group_size),
        "peft": lambda folder: _export_adapter(run, folder, form),
        "mlx-lm": lambda folder: _export_adapter(run, folder, form),
        "run": lambda folder: _export_run(run, folder, Path(target)),
        "opentslm": lambda folder: export_opentslm(run, folder / OPENTSLM_FILE),
    }
    with whole_directory(Path(target)) as folder:
        return write[form](folder)


def export_huggingface(run: Path, target: Path) -> str:
    """Write the best checkpoint of a run to `target`: config, float32 weights and the run's tokenizer.

    Adapters on a decoder are merged into it. Raises ConfigError when the run is not of family decoder or ssm, nor has
    such adapters, or the model has parts that Hugging Face's models have not.
    """
    spec, model, source, written = _own_model(run)
    tokenizer = Tokenizer.load(source)
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    try:
        described, arrays = to_huggingface(spec, model, **special)
    except ConfigError as error:
        raise ConfigError(f"{run}: {error}") from None
    target.mkdir(parents=True, exist_ok=True)
    if (source / "tokenizer.json").is_file() or (source / "tokenizer.model").is_file():
        for file in sorted(source.glob("*token*")):  # tokenizer.json, tokenizer_config.json, tokenizer.model, ...
            (target / file.name).write_bytes(file.read_bytes())
    else:  # files of GPT-2 or tiktoken
        tokenizer.save(target)
    save_file(arrays, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    (target / "generation_config.json").write_text(json.dumps(special, indent=1) + "\n")
    return written


def export_opentslm(run: Path, out: Path) -> str:
    """Write the encoder, projector and adapters of a run as OpenTSLM's file."""
    checkpoint = CheckpointStore(run).best_or_latest()
    arrays, lora = split_adapter(checkpoint.model, checkpoint.state)
    lora = lora or kept_adapter(run)
    if lora is not None and lora.dora:
        raise ConfigError(f"{run}: adapters with dora; OpenTSLM has plain LoRA only")
    write_opentslm(out, arrays, lora=lora)
    return f"{len(arrays)} arrays of step {checkpoint.step}; {lora or 'no LoRA'}"


def run_spec(run: Path) -> Spec:
    """The spec of a trained run, without reading its data. Raises UserError where its LM or tokenizer is gone."""
    model = read_run_config(run).model
    if isinstance(model, LanguageConfig):
        return language_spec(model, run)
    return pretrained_spec(model)


def _export_dense(run: Path, target: Path) -> str:
    """A decoder, or the frozen LM with the adapters merged into it; of a time-series run the LM alone."""
    if _is_our_own(run):
        return export_huggingface(run, target)
    llm, adapter, step = _adapter_of(run)
    merge_directory(llm.directory, adapter, target)
    return f"{adapter} of step {step} merged into {llm.directory}, float32{_left_out(run)}"


def _export_run(run: Path, folder: Path, target: Path) -> str:
    """A decoder with the adapters merged into it, as a run."""
    if not _is_our_own(run):
        raise ConfigError(
            f"{run}: --format run is for adapters on a run of family decoder, their base is in Hugging Face's format; "
            "give --format hf, and make a run of what it writes with `mlx-training checkpoint import`"
        )
    spec, arrays, tokenizer, written = _own_model(run)
    fill_run(folder, target, spec, arrays, Tokenizer.load(tokenizer), str(run))
    return f"{written}: a run of family decoder"


def _export_adapter(run: Path, target: Path, form: str) -> str:
    llm, adapter, step = _adapter_of(run)
    if llm.decoder:
        _check_libraries_know(llm.decoder, run, form)
    if form == "peft":
        write_peft(target, adapter, _on_frozen_lm(run).llm_id)
    else:
        layers = llm.decoder.num_layers if llm.decoder else describe_llm(llm.directory).num_layers
        write_mlx_lm(target, adapter, layers)
    return f"{adapter} of step {step}{_left_out(run)}"


def _check_libraries_know(decoder: DecoderSpec, run: Path, form: str) -> None:
    """ConfigError for adapters whose base PEFT or mlx-lm cannot load under the same names."""
    kinds = {kind: lacks for kind, lacks in llama_kinds(decoder).items() if form == "peft" or kind != "Mistral"}
    nearest = min(kinds, key=lambda kind: len(kinds[kind]))
    if kinds[nearest]:
        raise ConfigError(
            f"{run}: --format {form} holds adapters on a Llama or Qwen3; of their base {nearest} has no "
            f"{', '.join(kinds[nearest])}. A run goes on from them with training.init_from={run}; base and adapters in "
            "one: --format run, or hf where it is a GPT-2"
        )


class _Model(NamedTuple):
    """A model of this project's own, as a run left it."""

    spec: Trainable
    arrays: dict[str, np.ndarray]
    tokenizer: Path
    written: str  # in words


def _own_model(run: Path) -> _Model:
    """What a run trained from scratch, or the decoder that it trained adapters on with these merged into it."""
    model = read_run_config(run).model
    if isinstance(model, LanguageConfig):
        if not isinstance(model, DecoderConfig | SSMConfig):
            raise ConfigError(f"{run}: a {model.family} run; only decoder and ssm runs can be exported as a directory")
        checkpoint, spec = CheckpointStore(run).best_or_latest(), language_spec(model, run)
        assert isinstance(spec, DecoderSpec | SSMSpec)
        shapes = {name: array.shape for name, array in checkpoint.model.items()}
        check_shapes({name: p.shape for name, p in spec.params().items()}, shapes, str(checkpoint.path))
        written = f"{len(shapes)} float32 arrays of step {checkpoint.step}"
        return _Model(spec, checkpoint.model, tokenizer_of(model, run), written)
    llm, adapter, step = _adapter_of(run)
    assert llm.decoder is not None
    written = f"{adapter} of step {step} merged into {llm.directory}, float32{_left_out(run)}"
    return _Model(llm.decoder, merge_decoder(llm.directory, adapter), read_decoder(llm.directory).tokenizer, written)


def _is_our_own(run: Path) -> bool:
    """Whether a run's model, or the frozen LM of its adapters, is one that this project trains from scratch."""
    model = read_run_config(run).model
    return isinstance(model, LanguageConfig) or is_run(resolve_llm(model.llm_id, model.llm_revision))


def _adapter_of(run: Path) -> tuple[FrozenLM, Adapter, int]:
    """Base, adapters and step of a run that has some; the base must be the one they were trained on."""
    checkpoint = CheckpointStore(run).best_or_latest()
    _, adapter = split_adapter(checkpoint.model, checkpoint.state)
    assert adapter is not None, "the configuration of a run with adapters says so"
    llm = frozen_lm(_on_frozen_lm(run))
    if llm.sha256 != adapter.llm_sha256:
        raise CheckpointError(
            f"{llm.directory} is another model than {checkpoint.path} was trained on (sha256 "
            f"{str(adapter.llm_sha256)[:12]}, found {llm.sha256[:12]}); put the base back, or set model.llm_id in "
            f"{run / 'config.yaml'} to where it is now"
        )
    return llm, adapter, checkpoint.step


def _on_frozen_lm(run: Path) -> TimeSeriesConfig | PretrainedConfig:
    model = read_run_config(run).model
    assert isinstance(model, TimeSeriesConfig | PretrainedConfig), "only these have adapters"
    return model


def _left_out(run: Path) -> str:
    return "; encoder and projector are not in it" if isinstance(_on_frozen_lm(run), TimeSeriesConfig) else ""


def _export_mlx(run: Path, target: Path, bits: int | None, group_size: int | None) -> str:
    """Quantise the dense model as `mlx_lm.convert -q` would; by default as the base was, else to 4 bits by 64."""
    if not _is_our_own(run):
        llm, adapter, step = _adapter_of(run)
        packed = describe_llm(llm.directory).quantization or {}
        bits, group_size = bits or packed.get("bits", 4), group_size or packed.get("group_size", 64)
        changed = merge_and_quantize(llm.directory, adapter, target, bits, group_size)
        return f"{adapter} of step {step} merged into {llm.directory}, {changed}{_left_out(run)}"
    bits, group_size = bits or 4, group_size or 64
    scratch = target / "float"
    written = export_huggingface(run, scratch)
    described = json.loads((scratch / "config.json").read_text())
    if described["model_type"] not in FAMILIES or described.get("sliding_window"):
        raise ConfigError(
            f"{run}: --format mlx holds Llama and Qwen3, this is a {described['model_type']}: give --format hf"
        )
    width = described["hidden_size"]
    if width % group_size:
        fitting = [str(size) for size in GROUP_SIZES if width % size == 0]
        advice = f"--group-size {' or '.join(fitting)}" if fitting else "--format hf, which keeps float32"
        raise ConfigError(f"--group-size {group_size} does not divide this model's hidden_size {width}; give {advice}")
    quantize_directory(scratch, target, bits, group_size)
    shutil.rmtree(scratch)
    return f"{written}, matrices quantised to {bits} bits in groups of {group_size}"

"""A trained run in other formats: a Hugging Face Llama or Mamba, the same quantised for MLX, OpenTSLM's file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save_file

from mlx_training.assemble import timeseries_spec
from mlx_training.checkpoint import CheckpointStore, check_shapes
from mlx_training.config import RunConfig, load_config
from mlx_training.config_model import DecoderConfig, LanguageConfig, SSMConfig
from mlx_training.data.text_data import vocabulary_size
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.llm_source import GROUP_SIZES
from mlx_training.opentslm import read_lora, write_opentslm
from mlx_training.quantize import quantize_directory
from mlx_training.spec import Spec, SSMSpec

FORMATS = {"hf": ("decoder", "ssm"), "mlx": ("decoder",), "opentslm": ("timeseries",)}  # and what each can hold
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
    target = Path(target).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "is not empty" if target.is_dir() else "is a file"
        raise ConfigError(f"--to {target} {what}; give a directory that does not exist yet. Nothing was changed")
    if form != "opentslm" or (run / "config.yaml").is_file():  # weights imported from OpenTSLM come without one
        family = read_run_config(run).model.family
        if family not in FORMATS[form]:
            others = [name for name, holds in FORMATS.items() if family in holds]
            advice = f"Give --format {' or '.join(others)}" if others else f"No format holds family {family}"
            raise ConfigError(
                f"{run} is a run of family {family}; --format {form} holds family {' or '.join(FORMATS[form])} only. "
                f"{advice}"
            )
    write: dict[str, Callable[[Path], str]] = {
        "hf": lambda folder: export_huggingface(run, folder),
        "mlx": lambda folder: _export_mlx(run, folder, bits or 4, group_size or 64),
        "opentslm": lambda folder: export_opentslm(run, folder / OPENTSLM_FILE),
    }
    temporary = target.with_name(f".tmp-{target.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed export left behind
        temporary.mkdir(parents=True)
        written = write[form](temporary)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--to {target}: the export could not be written: {error}. Free space there, or give another directory; "
            "nothing was left behind."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return written


def export_huggingface(run: Path, target: Path) -> str:
    """Write the best checkpoint of a run to `target`: config, float32 weights and the run's tokenizer.

    Raises ConfigError when the run is not of family decoder or ssm, or has parts that Hugging Face's models have not.
    """
    config = read_run_config(run)
    if not isinstance(config.model, DecoderConfig | SSMConfig):
        raise ConfigError(
            f"{run}: a {config.model.family} run; only decoder and ssm runs can be exported as a directory"
        )
    source = _tokenizer_of(config.model, run)
    tokenizer = Tokenizer.load(source)
    spec = config.model.spec(vocabulary_size(config.model, tokenizer))
    kind, misfits = ("Mamba", spec.not_mamba()) if isinstance(spec, SSMSpec) else ("Llama", spec.not_llama())
    if misfits:
        raise ConfigError(
            f"{run}: Hugging Face's {kind} has no {', '.join(misfits)}; this model cannot be exported as one"
        )
    checkpoint = CheckpointStore(run).best_or_latest()
    shapes = {name: array.shape for name, array in checkpoint.model.items()}
    check_shapes({name: p.shape for name, p in spec.params().items()}, shapes, str(checkpoint.path))
    target.mkdir(parents=True, exist_ok=True)
    if (source / "tokenizer.json").is_file() or (source / "tokenizer.model").is_file():
        for file in sorted(source.glob("*token*")):  # tokenizer.json, tokenizer_config.json, tokenizer.model, ...
            (target / file.name).write_bytes(file.read_bytes())
    else:  # files of GPT-2 or tiktoken
        tokenizer.save(target)
    save_file(checkpoint.model, target / "model.safetensors", metadata={"format": "pt"})
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    (target / "config.json").write_text(json.dumps(spec.hf_config(**special), indent=1) + "\n")
    (target / "generation_config.json").write_text(json.dumps(special, indent=1) + "\n")
    return f"{len(shapes)} float32 arrays of step {checkpoint.step}"


def export_opentslm(run: Path, out: Path) -> str:
    """Write the encoder, projector and kept LoRA weights of a run as OpenTSLM's file."""
    checkpoint = CheckpointStore(run).best_or_latest()
    lora = read_lora(run)
    write_opentslm(out, checkpoint.model, lora=lora)
    return f"{len(checkpoint.model)} arrays of step {checkpoint.step}; {lora or 'no LoRA'}"


def read_run_config(run: Path) -> RunConfig:
    """The configuration that a run was trained with. Raises CheckpointError where there is none."""
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: no config.yaml; expected a run directory, as `mlx-training train` makes it")
    return load_config(run / "config.yaml")


def run_spec(run: Path) -> Spec:
    """The spec of a trained run, without reading its data. Raises UserError where its LM or tokenizer is gone."""
    model = read_run_config(run).model
    if isinstance(model, LanguageConfig):
        return model.spec(vocabulary_size(model, Tokenizer.load(_tokenizer_of(model, run))))
    return timeseries_spec(model)


def _export_mlx(run: Path, target: Path, bits: int, group_size: int) -> str:
    """Quantise what `export_huggingface` writes, as `mlx_lm.convert -q` would."""
    scratch = target / "float"
    written = export_huggingface(run, scratch)
    width = json.loads((scratch / "config.json").read_text())["hidden_size"]
    if width % group_size:
        fitting = [str(size) for size in GROUP_SIZES if width % size == 0]
        advice = f"--group-size {' or '.join(fitting)}" if fitting else "--format hf, which keeps float32"
        raise ConfigError(f"--group-size {group_size} does not divide this model's hidden_size {width}; give {advice}")
    quantize_directory(scratch, target, bits, group_size)
    shutil.rmtree(scratch)
    return f"{written}, matrices quantised to {bits} bits in groups of {group_size}"


def _tokenizer_of(model: LanguageConfig, run: Path) -> Path:
    source = Path(model.tokenizer) if isinstance(model.tokenizer, str) else run / "tokenizer"
    whole = source.name in ("tokenizer.json", "tokenizer.model")
    return source.parent if whole and source.is_file() else source

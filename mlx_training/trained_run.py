"""What a run directory says of the model in it, without its data: configuration, tokenizer, and a decoder to build on.

A run of family decoder (one of `checkpoint import` too) can be the frozen language model of another.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from mlx_training.checkpoint import CheckpointStore, check_shapes
from mlx_training.checkpoint_files import MODEL, STEP_DIRECTORY, verify
from mlx_training.config import RunConfig, load_config
from mlx_training.config_model import DecoderConfig, LanguageConfig, PretrainedConfig
from mlx_training.data.text_data import vocabulary_size
from mlx_training.data.tokenizer import Tokenizer
from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.llm_source import safetensors_header
from mlx_training.spec import DecoderSpec, Spec


@dataclass(frozen=True)
class TrainedDecoder:
    """A checkpoint of a decoder, its spec (without dropout: it stays frozen) and where its tokenizer is."""

    checkpoint: Path
    spec: DecoderSpec
    tokenizer: Path


def read_run_config(run: Path) -> RunConfig:
    """The configuration that a run was trained with. Raises CheckpointError where there is none."""
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: no config.yaml; expected a run directory, as `mlx-training train` makes it")
    return load_config(run / "config.yaml")


def language_spec(model: LanguageConfig, run: Path) -> Spec:
    """The spec of a run that was trained from scratch on text."""
    return model.spec(vocabulary_size(model, Tokenizer.load(tokenizer_of(model, run))))


def tokenizer_of(model: LanguageConfig, run: Path) -> Path:
    """The directory of a run's tokenizer."""
    source = Path(model.tokenizer) if isinstance(model.tokenizer, str) else run / "tokenizer"
    whole = source.name in ("tokenizer.json", "tokenizer.model")
    return source.parent if whole and source.is_file() else source


def is_run(directory: Path) -> bool:
    """Whether a directory is a run or a checkpoint of one, rather than a model in another format."""
    if (directory / "config.json").is_file():
        return False
    names = ("config.yaml", "checkpoints")
    return _is_checkpoint(directory) or any((directory / name).exists() for name in names)


def read_decoder(directory: Path) -> TrainedDecoder:
    """The decoder of a run directory (its best checkpoint, else its latest) or of a checkpoint directory.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or not of the run's configuration.
        ConfigError: a run of another family, or of a model that tells hidden tokens from both sides.
    """
    run = directory.resolve().parent.parent if _is_checkpoint(directory) else directory
    model = read_run_config(run).model
    if not isinstance(model, DecoderConfig):
        advice = (
            f"merge its adapters first: mlx-training checkpoint export {run} --to merged --format hf or run"
            if isinstance(model, PretrainedConfig)
            else "give a run of family decoder, or a directory in Hugging Face's format"
        )
        raise ConfigError(f"{directory} is a run of family {model.family}, which cannot be a frozen LM; {advice}")
    spec = language_spec(model, run)
    assert isinstance(spec, DecoderSpec)
    if not spec.is_causal:
        raise ConfigError(
            f"{directory} is a masked model (mixers: [bidirectional]), which cannot continue a text; give a decoder "
            "that was trained with objective: causal"
        )
    checkpoint = directory if _is_checkpoint(directory) else _chosen(run)
    if problems := verify(checkpoint):
        raise CheckpointError(
            f"{checkpoint}: damaged checkpoint.\n  " + "\n  ".join(problems) + "\n"
            f"Name another one ({run}/checkpoints/step_...), or train that run again"
        )
    header, _ = safetensors_header(checkpoint / MODEL)
    given = {name: tuple(entry["shape"]) for name, entry in header.items()}
    check_shapes({name: param.shape for name, param in spec.params().items()}, given, checkpoint / MODEL)
    return TrainedDecoder(checkpoint, replace(spec, dropout=0.0), tokenizer_of(model, run))


def _chosen(run: Path) -> Path:
    """The checkpoint that the run calls its best, else its latest."""
    store = CheckpointStore(run)
    paths = {path.name: path for path in store.paths()}
    if not paths:
        raise CheckpointError(f"{run}: this run has saved no checkpoint yet; let it train, or give another one")
    best = store.pointer("best")
    if best is not None and best not in paths:
        raise CheckpointError("\n".join(store.lost_pointers().values()))
    return paths[best] if best else paths.get(store.pointer("latest") or "", next(reversed(paths.values())))


def _is_checkpoint(directory: Path) -> bool:
    return bool(STEP_DIRECTORY.fullmatch(directory.resolve().name))

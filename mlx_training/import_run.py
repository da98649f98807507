"""A model in Hugging Face's format as a run: one that can be evaluated, asked, exported and trained further."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import RunConfig, to_yaml
from mlx_training.config_decoder import DecoderShape
from mlx_training.config_model import LanguageConfig
from mlx_training.config_ssm import READERS, SSMShape
from mlx_training.data.tokenizer import Tokenizer, check_vocabulary
from mlx_training.errors import ConfigError
from mlx_training.huggingface import Arrays, Trainable, read_huggingface
from mlx_training.llm_source import resolve_llm
from mlx_training.run_directory import whole_directory
from mlx_training.spec import DecoderSpec

TEXT = "text.txt"  # a run names its text; until it is told another, this one
PLACEHOLDER = "Give this model a text of your own: dataset.path=FILE\n" * 200


def import_run(source: str, run: Path) -> dict[str, Any]:
    """Make the run directory `run` of a model directory (or hub id): weights as step 0, configuration, tokenizer.

    `run` must be absent or empty, and appears complete or not at all. Raises ConfigError for what no family can
    express, CheckpointError and DataError for files that cannot be read or written, or do not fit together.
    """
    directory = resolve_llm(source)
    spec, arrays = read_huggingface(directory)
    tokenizer = Tokenizer.load(directory)
    check_vocabulary(tokenizer.vocab_size, spec.vocab_size, str(directory))
    with whole_directory(run) as folder:
        config = fill_run(folder, run, spec, arrays, tokenizer, source)
    count = sum(array.size for array in arrays.values())
    return {"from": source, "run": str(run), "family": config.model.family, "parameters": count}


def fill_run(folder: Path, run: Path, spec: Trainable, arrays: Arrays, tokenizer: Tokenizer, source: str) -> RunConfig:
    """Fill `folder`, which will be the run directory `run`, with a model as step 0; its configuration."""
    config = _config(spec, source, run)
    tokenizer.save(folder / "tokenizer")
    CheckpointStore(folder).save(0, arrays, {}, {"source": source}, best=True, keep=1)
    (folder / TEXT).write_text(PLACEHOLDER)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return config


def _config(spec: Trainable, source: str, run: Path) -> RunConfig:
    data = {
        "experiment": {"name": run.resolve().name},
        "output_dir": str(run),
        "model": _section(spec) | {"tokenizer": str(run / "tokenizer")},
        "dataset": {"path": str(run / TEXT), "format": "text"},
        "training": {"max_steps": 1000, "learning_rate": 1e-4, "init_from": str(run)},
    }
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {error.errors()[0]['msg']}") from None
    assert isinstance(config.model, LanguageConfig)
    assert config.model.spec(spec.vocab_size).params() == spec.params(), "the section describes the model"
    return config


def _section(spec: Trainable) -> dict[str, Any]:
    """The `model` section that describes a spec."""
    if isinstance(spec, DecoderSpec):
        shape = {key: getattr(spec, key) for key in DecoderShape.model_fields if hasattr(spec, key)}
        plain = {key: None if shape[key] is None else vars(shape[key]) for key in ("rope_scaling", "experts")}
        lists = {"mixers": [*spec.mixers], "widths": [*spec.widths] or None}
        ours = shape | plain | lists | {"fixed": vars(spec.fixed)}
        if spec.widths:
            ours["head_dim"] = None  # of each layer by its width
        return {"family": "decoder", "vocab_size": spec.vocab_size, "decoder": ours}
    unread = [key for key, mixers in READERS.items() if not {*mixers} & {*spec.mixers}]
    shape = {key: getattr(spec, key) for key in SSMShape.model_fields if key not in unread}
    return {"family": "ssm", "vocab_size": spec.vocab_size, "ssm": shape | {"mixers": [*spec.mixers]}}

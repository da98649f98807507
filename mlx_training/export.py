"""A trained decoder as a Hugging Face Llama directory, which mlx-lm, transformers and this toolkit load."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from mlx_training.assemble import assemble
from mlx_training.checkpoint import CheckpointStore, check_shapes
from mlx_training.config import load_config
from mlx_training.errors import ConfigError
from mlx_training.spec import DecoderSpec


def export_huggingface(run: Path, target: Path) -> None:
    """Write the best checkpoint of a decoder run to `target`: config, float32 weights and the run's tokenizer.

    Raises ConfigError when the run is not of family decoder.
    """
    config = load_config(run / "config.yaml")
    assembly = assemble(config, run)
    spec, tokenizer = assembly.spec, assembly.data.tokenizer
    if not isinstance(spec, DecoderSpec):
        raise ConfigError(f"{run}: a {config.model.family} run; only decoder runs can be exported as a Llama directory")
    checkpoint = CheckpointStore(run).best_or_latest()
    shapes = {name: array.shape for name, array in checkpoint.model.items()}
    check_shapes({name: p.shape for name, p in spec.params().items()}, shapes, str(checkpoint.path))
    target.mkdir(parents=True, exist_ok=True)
    source = run / "tokenizer" if (run / "tokenizer").is_dir() else Path(str(getattr(config.model, "tokenizer", "")))
    for file in sorted(source.glob("*token*")):  # tokenizer.json, tokenizer_config.json, tokenizer.model, ...
        (target / file.name).write_bytes(file.read_bytes())
    save_file(checkpoint.model, target / "model.safetensors", metadata={"format": "pt"})
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    (target / "config.json").write_text(json.dumps(spec.hf_config(**special), indent=1) + "\n")
    (target / "generation_config.json").write_text(json.dumps(special, indent=1) + "\n")

"""OpenTSLM's `model_checkpoint.pt`: read it and write it, the LoRA weights of the language model included.

The file is a dict {encoder_state, projector_state, lora_enabled, lora_state, lora_config, epoch, val_loss, ...}
(StanfordBDHG/OpenTSLM, `OpenTSLMSP.store_to_file`). Arrays here carry canonical names (`spec/timeseries.py`).
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.adapters import Adapter, from_peft, peft_config, peft_name
from mlx_training.errors import CheckpointError
from mlx_training.torch_archive import Inert, read_archive, write_archive

Arrays = dict[str, np.ndarray]
ENCODER = re.compile(
    r"patch_embed\.weight|pos_embed|input_norm\.(weight|bias)|"
    r"encoder\.layers\.\d+\.(self_attn\.in_proj_(weight|bias)|(self_attn\.out_proj|(linear|norm)[12])\.(weight|bias))"
)
MAX_DEPTH, MAX_VALUES = 6, 10_000  # a real configuration has three levels; a hostile one may contain itself, often
PROJECTOR = {"projector.0.": "projector.norm.", "projector.1.": "projector.linear."}


@dataclass(frozen=True)
class OpenTSLMCheckpoint:
    """A published checkpoint. `sizes` is read from the arrays, with the names of EncoderSpec."""

    arrays: Arrays
    sizes: dict[str, int]
    lora: Adapter | None = None
    epoch: int | None = None
    extras: dict[str, Any] = field(default_factory=dict)  # the file's other plain values, such as val_loss


def read_opentslm(path: str | Path) -> OpenTSLMCheckpoint:
    """Read a SoftPrompt checkpoint; no PyTorch or PEFT is needed and nothing in the file is executed.

    Positions may be 1024 or, in files from before the change, 2600: see `sizes["max_patches"]`.
    Raises CheckpointError when the file is damaged, unsafe, or not of this kind.
    """
    content = read_archive(path)
    parts = ("encoder_state", "projector_state")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), dict) for part in parts):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        flamingo = " This is a Flamingo checkpoint." if isinstance(content, dict) and "model_state" in content else ""
        raise CheckpointError(
            f"{path}: not an OpenTSLM SoftPrompt checkpoint: expected {' and '.join(parts)}, found {found}.{flamingo} "
            "Use the model_checkpoint.pt of a repository whose name ends in -sp."
        )
    arrays: Arrays = {}
    unknown = []
    for part in parts:
        for theirs, array in content[part].items():
            ours = _canonical(part, str(theirs))
            if ours is None or not isinstance(array, np.ndarray):
                unknown.append(f"{part}[{theirs}]")
            else:
                arrays[ours] = array.astype(np.float32)
    axes = {"encoder.patch_embed.weight": 3, "encoder.pos_embed": 3, "projector.linear.weight": 2}
    missing = [name for name, number in axes.items() if name not in arrays or arrays[name].ndim != number]
    if unknown or missing:
        raise CheckpointError(
            f"{path}: not the published encoder and projector. Unknown: {', '.join(unknown) or 'none'}; "
            f"missing: {', '.join(missing) or 'none'}."
        )
    others = {key: value for key, value in content.items() if isinstance(value, (bool, int, float, str))}
    epoch = others.pop("epoch", None)
    others.pop("lora_enabled", None)
    return OpenTSLMCheckpoint(
        arrays, _sizes(arrays), _lora(path, content), epoch if isinstance(epoch, int) else None, others
    )


def write_opentslm(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    *,
    lora: Adapter | None = None,
    epoch: int | None = None,
    extras: Mapping[str, Any] | None = None,
) -> None:
    """Write what OpenTSLM's `load_from_file` reads. PEFT's configuration is written as a plain dict, not an object.

    Raises CheckpointError for parameters that the published model does not have.
    """
    content: dict[str, Any] = {"encoder_state": {}, "projector_state": {}}
    for ours, array in arrays.items():
        part, theirs = _published(ours)
        if _canonical(part, theirs) != ours:
            raise CheckpointError(
                f"OpenTSLM has no place for the parameter {ours}. Only a model trained with "
                "model.preset: opentslm-sp (no numeric_scale, norm_output or train_lm_head) can be exported."
            )
        content[part][theirs] = np.asarray(array, np.float32)
    content["lora_enabled"] = lora is not None
    if lora is not None:
        state = {peft_name(name, "default"): array for name, array in lora.arrays.items()}
        content |= {"lora_state": state, "lora_config": {"default": peft_config(lora)}}
    write_archive(path, content | {"epoch": epoch, **(extras or {})})


def _canonical(part: str, theirs: str) -> str | None:
    """Our name of an entry of `encoder_state` or `projector_state`; None if it is not a published parameter."""
    if part == "encoder_state":
        return f"encoder.{theirs.removeprefix('encoder.')}" if ENCODER.fullmatch(theirs) else None
    prefix, name = theirs[:12], theirs[12:]
    return PROJECTOR[prefix] + name if prefix in PROJECTOR and name in ("weight", "bias") else None


def _published(ours: str) -> tuple[str, str]:
    """The state dict and key of a canonical name."""
    if ours.startswith("encoder."):
        name = ours.removeprefix("encoder.")
        return "encoder_state", ours if name.startswith("layers.") else name
    for theirs, prefix in PROJECTOR.items():
        ours = ours.replace(prefix, theirs, 1)
    return "projector_state", ours


def _sizes(arrays: Arrays) -> dict[str, int]:
    hidden_size, _, patch_size = arrays["encoder.patch_embed.weight"].shape
    return {
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_layers": 1 + max([int(name.split(".")[2]) for name in arrays if ".layers." in name], default=-1),
        "ffn_size": len(arrays.get("encoder.layers.0.linear1.bias", ())),
        "max_patches": arrays["encoder.pos_embed"].shape[1],
        "llm_hidden_size": arrays["projector.linear.weight"].shape[0],
    }


def _lora(path: str | Path, content: dict[str, Any]) -> Adapter | None:
    if not content.get("lora_enabled", False):
        return None
    state = content.get("lora_state")
    if not isinstance(state, dict) or not all(isinstance(value, np.ndarray) for value in state.values()):
        raise CheckpointError(f"{path}: lora_enabled is true, but there is no lora_state: expected a dict of tensors.")
    config = _json(content.get("lora_config"))
    config = config.get("default", config) if isinstance(config, dict) else {}
    config = config if isinstance(config, dict) else {}
    return from_peft({str(name): array for name, array in state.items()}, config, f"{path}: lora_state")


def _json(value: Any, depth: int = 0, seen: Iterator[int] | None = None) -> Any:
    """PEFT's configuration as JSON: objects become their fields, enums their value, sets sorted lists."""
    seen = seen or itertools.count()
    if depth > MAX_DEPTH or next(seen) > MAX_VALUES:
        return None
    if isinstance(value, Inert):
        inner = value.fields if hasattr(value, "fields") else value.args[0] if value.args else None
        return _json(inner, depth + 1, seen)
    if isinstance(value, dict):
        return {str(key): _json(item, depth + 1, seen) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        items = [_json(item, depth + 1, seen) for item in value]
        return sorted(items, key=str) if isinstance(value, set) else items
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

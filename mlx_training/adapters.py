"""Adapters in files: PEFT's directories and mlx-lm's, both read and written, and those inside a checkpoint.

PEFT: adapter_model.safetensors, `base_model.model.<path>.lora_A.weight` (r, in), change alpha / r * B A.
mlx-lm: adapters.safetensors, `<path>.lora_a` (in, r), change scale * (a b)'. Magnitudes of DoRA are alike.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from mlx_training.checkpoint import check_shapes
from mlx_training.errors import CheckpointError
from mlx_training.json_text import parse_json
from mlx_training.quantize import read_tensors, to_float32
from mlx_training.spec import AdapterSpec, PretrainedSpec, Spec

Arrays = dict[str, np.ndarray]
PEFT_FILE, MLX_FILE, CONFIG = "adapter_model.safetensors", "adapters.safetensors", "adapter_config.json"
PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.(?:(lora_[AB])(?:\.\w+)?\.weight|(lora_magnitude_vector)(?:\.\w+)*)")
MLX_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
# PEFT's settings that change what an adapter computes, and are not known here
UNKNOWN = (
    *("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias"),
    *("trainable_token_indices", "target_parameters", "layer_replication", "use_qalora", "alora_invocation_tokens"),
)


@dataclass(frozen=True)
class Adapter:
    """Adapters of a language model: arrays under the table's names (`lm.<path>.lora_A.weight`, ...), float32."""

    arrays: Arrays
    rank: int
    alpha: float
    dropout: float = 0.0
    dora: bool = False
    llm_sha256: str | None = None  # of the base, where it is known

    def __str__(self) -> str:
        kind = "DoRA" if self.dora else "LoRA"
        return f"{kind}: {len(self.arrays)} arrays (rank {self.rank}, alpha {self.alpha:g})"

    @property
    def paths(self) -> list[str]:
        """The Linears they change, as the language model names them."""
        suffix = ".lora_A.weight"
        return [n.removeprefix("lm.").removesuffix(suffix) for n in self.arrays if n.endswith(suffix)]

    @property
    def ends(self) -> list[str]:
        """Last words of the paths, as `model.lora.targets` and PEFT's target_modules have them."""
        return sorted({path.rpartition(".")[2] for path in self.paths})


def describe_adapter(spec: Spec) -> dict[str, Any] | None:
    """What a checkpoint's state keeps of the adapters beside their arrays."""
    own = spec.adapter if isinstance(spec, PretrainedSpec) else None
    if own is None:
        return None
    return {"rank": own.rank, "alpha": own.alpha, "dropout": own.dropout, "dora": own.dora}


def split_adapter(arrays: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> tuple[Arrays, Adapter | None]:
    """The arrays of a checkpoint without adapters, and the adapters."""
    own = {name: array for name, array in arrays.items() if ".lora_" in name}
    rest = {name: array for name, array in arrays.items() if name not in own}
    return rest, Adapter(own, **state["adapter"], llm_sha256=state.get("llm_sha256")) if own else None


def kept_adapter(run: Path) -> Adapter | None:
    """LoRA weights that earlier versions kept beside a run without applying them; None if there are none."""
    path = run / "lora.safetensors"
    if not path.is_file():
        return None
    return from_peft(_read_arrays(path), _read_config(run / "lora.json"), str(path))


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters in one of the two formats."""
    return any((directory / name).is_file() for name in (PEFT_FILE, MLX_FILE, CONFIG))


def read_adapter(directory: Path) -> Adapter:
    """Adapters in PEFT's or mlx-lm's format.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter is of a kind that is not known here.
    """
    found = [directory / name for name in (PEFT_FILE, MLX_FILE) if (directory / name).is_file()]
    if not found or not (directory / CONFIG).is_file():
        raise CheckpointError(
            f"{directory}: expected {CONFIG} with {PEFT_FILE} (PEFT) or {MLX_FILE} (mlx-lm); other files, such as "
            "adapter_model.bin, are not read"
        )
    config, arrays = _read_config(directory / CONFIG), _read_arrays(found[0])
    sha256 = _metadata(found[0]).get("llm_sha256")
    read = from_peft if found[0].name == PEFT_FILE else _from_mlx_lm
    return read(arrays, config, str(found[0]), sha256)


def from_peft(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str, llm_sha256: str | None = None
) -> Adapter:
    """Adapters from PEFT's names and settings. Raises CheckpointError for a kind that is not known here."""
    unknown = [key for key in UNKNOWN if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none")
    if unknown or config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(
            f"{where}: given {config.get('peft_type')} with {', '.join(unknown) or 'no further settings'}; only plain "
            "LoRA and DoRA are read: merge it with PEFT and use the merged model"
        )
    named = {}
    for theirs, array in arrays.items():
        match = PEFT_NAME.fullmatch(theirs)
        if match is None:
            raise CheckpointError(f"{where}: {theirs} is none of PEFT's names for LoRA on a Linear")
        path, low_rank, magnitude = match.groups()
        named[f"lm.{path}.{f'{low_rank}.weight' if low_rank else magnitude}"] = np.asarray(array, np.float32)
    rank, alpha = _number(config, "r", where), _number(config, "lora_alpha", where)
    return Adapter(
        named, int(rank), alpha, _dropout(config, "lora_dropout", where), bool(config.get("use_dora")), llm_sha256
    )


def write_peft(directory: Path, adapter: Adapter, base: str) -> None:
    """PEFT's directory; `base` is the name of the model that the adapters belong to."""
    save_file(
        {peft_name(name): array for name, array in adapter.arrays.items()},
        directory / PEFT_FILE,
        {"format": "pt", "llm_sha256": adapter.llm_sha256 or ""},
    )
    config = {"base_model_name_or_path": base, "inference_mode": True} | peft_config(adapter)
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def write_mlx_lm(directory: Path, adapter: Adapter, num_layers: int) -> None:
    """mlx-lm's directory, as its `--adapter-path` takes it."""
    theirs = {ours: name for name, ours in MLX_NAMES.items()}
    arrays = {}
    for name, array in adapter.arrays.items():
        path, ours = _split(name)
        arrays[f"{path}.{theirs[ours]}"] = np.ascontiguousarray(array.T)
    metadata = {"format": "mlx", "llm_sha256": adapter.llm_sha256 or ""}
    save_file(arrays, directory / MLX_FILE, metadata)
    parameters = {"rank": adapter.rank, "scale": adapter.alpha / adapter.rank, "dropout": adapter.dropout}
    config = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": num_layers,
        "lora_parameters": parameters | {"keys": adapter.paths},
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def peft_name(name: str, adapter: str = "") -> str:
    """PEFT's name of an array: in files without, in a model with the name of the adapter."""
    path, ours = _split(name)
    kind, dot, weight = ours.partition(".")
    return f"base_model.model.{path}.{kind}{f'.{adapter}' if adapter else ''}{dot}{weight}"


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """PEFT's settings."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_dora": adapter.dora,
        "bias": "none",
        "target_modules": adapter.ends if len({*adapter.paths}) > len(adapter.ends) else adapter.paths,
    }


def check_adapter(adapter: Adapter, spec: AdapterSpec, llm_sha256: str | None, where: str) -> None:
    """Raise CheckpointError unless these adapters are what `spec` describes, on the same base."""
    if adapter.llm_sha256 and llm_sha256 and adapter.llm_sha256 != llm_sha256:
        raise CheckpointError(
            f"{where}: adapters for another base (sha256 {adapter.llm_sha256[:12]}, given {llm_sha256[:12]}); set "
            "model.llm_id to the model that they were trained on"
        )
    pairs = {"rank": (adapter.rank, spec.rank), "alpha": (adapter.alpha, spec.alpha), "dora": (adapter.dora, spec.dora)}
    if different := [key for key, (there, here) in pairs.items() if there != here]:
        given = ", ".join(f"{key} {pairs[key][0]}" for key in different)
        advice = " ".join(f"model.lora.{key}={json.dumps(pairs[key][0])}" for key in different)
        here = ", ".join(str(pairs[key][1]) for key in different)
        raise CheckpointError(f"{where}: adapters with {given}, where model.lora says {here}; set {advice}")
    shapes = {name: array.shape for name, array in adapter.arrays.items()}
    try:
        check_shapes({name: p.shape for name, p in spec.params().items()}, shapes, where)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} These adapters are for another base (set model.llm_id), or for other Linears: set "
            f"model.lora.targets=[{', '.join(adapter.ends)}]"
        ) from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = parse_json(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy or download it again") from None
    return config


def _read_arrays(path: Path) -> Arrays:
    return {name: to_float32(*tensor) for name, tensor in read_tensors(path).items()}


def _from_mlx_lm(
    arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str, llm_sha256: str | None
) -> Adapter:
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora") or not isinstance(settings, dict):
        raise CheckpointError(f"{where}: fine_tune_type {kind!r}; only lora and dora, with lora_parameters, are read")
    named = {}
    for theirs, array in arrays.items():
        path, _, name = theirs.rpartition(".")
        if name not in MLX_NAMES:
            raise CheckpointError(f"{where}: {theirs} is none of mlx-lm's names for LoRA on a Linear")
        named[f"lm.{path}.{MLX_NAMES[name]}"] = np.ascontiguousarray(array.T)
    rank = int(_number(settings, "rank", where))
    alpha = round(rank * _number(settings, "scale", where), 6)  # 3 * (5 / 3) may miss 5 by the last bit
    return Adapter(named, rank, alpha, _dropout(settings, "dropout", where), kind == "dora", llm_sha256)


def _number(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{where}: its settings have {key} {value!r}; expected a number above 0")
    return value


def _dropout(config: Mapping[str, Any], key: str, where: str) -> float:
    return _number(config, key, where) if config.get(key) else 0.0


def _split(name: str) -> tuple[str, str]:
    """("model.layers.0.self_attn.q_proj", "lora_A.weight") of a table's name."""
    path, kind, rest = name.removeprefix("lm.").rpartition(".lora_")
    return path, kind.removeprefix(".") + rest


def _metadata(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return parse_json(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__") or {}

"""What a run starts from (`training.init_from`): another run, a model of Hugging Face's, an OpenTSLM file, adapters."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_training.adapters import Adapter, check_adapter, is_adapter, kept_adapter, read_adapter, split_adapter
from mlx_training.checkpoint import CheckpointStore, check_shapes
from mlx_training.checkpoint_files import STEP_DIRECTORY
from mlx_training.errors import CheckpointError
from mlx_training.huggingface import check_same_model, read_huggingface
from mlx_training.init import initialise
from mlx_training.opentslm import read_opentslm
from mlx_training.spec import PretrainedSpec, Spec

Arrays = dict[str, np.ndarray]


def initial_parameters(spec: Spec, seed: int, source: str | None, built: Callable[[], Arrays]) -> Arrays:
    """Every parameter of a new run: from `source` (see `load_initial`), if one is given, else drawn.

    `built` returns what the model was built with; it is asked where a frozen LM gives parameters, and only there.
    """
    fresh = initialise(spec, seed)
    if fresh.keys() != spec.params().keys():
        fresh = built() | fresh
    return load_initial(source, spec, fresh) if source else fresh


def load_initial(source: str | Path, spec: Spec, fresh: Arrays) -> Arrays:
    """Every parameter of `spec`, from `source`: exactly its names and shapes, and nothing of it is left out.

    `source` is a run directory (its best checkpoint, else its latest), a checkpoint directory, a model directory in
    Hugging Face's format, an OpenTSLM `model_checkpoint.pt`, or a directory of adapters. `fresh` holds the initial
    values: adapters start from them where the source has none, and everything else where it has nothing but adapters;
    both are said.

    Raises:
        ConfigError: a model in Hugging Face's format that is another one than `spec`, by more than shapes.
        CheckpointError: parameters do not fit; adapters for another base or of another rank, alpha or kind; or
            adapters that this run would not apply.
    """
    given, adapter, where = _read(Path(source), spec)
    own = spec.adapter if isinstance(spec, PretrainedSpec) else None
    if adapter is not None and (own is None or not isinstance(spec, PretrainedSpec)):
        settings = f"{{rank: {adapter.rank}, alpha: {adapter.alpha:g}, dora: {str(adapter.dora).lower()}"
        raise CheckpointError(
            f"{where} has adapters ({adapter}), which this run would not apply; set model.lora="
            f"{settings}, targets: [{', '.join(adapter.ends)}]}}"
        )
    adapters = {name: array for name, array in fresh.items() if ".lora_" in name}
    rest = {name: array for name, array in fresh.items() if name not in adapters}
    if adapter is not None and own is not None and isinstance(spec, PretrainedSpec):
        check_adapter(adapter, own, spec.llm.sha256, where)
        adapters = adapter.arrays
    elif adapters:
        print(f"{where}: no adapters in it; those of this run start afresh", file=sys.stderr)
    if given is None:
        if rest:
            print(f"{where}: adapters only; {len(rest)} other parameters start afresh", file=sys.stderr)
        return {**rest, **adapters}
    check_shapes({n: a.shape for n, a in rest.items()}, {n: a.shape for n, a in given.items()}, where)
    return {**given, **adapters}


def _read(source: Path, spec: Spec) -> tuple[Arrays | None, Adapter | None, str]:
    """Parameters (None: there are adapters only), adapters, and the name of the source for messages."""
    if source.is_file():
        foreign = read_opentslm(source)
        sizes = ", ".join(f"{name} {size}" for name, size in foreign.sizes.items())
        return foreign.arrays, foreign.lora, f"{source} ({sizes})"
    if is_adapter(source):
        return None, read_adapter(source), str(source)
    if (source / "config.json").is_file():
        model, arrays = read_huggingface(source)
        check_same_model(model, spec, source)
        return arrays, None, str(source)
    if STEP_DIRECTORY.fullmatch(source.name):
        run, checkpoint = source.parent.parent, CheckpointStore(source.parent.parent).load(source)
    elif (source / "checkpoints").is_dir():
        run, checkpoint = source, CheckpointStore(source).best_or_latest()
    else:
        raise CheckpointError(
            f"{source}: nothing to start from. training.init_from takes a run directory (with checkpoints/), a "
            "checkpoint directory (checkpoints/step_...), a model directory in Hugging Face's format (config.json), an "
            "OpenTSLM model_checkpoint.pt, or a directory of adapters (adapter_config.json, as PEFT and mlx-lm write "
            "it)."
        )
    arrays, adapter = split_adapter(checkpoint.model, checkpoint.state)
    return arrays, adapter or kept_adapter(run), str(checkpoint.path)

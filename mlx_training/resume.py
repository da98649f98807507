"""Which checkpoint a run is continued from, and whether it may be."""

import sys
from pathlib import Path

from mlx_training.assemble import Assembly, check_fits
from mlx_training.checkpoint import Checkpoint, CheckpointStore, check_shapes
from mlx_training.config import RunConfig, load_config
from mlx_training.errors import CheckpointError, ConfigError

FIXED = (  # what a run cannot change when it is continued
    "experiment.seed",
    "model",
    "dataset",
    "training.batch_size",
    "training.grad_accumulation_steps",
)


def find_checkpoint(store: CheckpointStore, resume: str | None, assembly: Assembly) -> Checkpoint | None:
    """The checkpoint to continue from, if any. Nothing on the disk changes unless it fits."""
    if resume is None:
        return None
    if resume != "auto":
        if not (path := Path(resume)).name.startswith("step_") or not path.is_dir():
            raise CheckpointError(
                f"--resume {resume}: not a checkpoint directory; give auto, or a directory RUN/checkpoints/step_..."
            )
        checkpoint: Checkpoint | None = store.load(path)
        message = ""
    else:
        checkpoint, message = store.latest_valid()
    if message:
        print(f"warning: {message}", file=sys.stderr)
    if checkpoint:
        check_resumable(assembly, checkpoint)
        check_unchanged(assembly.config, store.directory.parent)
        store.rewind(checkpoint)
    return checkpoint


def check_unchanged(config: RunConfig, run: Path) -> None:
    """ConfigError unless the run that is continued has the same model, data and seed."""
    if not (run / "config.yaml").is_file():
        return
    given, before = config.model_dump(mode="json"), load_config(run / "config.yaml").model_dump(mode="json")
    changed = []
    for key in FIXED:
        section, _, name = key.partition(".")
        now, then = (value[section][name] if name else value[section] for value in (given, before))
        keys = sorted(now.keys() | then.keys()) if isinstance(now, dict) else []
        changed += [f"{key}.{k}: {then.get(k)} -> {now.get(k)}" for k in keys if now.get(k) != then.get(k)]
        if not keys and now != then:
            changed.append(f"{key}: {then} -> {now}")
    if changed:
        raise ConfigError(
            f"{run} was trained with other settings than those it would be continued with:\n  "
            + "\n  ".join(changed)
            + "\nUndo these changes, or start another run: output_dir=... with training.init_from"
        )


def check_resumable(assembly: Assembly, checkpoint: Checkpoint) -> None:
    """CheckpointError unless parameters and optimiser state fit, and the frozen LM is the very same."""
    if "progress" not in checkpoint.state:
        raise CheckpointError(
            f"{checkpoint.path} holds weights, but no training that could be continued; "
            "start from it: training.init_from instead of --resume"
        )
    check_fits(assembly.spec, checkpoint)
    moments = {f"{name}.{k}": param.shape for name, param in assembly.spec.params().items() for k in "mv"}
    given = {name: array.shape for name, array in checkpoint.optimizer.items()}
    check_shapes({**moments, "step": ()}, given, checkpoint.path)

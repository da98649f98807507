"""Which checkpoint is continued, and what may have changed since."""

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_training.assemble import Assembly, check_fits
from mlx_training.checkpoint import CheckpointStore, check_shapes
from mlx_training.checkpoint_files import OPTIMIZER, STATE, Checkpoint
from mlx_training.config import RunConfig, load_config
from mlx_training.config_errors import closest_key
from mlx_training.errors import CheckpointError, ConfigError
from mlx_training.fingerprint import fingerprint
from mlx_training.json_text import parse_json
from mlx_training.progress import wrong_progress

RESULT = "result.json"
# Keys that may change when a run is continued: single ones, and sections (with their dot).
OPTIMIZER_KEYS = ("training.optimizer", "training.ema_decay")  # another one has other state
LABELS = ("experiment.name", "experiment.tags", "experiment.notes", "output_dir", "logging.", "diagnostics.")
STOPPING = ("training.early_stopping_patience", "training.early_stopping_min_delta")
LENGTH = ("training.max_steps", "training.num_epochs")  # raised; or anything, once the run has finished
SAME_NUMBERS = ("backend", "device", "dataset.cache_dir", "training.gradient_checkpointing", "performance.")
HARMLESS = (*LABELS, *STOPPING, *SAME_NUMBERS, "checkpoint.", "evaluation.")
MEASURE = ("evaluation.split", "evaluation.max_rows")  # the best value was measured there: not harmless
GENERATION = "evaluation.max_new_tokens"  # nor is this, where answers choose the best
Changes = dict[str, tuple[Any, Any]]  # key: (old, new)


def find_checkpoint(
    store: CheckpointStore, resume: str | None, assembly: Assembly, allow_change: Sequence[str] = ()
) -> tuple[Checkpoint | None, Changes]:
    """The checkpoint to continue from, if any, and what the configuration changes of its run.

    Nothing on the disk changes unless it fits, and every change is harmless or allowed.
    """
    if resume is None:
        if allow_change:
            raise ConfigError("--allow-change is for a run that is continued: give --resume auto, or leave it out")
        return None, {}
    fits = partial(_check_continuable, assembly)
    checkpoint, message = store.latest_valid(fits) if resume == "auto" else (_given(store, Path(resume)), "")
    if message:
        print(f"warning: {message}", file=sys.stderr)
    if checkpoint is None:
        _check_allowed(allow_change, assembly.config, {})
        return None, {}
    _check_state(checkpoint)
    if store.paths() and not store.holds(checkpoint.path):  # another run's may not take the place of this one's
        raise ConfigError(
            f"--resume {resume}: output_dir {store.directory.parent} has checkpoints of its own. Continue them with "
            "--resume auto, or set output_dir to a directory that does not exist yet; nothing was changed."
        )
    run = checkpoint.path.resolve().parents[1]
    if not (run / "config.yaml").is_file():
        print(f"warning: {run / 'config.yaml'} is gone: nothing tells what has changed since", file=sys.stderr)
    changed = _changes(run, assembly.config)
    if not _touches(changed, "dataset.", "model.tokenizer") and (other := _other_rows(checkpoint, assembly)):
        changed["dataset.path"] = other  # the same name, but not the same rows
    for key in (key for key in OPTIMIZER_KEYS if key in changed):
        old, new = ("null" if value is None else value for value in changed[key])
        raise ConfigError(
            f"{key}: {old} -> {new}: this is kept for a whole run, with the state it needs. Undo the change, or start "
            f"another run from these weights: output_dir=... training.init_from={checkpoint.path}. Nothing was changed."
        )
    _check_allowed(allow_change, assembly.config, changed)
    refused = [key for key in changed if not _passes(key, changed[key], assembly.config, _finished(checkpoint))]
    _check_unchanged(run, {key: changed[key] for key in refused if not _within(key, allow_change)})
    _check_fits(assembly, checkpoint)
    if "checkpoint.best" in changed or set(refused) & {*MEASURE, GENERATION} or _touches(refused, "dataset.", "model."):
        checkpoint.state["progress"] |= {"best": None, "evaluations_without_improvement": 0}  # another measure
    if message := store.rewind(checkpoint, fits):
        print(f"warning: {message}", file=sys.stderr)
    return checkpoint, changed


def finished_result(
    store: CheckpointStore, checkpoint: Checkpoint, changed: Changes, backend: str
) -> dict[str, Any] | None:
    """What this run printed when it finished with this checkpoint, unless its report would now be another."""
    if not store.holds(checkpoint.path) or any(
        not _within(key, (*LABELS, *STOPPING, *LENGTH, "checkpoint.", "backend")) for key in changed
    ):
        return None
    result = _finished(checkpoint)
    return result | {"run": str(store.directory.parent)} if result and result.get("backend") == backend else None


def check_something_trains(changed: Changes, step: int, total_steps: int, *, elsewhere: bool) -> None:
    """ConfigError for a run that has ended where it would begin, in another directory than its own (`elsewhere`); and
    for changes that were allowed, but come too late: config.yaml would say what was never trained.
    """
    if elsewhere:
        raise ConfigError(
            f"--resume: the checkpoint is of step {step}, and this run has {total_steps}: nothing would train in its "
            "output_dir. Give more training.max_steps (or num_epochs)."
        )
    if late := [key for key in changed if not _within(key, (*HARMLESS, *LENGTH))]:
        raise ConfigError(
            f"{', '.join(late)}: the run has ended at step {step}, so that nothing would train with the change. Give "
            "more training.max_steps (or num_epochs) too, or undo the change."
        )


def _finished(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The result beside the checkpoint; a run has one only while it ends there."""
    try:
        result = parse_json((checkpoint.path.resolve().parents[1] / RESULT).read_bytes())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("steps") == checkpoint.step else None


def _given(store: CheckpointStore, path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(f"--resume {path}: there is no such file or directory (working directory: {Path.cwd()})")
    if (path / "checkpoints").is_dir():
        return CheckpointStore(path).load()
    if not path.name.startswith("step_") or not path.is_dir():
        raise CheckpointError(
            f"--resume {path}: not a checkpoint directory; give auto, a run's directory (its latest checkpoint), or "
            "RUN/checkpoints/step_..."
        )
    return store.load(path)


def _changes(run: Path, config: RunConfig) -> Changes:
    """Every key that differs from the configuration the run was trained with."""
    if not (run / "config.yaml").is_file():
        return {}
    before = load_config(run / "config.yaml")
    return dict(_differences("", before.model_dump(mode="json"), config.model_dump(mode="json")))


def _other_rows(checkpoint: Checkpoint, assembly: Assembly) -> tuple[str, str] | None:
    """The rows that the run was trained with and those that are there now, where they are not the same."""
    then, now = checkpoint.state.get("data"), fingerprint(assembly.data)
    return (then, now) if then and now and then != now else None


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(f"{key}.{name}".lstrip("."), old.get(name), new.get(name))
    elif old != new:
        yield key, (old, new)


def _passes(key: str, change: tuple[Any, Any], config: RunConfig, finished: Any) -> bool:
    """Whether a key may change without being asked for."""
    old, new = change
    if key in LENGTH:
        return bool(finished) or (old is not None and new is not None and new > old)
    if key == GENERATION:
        return config.checkpoint.best == "eval/loss"
    return _within(key, HARMLESS) and key not in MEASURE


def _within(key: str, places: Collection[str]) -> bool:
    """Whether a key is one of these, or inside one of them."""
    return any(key == place or key.startswith(place.rstrip(".") + ".") for place in places)


def _touches(keys: Collection[str], *sections: str) -> bool:
    return any(key.startswith(sections) for key in keys)


def _check_allowed(allowed: Sequence[str], config: RunConfig, changed: Changes) -> None:
    """ConfigError for a name that is no key; a hint for a key that has not changed."""
    known = {name for key in (*_keys("", config.model_dump(mode="json")), *changed) for name in _prefixes(key)}
    for key in allowed:
        if key not in known:
            close = closest_key(key, known)
            raise ConfigError(
                f"--allow-change {key}: there is no such key in this configuration"
                + (f"; did you mean {close}?" if close else "; keys are spelled as in training.learning_rate")
            )
        if not any(_within(name, (key,)) for name in changed):
            print(f"note: --allow-change {key}: it has not changed; the flag can be left out", file=sys.stderr)


def _keys(prefix: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _keys(f"{prefix}.{name}".lstrip("."), inner)
    else:
        yield prefix


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def _check_unchanged(run: Path, refused: Changes) -> None:
    """ConfigError that names every change and the flag that accepts it."""
    if refused:
        shown = {key: " -> ".join(json.dumps(value, ensure_ascii=False) for value in refused[key]) for key in refused}
        lines = [f"{key}: {change}   (--allow-change {key})" for key, change in shown.items()]
        raise ConfigError(
            f"{run} was trained with other settings than those it would be continued with:\n  "
            + "\n  ".join(lines)
            + "\nUndo these changes, accept each with its flag, or start another run: output_dir=... with "
            "training.init_from. Nothing was changed."
        )


def _check_continuable(assembly: Assembly, checkpoint: Checkpoint) -> None:
    """CheckpointError for a checkpoint of this run that is not what was saved, though its sums are right.

    Arrays are judged by the configuration while that is the one they were trained with.
    """
    _check_state(checkpoint)
    if not _touches(_changes(checkpoint.path.resolve().parents[1], assembly.config), "model.", *OPTIMIZER_KEYS):
        _check_fits(assembly, checkpoint)


def _check_state(checkpoint: Checkpoint) -> None:
    if "progress" not in checkpoint.state:
        raise CheckpointError(
            f"{checkpoint.path} holds weights, but no training that could be continued ({STATE} has no progress); "
            "start from it: training.init_from instead of --resume"
        )
    if wrong := wrong_progress(checkpoint.state, checkpoint.step):
        raise CheckpointError(f"{checkpoint.path}: damaged checkpoint.\n  {STATE}: " + f"\n  {STATE}: ".join(wrong))


def _check_fits(assembly: Assembly, checkpoint: Checkpoint) -> None:
    """CheckpointError unless parameters and optimiser state fit, and the frozen LM is the very same."""
    check_fits(assembly.spec, checkpoint)
    given = {name: array.shape for name, array in checkpoint.optimizer.items()}
    check_shapes(assembly.config.optim.state_shapes(assembly.spec), given, checkpoint.path / OPTIMIZER)


def after_stop(run: Path) -> str:
    """What a second Ctrl-C leaves."""
    saved = CheckpointStore(run).paths()
    kept = f"{saved[-1]} is the last checkpoint; continue with --resume auto" if saved else "nothing was saved yet"
    return f"stopped at once: {kept}"

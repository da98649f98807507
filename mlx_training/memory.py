"""What to say when memory runs out, in the words of a configuration."""

import errno
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import RunConfig
from mlx_training.config_checks import TEXT
from mlx_training.errors import MemoryExhaustedError

# torch on the CPU, CUDA and MPS; MLX on Metal, CUDA and the CPU (where 0.32 does not look, and crashes); C++
SAID = re.compile(
    r"out of memory|(can't|can ?not|unable to) allocate|greater than the maximum allowed buffer size|"
    r"insufficient memory|bad_alloc|ALLOC_FAILED",
    re.IGNORECASE,
)
MAX_QUOTED = 300


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a framework, NumPy or the system has refused memory."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and bool(SAID.search(str(error)))


@contextmanager
def full_memory_explained(advice: Callable[[], str]) -> Iterator[None]:
    """Any refusal of memory as a MemoryExhaustedError: what was refused, what was in use, and what to do."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        refused = " ".join(str(error).split())[:MAX_QUOTED] or type(error).__name__
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        raise MemoryExhaustedError(
            f"out of memory: {refused}. This process had used {peak / 1e9:.2f} GB of the machine's memory. {advice()}"
        ) from error


def training_advice(config: RunConfig) -> str:
    """What to lower, and how to go on, when training ran out of memory."""
    training, saved = config.training, CheckpointStore(config.output_dir).paths()
    on_text = {"decoder": "model.decoder.context_length"}
    on_text |= {"pretrained": "model.context_length"} if config.dataset.format in TEXT else {}
    length = on_text.get(config.model.family, "dataset.max_length")
    changes: dict[str, int | str] = {length: "..."}
    if training.batch_size > 1:  # the same step in smaller parts
        changes = {
            "training.batch_size": training.batch_size // 2,
            "training.grad_accumulation_steps": training.grad_accumulation_steps * 2,
        }
    kept = f"{saved[-1]} is intact; continue" if saved else "No checkpoint was saved yet; start again"
    values = " ".join(f"{key}={value}" for key, value in changes.items())
    allowed = " ".join(f"--allow-change {key}" for key in changes)
    return (
        f"Lower training.batch_size, {length} or evaluation.batch_size; `mlx-training plan CONFIG` predicts what is "
        f"needed. {kept}: {values} --resume auto {allowed}"
    )


def examining_advice() -> str:
    """What to lower when the doctor could not even build what it examines, or its first batches."""
    return (
        "`mlx-training plan CONFIG` predicts what is needed; examine a smaller model of the same kind, or give "
        "training.batch_size=1 and a shorter context: its faults are the same"
    )


def reading_advice(run: Path) -> str:
    """What to lower when a trained run was evaluated or asked."""
    return (
        f"Lower evaluation.batch_size (or evaluation.max_new_tokens) in {run / 'config.yaml'}; the run and its "
        "checkpoints are as they were"
    )

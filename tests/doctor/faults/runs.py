"""Run directories that tell of a training that went wrong."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mlx_training.json_lines import JsonLines, read_metrics
from tests.doctor.faults.base import fault

Curve = Callable[[int], float]


def rewrite(run: Path, loss: Curve, eval_loss: Curve | None = None, steps: int = 200) -> None:
    """Another `metrics.jsonl`: a record every step with `loss(step)`, an evaluation every 20."""
    path = run / "metrics.jsonl"
    records = read_metrics(path)
    training = next(r for r in records if "loss" in r)
    evaluation = next(r for r in records if "eval/loss" in r)
    path.unlink()
    sink = JsonLines(path)
    for step in range(1, steps + 1):
        sink.log({**training, "step": step, "loss": loss(step)})
        if step % 20 == 0:
            sink.log({**evaluation, "step": step, "eval/loss": (eval_loss or loss)(step)})
    sink.close()


def falling(step: int) -> float:
    """From 6 towards 0.5, with noise."""
    return 0.5 + 5.5 * math.exp(-step / 50) + 0.05 * float(np.random.default_rng(step).standard_normal())


@fault("checkpoint_damaged", case="run")
def checkpoint_cut_short(run: Path) -> None:
    """The disk was full, or a copy was interrupted: files of the checkpoints lack their end."""
    for path in run.glob("checkpoints/step_*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-64])


@fault("checkpoint_damaged", case="run")
def checkpoint_with_flipped_bits(run: Path) -> None:
    """A bad disk or cable: some bytes in the middle are others."""
    for path in run.glob("checkpoints/step_*/model.safetensors"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 64
        path.write_bytes(content)


@fault("nonfinite_parameters", "checkpoint_damaged", case="run")
def checkpoint_of_nan(run: Path) -> None:
    """The run was saved after it had diverged, under valid checksums."""
    from mlx_training.checkpoint import CheckpointStore

    store = CheckpointStore(run)
    last = store.load("latest")
    spoilt = {name: np.full_like(array, np.nan) if "linear" in name else array for name, array in last.model.items()}
    state = {key: value for key, value in last.state.items() if key != "step"}
    store.save(last.step, spoilt, last.optimizer, state, best=True, keep=1)


@fault("loss_nonfinite", case="run")
def loss_became_nan(run: Path) -> None:
    """From step 120 on the loss is NaN, and the run went on for hours."""
    rewrite(run, lambda step: falling(step) if step < 120 else math.nan, falling)


@fault("loss_nonfinite", case="run")
def loss_became_infinite(run: Path) -> None:
    """Single losses are infinite."""
    rewrite(run, lambda step: math.inf if step % 50 == 0 else falling(step), falling)


@fault("loss_flat", case="run")
def loss_never_fell(run: Path) -> None:
    """ln V with noise from the first step to the last."""
    rewrite(run, lambda step: 5.95 + 0.03 * float(np.random.default_rng(step).standard_normal()))


@fault("loss_spikes", case="run")
def loss_jumps(run: Path) -> None:
    """The loss falls, and every now and then it is many times what it was."""
    rewrite(run, lambda step: falling(step) * (8 if step in (90, 91, 130, 170) else 1), falling)


@fault("overfitting", case="run")
def evaluation_rises(run: Path) -> None:
    """Training falls towards zero while the loss on unseen rows doubles."""
    rewrite(run, lambda step: 0.05 + 5.9 * math.exp(-step / 30), lambda step: 2.0 + abs(step - 60) / 50)

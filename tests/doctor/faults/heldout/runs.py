"""Unseen faults in trained models and runs."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.checkpoint import CheckpointStore
from mlx_training.diagnostics.subject import Subject
from tests.doctor.faults.base import (
    override,
)
from tests.doctor.faults.heldout.registry import fault
from tests.doctor.faults.runs import falling, rewrite


@fault("series_ignored", "dead_activations", "no_influence", case="trained", level="full")
def series_pooled_to_nothing(subject: Subject) -> None:
    """Patches are centred over the places of a series and then averaged: all of them are zero."""

    def call(projector: Any, x: Any) -> Any:
        centred = x - x.mean(axis=1, keepdims=True)
        return projector(centred.mean(axis=1, keepdims=True) + 0 * x)

    override(subject.model.projector, call)


@fault("loss_nonfinite", case="run")
def evaluation_is_nan(run: Path) -> None:
    """Training is fine; one evaluation row makes every evaluation NaN."""
    rewrite(run, falling, lambda step: math.nan)


@fault("loss_flat", case="run")
def loss_rises(run: Path) -> None:
    """The loss climbs slowly from its first value."""
    rewrite(run, lambda step: 5.9 + step / 150 + 0.03 * float(np.random.default_rng(step).standard_normal()))


@fault("loss_spikes", case="run")
def loss_jumps_and_stays(run: Path) -> None:
    """After two thirds of the run the loss jumps back to where it began, and stays."""
    rewrite(run, lambda step: falling(step) if step < 150 else 5.9 + 0.05 * math.sin(step))


@fault("overfitting", case="run")
def evaluation_turns_late(run: Path) -> None:
    """Evaluation improves for half the run, then rises by a half."""
    rewrite(run, lambda step: 0.05 + 5.9 * math.exp(-step / 40), lambda step: 1.0 + abs(step - 100) / 180)


@fault("checkpoint_damaged", case="run")
def optimizer_file_missing(run: Path) -> None:
    """Large files were left out of the copy: the optimiser's state is gone."""
    for path in run.glob("checkpoints/step_*/optimizer.safetensors"):
        path.unlink()


@fault("checkpoint_damaged", case="run")
def configuration_of_another_size(run: Path) -> None:
    """config.yaml was edited after the run: its encoder has other sizes than the checkpoint."""
    config = run / "config.yaml"
    text = config.read_text()
    assert "ffn_size: 32" in text
    config.write_text(text.replace("ffn_size: 32", "ffn_size: 48"))


@fault("nonfinite_parameters", "checkpoint_damaged", case="run", where="projector")
def one_nan_in_the_checkpoint(run: Path) -> None:
    """A single number of the saved projector is NaN, under a valid checksum."""
    store = CheckpointStore(run)
    last = store.load("latest")
    spoilt = dict(last.model)
    spoilt["projector.norm.weight"] = np.where(np.arange(16) == 5, np.nan, spoilt["projector.norm.weight"])
    spoilt["projector.norm.weight"] = spoilt["projector.norm.weight"].astype(np.float32)
    state = {key: value for key, value in last.state.items() if key != "step"}
    store.save(last.step, spoilt, last.optimizer, state, best=True, keep=1)

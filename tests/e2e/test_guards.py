"""What a run does about steps that are not finite, losses that jump and parameters that stand still."""

from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_training import trainer
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.data.batch import Batch
from mlx_training.data.batching import Batches
from mlx_training.diagnostics.guard import Guard, _stands_still
from mlx_training.errors import DivergedError
from mlx_training.objectives.lm import lm
from tests.e2e.workbench import Workbench, contents, metrics

SLOW = ("training.max_steps=12", "evaluation.every_steps=4", "checkpoint.every_steps=4", "checkpoint.keep=9")


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> list[int]:
    """NaN in the second series of the micro-batches of these steps; the rows that got it."""
    rows: list[int] = []
    make = Batches.batch

    def batch(batches: Batches, index: int) -> Batch:
        made = make(batches, index)
        if index + 1 not in steps:
            return made
        series = made.series.copy()
        series[1, 3] = np.nan
        rows.append(made.rows[1])
        return replace(made, series=series)

    monkeypatch.setattr(Batches, "batch", batch)
    return rows


def test_a_bad_batch_is_skipped_counted_and_shown(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, 3, 6)
        code, _, err = tiny.main("train", tiny.config, "training.max_steps=8", "training.schedule=constant")
    assert code == 0, err
    logged = [record for record in metrics(tiny.run) if "loss" in record]
    assert [record.get("skipped") for record in logged] == [None, None, 1, 1, 1, 2, 2, 2]
    assert [np.isfinite(record["loss"]) for record in logged] == [step not in (3, 6) for step in range(1, 9)]
    lines = [line for line in err.splitlines() if "grad_norm" in line]
    assert ["skipped" in line for line in lines] == [False] * 2 + [True] * 6 and "  skipped 2  " in lines[-1]
    assert CheckpointStore(tiny.run).load().optimizer["step"] == 8 - 2
    tiny.train("training.max_steps=10", "training.schedule=constant", "--resume", "auto")
    assert metrics(tiny.run)[-2]["skipped"] == 2, "the count is kept"


def test_skipped_steps_are_counted_between_the_lines_of_the_log(
    tiny: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 2, 3, 12)
    result = tiny.train(*SLOW, "logging.every_steps=100")
    assert [record["skipped"] for record in metrics(tiny.run) if "skipped" in record] == [2, 2, 3]
    assert np.isfinite(result["loss"]), "of the last finite step that was read"


def test_too_many_in_a_row_stop_the_run(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the first module, the row, and nothing that was saved is touched."""
    with monkeypatch.context() as patch:
        bad = spoil(patch, 2, 6, 7, 8, 9, 10, 11)
        settings = "diagnostics.max_skipped_steps=3", "logging.every_steps=100"
        code, out, err = tiny.main("train", tiny.config, *SLOW, *settings, "checkpoint.every_steps=1")
    assert (code, out) == (4, "")
    message = err[err.index("error: ") :]
    assert message.startswith(
        "error: diverged by step 8: loss nan, gradient norm nan; 3 updates in a row were skipped."
    )
    assert "First not finite: the output of encoder.patch_embed, for 1 of 4 rows of the batch: " in message
    rows = {f"r{i}" for i in range(32)}
    (named,) = rows & set(message.replace(".", " ").replace(",", " ").split())
    assert named and len(bad) >= 4
    assert "What was saved before is intact" in message and "Traceback" not in err
    saved = [int(path.name.removeprefix("step_")) for path in CheckpointStore(tiny.run).paths()]
    assert saved == [1, 3, 4, 5], "a step that was skipped saves nothing"
    tiny.train(*SLOW, "--resume", "auto")


def test_the_row_is_the_one(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = spoil(monkeypatch, 1)
    _, _, err = tiny.main("train", tiny.config, "diagnostics.max_skipped_steps=1")
    config = load_config(tiny.config)
    ids = [row.id for row in trainer.assemble(config).data.splits["train"]]
    assert f"1 of 4 rows of the batch: {ids[bad[0]]}." in err


def test_a_gradient_that_is_not_finite(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and every output are fine; the square root at zero has no finite slope."""

    def rooted(model: Any, batch: Batch) -> dict[str, Any]:
        sums = lm(model, batch)
        nothing = sums["loss"] - sums["loss"]
        return sums | {"loss": sums["loss"] + (nothing * nothing) ** 0.5}

    monkeypatch.setattr(trainer, "training_objective", lambda spec: rooted)
    code, _, err = tiny.main("train", tiny.config, "diagnostics.max_skipped_steps=2")
    assert code == 4 and "diverged by step 2: loss" in err and "gradient norm nan; 2 updates in a row" in err
    assert "All outputs are finite; first not finite: the gradient of encoder.patch_embed.weight" in err
    assert "for the rows of the batch: r" in err


def test_a_decoder_has_windows(tiny: Workbench) -> None:
    tiny.use_decoder()
    huge = "training.learning_rate=1e39", "training.max_steps=9", "evaluation.every_steps=9", "checkpoint.every_steps=9"
    code, _, err = tiny.main("train", tiny.config, *huge)
    assert code == 4 and "First not finite: the output of model." in err and "of the batch: " in err


def test_spikes_are_marked(tiny: Workbench) -> None:
    """Against the losses logged before; a resumed run marks the same ones."""
    factor = 1.001
    jumpy = f"diagnostics.spike_factor={factor}", "training.learning_rate=10", "training.schedule=constant"
    code, _, err = tiny.main("train", tiny.config, *jumpy, "training.max_steps=30", "checkpoint.keep=99")
    assert code == 0
    logged = [record for record in metrics(tiny.run) if "loss" in record]
    losses = [record["loss"] for record in logged]
    expected = [i >= 5 and losses[i] > factor * median(losses[max(0, i - 20) : i]) for i in range(30)]
    assert any(expected) and [record.get("spike") == 1 for record in logged] == expected
    assert [" spike " in line for line in err.splitlines() if "grad_norm" in line] == expected
    tiny.train(
        *jumpy, "training.max_steps=30", "checkpoint.keep=99", "--resume", tiny.run / "checkpoints/step_00000010"
    )
    assert [record.get("spike") == 1 for record in metrics(tiny.run) if "loss" in record] == expected
    tiny.train(*jumpy, "diagnostics.spike_factor=null", "training.max_steps=30", "output_dir=unmarked")
    assert not any("spike" in record for record in metrics(Path("unmarked")))


def test_what_stands_still_is_named_once(tiny: Workbench) -> None:
    """By what moves: a rate so small that float32 cannot add it; a rate of 0 is meant."""
    rates = "training.learning_rate={encoder: 1e-12, projector: 1e-2}", "diagnostics.unmoved_after_steps=3"
    code, _, err = tiny.main("train", tiny.config, "training.max_steps=9", *rates)
    assert code == 0 and err.count("have not moved in 3 steps") == 1
    (line,) = (line for line in err.splitlines() if "have not moved" in line)
    assert "encoder.patch_embed.weight" in line and "projector" not in line and " more; run: " in line
    assert line.endswith(f"run: mlx-training doctor {tiny.run / 'config.yaml'}")
    (named,) = (record["unmoved"] for record in metrics(tiny.run) if "unmoved" in record)
    assert set(named.split(", ")) <= set(CheckpointStore(tiny.run).load().model) and "encoder.pos_embed" in named
    quiet = ("training.learning_rate={encoder: 0, projector: 1e-2}", "diagnostics.unmoved_after_steps=null")
    for folder, changed in zip(("first", "second"), quiet, strict=True):
        code, _, err = tiny.main("train", tiny.config, *rates, changed, f"output_dir={folder}")
        assert code == 0 and "have not moved" not in err, changed
    _, _, err = tiny.main("train", tiny.config, "training.max_steps=11", *rates, "--resume", "auto")
    assert "have not moved" not in err, "two steps of this process say little"


def test_what_moves_is_not_named(tiny: Workbench) -> None:
    """All of a healthy model, though a third of the attention bias has no true gradient."""
    for use in (lambda: None, tiny.use_decoder):
        use()
        name = f"output_dir=run{use == tiny.use_decoder}"
        code, _, err = tiny.main("train", tiny.config, "diagnostics.unmoved_after_steps=4", name)
        assert code == 0 and "have not moved" not in err, err


def test_decay_alone_is_no_movement() -> None:
    before = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    assert _stands_still(before, before.copy(), 0.0)
    assert _stands_still(before, before * np.float32(1 - 5e-4), 5e-4)
    assert not _stands_still(before, before * np.float32(1 - 5e-3), 5e-4), "more than decay explains"
    assert not _stands_still(before, before * np.float32(1 - 5e-4), 0.0), "this one does not decay"
    assert not _stands_still(before, before * np.float32(1.0005), 5e-4)
    moved = before.copy()
    moved[3, 2] += 1e-4
    assert not _stands_still(before, moved, 5e-4)
    assert not _stands_still(np.zeros(3, np.float32), np.full(3, 1e-9, np.float32), 5e-4)


class Scalar:
    """A device scalar that remembers who waited for it."""

    def __init__(self, value: float) -> None:
        self.value, self.reads = value, 0

    def __float__(self) -> float:
        self.reads += 1
        return self.value


def test_the_guard_waits_for_the_step_before_and_never_for_the_current_one(tiny: Workbench) -> None:
    config = load_config(tiny.config, ["diagnostics.max_skipped_steps=2", "diagnostics.unmoved_after_steps=null"])
    backend: Any = SimpleNamespace(
        activations=lambda *_: {"logprobs": np.zeros((1, 1))}, gradients=lambda *_: {"w": np.array([np.inf])}
    )
    assembly = trainer.assemble(config)
    batch = assembly.data.train_batches().batch(0)
    guard = Guard(assembly, backend, None, lm, run=tiny.run, step=0, skipped=3)
    steps = [
        {name: Scalar(1.0) for name in ("loss", "grad_norm")} | {"skipped": Scalar(s)}
        for s in (0.0, 1.0, 0.0, 1.0, 1.0, 0.0)
    ]

    def reads() -> list[int]:
        return [step["skipped"].reads for step in steps]

    for number, step in enumerate(steps[:5]):
        guard.watch(number + 1, step, [batch])
        assert reads() == [1] * number + [0] * (6 - number)
    assert (guard.skipped, guard.in_a_row) == (5, 1)
    with pytest.raises(DivergedError, match=r"by step 5: .*the gradient of w, for the rows"):
        guard.watch(6, steps[5], [batch])
    assert reads() == [1, 1, 1, 1, 1, 0] and sum(step["loss"].reads for step in steps) == 1

    guard = Guard(assembly, backend, None, lm, run=tiny.run, step=0, skipped=0)
    guard.watch(1, steps[1], [batch])
    assert guard.read() == {"loss": 1.0, "grad_norm": 1.0, "skipped": 1}, "the log waits anyway"
    guard.watch(2, steps[0], [batch])
    assert guard.in_a_row == 1 and contents(tiny.run) == {}

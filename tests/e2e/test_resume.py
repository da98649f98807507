"""Runs that stop and go on: interrupted, resumed here or on the other backend, started from another, diverged."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import trainer
from mlx_training.checkpoint import CheckpointStore
from tests.e2e.workbench import Workbench, contents, metrics


def state(run: Path) -> dict[str, bytes | list[dict[str, Any]]]:
    """Everything of a run that must not depend on how often it was interrupted."""
    steps = {path.name for path in CheckpointStore(run).paths()}
    names = [f"{step}/{part}.safetensors" for step in sorted(steps) for part in ("model", "optimizer")]
    files = {name: (run / "checkpoints" / name).read_bytes() for name in [*names, "latest", "best"]}
    return {**files, "metrics": metrics(run), "predictions": (run / "predictions_test.jsonl").read_bytes()}


EIGHT = ("training.max_steps=8", "training.grad_accumulation_steps=2", "model.encoder.dropout=0.2", "checkpoint.keep=9")


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """The next run gets a signal while it takes this step."""

    def rates(config: Any, current: int, total: int) -> dict[str, float]:
        if current == step:
            signal.raise_signal(number)
        return learning_rates(config, current, total)

    learning_rates = trainer.learning_rates
    monkeypatch.setattr(trainer, "learning_rates", rates)


@pytest.mark.parametrize("step", [3, 4, 8])
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    tiny: Workbench, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a step between evaluations, at one that evaluates, and at the last."""
    whole = tiny.train(*EIGHT, "output_dir=whole")
    with monkeypatch.context() as patch:
        interrupt_at(step, patch, signal.SIGTERM if step == 4 else signal.SIGINT)
        code, out, err = tiny.main("train", tiny.config, *EIGHT, "--json")
    assert (code, out) == (143 if step == 4 else 130, "")
    assert f"interrupted: saved at step {step}; continue with --resume auto" in err and "Traceback" not in err
    with (tiny.run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "lo\xf0\x9f')  # torn by a kill
    resumed = tiny.train(*EIGHT, "--resume", "auto")
    expected = state(Path("whole"))
    found = state(tiny.run)
    for name in found.keys() - expected.keys():  # the interruption's own checkpoint
        assert name.startswith(f"step_{step:08d}")
    assert {name: found[name] for name in expected} == expected
    assert {k: v for k, v in resumed.items() if k not in ("run", "seconds")} == {
        k: v for k, v in whole.items() if k not in ("run", "seconds")
    }


@pytest.mark.parametrize(("late", "saved"), [(3, 4), (8, 8)])
def test_a_signal_late_in_a_step(tiny: Workbench, late: int, saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the log waits for the device: that step is not saved any more, but the next, or the last, is."""

    def read(guard: trainer.Guard) -> dict[str, Any]:
        if next(numbers) == late:
            signal.raise_signal(signal.SIGINT)
        return read_step(guard)

    numbers, read_step = itertools.count(1), trainer.Guard.read  # every step is logged
    monkeypatch.setattr(trainer.Guard, "read", read)
    seldom = "training.max_steps=8", "checkpoint.every_steps=8", "evaluation.every_steps=8"
    code, _, err = tiny.main("train", tiny.config, *seldom)
    assert code == 130 and f"saved at step {saved};" in err
    assert CheckpointStore(tiny.run).load("latest").step == saved
    assert tiny.train(*seldom, "--resume", "auto")["steps"] == 8
    assert [record["step"] for record in metrics(tiny.run) if "eval/loss" in record] == [8]


def test_a_second_signal_stops_at_once(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.train("training.max_steps=2")
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        interrupt_at(3, patch)
        code, out, err = tiny.main("train", tiny.config, "--resume", "auto", "--json")
    assert (code, out) == (130, "") and err.endswith("interrupted\n") and "Traceback" not in err
    assert CheckpointStore(tiny.run).load("latest").step == 2
    assert tiny.train("--resume", "auto")["steps"] == 4


def test_resume_from_an_older_checkpoint_drops_the_later_lines(tiny: Workbench) -> None:
    tiny.train(*EIGHT)
    expected = state(tiny.run)
    tiny.train(*EIGHT, "--resume", tiny.run / "checkpoints/step_00000004")
    assert state(tiny.run) == expected


def test_resume_from_an_older_checkpoint_forgets_a_better_one_that_came_later(tiny: Workbench) -> None:
    tiny.train("training.max_steps=8", "checkpoint.keep=9")
    older = tiny.run / "checkpoints/step_00000002"
    worse = "training.learning_rate=1000", "training.schedule=constant", "training.max_steps=4"
    result = tiny.train("--resume", older, *worse)
    assert result["steps"] == 4 and (tiny.run / "checkpoints/best").read_text().strip() == "step_00000004"
    assert [path.name for path in CheckpointStore(tiny.run).paths()] == ["step_00000002", "step_00000004"]
    elsewhere = tiny.train("--resume", older, *worse, "output_dir=elsewhere")
    assert elsewhere["eval"] == result["eval"]
    assert (Path("elsewhere") / "checkpoints/best").read_text().strip() == "step_00000004"


def test_resume_auto_starts_continues_and_does_nothing_to_a_finished_run(tiny: Workbench) -> None:
    first = tiny.train("--resume", "auto")
    before = contents(tiny.run / "checkpoints"), metrics(tiny.run)
    assert tiny.train("--resume", "auto") == first
    assert (contents(tiny.run / "checkpoints"), metrics(tiny.run)) == before
    assert tiny.train("--resume", "auto", "training.max_steps=6")["steps"] == 6
    assert [record["step"] for record in metrics(tiny.run) if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_resume_on_the_other_backend(bench: Workbench, both_backends: list[str]) -> None:
    for first, second in (both_backends, both_backends[::-1]):
        mixed = f"output_dir={first}-{second}"
        schedule = "training.schedule=constant", "training.warmup_fraction=0"
        bench.train("training.max_steps=4", mixed, "--backend", first, *schedule)
        result = bench.train("training.max_steps=8", mixed, "--backend", second, "--resume", "auto", *schedule)
        assert (result["backend"], result["steps"]) == (second, 8)
        bench.train("training.max_steps=8", f"output_dir={first}-constant", "--backend", first, *schedule)
        alone, both = (metrics(Path(f"{first}-{kind}")) for kind in ("constant", second))
        for a, b in zip(alone, both, strict=True):
            assert a == pytest.approx(b, rel=1e-4), (a, b)
        model = CheckpointStore(f"{first}-constant").load().model
        for name, array in CheckpointStore(f"{first}-{second}").load().model.items():
            if not name.endswith("in_proj_bias"):  # its true gradient is zero in part: AdamW moves it by noise
                assert np.abs(array - model[name]).max() < 1e-4, name
        given, found = (tiny_predictions(Path(f"{first}-{kind}")) for kind in ("constant", second))
        assert given == found


def tiny_predictions(run: Path) -> bytes:
    return (run / "predictions_test.jsonl").read_bytes()


def test_a_signal_to_the_program(tiny: Workbench) -> None:
    number = {"torch": signal.SIGINT, "mlx": signal.SIGTERM}[tiny.backend]  # one each: a program starts in seconds
    command = [sys.executable, "-m", "mlx_training.cli", "train", tiny.config, "training.max_steps=100000", "--json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while not (tiny.run / "checkpoints/latest").exists() and time.monotonic() < deadline and program.poll() is None:
        time.sleep(0.02)
    program.send_signal(number)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (128 + number, ""), err
    assert "finishing this step and saving" in err and "Traceback" not in err
    saved = CheckpointStore(tiny.run).load("latest").step
    assert f"interrupted: saved at step {saved}; continue with --resume auto" in err
    assert tiny.train(f"training.max_steps={saved + 2}", "--resume", "auto")["steps"] == saved + 2


def test_init_from_a_run(tiny: Workbench) -> None:
    tiny.train()
    still = "training.learning_rate=1e-12", "training.max_steps=1"
    for source in (tiny.run, tiny.run / "checkpoints/step_00000002"):
        name = f"from-{source.name}"
        tiny.train(f"training.init_from={source}", f"output_dir={name}", *still)
        store = CheckpointStore(tiny.run)
        expected = store.load(source) if "step" in source.name else store.best_or_latest()
        started = CheckpointStore(name).load()
        assert started.optimizer["step"] == 1  # fresh
        for parameter, array in expected.model.items():
            assert np.abs(array - started.model[parameter]).max() < 1e-6
    again = f"training.init_from={tiny.run}", "output_dir=from-run", "training.max_steps=2", "--resume=auto"
    assert tiny.train(*again)["steps"] == 2


@pytest.mark.parametrize("rate", ["1e30", "1e38"])
def test_divergence(tiny: Workbench, rate: str) -> None:
    tiny.train()
    good = contents(tiny.run / "checkpoints")
    huge = "training.max_steps=40", f"training.learning_rate={rate}", "training.schedule=constant", "--resume=auto"
    code, out, err = tiny.main("train", tiny.config, *huge, "evaluation.every_steps=10", "checkpoint.every_steps=10")
    assert (code, out) == (4, "")
    assert "error: diverged by step" in err and "lower training.learning_rate" in err and "Traceback" not in err
    assert contents(tiny.run / "checkpoints") == good
    assert tiny.train("--resume", "auto", "training.max_steps=6")["steps"] == 6


def test_divergence_before_anything_was_saved(tiny: Workbench) -> None:
    code, _, err = tiny.main("train", tiny.config, "training.learning_rate=1e38", "training.max_steps=40")
    assert code == 4 and "error: diverged by step" in err
    assert not CheckpointStore(tiny.run).paths() or CheckpointStore(tiny.run).load()
    assert tiny.train("--resume", "auto")["steps"] == 4


def test_a_run_is_not_continued_with_another_model_or_other_data(tiny: Workbench) -> None:
    tiny.train(*EIGHT, "training.max_steps=4")
    changes = ("dataset.stats_in_text=false", "experiment.seed=8", "model.encoder.num_heads=1")
    code, _, err = tiny.main("train", tiny.config, *EIGHT, *changes, "--resume", "auto")
    assert code == 2
    for change in ("dataset.stats_in_text: True -> False", "experiment.seed: ", "model.encoder: "):
        assert change in err
    assert tiny.train(*EIGHT, "--resume", "auto")["steps"] == 8  # more steps are no other run

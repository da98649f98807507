"""Runs that stop and go on: interrupted, resumed here or on the other backend, started from another, diverged."""

import errno
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_training import evaluate, tracking, trainer
from mlx_training.assemble import assemble
from mlx_training.checkpoint import CheckpointStore
from mlx_training.config import load_config
from mlx_training.data.rows import write_rows
from mlx_training.errors import CheckpointError, ConfigError, DivergedError
from tests.e2e.tiny import rows
from tests.e2e.workbench import CONFIG, DATA, Workbench, contents, metrics


def state(run: Path) -> dict[str, bytes | list[dict[str, Any]]]:
    """Everything of a run that must not depend on how often it was interrupted."""
    steps = {path.name for path in CheckpointStore(run).paths()}
    names = [f"{step}/{part}.safetensors" for step in sorted(steps) for part in ("model", "optimizer")]
    files = {name: (run / "checkpoints" / name).read_bytes() for name in [*names, "latest", "best"]}
    return {**files, "metrics": metrics(run), "predictions": (run / "predictions_test.jsonl").read_bytes()}


EIGHT = ("training.max_steps=8", "training.grad_accumulation_steps=2", "model.encoder.dropout=0.2", "checkpoint.keep=9")


STEPS = "training.max_steps"


def go_on(bench: Workbench, *overrides: str, resume: str = "auto", allow: Sequence[str] = ()) -> dict[str, Any]:
    """Continue the bench's run."""
    return trainer.train(load_config(bench.config, overrides), resume=resume, allow_change=allow)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """The next run gets a signal while it takes this step."""

    def rates(config: Any, current: int, total: int) -> dict[str, float]:
        if current == step:
            signal.raise_signal(number)
        return learning_rates(config, current, total)

    learning_rates = trainer.learning_rates
    monkeypatch.setattr(trainer, "learning_rates", rates)


@pytest.mark.parametrize("step", [3, 4, 8])
@pytest.mark.parametrize("averaging", ["null", "0.7"])
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    tiny: Workbench, step: int, averaging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a step between evaluations, at one that evaluates, and at the last."""
    eight = *EIGHT, f"training.ema_decay={averaging}"
    whole = tiny.train(*eight, "output_dir=whole")
    with monkeypatch.context() as patch:
        interrupt_at(step, patch, signal.SIGTERM if step == 4 else signal.SIGINT)
        code, out, err = tiny.main("train", tiny.config, *eight, "--json")
    assert (code, out) == (143 if step == 4 else 130, "")
    assert f"interrupted: saved at step {step}; continue with --resume auto" in err and "Traceback" not in err
    with (tiny.run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "lo\xf0\x9f')  # torn by a kill
    resumed = tiny.train(*eight, "--resume", "auto")
    expected = state(Path("whole"))
    found = state(tiny.run)
    for name in found.keys() - expected.keys():  # the interruption's own checkpoint
        assert name.startswith(f"step_{step:08d}")
    assert {name: found[name] for name in expected} == expected
    assert {k: v for k, v in resumed.items() if k not in ("run", "seconds")} == {
        k: v for k, v in whole.items() if k not in ("run", "seconds")
    }


def test_batches_by_tokens_go_on_in_the_middle_of_an_epoch(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = [replace(row, pre_prompt="Trend? " * (1 + i % 9)) for i, row in enumerate(rows(32))]
    write_rows(tiny.data, ragged)
    overrides = (*EIGHT, "training.batch_by=tokens", "training.batch_size=3")  # three steps an epoch
    batches = assemble(load_config(tiny.config, overrides)).data.train_batches()
    assert {len(batches.batch(i).rows) for i in range(6)} > {2}
    tiny.train(*overrides, "output_dir=whole")
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        assert tiny.main("train", tiny.config, *overrides)[0] == 130
    tiny.train(*overrides, "--resume", "auto")
    expected, found = state(Path("whole")), state(tiny.run)
    assert {name: found[name] for name in expected} == expected


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


@pytest.mark.parametrize("averaging", ["null", "0.7"])
@pytest.mark.parametrize("at", [4, 8])
def test_a_signal_leaves_an_evaluation(
    tiny: Workbench, averaging: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between epochs, and after the last step; no step more is taken, and the run that goes on evaluates first."""
    overrides = *EIGHT, f"training.ema_decay={averaging}"
    whole = tiny.train(*overrides, "output_dir=whole")
    measure, number = evaluate.Evaluator.loss, itertools.count(2, 2)

    def loss(self: evaluate.Evaluator, split: str, limit: int | None) -> dict[str, float]:
        if next(number) == at:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the evaluation went on")
        return measure(self, split, limit)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Evaluator, "loss", loss)
        code, _, err = tiny.main("train", tiny.config, *overrides)
    assert code == 130 and f"saved at step {at};" in err and "leaving the evaluation" in err
    assert CheckpointStore(tiny.run).load("latest").step == at
    assert [record["step"] for record in metrics(tiny.run) if "eval/loss" in record] == list(range(2, at, 2))
    resumed = tiny.train(*overrides, "--resume", "auto")
    expected, found = state(Path("whole")), state(tiny.run)
    assert {name: found[name] for name in expected} == expected
    assert {k: v for k, v in resumed.items() if k not in ("run", "seconds")} == {
        k: v for k, v in whole.items() if k not in ("run", "seconds")
    }
    assert [record["step"] for record in metrics(tiny.run) if "eval/loss" in record] == [2, 4, 6, 8]


def test_a_second_signal_stops_at_once(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.train("training.max_steps=2")
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        interrupt_at(3, patch)
        code, out, err = tiny.main("train", tiny.config, "--resume", "auto", "--json")
    assert (code, out) == (130, "") and "Traceback" not in err
    assert "interrupted: stopped at once: " in err and "step_00000002 is the last checkpoint" in err
    assert CheckpointStore(tiny.run).load("latest").step == 2
    assert tiny.train("--resume", "auto")["steps"] == 4


def test_resume_from_an_older_checkpoint_drops_the_later_lines(tiny: Workbench) -> None:
    tiny.train(*EIGHT)
    expected = state(tiny.run)
    tiny.train(*EIGHT, "--resume", tiny.run / "checkpoints/step_00000004")
    assert state(tiny.run) == expected


def test_resume_from_a_run_means_its_latest_checkpoint(tiny: Workbench) -> None:
    same_rates = "training.schedule=constant", "training.warmup_fraction=0", *EIGHT
    whole = tiny.train(*same_rates)
    tiny.train(*same_rates, "training.max_steps=4", "output_dir=half")
    rest = tiny.train(*same_rates, "output_dir=rest", "--resume", "half", "--allow-change", STEPS)
    assert (rest["loss"], rest["eval"]) == (whole["loss"], whole["eval"])
    message = tiny.refused(CONFIG, "train", tiny.config, *same_rates, "output_dir=none", "--resume", tiny.run)
    assert "the checkpoint is of step 8, and this run has 8: nothing would train" in message
    assert not Path("none").exists()
    for part in ("model", "optimizer"):
        name = f"checkpoints/step_00000008/{part}.safetensors"
        assert (Path("rest") / name).read_bytes() == (tiny.run / name).read_bytes()


def test_resume_from_an_older_checkpoint_forgets_a_better_one_that_came_later(tiny: Workbench) -> None:
    tiny.train("training.max_steps=8", "checkpoint.keep=9")
    older = tiny.run / "checkpoints/step_00000002"
    worse = "training.learning_rate=1000", "training.schedule=constant", "training.max_steps=4"
    result = go_on(tiny, *worse, resume=str(older), allow=("training.learning_rate", "training.schedule", STEPS))
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


def test_averages_of_the_weights_are_what_is_evaluated_and_kept(tiny: Workbench) -> None:
    """What trains is in the optimiser's state, and trains as it would without."""
    tiny.train("output_dir=plain")
    result = tiny.train("training.ema_decay=0.8")
    plain, averaged = CheckpointStore("plain").load(), CheckpointStore(tiny.run).load()
    for name, array in plain.model.items():
        np.testing.assert_array_equal(averaged.optimizer[f"{name}.raw"], array)
        assert (averaged.model[name] != array).any() or not array.any(), name
    lines, other = metrics(tiny.run), metrics(Path("plain"))
    assert [a["loss"] for a in lines if "loss" in a] == [b["loss"] for b in other if "loss" in b]
    assert [a["eval/loss"] for a in lines if "eval/loss" in a] != [b["eval/loss"] for b in other if "eval/loss" in b]
    best = CheckpointStore(tiny.run).best_or_latest().step
    logged = next(line["eval/loss"] for line in lines if line["step"] == best and "eval/loss" in line)
    tiny.train(
        "output_dir=on", "training.max_steps=1", "training.learning_rate=1e-12", f"training.init_from={tiny.run}"
    )
    assert metrics(Path("on"))[-1]["eval/loss"] == pytest.approx(logged, rel=1e-5)
    assert result["eval"] == tiny.json("evaluate", tiny.run, "--split", "test")
    message = tiny.refused(CONFIG, "train", tiny.config, "training.max_steps=9", "--resume", "auto")
    assert "training.ema_decay: 0.8 -> null: " in message and "init_from" in message


@pytest.mark.parametrize("averaging", ["null", "0.7"])
def test_resume_on_the_other_backend(bench: Workbench, averaging: str, both_backends: list[str]) -> None:
    for first, second in (both_backends, both_backends[::-1]):
        mixed = f"output_dir={first}-{second}"
        schedule = "training.schedule=constant", "training.warmup_fraction=0", f"training.ema_decay={averaging}"
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
    assert re.search("(finishing this step|leaving the evaluation) and saving", err) and "Traceback" not in err
    saved = CheckpointStore(tiny.run).load("latest").step
    assert f"interrupted: saved at step {saved}; continue with --resume auto" in err
    assert go_on(tiny, f"training.max_steps={saved + 2}", allow=[STEPS])["steps"] == saved + 2


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
    again = f"training.init_from={tiny.run}", "output_dir=from-run", *still, "training.max_steps=2", "--resume=auto"
    assert tiny.train(*again)["steps"] == 2


@pytest.mark.parametrize("rate", ["1e30", "1e38"])
def test_divergence(tiny: Workbench, rate: str) -> None:
    tiny.train()
    good = contents(tiny.run / "checkpoints")
    huge = "training.max_steps=40", f"training.learning_rate={rate}", "training.schedule=constant"
    changes = "training.learning_rate", "training.schedule"
    with pytest.raises(DivergedError, match=r"diverged by step .*lower training.learning_rate"):
        go_on(tiny, *huge, "evaluation.every_steps=10", "checkpoint.every_steps=10", allow=changes)
    assert contents(tiny.run / "checkpoints") == good
    assert go_on(tiny, "training.max_steps=6", allow=(*changes, STEPS))["steps"] == 6


def test_divergence_before_anything_was_saved(tiny: Workbench) -> None:
    code, _, err = tiny.main("train", tiny.config, "training.learning_rate=1e38", "training.max_steps=40")
    assert code == 4 and "error: diverged by step" in err
    assert not CheckpointStore(tiny.run).paths() or CheckpointStore(tiny.run).load()
    assert go_on(tiny, allow=("training.learning_rate", STEPS))["steps"] == 4


# Another configuration


def test_a_run_is_not_continued_with_other_settings(tiny: Workbench) -> None:
    tiny.train(*EIGHT, "training.max_steps=4")
    changes = ("dataset.stats_in_text=false", "experiment.seed=8", "model.encoder.num_heads=1", "training.eps=1e-6")
    message = tiny.refused(CONFIG, "train", tiny.config, *EIGHT, *changes, "training.max_steps=3", "--resume", "auto")
    for change in (
        "dataset.stats_in_text: true -> false   (--allow-change dataset.stats_in_text)\n",
        "experiment.seed: 7 -> 8   (--allow-change experiment.seed)\n",
        "model.encoder.num_heads: 2 -> 1   (--allow-change model.encoder.num_heads)\n",
        "training.eps: 1e-08 -> 1e-06   (--allow-change training.eps)\n",
    ):
        assert change in message
    assert "max_steps" not in message, "the run has finished: fewer steps train nothing"
    allowed = ["dataset.stats_in_text", "experiment.seed", "model.encoder.num_heads"]
    with pytest.raises(ConfigError, match=r"^[^>]*\n  training.eps: 1e-08 -> 1e-06 [^>]*$"):
        go_on(tiny, *EIGHT, *changes, allow=allowed)
    assert go_on(tiny, *EIGHT, *changes, allow=[*allowed, "training.eps"])["steps"] == 8
    assert tiny.train(*EIGHT, *changes, "training.max_steps=9", "--resume", "auto")["steps"] == 9, "what it is now"


HARMLESS = (
    *("experiment.name=other", "experiment.tags=[a]", "experiment.notes=why", "logging.every_steps=2"),
    *("checkpoint.keep=1", "checkpoint.every_steps=3", "checkpoint.best=eval/accuracy", "evaluation.every_steps=3"),
    *("evaluation.metrics=[accuracy, loss]", "evaluation.batch_size=3", "evaluation.save_predictions=false"),
    *("diagnostics.max_skipped_steps=9", "training.early_stopping_patience=9", "training.max_steps=8", "device=auto"),
)


def test_harmless_changes_pass_and_a_new_measure_of_the_best_starts_anew(tiny: Workbench) -> None:
    tiny.train()
    assert tiny.train(*HARMLESS, "--resume", "auto")["steps"] == 8
    accuracies = [record["eval/accuracy"] for record in metrics(tiny.run) if record["step"] > 4 and len(record) == 3]
    assert CheckpointStore(tiny.run).load().state["progress"]["best"] == max(accuracies)
    assert int((tiny.run / "checkpoints/best").read_text()[5:]) > 4
    longer = *HARMLESS, "training.max_steps=9"
    for measure in ("evaluation.max_rows=2", "evaluation.split=test", "evaluation.max_new_tokens=2"):
        message = tiny.refused(CONFIG, "train", tiny.config, *longer, measure, "--resume", "auto")
        assert f"(--allow-change {measure.partition('=')[0]})" in message
    assert go_on(tiny, *longer, "evaluation.max_rows=2", allow=["evaluation.max_rows"])["steps"] == 9


def test_fewer_steps_of_an_unfinished_run(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        tiny.main("train", tiny.config, *EIGHT)
    fewer = *EIGHT, "training.max_steps=5"
    assert "max_steps: 8 -> 5   (--allow" in tiny.refused(CONFIG, "train", tiny.config, *fewer, "--resume", "auto")
    assert go_on(tiny, *fewer, allow=["training.max_steps"])["steps"] == 5


def test_names_to_allow(tiny: Workbench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--allow-change is for a run that is continued"):
        go_on(tiny, resume=None, allow=["training.eps"])  # type: ignore[arg-type]
    for _ in range(2):  # nothing to continue, and a run
        with pytest.raises(ConfigError, match=r"no such key .* did you mean training.learning_rate\?"):
            go_on(tiny, allow=["training.learning_rates"])
        capsys.readouterr()
        go_on(tiny, allow=["training.eps"])
        assert "note: --allow-change training.eps: it has not changed" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"shape: encoder"):
        go_on(tiny, "model.encoder.hidden_size=16", allow=["model.encoder.hidden_size"])
    assert go_on(tiny, "model.encoder.num_heads=1", STEPS + "=5", allow=["model.encoder"])["steps"] == 5
    before = contents(tiny.run)
    with pytest.raises(ConfigError, match="model.encoder.num_heads: 1 -> 2"):
        go_on(tiny, STEPS + "=6", resume=str(tiny.run / "checkpoints/step_00000005"))
    with pytest.raises(ConfigError, match="model.encoder.num_heads: 1 -> 2"):  # of the run that the checkpoint is of
        go_on(tiny, "output_dir=new", resume=str(tiny.run / "checkpoints/step_00000005"))
    assert contents(tiny.run) == before


def test_more_patience_goes_on_after_an_early_stop(tiny: Workbench) -> None:
    stop = "training.early_stopping_patience=1", "training.early_stopping_min_delta=100", "training.max_steps=12"
    assert tiny.train(*stop)["steps"] == 4
    assert tiny.train(*stop, "training.early_stopping_patience=3", "--resume", "auto")["steps"] == 8


# A finished run


def test_a_finished_run_is_left_alone(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tiny.train()
    before = contents(tiny.run)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Evaluator, "report", lambda *_: pytest.fail("evaluated again"))
        for same in ((), ("training.max_steps=2",), ("logging.every_steps=3", "experiment.notes=again")):
            assert tiny.train(*same, "--resume", "auto") == result
            assert contents(tiny.run) == before
    again = tiny.train("evaluation.test_split=validation", "--resume", "auto")
    assert again["steps"] == 4 and (tiny.run / "predictions_validation.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_final_report(
    tiny: Workbench, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.train("output_dir=whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Evaluator, "report", lambda *_: signal.raise_signal(number))
        code, out, err = tiny.main("train", tiny.config, "--json")
    assert (code, out) == (128 + number, "") and "Traceback" not in err
    assert "interrupted: in the final report; the training is saved at step 4; continue with --resume auto" in err
    result = tiny.train("--resume", "auto")
    assert (result["eval"], result["loss"], result["steps"]) == (whole["eval"], whole["loss"], 4)


# What must not be lost


def test_metrics_outlive_their_checkpoints(tiny: Workbench) -> None:
    tiny.train("diagnostics.probe_every_steps=1")
    logged = {name: (tiny.run / name).read_bytes() for name in ("metrics.jsonl", "gradients.jsonl")}
    for number in (1, 2):
        shutil.rmtree(tiny.run / "checkpoints")
        code, _, err = tiny.main("train", tiny.config, "diagnostics.probe_every_steps=1", "--resume", "auto")
        assert code == 0 and f"it is kept as metrics.jsonl.{number}" in err
        assert (tiny.run / "gradients.jsonl").read_bytes() == logged["gradients.jsonl"]
    for name, content in logged.items():
        assert (tiny.run / f"{name}.1").read_bytes() == content and (tiny.run / f"{name}.2").exists()


def test_another_runs_checkpoint_replaces_no_run(tiny: Workbench) -> None:
    tiny.train()
    tiny.train("output_dir=other")
    theirs = Path("other/checkpoints/step_00000002")
    message = tiny.refused(CONFIG, "train", tiny.config, "--resume", theirs)
    assert "has checkpoints of its own" in message and "nothing was changed" in message


def test_an_evaluation_is_logged_once(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at a step that would have been evaluated; killed after evaluating it, before it was saved again."""
    with monkeypatch.context() as patch:
        interrupt_at(2, patch)
        tiny.main("train", tiny.config)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go_on(tiny)
    assert [record["step"] for record in metrics(tiny.run) if "eval/loss" in record] == [2]
    tiny.train("--resume", "auto")
    assert [record["step"] for record in metrics(tiny.run) if "eval/loss" in record] == [2, 4]


# Two processes


HOLD = """
import sys, time
from mlx_training.run_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_trains_in_a_directory(tiny: Workbench) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tiny.run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for resume in ((), ("--resume", "auto")):
            message = tiny.refused(CONFIG, "train", tiny.config, *resume)
            assert f"{tiny.run} is being trained in by process {holder.pid} on " in message
            assert "nothing was changed" in message
        holder.kill()
        holder.wait()
    assert (tiny.run / "train.lock").exists(), "a killed process leaves its file, but not its lock"
    assert tiny.train()["steps"] == 4
    assert not (tiny.run / "train.lock").exists()


# Disks


def test_a_disk_that_fills_up(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.train("training.max_steps=2")
    good = contents(tiny.run / "checkpoints")
    usage = shutil.disk_usage(tiny.run)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        code, out, err = tiny.main("train", tiny.config, "--resume", "auto")
    assert (code, out) == (3, "") and "Traceback" not in err
    assert "No space left on device. It needs 1.1 MB. 0.0 MB are free. Remove files from that disk" in err
    assert "Earlier checkpoints are intact; continue with --resume auto" in err
    assert contents(tiny.run / "checkpoints") == good
    assert tiny.train("--resume", "auto")["steps"] == 4


@pytest.mark.parametrize("place", ["metrics.jsonl", "result.json"])
def test_a_disk_that_refuses_other_files(tiny: Workbench, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if place == "metrics.jsonl":
            patch.setattr(tracking.JsonLines, "log", refuse)
        else:
            patch.setattr(trainer, "write_atomic", refuse_if(place, trainer.write_atomic, refuse))
        code, out, err = tiny.main("train", tiny.config)
    assert (code, out) == (3, "") and "cannot be written: No space left on device. " in err and "Traceback" not in err
    assert tiny.train("--resume", "auto")["steps"] == 4


def test_predictions_that_a_disk_refuses(tiny: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, _: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    tiny.train()
    monkeypatch.setattr(evaluate, "write_atomic", refuse)
    message = tiny.refused(DATA, "evaluate", tiny.run)
    assert "predictions_test.jsonl: cannot be written: Read-only file system." in message


def refuse_if(name: str, write: Any, refuse: Any) -> Any:
    return lambda path, content: refuse() if path.name == name else write(path, content)

"""Metrics: valid JSON lines without doubles, an ETA that is right, and W&B that cannot stop a run."""

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_training.errors import DivergedError
from mlx_training.json_lines import JsonLines, read_metrics
from mlx_training.tracking import Progress, Tracker, WandbSink, open_tracker


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress(total: int, *, from_step: int = 0, terminal: bool = False) -> tuple[Progress, io.StringIO, list[float]]:
    stream, now = Terminal() if terminal else io.StringIO(), [100.0]
    return Progress(total, from_step=from_step, stream=stream, clock=lambda: now[0]), stream, now


def test_lines_are_valid_json_flushed_at_once_and_restored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = Tracker([JsonLines(path)])
    tracker.log(1, {"loss": np.float32(0.5), "grad_norm": math.nan, "lr/encoder": math.inf, "note": "x", "none": None})
    text = path.read_text()  # before close: a kill must not lose a line

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse)["grad_norm"] == "NaN"
    (record,) = read_metrics(path)
    assert math.isnan(record["grad_norm"]) and record["lr/encoder"] == math.inf
    assert (record["step"], record["loss"], record["note"], record["none"]) == (1, 0.5, "x", None)


def test_resuming_truncates_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10}\n{"step": 20, "eval/loss": 1}\n{"step": 20}\n{"step": 30}\n{"step": 4')
    tracker = open_tracker(tmp_path, total_steps=40, from_step=20)
    tracker.log(30, {"loss": 1.0})
    tracker.close()
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 20, 30]
    open_tracker(tmp_path, total_steps=40, from_step=0).close()  # nothing was saved: the run starts over
    assert read_metrics(path) == []


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"step": true}',
        '{"step": 2, "loss": []}',
        '{"step": 2, "grad_norm": "x"}',
        '{"step": 2, "eval/loss": {}}',
    ],
)
def test_lines_that_are_no_records_are_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": "NaN"}}\n{line}\n')
    assert [record["step"] for record in read_metrics(path)] == [1]


def test_eta_counts_remaining_steps_at_the_current_pace() -> None:
    sink, stream, now = progress(1000)
    now[0] += 60  # one slow step: compilation
    sink.log({"step": 1, "loss": 1.0})
    now[0] += 99 * 2
    sink.log({"step": 100, "loss": 1.0})
    assert stream.getvalue().splitlines()[1].endswith("ETA 30:00")  # 900 steps at 2 s, the compilation left out
    now[0] += 100 * 2 + 40  # an evaluation takes 40 s: (198 + 240) s for 199 steps
    sink.log({"step": 200, "loss": 1.0})
    assert stream.getvalue().splitlines()[2].endswith(f"ETA {800 * 438 / 199 / 60:.0f}:21")


def test_eta_of_a_resumed_run_ignores_the_steps_of_earlier_processes() -> None:
    sink, stream, now = progress(1000, from_step=900)
    now[0] += 50
    sink.log({"step": 950, "loss": 1.0})
    assert "ETA 0:50" in stream.getvalue()
    sink.log({"step": 1000, "loss": 1.0})
    assert stream.getvalue().splitlines()[-1].endswith("ETA 0:00")


def test_a_small_gradient_norm_does_not_read_as_zero() -> None:
    sink, stream, _ = progress(10)
    record = {"step": 1, "loss": 1.25, "lr/encoder": 2e-4, "lr/projector": 1e-4, "grad_norm": 3e-5}
    sink.log({**record, "tokens_per_second": 12345.6, "memory_gb": 0.5})
    line = stream.getvalue()
    for part in ("step  1/10", "loss 1.2500", "lr encoder 2.00e-04", "lr projector 1.00e-04", "grad_norm 3.00e-05"):
        assert part in line
    assert "12,346 tokens/s" in line and "0.50 GB" in line
    sink.log({"step": 2, "lr/encoder": 1e-4, "lr/projector": 1e-4})
    assert "lr 1.00e-04" in stream.getvalue()


def test_a_terminal_line_is_redrawn_and_evaluations_stay() -> None:
    sink, stream, _ = progress(10, terminal=True)
    sink.log({"step": 1, "loss": 1.0, "grad_norm": 1.0})
    sink.log({"step": 2, "eval/accuracy": 0.5, "eval/rows": 100})
    sink.log({"step": 3, "loss": 1.0})
    sink.close()
    first, second, _ = stream.getvalue().split("\n")
    assert first.count("\r") == 2 and "eval/accuracy 0.5000  eval/rows 100" in first
    assert second.startswith("\rstep  3/10")


def fake_wandb(monkeypatch: pytest.MonkeyPatch, **parts: Callable[..., Any]) -> list[Any]:
    """What a wandb module made of these parts (init, log, finish) is told."""
    told: list[Any] = []
    run = SimpleNamespace(
        log=parts.get("log", lambda values, step: told.append((values, step))),
        finish=parts.get("finish", lambda: told.append("finish")),
    )
    init = parts.get("init", lambda **options: told.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return told


def sink(folder: Path, **options: Any) -> WandbSink:
    return WandbSink(folder, mode="offline", project=None, name="run", tags=(), config={}, **options)


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("connection lost")


def leave(*_: object, **__: object) -> None:
    sys.exit("connection lost")


@pytest.mark.parametrize("part", ["init", "log", "finish"])
@pytest.mark.parametrize("failure", [fail, leave, None])
def test_wandb_missing_or_failing_is_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    failure: Callable[..., None] | None,
) -> None:
    if failure is None:
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        fake_wandb(monkeypatch, **{part: failure})
    tracker = Tracker([sink(tmp_path), JsonLines(tmp_path / "metrics.jsonl")])
    tracker.log(1, {})
    tracker.log(2, {})
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("wandb: not logging") == 1
    assert ("connection lost" if failure else "not installed (pip install wandb") in said
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("part", ["init", "log", "finish"])
def test_wandb_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    answer = Event()
    fake_wandb(monkeypatch, **{part: lambda *_, **__: answer.wait(60)})
    started = time.monotonic()
    silent = sink(tmp_path, patience=0.5)
    for step in range(1000):
        silent.log({"step": step})
    assert time.monotonic() - started < 0.5, "a step waited"
    silent.close()
    assert 0.5 <= time.monotonic() - started < 5
    answer.set()
    silent.thread.join(5)
    assert capsys.readouterr().err.count("wandb: not logging: it has not answered for 0.5 s") == 1


def test_wandb_gets_config_mode_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = fake_wandb(monkeypatch)
    tracker = open_tracker(
        tmp_path, total_steps=2, wandb="offline", project="p", name="n", tags=("t",), notes="why", config={"a": 1}
    )
    tracker.log(1, {"loss": np.float32(2)})
    tracker.close()
    options = {"dir": str(tmp_path), "mode": "offline", "project": "p", "name": "n", "config": {"a": 1}, "tags": ["t"]}
    options |= {"notes": "why", "id": (tmp_path / "wandb_id").read_text().strip(), "resume": "allow"}
    assert told == [options, ({"loss": 2.0}, 1), "finish"]
    for name in ("WANDB_DISABLE_GIT", "WANDB_DISABLE_CODE"):  # no uncommitted work is sent
        assert os.environ[name] == "true"


def test_a_directory_keeps_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(**options: Any) -> None:
        assert (tmp_path / "wandb_id").read_text().strip() == options["id"], "written down too late"
        told.append(options)
        raise KeyboardInterrupt

    told = fake_wandb(monkeypatch, init=killed)
    for _ in range(2):
        sink(tmp_path).close()
    (tmp_path / "wandb_id").write_text("../../id\n")  # damaged
    sink(tmp_path).close()
    first, second, third = (options["id"] for options in told)
    assert first == second and len(third) == 8 and third != first


def test_how_a_run_diverged_is_its_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DivergedError), open_tracker(tmp_path, total_steps=9) as tracker:
        tracker.log(1, {"loss": 1.0})
        raise DivergedError("diverged by step 3: loss nan", 3)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1] == {"step": 3, "diverged": "diverged by step 3: loss nan"}
    assert "step 3/9  diverged" in capsys.readouterr().err
    open_tracker(tmp_path, total_steps=9, from_step=2).close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]

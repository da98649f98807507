"""Metrics: valid JSON lines without doubles, an ETA that is right, and W&B that cannot stop a run."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

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


def test_wandb_missing_or_failing_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def log(*_: object, **__: object) -> None:
        raise RuntimeError("connection lost")

    modules = {"not installed": None, "connection lost": SimpleNamespace(init=lambda **_: SimpleNamespace(log=log))}
    for reason, wandb in modules.items():
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        sink = WandbSink(tmp_path, mode="offline", project=None, name="run", tags=(), config={})
        sink.log({"step": 1})
        sink.log({"step": 2})
        sink.close()
        said = capsys.readouterr().err
        assert said.count("wandb: not logging") == 1 and reason in said


def test_wandb_gets_config_mode_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    run = SimpleNamespace(log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options) or run))
    tracker = open_tracker(
        tmp_path, total_steps=2, wandb="offline", project="p", name="n", tags=("t",), notes="why", config={"a": 1}
    )
    tracker.log(1, {"loss": np.float32(2)})
    tracker.close()
    options = {"dir": str(tmp_path), "mode": "offline", "project": "p", "name": "n", "config": {"a": 1}, "tags": ["t"]}
    assert calls == [options | {"notes": "why"}, ({"loss": 2.0}, 1), "finish"]

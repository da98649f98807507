"""Where a run's numbers go: always `metrics.jsonl`; also a progress line and Weights & Biases.

A record is one flat mapping of names to numbers or strings. Names the progress line knows: `loss`, `lr` or
`lr/<group>`, `grad_norm`, `spike`, `skipped`, `tokens_per_second`, `memory_gb`; under `eval/` is an evaluation.
"""

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal, Protocol, TextIO

from mlx_training.errors import DivergedError, without_secrets
from mlx_training.json_lines import METRICS, JsonLines, Record, is_evaluation
from mlx_training.run_directory import write_atomic
from mlx_training.waiting import duration

WANDB_ID = "wandb_id"
WANDB_SETTINGS = {  # unless the environment says otherwise: no long waits, and nobody's uncommitted work
    "WANDB_INIT_TIMEOUT": "60",
    "WANDB_FINISH_TIMEOUT": "50",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
}


class Sink(Protocol):
    """Receives every record; `record["step"]` is the number of optimiser steps taken."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Hands each record to every sink, in order. Leaving its `with` block closes them, and logs how a run diverged."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record `values` (numbers, NumPy scalars, strings, None) at optimiser step `step`."""
        record = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        for sink in self.sinks:
            sink.log(record)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            if isinstance(error, DivergedError):
                self.log(error.step, {"diverged": str(error)})
        finally:
            self.close()


class WandbSink:
    """Weights & Biases, offline or online. Its absence or failure is said once and never stops a run.

    A thread of its own does all the talking, so that a service that does not answer holds up no step, and the end of
    the run by `patience` seconds at most. A run directory that is trained in again continues its W&B run: the id is
    in `WANDB_ID`. W&B drops steps that it has already seen.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        mode: Literal["offline", "online"],
        project: str | None,
        name: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
        notes: str = "",
        patience: float = 60,
    ) -> None:
        about: dict[str, Any] = {"mode": mode, "project": project, "name": name, "tags": list(tags), "notes": notes}
        about |= {"dir": str(directory), "config": dict(config), "id": _wandb_id(Path(directory)), "resume": "allow"}
        for setting, value in WANDB_SETTINGS.items():
            os.environ.setdefault(setting, value)
        self.patience, self.has_given_up = patience, False
        self.records: SimpleQueue[Record | None] = SimpleQueue()
        self.thread = Thread(target=self._work, args=[about], name="wandb", daemon=True)
        self.thread.start()

    def log(self, record: Record) -> None:
        if self.thread.is_alive():
            self.records.put(record)

    def close(self) -> None:
        self.records.put(None)
        self.thread.join(self.patience)
        if self.thread.is_alive():
            self._give_up(f"it has not answered for {self.patience:g} s")

    def _work(self, about: Mapping[str, Any]) -> None:
        try:
            import wandb

            run = wandb.init(**about)
            while (record := self.records.get()) is not None:
                run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])
            run.finish()
        except ImportError:
            self._give_up("it is not installed (pip install wandb, or logging.wandb=disabled)")
        except BaseException as error:  # noqa: BLE001  any failure of an optional service, its own sys.exit included
            self._give_up(error)

    def _give_up(self, reason: object) -> None:
        if not self.has_given_up:
            self.has_given_up = True
            words = " ".join(without_secrets(str(reason) or type(reason).__name__).split())
            print(f"wandb: not logging: {words}; metrics.jsonl has everything", file=sys.stderr)


class Progress:
    """One line that is redrawn on a terminal; a line per record elsewhere.

    The ETA is the wall time per step since this process' first record (so that compilation and loading count
    once, evaluations and saving as often as they happen) times the steps that are left.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        from_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.stream = stream or sys.stderr
        self.clock = clock
        self.start = (from_step, clock())
        self.anchor: tuple[int, float] | None = None
        self.drawn = 0

    def log(self, record: Record) -> None:
        step, now = record["step"], self.clock()
        seconds = self._seconds_left(step, now)
        if self.anchor is None and step > self.start[0]:
            self.anchor = (step, now)
        parts = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}", *_parts(record)]
        if seconds is not None:
            parts.append(f"ETA {duration(seconds)}")
        line = "  ".join(parts)
        if not self.stream.isatty():
            self.stream.write(line + "\n")
        elif is_evaluation(record):
            self.stream.write("\r" + line.ljust(self.drawn) + "\n")
            self.drawn = 0
        else:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be drawn over
            self.stream.write("\r" + line.ljust(self.drawn))
            self.drawn = len(line)
        self.stream.flush()

    def close(self) -> None:
        if self.drawn:
            self.stream.write("\n")
            self.stream.flush()
            self.drawn = 0

    def _seconds_left(self, step: int, now: float) -> float | None:
        first_step, first_time = self.anchor if self.anchor and step > self.anchor[0] else self.start
        if step <= first_step:
            return None
        return max(0, self.total_steps - step) * (now - first_time) / (step - first_step)


class StepTimer:
    """Supervised tokens and seconds per step since the last reading; `restart` leaves out what was between."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.since, self.tokens, self.steps = time.monotonic(), 0, 0

    def count(self, tokens: int) -> None:
        self.tokens, self.steps = self.tokens + tokens, self.steps + 1

    def read(self) -> dict[str, float]:
        seconds = time.monotonic() - self.since
        rates = {"tokens_per_second": self.tokens / seconds, "seconds_per_step": seconds / self.steps}
        self.restart()
        return rates


def open_tracker(
    directory: str | Path,
    *,
    total_steps: int,
    from_step: int = 0,
    evaluated: int | None = None,
    wandb: Literal["disabled", "offline", "online"] = "disabled",
    project: str | None = None,
    name: str = "",
    tags: Sequence[str] = (),
    notes: str = "",
    config: Mapping[str, Any] | None = None,
) -> Tracker:
    """The sinks of a training run in `directory`, which continues after optimiser step `from_step`.

    `evaluated` is the step of the last evaluation that it continues after.
    """
    sinks: list[Sink] = [
        JsonLines(Path(directory) / METRICS, from_step=from_step, evaluated=evaluated),
        Progress(total_steps, from_step=from_step),
    ]
    if wandb != "disabled":
        about: dict[str, Any] = {"project": project, "name": name, "tags": tags, "notes": notes, "config": config or {}}
        sinks.append(WandbSink(directory, mode=wandb, **about))
    return Tracker(sinks)


def _wandb_id(directory: Path) -> str:
    """The id of this directory's W&B run; made, and written down at once, where there is none."""
    path = directory / WANDB_ID
    known = path.read_text(errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch(r"[a-z0-9]{8}", known):
        known = secrets.token_hex(4)
        write_atomic(path, known + "\n")
    return known


def _plain(value: Any) -> Any:
    """A NumPy scalar as Python's own number."""
    return value.item() if hasattr(value, "item") else value


def _parts(record: Record) -> list[str]:
    """The record's known values as the words of a progress line."""
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    rates = {name.removeprefix("lr/"): value for name, value in record.items() if name == "lr" or name[:3] == "lr/"}
    if len(set(rates.values())) == 1:
        parts.append(f"lr {next(iter(rates.values())):.2e}")
    else:
        parts += [f"lr {name} {value:.2e}" for name, value in rates.items()]
    if "grad_norm" in record:
        parts.append(f"grad_norm {record['grad_norm']:.2e}")  # "%.2f" of a small norm reads as a dead gradient
    if "spike" in record:
        parts.append("spike")
    if "diverged" in record:
        parts.append("diverged")
    if "skipped" in record:
        parts.append(f"skipped {record['skipped']}")
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if "memory_gb" in record:
        parts.append(f"{record['memory_gb']:.2f} GB")
    for name, value in record.items():
        if name.startswith("eval/") and isinstance(value, (int, float)):
            parts.append(f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}")
    return parts

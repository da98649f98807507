"""A run's log under the event names of "mainrun": RUN/events.jsonl, one JSON object a line, beside metrics.jsonl."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_training.assemble import Assembly, TextData
from mlx_training.backend import Backend
from mlx_training.json_lines import VALIDATION, JsonLines, Record, read_metrics

EVENTS = "events.jsonl"
STAMP = ("event", "timestamp", "step")


def descriptions(assembly: Assembly, backend: Backend, batches_per_epoch: int) -> dict[str, dict[str, Any]]:
    """What is said before the first step: event -> fields."""
    config, data = assembly.config, assembly.data
    dataset: dict[str, Any] = {"rows": {name: len(rows) for name, rows in data.splits.items()}}
    dataset |= {"batches_per_epoch": batches_per_epoch, "vocab_size": data.tokenizer.vocab_size}
    if isinstance(data, TextData):
        dataset["tokens"] = {name: data.sizes(name)["tokens"] for name in data.splits}
    runtime = backend.runtime
    return {
        "hyperparameters_configured": {"seed": config.experiment.seed, **config.training.model_dump(mode="json")},
        "device_info": {"device": runtime.device, "backend": backend.name, "precision": runtime.precision},
        "dataset_info": dataset,
        "model_configured": config.model.model_dump(mode="json"),
        "model_info": {"parameters_count": assembly.spec.num_parameters},
    }


class EventLines:
    """A sink of the tracker: `training_step` and `validation_step`, each with step, max_steps, loss and elapsed_time
    (seconds of training, earlier attempts included).

    A resumed run drops the lines of steps that it takes again, and describes what is not as the file says it was.
    """

    def __init__(
        self,
        run: Path,
        described: Mapping[str, Mapping[str, Any]],
        max_steps: int,
        from_step: int = 0,
        evaluated: int | None = None,
        seconds: float = 0.0,
    ) -> None:
        path = run / EVENTS
        self.max_steps, self.started = max_steps, time.monotonic() - seconds
        self.lines = JsonLines(path, from_step=from_step, evaluated=evaluated)
        known = {record["event"]: record for record in read_metrics(path) if "event" in record}
        for event, fields in described.items():
            said = {name: value for name, value in known.get(event, {}).items() if name not in STAMP}
            if said != fields:
                self._write(event, {"step": from_step, **fields})

    def log(self, record: Record) -> None:
        for name, event in (("loss", "training_step"), ("eval/loss", VALIDATION)):
            if name in record:
                seconds = round(time.monotonic() - self.started, 3)
                fields = {"step": record["step"], "max_steps": self.max_steps, "loss": record[name]}
                self._write(event, {**fields, "elapsed_time": seconds})

    def close(self) -> None:
        self.lines.close()

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        self.lines.log({"event": event, "timestamp": datetime.now(UTC).isoformat(), **fields})

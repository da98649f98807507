"""Records of a run as JSON lines: `metrics.jsonl` and `gradients.jsonl`, written, read back, and kept."""

import itertools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_training.json_text import parse_json
from mlx_training.run_directory import naming, write_atomic

METRICS = "metrics.jsonl"
VALIDATION = "validation_step"  # the event of an evaluation in events.jsonl
Record = dict[str, Any]
NUMBERS = ("loss", "grad_norm", "skipped")
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonLines:
    """One JSON object a line of a file, flushed at once. NaN and infinities, at any depth, are written as strings."""

    def __init__(
        self, path: str | Path, *, from_step: int = 0, evaluated: int | None = None, lazy: bool = False
    ) -> None:
        """Append to `path`, after dropping the lines past `from_step`, where the run is resumed (0: all lines).

        `evaluated`: the last evaluation that the resumed run knows of, where that is an earlier step.
        `lazy`: make the file with the first record.
        """
        path = Path(path)
        if path.exists():
            last = {True: from_step if evaluated is None else evaluated, False: from_step}
            records = read_metrics(path) if from_step else []
            kept = [record for record in records if record["step"] <= last[is_evaluation(record)]]
            write_atomic(path, "".join(_line(record) for record in kept))
        self.path = path
        self.file = None if lazy else path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        with naming(self.path):
            self.file = self.file or self.path.open("a", encoding="utf-8")
            self.file.write(_line(record))
            self.file.flush()

    def close(self) -> None:
        if self.file:
            with naming(self.path):  # what could not be written is tried again
                self.file.close()


def set_aside(*paths: Path) -> None:
    """Keep what an earlier attempt logged, under the first free name PATH.1, PATH.2, ..., and say so."""
    for path in paths:
        if not path.is_file() or not read_metrics(path):
            continue
        kept = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(kept)
        print(f"warning: {path} is of steps that no checkpoint here has; it is kept as {kept.name}", file=sys.stderr)


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a `metrics.jsonl`, non-finite numbers restored. A torn last line is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = parse_json(line)
        except ValueError:  # only the line a kill cut short; the step it belongs to is trained again
            continue
        if isinstance(record, dict) and _is_record(record := _restored(record)):
            records.append(record)
    return records


def _is_record(record: Record) -> bool:
    """Whether what is counted and plotted is a number."""
    numbers = [value for name, value in record.items() if name in NUMBERS or name.startswith("eval/")]
    return type(record.get("step")) is int and all(isinstance(value, int | float) for value in numbers)


def is_evaluation(record: Record) -> bool:
    """Whether a record holds an evaluation."""
    return record.get("event") == VALIDATION or any(name.startswith("eval/") for name in record)


def _line(record: Record) -> str:
    return json.dumps(_writable(record), allow_nan=False) + "\n"


def _writable(value: Any) -> Any:
    """The value with its non-finite numbers, at any depth, as strings."""
    if isinstance(value, Mapping):
        return {name: _writable(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(value: Any) -> Any:
    """The value with its non-finite numbers as numbers again."""
    if isinstance(value, dict):
        return {name: _restored(inner) for name, inner in value.items()}
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value

"""What every record works with: the command line in processes of its own, runs that go on, tables and pictures."""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlx_training.errors import UserError
from mlx_training.json_lines import read_metrics
from tools.evidence import ROOT

RESULTS = ROOT / "docs" / "records"
QUIET = {"evaluation": {"test_split": None}}  # records evaluate by themselves
Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Lab:
    """The runs of one record, in runs/records/NAME."""

    name: str

    @property
    def folder(self) -> Path:
        """Where the runs and their configurations are."""
        return ROOT / "runs" / "records" / self.name

    def data(self, file: str) -> str:
        """Path of a file of the real data."""
        path = Path(os.environ.get("MLX_TRAINING_DATA") or ROOT.parent / "shared" / "data") / file
        if not path.exists():
            raise UserError(f"no real data at {path}; MLX_TRAINING_DATA names its folder")
        return str(path.resolve())

    def train(self, run: str, config: Mapping[str, Any], backend: str = "torch") -> Path:
        """Train a configuration, or go on with it; the run directory. A finished run costs a start of the command."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, output = self.folder / f"{run}.yaml", self.folder / run
        known = {"experiment": {"name": run}, "output_dir": str(output)}
        self.write(path, {**known, **config})
        self.command("train", path, "--backend", backend, "--resume", "auto")
        return output

    def write(self, path: Path, config: Mapping[str, Any]) -> None:
        """A configuration as YAML."""
        path.write_text(yaml.safe_dump(merged(QUIET, config), sort_keys=False))

    def evaluate(self, run: Path, *flags: str | Path) -> dict[str, Any]:
        """What `evaluate` says of a run's last checkpoint that was best."""
        return self.command("evaluate", run, *flags)

    def command(self, *words: str | Path) -> dict[str, Any]:
        """The JSON of one command; its progress goes to our standard error."""
        command = [sys.executable, "-m", "mlx_training.cli", *map(str, words), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def refused(self, *words: str | Path) -> str:
        """The message of a command that is refused."""
        command = [sys.executable, "-m", "mlx_training.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stderr.strip()

    def cpu_seconds(self, config: Mapping[str, Any], backend: str = "torch") -> float:
        """CPU seconds of a training run in a new process, which leaves nothing behind."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.yaml"
            self.write(path, {**config, "output_dir": f"{folder}/run"})
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.command("train", path, "--backend", backend)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def curve(self, run: Path, metric: str = "loss", tokens_per_step: int = 1) -> Curve:
        """A metric of a run against steps, or against tokens."""
        records = [record for record in read_metrics(run / "metrics.jsonl") if metric in record]
        return [r["step"] * tokens_per_step for r in records], [r[metric] for r in records]

    def draw(self, curves: Mapping[str, Curve], x: str, y: str, suffix: str = "", **axes: Any) -> Path:
        """One picture of named curves: docs/records/NAME[_SUFFIX].png."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        panel = figure.subplots()
        for name, (xs, ys) in curves.items():
            panel.plot(xs, ys, label=name, linewidth=1.2, marker="." if len(xs) < 12 else None)
        panel.set(xlabel=x, ylabel=y, **axes)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{self.name}{'_' * bool(suffix)}{suffix}.png"
        figure.savefig(path, dpi=120)
        return path


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key; what `over` says wins."""
    both = {
        key: merged(base[key], over[key])
        for key in base.keys() & over.keys()
        if isinstance(base[key], Mapping) and isinstance(over[key], Mapping)
    }
    return {**base, **over, **both}


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Columns of equal width; floats with four digits."""
    cells = [list(head), *([f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    aligned = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in cells
    ]
    return ["  ".join(row).rstrip() for row in aligned]

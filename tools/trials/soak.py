"""Many steps of a tiny run: memory, open files, threads, the time of a step and compilations stay what they were.

The real command trains in a process of its own. It logs every 20 steps, evaluates and saves every 500 and probes every
1,000 (runs under 10,000 steps: 100, 20 and 10 times in all). At each line that it logs, its memory, files, threads and
CPU time are read from outside. Its log also counts the shapes that the step was given, and its traces: MLX compiles a
step for every shape.

What fails, once the warm-up (the first tenth) is over:
- resident memory that rises by more than 0.5 MB per 1,000 steps (Theil-Sen) and by more than 5 % from the first tenth
  to the last (medians);
- one open file, or one thread, more than there were;
- in 2,000 steps or more: a step that takes 1.25 times the CPU time it took (of each tenth the tenth percentile, which a
  shared machine disturbs least; wall time is only reported), and a shape that is new in the second half;
- more traces than three functions of the step can need.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_training.backend import replaced
from mlx_training.config import RunConfig
from mlx_training.data.batch import Batch
from mlx_training.data.questions import QuestionDataset
from mlx_training.data.rows import write_rows
from mlx_training.json_lines import METRICS, read_metrics
from tools.make_llama import LLAMA_3_2_1B, make_llama
from tools.trials.report import REPOSITORY, Report

MOST_SLOPE, MOST_GROWTH, MOST_SLOWER = 0.5, 0.05, 1.25  # MB per 1,000 steps, share, ratio
ENOUGH = 2000  # steps; times of fewer are noise, and their shapes have not all been seen
TINY_LLAMA = LLAMA_3_2_1B | {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
COMMON = """\
experiment: {name: soak}
device: cpu
evaluation: {metrics: [loss]}
"""
DECODER = """\
model:
  family: decoder
  decoder: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, context_length: 16}
  tokenizer: {train: 300}
dataset: {format: corpus, num_samples_train: 40, num_samples_validation: 4, num_samples_test: 4}
training: {batch_size: 4}
"""
TIMESERIES = """\
model:
  family: timeseries
  llm_id: FOLDER/llm
  encoder: {hidden_size: 16, num_layers: 1, num_heads: 2, ffn_size: 32, max_patches: 64, dropout: 0.1}
dataset: {path: FOLDER/rows.jsonl, format: jsonl}
training: {batch_size: 3, grad_accumulation_steps: 2}
"""
FAMILIES = {"decoder": DECODER, "timeseries": TIMESERIES}


@dataclass(frozen=True)
class Sample:
    """A process when it has taken `step` steps, seen from outside."""

    step: int
    memory: float  # resident, MB
    files: int
    threads: int
    cpu: float  # seconds, of all its threads

    @classmethod
    def of(cls, pid: int, step: int) -> "Sample":
        """Read one."""
        here = Path(f"/proc/{pid}")
        pages = int((here / "statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        cpu = time.clock_gettime(~pid << 3 | 2)  # clock_getcpuclockid(3) of Linux
        return cls(step, memory, len(os.listdir(here / "fd")), len(os.listdir(here / "task")), cpu)


@dataclass(frozen=True)
class Soaked:
    """A run after its warm-up: samples from outside, and the records of its log."""

    samples: Sequence[Sample]
    records: Sequence[dict[str, Any]]

    def slope(self) -> float:
        """Resident memory, MB per 1,000 steps: the median of the slopes between any two samples."""
        steps, memory = (np.array([getattr(s, name) for s in self.samples], float) for name in ("step", "memory"))
        one, other = np.triu_indices(len(steps), 1)
        return float(np.median((memory[other] - memory[one]) / (steps[other] - steps[one]))) * 1000

    def memory(self) -> tuple[float, float]:
        """MB, medians."""
        return _ends([s.memory for s in self.samples], np.median)

    def most(self, name: str) -> tuple[int, int]:
        """Open files or threads, at most."""
        first, last = _ends([getattr(s, name) for s in self.samples], max)
        return int(first), int(last)

    def cpu(self) -> tuple[float, float]:
        """Milliseconds a step, tenth percentiles."""
        pairs = zip(self.samples, self.samples[1:], strict=False)
        return _ends([1000 * (b.cpu - a.cpu) / (b.step - a.step) for a, b in pairs], lambda x: np.percentile(x, 10))

    def wall(self) -> tuple[float, float]:
        """Milliseconds a step, medians."""
        return _ends([1000 * record["seconds_per_step"] for record in self.records], np.median)

    def faults(self) -> list[str]:
        """Everything that did not stay what it was."""
        problems = []
        (before, after), slope = self.memory(), self.slope()
        if slope > MOST_SLOPE and after > (1 + MOST_GROWTH) * before:
            problems.append(f"memory: {before:.1f} MB became {after:.1f} MB, {slope:.2f} MB per 1,000 steps")
        for name in ("files", "threads"):
            if self.most(name)[1] > self.most(name)[0]:
                problems.append("open {}: {} became {}".format(name, *self.most(name)))
        half, end = self.records[len(self.records) // 2], self.records[-1]
        before, after = self.cpu()
        if end["step"] >= ENOUGH and after > MOST_SLOWER * before:
            problems.append(f"CPU time of a step: {before:.2f} ms became {after:.2f} ms")
        if end["step"] >= ENOUGH and end["shapes"] > half["shapes"]:
            problems.append(f"{half['shapes']} shapes at half time, {end['shapes']} at the end")
        if end["traces"] > 2 * end["shapes"] + 1:  # a step, or its gradients, of every shape; and the update
            problems.append(f"{end['traces']} traces of {end['shapes']} shapes")
        return problems

    def lines(self) -> list[str]:
        """What was measured."""
        a, b = self.records[0], self.records[-1]
        (cpu, later_cpu), (wall, later_wall) = self.cpu(), self.wall()
        return [
            "memory {:.1f} -> {:.1f} MB, ".format(*self.memory())
            + f"{self.slope():+.3f} MB per 1,000 steps; open files {{}} -> {{}}; ".format(*self.most("files"))
            + "threads {} -> {}".format(*self.most("threads")),
            f"a step: {cpu:.2f} -> {later_cpu:.2f} ms of CPU ({later_cpu / cpu:.2f} times), "
            f"{wall:.2f} -> {later_wall:.2f} ms of wall time ({later_wall / wall:.2f} times)",
            f"traces {a['traces']} -> {b['traces']}, of {a['shapes']} -> {b['shapes']} shapes",
        ]


def run(size: int, backends: Sequence[str], seed: int, folder: Path) -> Report:
    """`size` steps of each family on each backend, one after the other."""
    if not Path("/proc/self/statm").exists():
        return Report(skipped="it reads /proc, which this system does not have")
    make_llama(TINY_LLAMA, folder / "llm", group_size=32, seed=seed)
    write_rows(folder / "rows.jsonl", QuestionDataset(seed, "train", 120))
    report = Report()
    for backend in backends:
        for family, text in FAMILIES.items():
            config = folder / f"{backend}-{family}.yaml"
            output = f"backend: {backend}\noutput_dir: {folder / config.stem}\n"
            config.write_text((COMMON + text).replace("FOLDER", str(folder)) + output)
            started = time.monotonic()
            soaked, problem = soak(config, folder / config.stem, size)
            name = f"{backend}, {family}"
            if soaked is None:
                report.failures.append(f"{name}: {problem}")
                continue
            report.lines.append(f"{name} ({time.monotonic() - started:.0f} s)")
            report.lines += [f"  {line}" for line in soaked.lines()]
            report.failures += [f"{name}: {fault}" for fault in soaked.faults()]
    return report


def soak(config: Path, run: Path, steps: int) -> tuple[Soaked | None, str]:
    """Train for so many steps, watched; what is wrong, if it does not come to its end."""
    save, log = min(500, steps // 20), min(20, steps // 100)
    cadence = {"evaluation": save, "checkpoint": save, "logging": log}
    train = ["train", str(config), f"training.max_steps={steps}", f"diagnostics.probe_every_steps={2 * save}"]
    train += [f"{section}.every_steps={every}" for section, every in cadence.items()]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    samples: list[Sample] = []
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-m", "tools.trials.soak", *train],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said = [*said[-20:], line]
            if (logged := re.match(r"step +(\d+)/\d+  loss", line)) and int(logged[1]) < steps:
                samples.append(Sample.of(process.pid, int(logged[1])))
    if process.returncode:
        return None, f"exit code {process.returncode}: {''.join(said)}"
    warm = steps // 10
    records = [record for record in read_metrics(run / METRICS) if "loss" in record and record["step"] >= warm]
    return Soaked([sample for sample in samples if sample.step >= warm], records), ""


def counting(argv: Sequence[str]) -> int:
    """The command line; the log of a run counts traces of the step and shapes of its batches as well."""
    from mlx_training import cli, trainer

    steps: list[Any] = []
    shapes: set[tuple[Any, ...]] = set()
    opened = trainer.open_backend

    def open_backend(config: RunConfig) -> Any:
        backend: Any = opened(config)
        make_step = backend.make_step

        def kept(*args: Any, **kwargs: Any) -> Any:
            steps.append(make_step(*args, **kwargs))
            return steps[-1]

        backend.make_step = kept
        return backend

    class Counting(trainer.Guard):
        def watch(self, step: int, metrics: dict[str, Any], batches: Sequence[Batch]) -> None:
            shapes.update(tuple(array.shape for array in batch.arrays().values()) for batch in batches)
            super().watch(step, metrics, batches)

        def read(self) -> dict[str, Any]:
            return super().read() | {"traces": steps[-1].num_compilations, "shapes": len(shapes)}

    with replaced(trainer, "open_backend", open_backend), replaced(trainer, "Guard", Counting):
        return cli.main(argv)


def _ends(values: Sequence[float], of: Callable[[Any], float]) -> tuple[float, float]:
    """A figure of the first tenth of a run (after the warm-up, so the first ninth of what is left) and of the last."""
    part = max(1, len(values) // 9)
    return float(of(values[:part])), float(of(values[-part:]))


if __name__ == "__main__":
    sys.exit(counting(sys.argv[1:]))

"""Kill a training program at random moments and see that it always goes on.

python tools/torture.py                     20 kills over the installed backends, a minute or two
python tools/torture.py --kills 200

A small decoder trains on generated text and saves after every second step, so that many kills fall inside a save.
After `kill -9` the same command with `--resume auto` must continue, from the last save that was begun or, as saves
are written in the background, from the one before: a kill costs at most one save interval beside the save in flight.
At the end the log must hold every step once. Exits with 1 on any failure.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_training.checkpoint import CheckpointStore
from mlx_training.environment import installed_backends
from mlx_training.json_lines import METRICS, read_metrics

SAVE_EVERY = 2
CONFIG = """\
experiment: {name: torture}
device: cpu
model:
  family: decoder
  decoder: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, context_length: 16}
  tokenizer: {train: 300}
dataset: {format: corpus, num_samples_train: 40, num_samples_validation: 4, num_samples_test: 4}
training: {max_steps: 1000000, batch_size: 4, schedule: constant}
evaluation: {every_steps: 4}
logging: {every_steps: 1}
"""
PATIENCE = 120  # seconds a program may take to its first step


@dataclass
class Summary:
    """What one backend went through."""

    kills: int = 0
    inside_a_save: int = 0
    most_lost: int = 0  # steps trained twice after one kill
    failures: list[str] = field(default_factory=list)


class Program:
    """`mlx-training train ... --resume auto` in a process of its own; what it says goes to a file."""

    def __init__(self, folder: Path) -> None:
        self.run, self.said = folder / "run", folder / "said.txt"
        self.steps_before = last_step(self.run)
        command = [sys.executable, "-m", "mlx_training.cli", "train", str(folder / "config.yaml"), "--resume", "auto"]
        root = str(Path(__file__).resolve().parents[1])
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                command, stdout=said, stderr=said, env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
            )

    def wait_for_a_step(self) -> str:
        """What is wrong, if it never takes one."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(r"^step +\d+/\d+  loss", self.said.read_text(), re.MULTILINE):
            if self.process.poll() is not None:
                return f"exit code {self.process.returncode} before a step: {self.said.read_text()[-500:]}"
            if time.monotonic() > deadline:
                return f"no step within {PATIENCE} s: {self.said.read_text()[-500:]}"
            time.sleep(0.002)
        return ""

    @property
    def first_step(self) -> int:
        """The step it continued from."""
        resumed = re.search(r"resumed from step (\d+)", self.said.read_text())
        return int(resumed[1]) if resumed else 0

    def end(self, number: signal.Signals) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=PATIENCE)
        finally:
            self.process.kill()


def last_step(run: Path) -> int:
    """The last step that was logged."""
    records = read_metrics(run / METRICS) if (run / METRICS).exists() else []
    return max((record["step"] for record in records), default=0)


def torture(backend: str, kills: int, folder: Path, moments: random.Random) -> Summary:
    """Kill one run so many times."""
    summary = Summary()
    (folder / "config.yaml").write_text(
        f"{CONFIG}output_dir: {folder / 'run'}\nbackend: {backend}\n"
        f"checkpoint: {{every_steps: {SAVE_EVERY}, keep: 2}}\n"
    )
    for attempt in range(kills + 1):
        program = Program(folder)
        problem = program.wait_for_a_step()
        first, before = program.first_step, program.steps_before
        summary.most_lost = max(summary.most_lost, before - first)
        begun = (before - 1) // SAVE_EVERY * SAVE_EVERY  # a step is logged before it is saved
        if not problem and first < begun - SAVE_EVERY:
            problem = f"continued from step {first}; step {before} was reached, and saved after every {SAVE_EVERY}"
        time.sleep(moments.random() * 0.4)
        if attempt < kills:
            program.end(signal.SIGKILL)
            summary.kills += 1
            summary.inside_a_save += bool(list((folder / "run/checkpoints").glob(".tmp-*")))
        elif (code := program.end(signal.SIGTERM)) != 143:
            problem = problem or f"SIGTERM ended it with {code}: {program.said.read_text()[-500:]}"
        if problem:
            summary.failures.append(f"{backend}, start {attempt + 1}: {problem}")
            break
    if not summary.failures:
        summary.failures += [f"{backend}: {problem}" for problem in wrong_at_the_end(folder / "run")]
    return summary


def wrong_at_the_end(run: Path) -> list[str]:
    """Steps that are missing from the log or in it twice, a last checkpoint that is not good, files left over."""
    steps = [record["step"] for record in read_metrics(run / METRICS) if "loss" in record]
    problems = []
    if steps != list(range(1, len(steps) + 1)):
        problems.append(f"{METRICS} does not hold every step once: {steps}")
    if (saved := CheckpointStore(run).load().step) != len(steps):
        problems.append(f"{len(steps)} steps are logged, the last checkpoint is of step {saved}")
    leftovers = [path.name for path in run.rglob("*") if path.name.startswith(".tmp") or path.suffix == ".lock"]
    return problems + ([f"left over: {', '.join(leftovers)}"] if leftovers else [])


def main(argv: Sequence[str] | None = None) -> int:
    """Print a summary; 1 when any run could not go on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="in all, shared out between the backends")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: another one every time")
    parser.add_argument("--backend", choices=("mlx", "torch"), help="default: every installed one")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    names = [args.backend] if args.backend else list(installed_backends())
    failures: list[str] = []
    for index, name in enumerate(names):
        kills = args.kills // len(names) + (index < args.kills % len(names))
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            summary = torture(name, kills, Path(folder), random.Random(f"{seed}/{name}"))
        print(
            f"{name}: {summary.kills} kills, {summary.inside_a_save} of them inside a save; at most "
            f"{summary.most_lost} steps lost (saved after every {SAVE_EVERY}); {len(summary.failures)} failures; "
            f"{time.monotonic() - started:.0f} s",
            flush=True,
        )
        failures += summary.failures
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"seed {seed}: " + ("FAILED" if failures else "every run went on"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

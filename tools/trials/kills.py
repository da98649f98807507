"""`kill -9` at random moments: every run goes on, and never loses more than one save interval.

A small decoder, and a small time-series model, train on generated data and save after every second step, so that many
kills fall inside a save. One kill in four comes at any moment since the program was started, the others once it
trains. The same command with `--resume auto` must then continue from the last save that was begun before the last step
that was logged. At the end the log must hold every step once.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_training.checkpoint import CheckpointStore
from mlx_training.json_lines import METRICS, read_metrics
from tools.trials.report import REPOSITORY, Report

SAVE_EVERY = 2
COMMON = """\
experiment: {name: torture}
device: cpu
evaluation: {every_steps: 4}
logging: {every_steps: 1}
"""
DECODER = """\
model:
  family: decoder
  decoder: {hidden_size: 16, intermediate_size: 24, num_layers: 1, num_heads: 2, context_length: 16}
  tokenizer: {train: 300}
dataset: {format: corpus, num_samples_train: 40, num_samples_validation: 4, num_samples_test: 4}
training: {max_steps: 1000000, batch_size: 4, schedule: constant}
"""
TIMESERIES = """\
extends: quick_test
model:
  encoder: {hidden_size: 16, num_layers: 1, num_heads: 2, ffn_size: 32}
dataset: {num_samples_train: 40, num_samples_validation: 4, num_samples_test: 4}
training: {max_steps: 1000000, batch_size: 2, grad_accumulation_steps: 2, schedule: constant}
"""
FAMILIES = {"decoder": DECODER, "timeseries": TIMESERIES}
PATIENCE = 120  # seconds a program may take to its first step
START = 4.0  # seconds within which a kill "at any moment" comes


@dataclass
class Tally:
    """What one run went through."""

    kills: int = 0
    inside_a_save: int = 0
    before_a_step: int = 0
    most_lost: int = 0  # steps trained twice after one kill
    problem: str = ""


class Program:
    """`mlx-training train ... --resume auto` in a process of its own; what it says goes to a file."""

    def __init__(self, folder: Path) -> None:
        self.run, self.said = folder / "run", folder / "said.txt"
        self.steps_before = last_step(self.run)
        command = [sys.executable, "-m", "mlx_training.cli", "train", str(folder / "config.yaml"), "--resume", "auto"]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                command,
                stdout=said,
                stderr=said,
                env=environment,
            )

    def wait_for_a_step(self) -> str:
        """What is wrong, if it never takes one."""
        deadline = time.monotonic() + PATIENCE
        while not self.has_trained():
            if self.process.poll() is not None:
                return f"exit code {self.process.returncode} before a step: {self.said.read_text()[-500:]}"
            if time.monotonic() > deadline:
                return f"no step within {PATIENCE} s: {self.said.read_text()[-500:]}"
            time.sleep(0.002)
        return ""

    def has_trained(self) -> bool:
        """Whether it has taken a step."""
        return bool(re.search(r"^step +\d+/\d+  loss", self.said.read_text(), re.MULTILINE))

    def has_lost(self) -> int:
        """How many logged steps this program had to train again; 0 where it did not come so far as to say."""
        began = re.search(r"trainable parameters, (?:resumed from step (\d+)|from step 0)", self.said.read_text())
        return max(0, self.steps_before - int(began[1] or 0)) if began else 0

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


def run(size: int, backends: Sequence[str], seed: int, folder: Path) -> Report:
    """`size` kills in all, shared out between the backends and the two families."""
    report = Report()
    subjects = [(backend, family) for backend in backends for family in FAMILIES]
    for index, (backend, family) in enumerate(subjects):
        kills = size // len(subjects) + (index < size % len(subjects))
        here = folder / f"{backend}-{family}"
        here.mkdir()
        (here / "config.yaml").write_text(
            f"{COMMON}{FAMILIES[family]}output_dir: {here / 'run'}\nbackend: {backend}\n"
            f"checkpoint: {{every_steps: {SAVE_EVERY}, keep: 2}}\n"
        )
        tally = torture(here, kills, random.Random(f"{seed}/{backend}/{family}"))
        problems = [tally.problem] if tally.problem else wrong_at_the_end(here / "run")
        report.failures += [f"{backend}, {family}: {problem}" for problem in problems]
        report.lines.append(
            f"{backend}, {family}: {tally.kills} kills, {tally.inside_a_save} inside a save, {tally.before_a_step} "
            f"before a first step; at most {tally.most_lost} steps lost, saved after every {SAVE_EVERY}"
        )
    return report


def torture(folder: Path, kills: int, moments: random.Random) -> Tally:
    """Kill one run so many times, then let it end in good order."""
    tally = Tally()
    for attempt in range(kills + 1):
        program = Program(folder)
        last = attempt == kills
        if not last and moments.random() < 0.25:
            time.sleep(moments.random() * START)
        else:
            tally.problem = program.wait_for_a_step()
            time.sleep(moments.random() * 0.4)
        code = program.end(signal.SIGTERM if last else signal.SIGKILL)
        lost = program.has_lost()
        tally.most_lost = max(tally.most_lost, lost)
        if last:
            ended = f"SIGTERM ended it with {code}: {program.said.read_text()[-500:]}"
            tally.problem = tally.problem or (ended if code != 128 + signal.SIGTERM else "")
        else:
            tally.kills += 1
            tally.inside_a_save += bool(list((folder / "run/checkpoints").glob(".tmp-*")))
            tally.before_a_step += not program.has_trained()
        if lost > SAVE_EVERY:
            tally.problem = tally.problem or f"{lost} steps were lost, saved after every {SAVE_EVERY}"
        if tally.problem:
            tally.problem = f"start {attempt + 1}: {tally.problem}"
            break
    return tally


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

"""Several processes in one run directory: one trains, the others are refused, or only read.

Trainers: in a round two to four processes that have loaded everything are let go at the same moment. One trains; each
other exits with 2 and names the winner's pid and start time. Then the winner is halted (SIGSTOP), one more is refused,
and not a byte has changed. Then it is killed. Its lock file stays, by turns as it is, empty, full of bytes that mean
nothing, or as a process of another host, or a living one of this host, would have left it: the next round must start at
once, go on from the last checkpoint, and name its own winner.

Readers: while a run saves after every step and keeps one checkpoint beside the best, `checkpoint verify`, `ls` and
`diff`, `evaluate` and `generate` succeed every time and find nothing damaged.

Locks are flock(2)'s. The kernel holds them, not the file, so what stands in a file blocks nobody. Between hosts they
hold where the file system carries them over (NFS does, on Linux). Where it has none the file is a note, and two
processes are not kept apart.
"""

import contextlib
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlx_training import cli
from mlx_training.checkpoint import CheckpointStore
from mlx_training.data.questions import QuestionDataset
from mlx_training.data.rows import write_rows
from mlx_training.run_lock import LOCK
from tools.make_llama import make_llama
from tools.trials.kills import COMMON, DECODER, PATIENCE, wrong_at_the_end
from tools.trials.report import REPOSITORY, Report
from tools.trials.soak import TIMESERIES, TINY_LLAMA

READ = """\
experiment: {name: torture}
device: cpu
evaluation: {every_steps: 3, max_rows: 2, max_new_tokens: 2}
checkpoint: {every_steps: 1, keep: 1}
logging: {every_steps: 1}
"""
REFUSED = 2  # exit code
READINGS = 5  # of each reader a round
# Loads what it needs to come to the lock, says so, and goes on when its standard input is closed.
STARTER = """\
import os, sys
from mlx_training import cli, trainer
os.write(int(sys.argv[1]), b".")
os.close(int(sys.argv[1]))
sys.stdin.read()
sys.exit(cli.main(sys.argv[2:]))
"""
LEFT: dict[str, Callable[[random.Random], bytes | None]] = {  # what a killed process may leave in its lock file
    "as it is": lambda _: None,
    "empty": lambda _: b"",
    "noise": lambda chance: chance.randbytes(200),
    "another host's": lambda _: note(1, "elsewhere"),
    "a living process'": lambda _: note(os.getpid(), socket.gethostname()),
}


def note(pid: int, host: str) -> bytes:
    """What a process writes into the lock file."""
    return json.dumps({"pid": pid, "host": host, "started": "2001-02-03 04:05:06"}).encode()


class Problem(Exception):
    """What should not have happened."""


class Program:
    """`mlx-training` in a process of its own; what it says goes to a file."""

    def __init__(self, said: Path, words: Sequence[str], gate: int, ready: int) -> None:
        self.said = said
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", STARTER, str(ready), *words]
        with said.open("w") as out:
            self.process = subprocess.Popen(
                command, stdin=gate, stdout=out, stderr=out, env=environment, pass_fds=[ready]
            )

    def has_trained(self) -> bool:
        """Whether it has logged a step."""
        return "  loss " in self.said.read_text()

    def end(self, number: signal.Signals) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=PATIENCE)


def start_together(count: int, words: Sequence[str], folder: Path) -> list[Program]:
    """So many processes, at the same moment."""
    (gate, opener), (heard, ready) = os.pipe(), os.pipe()
    programs = [Program(folder / f"said-{i}.txt", words, gate, ready) for i in range(count)]
    os.close(ready)
    here = b""
    while len(here) < count and (more := os.read(heard, count)):
        here += more
    for descriptor in (gate, heard, opener):
        os.close(descriptor)
    return programs


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Raise Problem when something does not come true in time."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise Problem(f"not within {PATIENCE} s: {what}")
        time.sleep(0.01)


def run(size: int, backends: Sequence[str], seed: int, folder: Path) -> Report:
    """`size` rounds of trainers, the backends by turns; then so many rounds of readers in all."""
    report = Report()
    for trial in (trainers, readers):
        (folder / trial.__name__).mkdir()
        try:
            report.lines += trial(size, backends, seed, folder / trial.__name__)
        except Problem as problem:
            report.failures.append(f"{trial.__name__}: {problem}")
    return report


def trainers(rounds: int, backends: Sequence[str], seed: int, folder: Path) -> list[str]:
    """Processes that compete for one directory; what was done."""
    chance, run, config = random.Random(seed), folder / "run", folder / "config.yaml"
    config.write_text(f"{COMMON}{DECODER}output_dir: {run}\ncheckpoint: {{every_steps: 2, keep: 2}}\n")
    starts, left = 0, "nothing"
    for number in range(rounds):
        words = ["train", str(config), "--resume", "auto", "--backend", backends[number % len(backends)]]
        programs = start_together(2 + number % 3, words, folder)
        starts += len(programs)
        try:
            winner = the_only_one(programs, run)
            if number and "resumed from step" not in winner.said.read_text():
                raise Problem(f"it did not go on: {winner.said.read_text()}")
            refuse_one_more(winner, words, run)
            if number == rounds - 1:
                winner.process.send_signal(signal.SIGCONT)
                if winner.end(signal.SIGTERM) != 128 + signal.SIGTERM:
                    raise Problem(f"SIGTERM did not end it: {winner.said.read_text()}")
        except Problem as problem:
            raise Problem(f"round {number + 1}, after a lock file left {left}: {problem}") from None
        finally:
            for program in programs:
                program.process.kill()
                program.process.wait()
        left = list(LEFT)[number % len(LEFT)]
        if number < rounds - 1 and (content := LEFT[left](chance)) is not None:
            (run / LOCK).write_bytes(content)
    if problems := wrong_at_the_end(run):
        raise Problem("; ".join(problems))
    return [f"{rounds} rounds, {starts} processes: {rounds} trained, {starts - rounds} and {rounds} more were refused"]


def the_only_one(programs: Sequence[Program], run: Path) -> Program:
    """The process that trains, once the others have been refused, each in its name."""
    wait_until(
        lambda: sum(program.process.poll() is None for program in programs) <= 1, "all but one of them are refused"
    )
    said = "\n".join(program.said.read_text() for program in programs)
    winners = [program for program in programs if program.process.poll() is None]
    if not winners:
        raise Problem(f"none of them trains: {said}")
    (winner,) = winners
    wait_until(
        lambda: (winner.has_trained() and (run / "checkpoints/latest").exists()) or winner.process.poll() is not None,
        "the winner saves something",
    )
    if winner.process.poll() is not None:
        raise Problem(f"the winner ended: {winner.said.read_text()}")
    holder = json.loads((run / LOCK).read_text())
    expected = f"process {winner.process.pid} on {socket.gethostname()}, since {holder['started']}"
    for program in programs:
        text = program.said.read_text()
        if program is not winner and (program.process.returncode != REFUSED or expected not in text):
            raise Problem(f"exit code {program.process.returncode}, {expected!r} expected: {text}")
    return winner


def refuse_one_more(winner: Program, words: Sequence[str], run: Path) -> None:
    """Halt the winner and start once more: refused, and nothing changes."""
    winner.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, winner.process.pid, os.WSTOPPED | os.WNOWAIT)
    before = contents(run)
    code, _, said = command(words)
    if code != REFUSED or f"process {winner.process.pid} on" not in said:
        raise Problem(f"one more was not refused: exit code {code}: {said}")
    if contents(run) != before:
        changed = {path for path, _ in set(before.items()) ^ set(contents(run).items())}
        raise Problem(f"the refused process changed {', '.join(map(str, changed))}")


def contents(run: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file and directory of a run: when it was changed, and its bytes."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in [run, *run.rglob("*")]
    }


def readers(rounds: int, backends: Sequence[str], seed: int, folder: Path) -> list[str]:
    """Commands that read a run while it trains; what was done."""
    make_llama(TINY_LLAMA, folder / "llm", group_size=32, seed=seed)
    write_rows(folder / "rows.jsonl", QuestionDataset(seed, "train", 24))
    write_rows(folder / "two.jsonl", QuestionDataset(seed, "test", 2))
    lines = []
    for backend in backends:
        run, config = folder / backend, folder / f"{backend}.yaml"
        config.write_text((READ + TIMESERIES).replace("FOLDER", str(folder)) + f"output_dir: {run}\n")
        (program,) = start_together(
            1, ["train", str(config), "training.max_steps=1000000", "--backend", backend], folder
        )
        try:
            wait_until(lambda run=run: (run / "checkpoints/best").exists(), f"{program.said}: something is saved")  # type: ignore[misc]
            readings = [reading for _ in range(-(-rounds // len(backends))) for reading in read_everything(run)]
            code = program.end(signal.SIGTERM)
        finally:
            program.process.kill()
            program.process.wait()
        if problems := Counter(problem for _, problem in readings if problem):
            raise Problem(f"{backend}: " + "; ".join(f"{count} times {what}" for what, count in problems.items()))
        if code != 128 + signal.SIGTERM or (wrong := wrong_at_the_end(run)):
            raise Problem(f"{backend}: it ended with {code}: {wrong or program.said.read_text()}")
        counts = Counter(name for name, _ in readings)
        saves = CheckpointStore(run).load().step
        read = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines.append(f"{backend}: read while {saves} checkpoints were saved: {read}")
    return lines


def read_everything(run: Path) -> Iterator[tuple[str, str]]:
    """Each reader, and what it did wrong."""
    words = {"verify": ["checkpoint", "verify", str(run)], "ls": ["checkpoint", "ls", str(run)]}
    words |= {"diff": ["checkpoint", "diff", str(run), str(run)], "evaluate": ["evaluate", str(run)]}
    words["generate"] = ["generate", str(run), "--rows", str(run.parent / "two.jsonl")]
    for name in [*["verify", "ls", "diff"] * READINGS, "evaluate", "generate"]:
        code, out, said = command([*words[name], "--json"])
        result = json.loads(out) if code == 0 else {}
        read = {
            "verify": "checkpoints",
            "ls": "checkpoints",
            "diff": "parameters",
            "evaluate": "rows",
            "generate": "rows",
        }
        whole = name != "ls" or all(entry["complete"] for entry in result.get("checkpoints", ()))
        yield name, "" if result.get(read[name]) and whole else f"{name}: exit code {code}: {out or said}"


def command(words: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, run in this process; a traceback is exit code -1."""
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            code = cli.main([str(word) for word in words])
        except Exception:  # noqa: BLE001  whatever it is, the trial reports it
            code = -1
            said.write(traceback.format_exc())
    return code, out.getvalue(), said.getvalue()

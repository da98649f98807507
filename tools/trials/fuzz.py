"""Spoilt configurations, overrides, rows, checkpoints and LMs: one message and a documented exit code for each.

hypothesis spoils sound material (`fuzz_material`, `fuzz_mutations`, `fuzz_archives`) into cases (`fuzz_cases`); a
process of its own runs a thousand of them with the real commands, under guard (`fuzz_worker`). Demanded of each: no
traceback, exit code 0 to 4 with a message where it is not 0, at most five seconds (of the processor, when it is tried
again), no file written, moved or removed outside the run directory, but for temporary files and the cache of `plan`, no
input changed, nothing unpickled, no program started but git and Python, and 4 GiB beside what the frameworks hold. A
case is run again, alone, by the worker's `--seed`, `--cases` (its number + 1) and `--first` (its number).
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.trials.report import REPOSITORY, Report

CHUNK = 1000  # cases a process
PATIENCE = 45  # seconds without a word, after which a process is killed
START = 400  # seconds that it may take to begin: MLX compiles its kernels
Result = dict[str, Any]


def run(size: int, backends: Sequence[str], seed: int, folder: Path) -> Report:
    """`size` cases, a thousand a process, the backends by turns."""
    report = Report()
    results: list[Result] = []
    for chunk, start in enumerate(range(0, size, CHUNK)):
        backend = backends[chunk % len(backends)]
        number = min(CHUNK, size - start)
        for result in _run_chunk(folder / str(chunk), seed + chunk, number, backend, report):
            results.append(result)
            if result["problem"]:
                again = f"--seed {seed + chunk} --cases {result['number'] + 1} --first {result['number']}"
                text = f"{result['kind']}: {result['problem']}\n    ({backend} {again}) {result['input']}"
                report.failures.append(text)
    report.lines += _told(results)
    return report


def _run_chunk(folder: Path, seed: int, cases: int, backend: str, report: Report) -> Iterator[Result]:
    """What came of each case; a process that dies or falls silent loses one case and is followed by another."""
    first = 0
    while first < cases:
        here = folder / str(first)
        last = None
        for result in _records(here, seed, cases, first, backend):
            last = result["number"]
            yield result
        if last is None:
            report.failures.append(
                f"the process for seed {seed} did not begin: {(here / 'said.txt').read_text()[-500:]}"
            )
            return
        first = last + 1
        if first < cases and _ended_well(here):  # hypothesis ran out of different cases
            return


def _records(folder: Path, seed: int, cases: int, first: int, backend: str) -> Iterator[Result]:
    """The results of one process, the last of them that it died, where it did."""
    folder.mkdir(parents=True)
    scratch = folder.parents[1] / "scratch"  # shared, so that MLX compiles its kernels once
    words = [
        folder / "place",
        "--scratch",
        scratch,
        "--seed",
        seed,
        "--cases",
        cases,
        "--first",
        first,
        "--backend",
        backend,
    ]
    command = [sys.executable, "-m", "tools.trials.fuzz_worker", *map(str, words)]
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
        )
    begun: Result = {}
    try:
        for record in _lines(process):
            if "input" in record:
                begun = record
            else:
                yield begun | record
                begun = {}
        code = process.wait()
    finally:
        process.kill()
        process.wait()
    (folder / "code.txt").write_text(str(code))
    if begun:
        death = f"the process ended with {code}: {(folder / 'said.txt').read_text()[-500:]}"
        yield begun | {"problem": death, "code": None, "seconds": 0.0, "length": 0}


def _lines(process: "subprocess.Popen[str]") -> Iterator[Result]:
    """Records as they are written; a process that is silent for too long is killed."""
    assert process.stdout is not None
    patience = START
    while True:
        timer = threading.Timer(patience, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        patience = PATIENCE
        yield json.loads(line)


def _ended_well(folder: Path) -> bool:
    return (folder / "code.txt").read_text() == "0"


def _told(results: Sequence[Result]) -> list[str]:
    """Counts by kind and exit code, and the extremes."""
    if not results:
        return []
    kinds = {result["kind"]: Counter[str]() for result in sorted(results, key=lambda result: result["kind"])}
    for result in results:
        kinds[result["kind"]][str(result["code"])] += 1
    lines = []
    for kind, codes in kinds.items():
        refused = ", ".join(f"{count} exit {code}" for code, count in sorted(codes.items()) if code != "0")
        lines.append(f"{kind:28} {codes.total():5}: {codes['0']} accepted{', ' if refused else ''}{refused}")
    every = Counter(str(result["code"]) for result in results)
    ends = ", ".join(f"{count} exit {code}" for code, count in sorted(every.items()))
    violations = sum(bool(result["problem"]) for result in results)
    slowest = max(results, key=lambda result: result["seconds"])
    longest = max(result["length"] for result in results)
    again = sum(bool(result.get("again")) for result in results)
    command = re.sub(r"\s+", " ", slowest["input"].split("\n")[0])[:120]
    lines.append(f"{len(results)} cases: {ends}; {violations} violations")
    lines.append(f"slowest {slowest['seconds']:.1f} s ({slowest['kind']}: {command}); {again} tried again for time")
    return [*lines, f"longest message {longest:,} characters"]

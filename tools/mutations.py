"""Plant known faults one at a time and see that a test turns red.

    python tools/mutations.py [--only NAME ...] [--json]

The faults and the test that is there to catch each are in `mutations.toml`. Every fault is written into a temporary
copy of the checkout, and its test runs there. Exit code 1 if a fault survives, cannot be planted any more, or breaks
the code in a way that says nothing about the test (a failed import is no catch). About seven minutes of CPU time.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".toml")
COPIED = ("mlx_training", "torch_backend", "tests", "pyproject.toml")
ASSERTION = r"assert |AssertionError|Failed: "  # how pytest reports an assertion, NumPy's, and pytest.raises'
TIMEOUT = 300  # seconds for one fault


class Edit(NamedTuple):
    """One textual replacement; `old` must occur exactly once in `file`."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Fault:
    """A mistake somebody could make, and the test that must notice."""

    name: str
    fault: str  # what it stands for
    test: str  # pytest node id
    edits: tuple[Edit, ...]
    error: str = ASSERTION  # pattern of the expected failure, where it is not an assertion


@dataclass(frozen=True)
class Result:
    """What became of a fault: "caught", "survived", or "broken" (the run says nothing about the test).

    Of the run without a fault: "green" or "broken".
    """

    name: str
    status: str
    detail: str  # the test that failed, or the reason
    seconds: float = 0.0


class BrokenFault(Exception):
    """A fault that cannot be planted: the code has moved on, and the table must follow."""


def load_faults() -> dict[str, Fault]:
    """The table, by name; an entry has `file, old, new` or a list of `edits` with these keys."""
    faults = {}
    for name, entry in tomllib.loads(TABLE.read_text(encoding="utf-8")).items():
        edits = entry.pop("edits", None) or [{key: entry.pop(key) for key in Edit._fields}]
        faults[name] = Fault(name=name, edits=tuple(Edit(**edit) for edit in edits), **entry)
    return faults


def mutate(fault: Fault, root: Path) -> dict[Path, str]:
    """The files of `root` as the fault has them. Raises BrokenFault when an old text does not occur exactly once."""
    texts: dict[Path, str] = {}
    for file, old, new in fault.edits:
        path = root / file
        text = texts.get(path) or path.read_text(encoding="utf-8")
        if (count := text.count(old)) != 1:
            raise BrokenFault(f"{fault.name}: found {count} times in {file}, expected once; update the table: {old!r}")
        texts[path] = text.replace(old, new)
    return texts


@contextmanager
def planted(fault: Fault, root: Path) -> Iterator[None]:
    """`root` holds the fault inside the block, and is as before afterwards."""
    mutated = mutate(fault, root)
    originals = {path: path.read_text(encoding="utf-8") for path in mutated}
    try:
        for path, text in mutated.items():
            path.write_text(text, encoding="utf-8")
        yield
    finally:
        for path, text in originals.items():
            path.write_text(text, encoding="utf-8")


def copy_checkout(target: Path) -> Path:
    """A copy of the code and its tests."""
    target.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target / name)
    return target


def run_tests(root: Path, tests: Iterable[str]) -> tuple[int, str, list[ElementTree.Element]]:
    """Run tests in a copy up to the first failure: (pytest's exit code, output, its report on each test)."""
    report = root / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    # No bytecode: a file that changes twice within a second would be taken from the cache.
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **one_thread}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    return done.returncode, done.stdout + done.stderr, cases


def check_baseline(root: Path, faults: Iterable[Fault]) -> Result:
    """Without a fault every test of the table passes; a skipped one (a backend is absent) could catch nothing."""
    start = time.perf_counter()
    code, output, cases = run_tests(root, sorted({fault.test for fault in faults}))
    skipped = [node_id(case) for case in cases if case.find("skipped") is not None]
    problem = output[-3000:] if code else f"skipped: {', '.join(skipped)}" if skipped else ""
    return Result("(no fault)", "broken" if problem else "green", problem, time.perf_counter() - start)


def try_fault(root: Path, fault: Fault) -> Result:
    """Plant one fault in a copy and run its test."""
    start = time.perf_counter()

    def result(status: str, detail: str) -> Result:
        return Result(fault.name, status, detail, time.perf_counter() - start)

    try:
        with planted(fault, root):
            code, output, cases = run_tests(root, [fault.test])
    except (BrokenFault, subprocess.TimeoutExpired) as error:
        return result("broken", str(error))
    if code == 0:
        return result("survived", f"green: {fault.test}")
    failures = [(case, failure) for case in cases if (failure := case.find("failure")) is not None]
    if code != 1 or not failures:
        return result("broken", f"pytest exit code {code}: {output[-1500:]}")
    case, failure = failures[0]
    message = failure.get("message", "")
    if not re.match(fault.error, message):
        return result("broken", f"{node_id(case)} failed, but not as expected: {message[:500]}")
    return result("caught", node_id(case))


def node_id(case: ElementTree.Element) -> str:
    """tests/parity/test_parity.py::test_trajectory[decoder-untied]"""
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def run(faults: Iterable[Fault], show: bool = True) -> list[Result]:
    """The baseline, then every fault; prints a line for each as it ends."""
    faults = list(faults)
    results = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = copy_checkout(Path(folder) / "checkout")
        for index in range(-1, len(faults)):
            results.append(try_fault(root, faults[index]) if index >= 0 else check_baseline(root, faults))
            if show:
                line = results[-1]
                print(f"{line.status:9}{line.seconds:5.1f} s  {line.name:30}  {line.detail}", flush=True)
            if index < 0 and results[-1].status == "broken":
                break
    return results


def main() -> None:
    faults = load_faults()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=faults, metavar="NAME", help="these faults (default: all)")
    parser.add_argument("--json", action="store_true", help="print the results as one object, nothing else")
    given = parser.parse_args()
    baseline, *results = run([faults[name] for name in given.only or faults], show=not given.json)
    if given.json:
        print(json.dumps({"baseline": asdict(baseline), "faults": [asdict(result) for result in results]}))
    else:
        counts = {status: sum(r.status == status for r in results) for status in ("caught", "survived", "broken")}
        seconds = baseline.seconds + sum(result.seconds for result in results)
        print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()) + f" in {seconds:.0f} s")
    sys.exit(not results or any(result.status != "caught" for result in results))


if __name__ == "__main__":
    main()
